"""How far a denoiser in training has come: grids of samples, and what the scorer says of them."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPModel

from agentsd.pipelines import POCKET_GUIDANCE

from .checkpoints import Clock
from .export import judging_processor
from .progress import append, plot_logs, save_grid
from .scenes import caption
from .scores import Judge, unseen
from .settings import Settings
from .tokenizer import build_tokenizer
from .unet import Trainer
from .vae import decode

STEPS = 12
COUNTS = {2: 64, 1: 16, 0: 4}  # level → samples on a CPU; the same few seconds each


class Preview:
    """Writes to the work folder: ``level-<n>.jpg`` a level, ``scores.csv``, and a plot of it.

    Args:
        settings: of the run.
        clip: the judge.
        vae: turns samples into pictures.
    """

    def __init__(self, settings: Settings, clip: CLIPModel, vae: AutoencoderKL):
        self.settings, self.vae = settings, vae.to(settings.device)
        tokenizer = build_tokenizer(settings.work / "tokenizer")
        self.judge = Judge(clip, judging_processor(tokenizer))
        self.counts = {0: 64} if settings.gpu else COUNTS
        if settings.smoke:
            self.counts = dict.fromkeys(COUNTS, 2)
        self.log = settings.work / "scores.csv"
        if not (settings.resume and (settings.work / "unet.pt").exists()):
            self.log.unlink(missing_ok=True)

    @torch.no_grad()
    def __call__(self, trainer: Trainer, clock: Clock) -> None:
        """Sample every level that is trained; captions are those of the evaluation's first."""
        work = self.settings.work
        for level, count in self.counts.items():
            scenes = unseen(self.settings, count)
            steps = 2 if self.settings.smoke else STEPS
            latents = trainer.sample(level, [caption(s) for s in scenes], steps, POCKET_GUIDANCE)
            decoded = decode(self.vae, latents).clamp(-1, 1).cpu().add(1).mul(127.5)
            pictures = decoded.permute(0, 2, 3, 1).round().byte().numpy()
            save_grid(np.ascontiguousarray(pictures), 8, work / f"level-{level}.jpg")
            found = self.judge.judge(scenes, [Image.fromarray(picture) for picture in pictures])
            figures = {"cosine": found["cosine"]}
            figures |= {name: told["right"] for name, told in found["attributes"].items()}
            figures = {f"level {level} {name}": value for name, value in figures.items()}
            append(self.log, trainer.step, clock.spent, figures)
        plot_logs(work / "unet.csv", work / "unet.png", self.log)
