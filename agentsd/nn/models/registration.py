"""Registration with timm: the preprocessing of images, and how a model is built."""

from collections.abc import Mapping
from typing import Any, TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import nn

from ..published import convert_published

Model = TypeVar("Model", bound=nn.Module)

PYRAMID = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
"""The feature configuration of a model with four stages of different resolution."""


def data_config(first_conv: str, classifier: str = "head") -> dict[str, Any]:
    """timm's ``pretrained_cfg``, with the published preprocessing of ImageNet.

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


def create(
    kind: type[Model],
    variant: str,
    pretrained: bool,
    features: Mapping[str, Any] = PYRAMID,
    **options: Any,
) -> Model:
    """Build a model as timm does, converting published weights if it loads any.

    Args:
        kind: Its class.
        variant: The name that it is registered under.
        pretrained: Whether to load weights.
        features: timm's ``feature_cfg``, for ``features_only``.
        options: Of the class and of timm.
    """
    model: Model = build_model_with_cfg(
        kind,
        variant,
        pretrained,
        pretrained_filter_fn=convert_published,
        feature_cfg=dict(features),
        **options,
    )
    return model
