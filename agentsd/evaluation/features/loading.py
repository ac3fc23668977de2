"""Load an extractor by its name on the command line or in a protocol."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import EvaluationError
from ...models.loading import POCKET
from ...settings import short_repr
from . import inception
from .clip import Clip
from .extractor import Extractor


def load_extractor(name: str, device: str | torch.device = "cpu") -> Extractor:
    """Load an extractor by name.

    Args:
        name: ``inception`` (weights from the cache of torch.hub) or ``inception:FILE``;
            ``clip:MODEL``, a folder or a hub id; ``pocket``, the CLIP of the pocket model.
        device: Where to run it.

    Raises:
        EvaluationError: If the name is unknown, or the weights are missing or wrong.
    """
    kind, _, rest = name.partition(":")
    if name == "pocket":
        return Clip(POCKET / "clip", device)
    if kind == "clip" and rest:
        return Clip(rest, device)
    if kind == "inception":
        network = inception.load(inception.weights_file(Path(rest) if rest else None))

        def embed(images: list[Image.Image], device: torch.device) -> Tensor:
            pixels = np.stack([np.asarray(image) for image in images])
            features: Tensor = network(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device))
            return features

        return Extractor(network, "inception", "pytorch-fid", embed, device)
    raise EvaluationError(
        f"unknown features {short_repr(name)}: choose inception, inception:FILE, clip:MODEL or "
        "pocket"
    )


def load_clip(name: str, device: str | torch.device = "cpu") -> Clip:
    """Load an extractor that has to be a CLIP.

    Args:
        name: ``clip:MODEL`` or ``pocket``, as for :func:`load_extractor`.
        device: Where to run it.

    Raises:
        EvaluationError: As for :func:`load_extractor`, or if it is not a CLIP.
    """
    if name.startswith("inception"):
        raise EvaluationError(f"{name} cannot embed prompts; give clip:MODEL or pocket")
    extractor = load_extractor(name, device)
    assert isinstance(extractor, Clip)
    return extractor
