"""What every stage of a run shares."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

EVALUATION_SEED = 10**6  # added to the run's seed: evaluation never sees a training sample


@dataclass(frozen=True)
class Settings:
    """One run of the training.

    Args:
        out: folder for the exported model.
        work: folder for checkpoints, logs and sample grids.
        device: a CPU or a GPU.
        seed: start of every random stream.
        smoke: a few steps at the smallest sizes, to try the machinery.
        steps: where each stage's training ends at the latest; 0 leaves it to the time.
        save_every: seconds between two checkpoints.
        resume: take up checkpoints found in `work`.
        workers: processes that draw pictures ahead; 0 on a CPU.
        shards: threads that split a step of the denoiser on a CPU.
        preview_every: samples between two previews of the denoiser.
    """

    out: Path
    work: Path
    device: torch.device
    seed: int = 0
    smoke: bool = False
    steps: int = 0
    save_every: float = 180.0
    resume: bool = True
    workers: int = 0
    shards: int = 2
    preview_every: int = 20_000

    @property
    def gpu(self) -> bool:
        """Whether the run is on a GPU."""
        return self.device.type == "cuda"

    @property
    def last_step(self) -> float:
        """The step at which a stage's training ends even with time left."""
        return self.steps or (3 if self.smoke else math.inf)

    def prepare(self) -> None:
        """Seed every generator and make the work folder."""
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)
        if self.gpu:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        self.work.mkdir(parents=True, exist_ok=True)
