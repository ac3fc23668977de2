"""How images are prepared for the models, in the form that timm keeps it."""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def data_config(first_conv: str, classifier: str = "head") -> dict[str, Any]:
    """timm's ``pretrained_cfg``, with the published preparation of ImageNet's images.

    Args:
        first_conv: Name of the convolution that reads the image.
        classifier: Name of the last layer.
    """
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
        "license": "apache-2.0",
    }
