"""Image to image and LoRAs: a visitor's choice, validated, and applied temporarily."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image

from ...errors import LoadError, SettingsError
from ...image_settings import ImageSettings
from ...models.adapters import configure_pipeline
from ...models.input_images import read_input_image
from ...models.options import PipelineOptions
from ...settings import short_repr
from .uploads import MAX_PNG_PIXELS

log = logging.getLogger(__name__)

OPTIONS = ("init_image", "strength", "lora", "lora_weight")
"""Names of what can be added to a pipeline."""

DEFAULT_LORA_FILE = "pytorch_lora_weights"

NO_LORA = "none"
"""Choice that stands for no LoRA."""

UNSUPPORTED = {
    "controlnet": "the ControlNet",
    "ip_adapter": "the IP-Adapter",
    "vae_tiling": "VAE tiling",
    "vae_slicing": "VAE slicing",
    "attention_backend": "the attention backend",
}
"""Options without a control on the page, and their names there."""


def read_options(
    settings: ImageSettings,
    loras: Mapping[str, str],
    *,
    init_image: str | None = None,
    strength: float = 0.8,
    lora: str | None = None,
    lora_weight: float = 1.0,
) -> PipelineOptions:
    """Check what a visitor adds to the pipeline.

    Args:
        settings: Of the image.
        loras: Paths of the LoRAs that the server offers, by name.
        init_image: File of an uploaded image to start from.
        strength: How much of it to change, above 0 and at most 1.
        lora: Name of a LoRA.
        lora_weight: Its weight, -2 to 2.

    Raises:
        SettingsError: Names the setting, its value and what is allowed.
    """
    given: dict[str, Any] = {}
    if lora not in (None, NO_LORA):
        if lora not in loras:
            allowed = ", ".join([NO_LORA, *loras])
            raise SettingsError(f"lora: must be one of {allowed} (got {short_repr(lora)})")
        if not isinstance(lora_weight, int | float) or not -2 <= lora_weight <= 2:
            raise SettingsError(f"lora_weight: must be -2 to 2 (got {short_repr(lora_weight)})")
        given["loras"] = (f"{loras[lora]}:{lora_weight:g}",)
    if init_image is not None:
        check_image(init_image)
        given |= {"init_image": init_image, "strength": strength}
    options = PipelineOptions(**given)
    options.check(settings)
    return options


def restored_options(
    options: PipelineOptions, loras: Mapping[str, str], init_image: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """A visitor's choice, from the record of an image.

    Args:
        options: Of the record, which names files but not where they are.
        loras: Paths of the LoRAs that the server offers, by name.
        init_image: The file of its initial image, if that still exists.

    Returns:
        What :func:`read_options` takes, and what cannot be restored.
    """
    found: dict[str, Any] = {"init_image": None, "lora": NO_LORA}
    lost = [label for name, label in UNSUPPORTED.items() if getattr(options, name)]
    for lora in options.parsed_loras():
        file = Path(lora.path).name
        same = [name for name, path in loras.items() if Path(path).name == file]
        if len(same) == len(options.loras) == 1:
            found |= {"lora": same[0], "lora_weight": lora.scale}
        else:
            lost.append(f"the LoRA {file}")
    if options.init_image is not None:
        found["strength"] = options.strength
        if init_image is None:
            lost.append(f"the initial image {Path(options.init_image).name}")
        else:
            found["init_image"] = init_image
    return found, lost


def check_image(path: str) -> None:
    """Refuse an uploaded image that cannot be used.

    Raises:
        SettingsError: Says why, with the name of the file but not where it is.
    """
    try:
        with Image.open(path) as image:
            pixels = image.width * image.height
        if pixels > MAX_PNG_PIXELS:
            raise SettingsError(f"the image may have at most {MAX_PNG_PIXELS:,} pixels")
        read_input_image(path)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(path, Path(path).name) if path in str(error) else str(error)
        kept = reason if isinstance(error, SettingsError) else "not an image that can be read"
        raise SettingsError(f"init_image: {kept}") from None


def named_loras(paths: Iterable[str]) -> dict[str, str]:
    """Names for LoRAs: that of the file, or of its folder if the file has diffusers' default name.

    Raises:
        SettingsError: If two have the same name.
    """
    found: dict[str, str] = {}
    for path in paths:
        file = Path(path)
        name = file.parent.name if file.stem == DEFAULT_LORA_FILE else file.stem
        if name in found:
            raise SettingsError(f"two LoRAs are called {name!r}: {found[name]} and {path}")
        found[name] = path
    return found


@contextmanager
def with_options(pipe: DiffusionPipeline, options: PipelineOptions) -> Iterator[DiffusionPipeline]:
    """The pipeline with options, or another that shares its models; restored afterwards.

    Raises:
        LoadError: If a LoRA does not fit the model.
    """
    if options == PipelineOptions():
        yield pipe
        return
    try:
        try:
            configured = configure_pipeline(pipe, options)
        except LoadError as error:
            log.warning("%s", error)  # it names the path, which visitors need not know
            names = ", ".join(Path(lora.path).name for lora in options.parsed_loras())
            raise LoadError(f"the LoRA {names} cannot be loaded into this model") from None
        yield configured
    finally:
        if options.loras:
            pipe.unload_lora_weights()


def public_record(options: PipelineOptions) -> dict[str, Any]:
    """The options as an image's record has them, with the names of files but not where they are."""
    recorded = options.recorded()
    if options.init_image is not None:
        recorded["init_image"] = Path(options.init_image).name
    if options.loras:
        recorded["loras"] = [
            f"{Path(lora.path).name}:{lora.scale:g}" for lora in options.parsed_loras()
        ]
    return recorded
