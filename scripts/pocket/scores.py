"""Stages 5 to 7: scores and pictures of the exported model, read from the folder that users get."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from agentsd.evaluation.metrics import fid, kid
from agentsd.similarity import psnr

from .batches import to_unit
from .clip import embed_pictures, embed_texts, tokenize
from .damage import LADDERS
from .progress import save_grid, say
from .scenes import Scene, caption, render, sample_scene
from .settings import EVALUATION_SEED, Settings
from .trials import TRIALS, Trial, paint
from .vae import decode, encode
from .variants import ATTRIBUTES, variants_of

SHOWN = (
    "three red circles in a row on a blue background",
    "a red circle above a blue square on a white background",
    "a ring of six yellow stars on a purple background",
    "a 3 by 3 grid of white triangles on a green background",
    "a yellow star on a black background",
    "an orange triangle to the left of a purple circle on a white background",
    "four green squares in a column on a yellow background",
    "two mirrored black circles above two mirrored red triangles on an orange background",
    "a white square on a red background",
    "two blue stars in a row on an orange background",
    "a ring of six red circles on a white background",
    "a 3 by 3 grid of black squares on a yellow background",
    "a green circle below a white star on a blue background",
    "four purple triangles in a row on a white background",
    "a black square to the right of an orange circle on a green background",
    "two mirrored white stars above two mirrored yellow squares on a blue background",
)


def unseen(settings: Settings, count: int) -> list[Scene]:
    """Scenes that no training stage draws."""
    seed = settings.seed + EVALUATION_SEED
    return [sample_scene(np.random.default_rng((seed, i))) for i in range(count)]


class Judge:
    """A CLIP, used as users would: a processor that resizes, then the model."""

    def __init__(self, clip: CLIPModel, processor: CLIPProcessor):
        self.clip, self.processor = clip.cpu().float().eval(), processor

    @classmethod
    def exported(cls, settings: Settings) -> Judge:
        """The one that users get."""
        folder = settings.out / "clip"
        return cls(CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder))

    @torch.no_grad()
    def pictures(self, images: list[Image.Image]) -> torch.Tensor:
        """Images → unit vectors [B, 96]."""
        values = self.processor.image_processor(images=images, return_tensors="pt").pixel_values
        return embed_pictures(self.clip, values)

    @torch.no_grad()
    def texts(self, captions: list[str]) -> torch.Tensor:
        """Captions → unit vectors [B, 96]."""
        ids = tokenize(self.processor.tokenizer, captions, torch.device("cpu"))
        return embed_texts(self.clip, ids)

    def margins(self, scenes: list[Scene], images: list[Image.Image]) -> list[float]:
        """The lead of each image's own caption over the best one that differs in one attribute."""
        found = []
        for scene, seen in zip(scenes, self.pictures(images), strict=True):
            others = [caption(s) for name in ATTRIBUTES for s in variants_of(scene, name)]
            own, *rest = (self.texts([caption(scene), *others]) @ seen).tolist()
            found.append(own - max(rest))
        return found

    def judge(self, scenes: list[Scene], images: list[Image.Image]) -> dict:
        """Compare images with their captions and with captions that differ in one attribute.

        Returns:
            The mean cosine to the own caption and to the next scene's (a control); for each
            attribute, the share of images whose own caption beats every caption that differs in
            that attribute alone, with the number of images that have it and the share that a blind
            choice would get; and the share for which the own caption is the best of 64.
        """
        seen = torch.cat([self.pictures(images[i : i + 100]) for i in range(0, len(images), 100)])
        own = self.texts([caption(s) for s in scenes])
        cosines = (seen * own).sum(-1)
        hits: dict[str, list[tuple[bool, float]]] = {name: [] for name in ATTRIBUTES}
        for i, scene in enumerate(scenes):
            for name in ATTRIBUTES:
                others = [caption(s) for s in variants_of(scene, name)]
                if others:
                    right = bool(cosines[i] > (self.texts(others) @ seen[i]).max())
                    hits[name].append((right, 1 / (1 + len(others))))
        best = [
            (seen[i : i + 64] @ own[i : i + 64].T).argmax(1).eq(torch.arange(len(seen[i : i + 64])))
            for i in range(0, len(scenes), 64)
        ]
        return {
            "images": len(scenes),
            "cosine": round(cosines.mean().item(), 4),
            "cosine to another caption": round((seen * own.roll(1, 0)).sum(-1).mean().item(), 4),
            "best of 64": round(torch.cat(best).float().mean().item(), 4),
            "attributes": {
                name: {
                    "right": round(float(np.mean([r for r, _ in found])), 4),
                    "blind": round(float(np.mean([b for _, b in found])), 4),
                    "images": len(found),
                }
                for name, found in hits.items()
                if found
            },
        }


@torch.no_grad()
def autoencoder_psnr(settings: Settings, scenes: list[Scene]) -> float:
    """Mean PSNR in dB of 256-pixel renders through the exported autoencoder."""
    vae = AutoencoderKL.from_pretrained(settings.out / "vae", dtype=torch.float32)
    found = []
    for scene in scenes:
        target = to_unit(
            torch.from_numpy(render(scene, 256)).permute(2, 0, 1)[None], torch.device("cpu")
        )
        error = (decode(vae, encode(vae, target)).clamp(-1, 1) - target).square().mean() / 4
        found.append(-10 * error.log10().item())
    return round(sum(found) / len(found), 2)


def ladders(judge: Judge, scenes: list[Scene]) -> dict[str, dict[str, dict[str, float]]]:
    """FID and KID of damaged renders against other, undamaged ones, with CLIP's image features.

    Returns:
        Kind of damage → its amount → "FID" and "KID", of half of the scenes against the others.
    """
    half = len(scenes) // 2
    whole = judge.pictures([Image.fromarray(render(s, 256)) for s in scenes[half:]]).numpy()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind, steps in LADDERS.items():
        for amount, damaged in steps.items():
            images = [damaged(s, np.random.default_rng(i)) for i, s in enumerate(scenes[:half])]
            seen = judge.pictures(images).numpy()
            figures = {"FID": fid(seen, whole).value, "KID": kid(seen, whole).value}
            found.setdefault(kind, {})[amount] = {k: round(v, 5) for k, v in figures.items()}
    return found


def _save(images: list[Image.Image], columns: int, path: Path) -> None:
    save_grid(np.stack([np.asarray(image) for image in images]), columns, path)


def _write(figures: dict, path: Path) -> dict:
    path.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return figures


def show(settings: Settings) -> None:
    """Write the model card's picture: sixteen captions, one sample each, seeds 0 to 15."""
    _save(paint(settings, list(SHOWN), Trial()), 4, settings.out / "samples.jpg")


def score(settings: Settings, generated: int = 512, renders: int = 1000) -> dict:
    """The figures of the model card, also in `work/scores.json`, and the sixteen worst samples.

    Args:
        settings: of the run.
        generated: images to generate, at 25 steps.
        renders: unseen renders to judge.
    """
    trial = Trial()
    if settings.smoke:
        generated, renders, trial = 2, 8, Trial(size=(64, 64), steps=2)
    judge = Judge.exported(settings)
    scenes = unseen(settings, max(renders, generated))
    real = [Image.fromarray(render(s, 256)) for s in scenes[:renders]]
    figures = {
        "autoencoder PSNR, dB": autoencoder_psnr(settings, scenes[: min(64, renders)]),
        "renders": judge.judge(scenes[:renders], real),
        "ladders": ladders(judge, scenes[:renders]),
    }
    say("score: renders judged")
    scenes = scenes[:generated]
    images = paint(settings, [caption(s) for s in scenes], trial)
    figures["generated"] = judge.judge(scenes, images)
    _save(images[:64], min(8, generated), settings.work / "generated.jpg")
    margins = judge.margins(scenes, images)
    worst = sorted(range(generated), key=margins.__getitem__)[:16]
    _save([images[i] for i in worst], min(4, generated), settings.out / "failures.jpg")
    figures["failures"] = [caption(scenes[i]) for i in worst]
    return _write(figures, settings.work / "scores.json")


def tries(settings: Settings, generated: int = 8) -> dict:
    """Scores of the model under other conditions; also in `work/trials.json`.

    Returns:
        Name of a trial → what `Judge.judge` says of it, and the mean PSNR in dB to the images of
        the same seeds as the model was trained for ("as trained"), where the size is the same.
    """
    judge = Judge.exported(settings)
    trials = {"as trained": Trial(), **TRIALS}
    if settings.smoke:
        generated = 1
        trials = {k: replace(t, size=(64, 64), steps=2) for k, t in trials.items()}
    scenes = unseen(settings, generated)
    figures: dict[str, dict] = {}
    for name, trial in trials.items():
        images = paint(settings, [caption(s) for s in scenes], trial)
        figures[name] = judge.judge(scenes, images)
        if name == "as trained":
            base = images
        elif trial.size == trials["as trained"].size:
            found = [psnr(np.asarray(a), np.asarray(b)) for a, b in zip(images, base, strict=True)]
            figures[name]["PSNR, dB"] = round(sum(found) / len(found), 2)
        _save(images, min(8, generated), settings.work / "trials" / f"{name.replace(' ', '-')}.jpg")
        say(f"trials: {name}: cosine {figures[name]['cosine']}")
    return _write(figures, settings.work / "trials.json")
