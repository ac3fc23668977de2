"""Stage 4: the folder that diffusers and transformers load."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTokenizer,
)

from .clip import SIZE
from .settings import Settings
from .unet import build_scheduler

LIMIT = 40e6  # bytes, all files


def assemble(
    unet: UNet2DConditionModel, text: CLIPTextModel, vae: AutoencoderKL, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """Join the parts into a pipeline, without a safety checker (there is nothing to check)."""
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def judging_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """The processor of this model's CLIP, for pictures and captions."""
    shrink = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )
    return CLIPProcessor(shrink, tokenizer)


def export(settings: Settings, pipe: StableDiffusionPipeline, clip: CLIPModel) -> Path:
    """Write the pipeline and the scorer to `settings.out`; each part appears when complete.

    Denoiser and autoencoder are float16; diffusers loads them as float32 unless asked otherwise.
    Transformers loads models in their stored dtype, and a float16 text encoder fails with a float32
    denoiser, so the text encoder and the scorer stay float32. The given models change their dtype.

    Raises:
        RuntimeError: The folder is too large to be embedded in a package.
    """
    fresh = settings.out.with_name(f".{settings.out.name}.part")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.unet.half()
    pipe.vae.half()
    pipe.save_pretrained(fresh, safe_serialization=True)
    clip.save_pretrained(fresh / "clip", safe_serialization=True)
    judging_processor(pipe.tokenizer).save_pretrained(fresh / "clip")
    for file in (fresh / "model_index.json", *fresh.rglob("config.json")):
        settled = json.loads(file.read_text())
        settled.pop("_name_or_path", None)  # would name a folder of the training machine
        file.write_text(json.dumps(settled, indent=2) + "\n")
    for file in fresh.rglob("*.safetensors"):
        file.chmod(0o644)  # temporary files behind the writer leave 0600
    settings.out.mkdir(parents=True, exist_ok=True)
    for part in sorted(fresh.iterdir()):  # other files in the folder (the model card) stay
        place = settings.out / part.name
        if part.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        os.replace(part, place)
    fresh.rmdir()
    size = sum(file.stat().st_size for file in settings.out.rglob("*") if file.is_file())
    if size > LIMIT:
        raise RuntimeError(
            f"{settings.out} holds {size / 1e6:.1f} MB; the limit is {LIMIT / 1e6:.0f}"
        )
    return settings.out
