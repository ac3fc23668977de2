"""How far a denoiser in training has come: grids of samples, and what the scorer says of them."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPModel

from agentsd.models.loading import POCKET_GUIDANCE

from .checkpoints import Clock
from .export import judging_processor
from .progress import append, save_grid
from .scenes import caption
from .scores import Judge, unseen
from .settings import Settings
from .tokenizer import CLOSE_UP, build_tokenizer
from .unet import Trainer
from .vae import decode

STEPS = 15


class Preview:
    """Writes to the work folder grids `whole.jpg` and `close-up.jpg`, and `scores.csv`.

    Args:
        settings: of the run.
        clip: the judge.
        vae: turns samples into pictures.
    """

    def __init__(self, settings: Settings, clip: CLIPModel, vae: AutoencoderKL):
        self.settings, self.vae = settings, vae.to(settings.device)
        tokenizer = build_tokenizer(settings.work / "tokenizer")
        self.judge = Judge(clip, judging_processor(tokenizer))
        self.count = 2 if settings.smoke else 64 if settings.gpu else 16
        self.log = settings.work / "scores.csv"
        if not (settings.resume and (settings.work / "unet.pt").exists()):
            self.log.unlink(missing_ok=True)

    @torch.no_grad()
    def __call__(self, trainer: Trainer, clock: Clock) -> None:
        """Sample the evaluation's first captions, whole and, unjudged, in part."""
        scenes = unseen(self.settings, self.count)
        captions = [caption(scene) for scene in scenes]
        side = 16 if self.settings.smoke else 64
        self.paint(trainer, [f"{CLOSE_UP} {text}" for text in captions], side // 2, "close-up")
        pictures = self.paint(trainer, captions, side, "whole")
        found = self.judge.judge(scenes, [Image.fromarray(picture) for picture in pictures])
        figures = {"cosine": found["cosine"]}
        figures |= {name: figure["right"] for name, figure in found["attributes"].items()}
        append(self.log, trainer.step, clock.spent, figures)

    def paint(self, trainer: Trainer, captions: list[str], side: int, name: str) -> np.ndarray:
        """Samples as a grid in the work folder and as uint8 pictures [B, H, W, 3]."""
        steps = 2 if self.settings.smoke else STEPS
        latents = trainer.sample(captions, side, steps, POCKET_GUIDANCE)
        decoded = decode(self.vae, latents).clamp(-1, 1).cpu().add(1).mul(127.5)
        pictures = np.ascontiguousarray(decoded.permute(0, 2, 3, 1).round().byte().numpy())
        save_grid(pictures, 8, self.settings.work / f"{name}.jpg")
        return pictures
