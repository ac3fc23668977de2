"""Embed prompts, and warn about the parts of them that a model ignores."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from ..image_settings import ImageSettings
from ..settings import short_repr

WHOLE_WORDS = 4096
"""Size of a vocabulary; a smaller one, such as the pocket model's, has only a few whole words."""


class PromptEncoder:
    """Embeds each prompt once and separately, so that it does not depend on its batch.

    Args:
        pipe: A text-to-image pipeline. One without a diffusers UNet, whose embeddings have other
            names, receives the texts instead.
        keep: How many embeddings to cache.
    """

    def __init__(self, pipe: DiffusionPipeline, keep: int = 64) -> None:
        self._pipe = pipe
        self._embeds = isinstance(getattr(pipe, "unet", None), UNet2DConditionModel)
        self._device = pipe._execution_device  # slow: it visits every module
        self._encoded = lru_cache(maxsize=keep)(self._encode)

    def __call__(self, batch: Sequence[ImageSettings]) -> dict[str, Any]:
        """The arguments of the pipeline's call for the prompts of a batch."""
        if not self._embeds:
            return {name: [getattr(s, name) for s in batch] for name in TEXTS}
        parts = [
            self._encoded(
                s.prompt, s.negative_prompt, s.guidance_scale > 1 and is_guided(self._pipe)
            )
            for s in batch
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _encode(self, prompt: str, negative: str, guided: bool) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            embeddings = self._pipe.encode_prompt(
                prompt=prompt,
                negative_prompt=negative or None,
                device=self._device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
            )
        # Stable Diffusion has the first two, Stable Diffusion XL all four.
        return {
            n: value for n, value in zip(_EMBEDS, embeddings, strict=False) if value is not None
        }


TEXTS = ("prompt", "negative_prompt")
_EMBEDS = (
    *("prompt_embeds", "negative_prompt_embeds"),
    *("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
)


def warnings_for(pipe: DiffusionPipeline, settings: ImageSettings) -> list[str]:
    """Warnings about prompts that the model ignores: their ends, unknown words, or all."""
    messages = _missed(pipe, "prompt", settings.prompt)
    if not settings.negative_prompt:
        return messages
    if settings.guidance_scale <= 1:
        scale = f"{settings.guidance_scale:g}"
        return [
            *messages,
            f"the negative prompt is not used: guidance_scale {scale} is not above 1",
        ]
    if not is_guided(pipe):
        return [*messages, "the negative prompt is not used: guidance is built into the model"]
    return messages + _missed(pipe, "negative prompt", settings.negative_prompt)


def _missed(pipe: DiffusionPipeline, name: str, text: str) -> list[str]:
    # SDXL's refiner only has the second tokenizer.
    tokenizer = getattr(pipe, "tokenizer", None) or getattr(pipe, "tokenizer_2", None)
    if tokenizer is None:
        return []
    messages = []
    limit = tokenizer.model_max_length
    ids = tokenizer(text, truncation=False).input_ids
    if len(ids) > limit:
        lost = tokenizer.decode(ids[limit - 1 : -1])
        tokens = f"{len(ids) - 2} tokens, at most {limit - 2}"
        messages.append(f"{name} too long ({tokens}): ignored {short_repr(lost)}")
    if len(tokenizer) < WHOLE_WORDS:
        vocabulary = tokenizer.get_vocab()
        words = re.findall(r"\w+", text.lower())
        unknown = list(dict.fromkeys(w for w in words if f"{w}</w>" not in vocabulary))
        if unknown:
            of = "" if name == "prompt" else f" of the {name}"
            more = ", …" if len(unknown) > 10 else ""
            messages.append(
                f"the model does not know the words{of}: {', '.join(unknown[:10])}{more}"
            )
    return messages


def is_guided(pipe: DiffusionPipeline) -> bool:
    """Whether guidance runs the UNet on the negative prompt; otherwise the UNet takes the scale."""
    unet = getattr(pipe, "unet", None)
    return getattr(getattr(unet, "config", None), "time_cond_proj_dim", None) is None
