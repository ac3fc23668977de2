"""Stage 5: figures of the exported model, read from the folder that users get."""

from __future__ import annotations

import json

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from .batches import to_unit
from .clip import embed_pictures, embed_texts, tokenize
from .progress import save_grid, say
from .scenes import Scene, caption, render, sample_scene
from .settings import EVALUATION_SEED, Settings
from .vae import decode, encode
from .variants import ATTRIBUTES, variants_of

STEPS, GUIDANCE = 25, 2.0
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
    """A CLIP, fed as a user would: a processor that shrinks, then the model."""

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


def generate(
    settings: Settings, captions: list[str], steps: int = STEPS, size: int = 256
) -> list[Image.Image]:
    """One image a caption from the exported pipeline; the seed of image i is i."""
    pipe = DiffusionPipeline.from_pretrained(settings.out).to(settings.device)
    pipe.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(captions), 4):
        some = captions[start : start + 4]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(some))]
        images += pipe(
            some, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generators,
            height=size, width=size,
        ).images  # fmt: skip
        say(f"score: {len(images)} of {len(captions)} images")
    return images


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


def show(settings: Settings) -> None:
    """Write the model card's picture: sixteen captions, one sample each, seeds 0 to 15."""
    images = generate(settings, list(SHOWN))
    save_grid(np.stack([np.asarray(i) for i in images]), 4, settings.out / "samples.jpg")


def score(settings: Settings, generated: int = 64, renders: int = 1000) -> dict:
    """All figures of the model card; also written to `work/scores.json`."""
    if settings.smoke:
        generated, renders = 1, 8
    judge = Judge.exported(settings)
    scenes = unseen(settings, max(renders, generated))
    figures = {
        "autoencoder PSNR, dB": autoencoder_psnr(settings, scenes[: min(64, renders)]),
        "renders": judge.judge(
            scenes[:renders], [Image.fromarray(render(s, 256)) for s in scenes[:renders]]
        ),
    }
    steps, size = (2, 64) if settings.smoke else (STEPS, 256)
    images = generate(settings, [caption(s) for s in scenes[:generated]], steps, size)
    figures["generated"] = judge.judge(scenes[:generated], images)
    figures["generated"] |= {"steps": steps, "guidance": GUIDANCE, "size": size}
    grid = np.stack([np.asarray(image) for image in images])
    save_grid(grid, min(8, len(grid)), settings.work / "generated.jpg")
    (settings.work / "scores.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures
