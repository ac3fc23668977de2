"""CLIP: embeddings of images and of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import EvaluationError
from ...models.quiet import quiet_loading
from ...settings import short_repr
from .cache import Floats
from .extractor import Extractor


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
