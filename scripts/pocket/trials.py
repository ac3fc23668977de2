"""Other conditions than the model was trained for: sizes, samplers, types, less attention."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from agentsd import Keys, Schedule, load_pipeline, patched
from agentsd.benchmark.variants import floor
from agentsd.models.adapters import configure_pipeline
from agentsd.models.loading import POCKET_GUIDANCE
from agentsd.models.options import PipelineOptions

from .settings import Settings

STEPS = 25


@dataclass(frozen=True)
class Trial:
    """How pictures are made.

    Args:
        size: height and width in pixels, multiples of 32.
        scheduler: as `agentsd generate --scheduler` takes it; None for the model's own, DDIM.
        dtype: "float32" or "bfloat16".
        keys: of each square of this side, one key of the top self-attention is kept, the same in
            every step; 1 keeps all, 0 has that attention give zeros.
        steps: of denoising.
        guidance: scale of classifier-free guidance.
    """

    size: tuple[int, int] = (256, 256)
    scheduler: str | None = None
    dtype: str = "float32"
    keys: int = 1
    steps: int = STEPS
    guidance: float = POCKET_GUIDANCE

    def load(self, settings: Settings) -> DiffusionPipeline:
        """The exported pipeline, set up for this."""
        pipe = load_pipeline(settings.out, device=settings.device, dtype=self.dtype)
        pipe.set_progress_bar_config(disable=True)
        return configure_pipeline(pipe, PipelineOptions(scheduler=self.scheduler))

    def attention(self, pipe: DiffusionPipeline) -> AbstractContextManager[Any]:
        """A context in which the pipeline has as much attention as asked for."""
        if self.keys == 0:
            return floor(pipe.unet)
        if self.keys == 1:
            return nullcontext()
        phase = Keys(sx=self.keys, sy=self.keys, select="grid", min_tokens=0)
        return patched(pipe, Schedule(phases=[phase]))


TRIALS = {
    "48×48 latents": Trial(size=(192, 192)),
    "96×96 latents": Trial(size=(384, 384)),
    "48×80 latents": Trial(size=(192, 320)),
    "PNDM": Trial(scheduler="PNDM"),
    "Euler": Trial(scheduler="Euler"),
    "DPM++ 2M": Trial(scheduler="DPM++ 2M"),
    "bfloat16": Trial(dtype="bfloat16"),
    "guidance 7.5": Trial(guidance=7.5),
    "a sixteenth of the top keys": Trial(keys=4),
    "no top self-attention": Trial(keys=0),
}


def paint(settings: Settings, captions: list[str], trial: Trial) -> list[Image.Image]:
    """One image a caption from the exported pipeline; the seed of image i is i.

    On a CPU several threads work, each with a pipeline of its own and single-threaded within.
    """
    batch, threads = (64, 1) if settings.gpu else (1, settings.shards)
    loaded = trial.load(settings)
    pipes = [loaded, *(deepcopy(loaded) for _ in range(threads - 1))]
    mine = threading.local()

    def begin() -> None:
        torch.set_num_threads(1)
        mine.pipe = pipes.pop()

    def some(first: int) -> list[Image.Image]:
        texts = captions[first : first + batch]
        generators = [torch.Generator().manual_seed(first + i) for i in range(len(texts))]
        with trial.attention(mine.pipe):
            return mine.pipe(
                texts, num_inference_steps=trial.steps, guidance_scale=trial.guidance,
                generator=generators, height=trial.size[0], width=trial.size[1],
            ).images  # fmt: skip

    with ThreadPoolExecutor(threads, initializer=begin) as pool:
        firsts = range(0, len(captions), batch)
        return [image for images in pool.map(some, firsts) for image in images]
