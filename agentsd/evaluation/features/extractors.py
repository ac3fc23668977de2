"""Networks that turn images into features, CLIP among them, and how they are loaded by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...errors import EvaluationError
from ...models.loading import POCKET
from ...models.quiet import quiet_loading
from ...settings import short_repr
from . import inception
from .storage import Floats


class Extractor:
    """A network that turns images into features.

    Args:
        network: Holds the weights; moved to ``device``.
        kind: Its name in the cache.
        settings: Everything besides the weights that the features depend on, as text.
        embed: Maps RGB images of the same size and a device to features ``[B, D]``.
        device: Where to run it.
    """

    def __init__(
        self,
        network: nn.Module,
        kind: str,
        settings: str,
        embed: Callable[[list[Image.Image], torch.device], Tensor],
        device: str | torch.device = "cpu",
    ):
        self.device = torch.device(device)
        self.network = network.to(self.device)
        self.embed = embed
        self.identity = f"{kind}-{_fingerprint(network, settings)}"

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> Floats:
        """Compute the features ``[B, D]`` of RGB images of the same size."""
        return np.asarray(self.embed(images, self.device).float().cpu().numpy())


def _fingerprint(network: nn.Module, settings: str) -> str:
    """Hash the settings and a sample of every weight, so that each revision has its own cache."""
    sha = hashlib.sha256(settings.encode())
    for name, tensor in sorted(network.state_dict().items()):
        flat = tensor.flatten()
        sample = flat[:: max(1, len(flat) // 64)].double().cpu()
        sha.update(f"{name}{tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return sha.hexdigest()[:16]


class Clip(Extractor):
    """A CLIP model of transformers, which embeds images and prompts.

    Args:
        model: A folder or a hub id.
        device: Where to run it.

    Raises:
        EvaluationError: If it cannot be loaded.
    """

    @quiet_loading()
    def __init__(self, model: str | Path, device: str | torch.device = "cpu"):
        from transformers import CLIPModel, CLIPProcessor

        try:
            network = CLIPModel.from_pretrained(model).float().eval()
            self.processor = CLIPProcessor.from_pretrained(model)
        except Exception as error:  # transformers and the hub raise errors of many types
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise EvaluationError(
                f"no CLIP {short_repr(str(model))}: give a folder or a hub id "
                f"({short_repr(reason)})"
            ) from error
        self.model: Any = network
        settings = self.processor.image_processor.to_json_string()
        super().__init__(network, "clip", settings, self._embed_images, device)

    def _embed_images(self, images: list[Image.Image], device: torch.device) -> Tensor:
        inputs = self.processor.image_processor(images=images, return_tensors="pt")
        pixels = inputs["pixel_values"].to(device)
        embeddings: Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
        return embeddings

    @torch.no_grad()
    def embed_texts(self, prompts: list[str]) -> tuple[Floats, list[int]]:
        """Embed prompts.

        Returns:
            Features ``[N, D]``, and the indices of the prompts that were truncated because they are
            longer than the model's context.
        """
        tokenizer: Any = self.processor.tokenizer
        limit: int = self.model.config.text_config.max_position_embeddings
        lengths = [len(tokenizer(prompt).input_ids) for prompt in prompts]
        batches = []
        for start in range(0, len(prompts), 64):
            inputs = tokenizer(
                prompts[start : start + 64],
                padding=True,
                truncation=True,
                max_length=limit,
                return_tensors="pt",
            ).to(self.device)
            embeddings = self.model.get_text_features(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).pooler_output
            batches.append(embeddings.float().cpu().numpy())
        return np.concatenate(batches), [i for i, length in enumerate(lengths) if length > limit]


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
    """Load a CLIP by name.

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
