"""What a pipeline can be given besides its model: a scheduler, adapters, images to follow.

All of it is diffusers' own; here it is checked, recorded, and put on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    ControlNetModel,
    DiffusionPipeline,
)
from PIL.Image import Image
from pydantic import Field, PrivateAttr, field_validator

from ..errors import AgentSDError, LoadError, SettingsError
from ..image_settings import LONGEST_SIDE, ImageSettings, check_steps
from ..patching.diffusers_internals import DTYPE
from ..settings import StrictModel, short_repr
from .fingerprints import file_sha256, fingerprint
from .input_images import read_input_image
from .loading import FILES, HUB_ID, only_variant
from .schedulers import class_name, scheduler_for

Offload = Literal["model", "sequential", "group"]


IMAGES = ("control_image", "ip_image", "init_image")
"""Settings that name an image file."""


class PipelineOptions(StrictModel):
    """What is added to a pipeline and changes its images.

    Args:
        scheduler: A diffusers scheduler, by class name or by the name that other tools give it
            (``DDIM``, ``Euler a``, ``DPM++ 2M``, …).
        loras: Folders, files or hub ids, each with its weight: ``PATH`` or ``PATH:SCALE``.
        controlnet: Folder or hub id of a ControlNet, which follows ``control_image``.
        control_image: An image file.
        ip_adapter: File of an IP-Adapter, here or on the hub (``OWNER/NAME/FOLDER/FILE``), which
            follows ``ip_image``.
        ip_image: An image file.
        init_image: An image file to begin from (image to image).
        strength: How much of ``init_image`` to change, above 0 and at most 1.
        vae_tiling: Decode in tiles, which saves memory and shows at high resolutions.
        vae_slicing: Decode one image at a time.
        attention_backend: Name of a diffusers attention backend.
        compile: Compile the UNet: a slow first batch, faster ones after it.

    Raises:
        SettingsError: Names the setting, its value and what is allowed.
        LoadError: If there is no such file of weights.
    """

    error: ClassVar = SettingsError

    scheduler: str | None = None
    loras: tuple[str, ...] = ()
    controlnet: str | None = None
    control_image: str | None = None
    ip_adapter: str | None = None
    ip_image: str | None = None
    init_image: str | None = None
    strength: Annotated[float, Field(gt=0, le=1)] = 0.8
    vae_tiling: bool = False
    vae_slicing: bool = False
    attention_backend: str | None = None
    compile: bool = False

    _size: tuple[int, int] | None = PrivateAttr(default=None)

    @field_validator("loras", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("loras")
    @classmethod
    def _one_spelling(cls, loras: tuple[str, ...]) -> tuple[str, ...]:
        # Likewise one weight: a, a:1 and a:1.0 are one run.
        scaled = map(_scaled, loras)
        return tuple(path if _scaled(path) == (path, of) else f"{path}:{of}" for path, of in scaled)

    @field_validator("scheduler")
    @classmethod
    def _class_name(cls, name: str | None) -> str | None:
        # One scheduler has one name on record, however it was spelled.
        return None if name is None else class_name(name)

    def model_post_init(self, _: Any) -> None:
        for one, other in (("controlnet", "control_image"), ("ip_adapter", "ip_image")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise SettingsError(f"{one} and {other}: one needs the other")
        if self.init_image is None and "strength" in self.model_fields_set:
            raise SettingsError("strength: is of init_image, and there is none")
        for path in self.images().values():
            read_input_image(path)
        if self.controlnet is not None:
            _must_be_there("the ControlNet", self.controlnet)
        for lora in self.loras:
            _must_be_there("the LoRA", _scaled(lora)[0])
        if self.ip_adapter is not None:
            _must_be_there("the IP-Adapter", self.ip_adapter, a_file=True)

    def images(self) -> dict[str, str]:
        """The image files, by setting."""
        return {name: path for name in IMAGES if (path := getattr(self, name)) is not None}

    def recorded(self) -> dict[str, Any]:
        """The settings that were given, and hashes of the image files, for the record."""
        told = self.model_dump(mode="json", exclude_defaults=True)
        if self.init_image is not None:
            told["strength"] = self.strength
        hashes = {f"{k}_sha256": file_sha256(path) for k, path in self.images().items()}
        return told | hashes

    def weights(self) -> dict[str, str | None]:
        """Fingerprints of the files of weights, by path or hub id; the first time hashes them."""
        added = [self.controlnet, self.ip_adapter, *(_scaled(lora)[0] for lora in self.loras)]
        if self.ip_adapter is not None:
            encoder = Path(self.ip_adapter).with_name("image_encoder")  # diffusers looks there
            added += [str(encoder)] if encoder.is_dir() else []
        return {source: fingerprint(source) for source in added if source is not None}

    @classmethod
    def from_record(cls, told: Mapping[str, Any]) -> PipelineOptions:
        """Read what :meth:`recorded` told, out of a record of more.

        Where no size is asked for, images to follow are then of the size on record, which may be
        one that :class:`agentsd.image_settings.ImageSettings` do not take.
        """
        options = cls(**{key: told[key] for key in cls.model_fields if key in told})
        match told:
            case {"width": int(width), "height": int(height)} if min(width, height) > 0:
                options._size = width, height
        return options

    def check(self, settings: ImageSettings) -> None:
        """Refuse an image that cannot be made with these options.

        Raises:
            SettingsError: If no denoising step is left, or a side would be too long.
        """
        share = 1.0 if self.init_image is None else self.strength
        check_steps(settings.num_inference_steps, share)
        if (settings.height is None) != (settings.width is None):
            self.inputs(settings.height, settings.width)

    def inputs(self, height: int | None, width: int | None) -> dict[str, Any]:
        """What to call the pipeline with for images of a height and width.

        Raises:
            SettingsError: If an image to follow would become too large.
        """
        images = {name: read_input_image(path) for name, path in self.images().items()}
        size = _size_for(images.get("init_image") or images.get("control_image"), height, width)
        if height is width is None:
            size = self._size or size
        if size is not None and max(size) > LONGEST_SIDE:
            raise SettingsError(
                f"the image to follow would be of {size[0]} × {size[1]} pixels, and at most "
                f"{LONGEST_SIDE} a side are made; give a height and a width"
            )
        fitted = {k: image.resize(size) if size else image for k, image in images.items()}
        told: dict[str, Any] = {}
        if self.init_image is not None:
            told |= {"image": fitted["init_image"], "strength": self.strength}
        if self.control_image is not None:
            name = "control_image" if self.init_image is not None else "image"
            told[name] = fitted["control_image"]
        if self.ip_image is not None:
            told["ip_adapter_image"] = images["ip_image"]
        return told


def recorded_fingerprints(told: Mapping[str, Any]) -> dict[str, Any]:
    """Of all files that a record tells of, weights and images, by path or hub id."""
    images = {told[k]: told.get(f"{k}_sha256") for k in IMAGES if isinstance(told.get(k), str)}
    weights = told.get("weights")
    return images | (weights if isinstance(weights, dict) else {})


def _size_for(image: Image | None, height: int | None, width: int | None) -> tuple[int, int] | None:
    """Width and height of images to follow, so that all are of one size.

    Where one side is given, the other keeps the image's proportions; where none is, the image's
    own size stands, rounded down to what models take.
    """
    if height is not None and width is not None:
        return width, height
    if image is None:
        return None
    if height is not None or width is not None:
        tall = height or _in_eights((width or 0) * image.height / image.width)
        wide = width or _in_eights((height or 0) * image.width / image.height)
        return wide, tall
    return image.width // 8 * 8 or 8, image.height // 8 * 8 or 8


def _in_eights(side: float) -> int:
    return max(8, round(side / 8) * 8)


def configure_pipeline(
    pipe: DiffusionPipeline,
    options: PipelineOptions,
    *,
    offload: Offload | None = None,
    allow_pickle: bool = False,
) -> DiffusionPipeline:
    """Put options on a pipeline.

    Args:
        pipe: A text-to-image pipeline on its device.
        options: What to add.
        offload: Keep what is not in use on the CPU: whole models (a little slower), or layers
            (``sequential`` and ``group``, much slower, least memory).
        allow_pickle: Also load weights that are not safetensors, which can run any code.

    Returns:
        The pipeline, or another that shares its models, for image to image or a ControlNet.

    Raises:
        SettingsError: If there is no such scheduler or backend.
        LoadError: If weights cannot be loaded or do not fit the model.
    """
    device = pipe.device
    if options.scheduler is not None:
        pipe.scheduler = scheduler_for(pipe, options.scheduler)
    if options.controlnet is not None:
        with _loading("the ControlNet", options.controlnet):
            net = ControlNetModel.from_pretrained(
                options.controlnet,
                use_safetensors=not allow_pickle or None,
                variant=only_variant(Path(options.controlnet)),
                **{DTYPE: pipe.dtype},
            )
            pipe = AutoPipelineForText2Image.from_pipe(pipe, controlnet=net.to(device))
    if options.init_image is not None:
        with _loading("image to image"):
            pipe = AutoPipelineForImage2Image.from_pipe(pipe)
    names = [f"lora_{i}" for i in range(len(options.loras))]
    scales = []
    for name, lora in zip(names, options.loras, strict=True):
        path, scale = _scaled(lora)
        scales.append(scale)
        with _loading("the LoRA", path, needs="peft"):
            safe = {} if allow_pickle else {"use_safetensors": True}
            pipe.load_lora_weights(path, adapter_name=name, **safe)
    if names:
        pipe.set_adapters(names, scales)
    if options.ip_adapter is not None:
        place = _ip_adapter(options.ip_adapter, allow_pickle)
        with _loading("the IP-Adapter", options.ip_adapter):
            pipe.load_ip_adapter(**place)
    if options.vae_tiling:
        pipe.vae.enable_tiling()
    if options.vae_slicing:
        pipe.vae.enable_slicing()
    if options.attention_backend is not None:
        try:
            pipe.unet.set_attention_backend(options.attention_backend)
        except (ValueError, RuntimeError, ImportError) as error:
            raise SettingsError(f"attention_backend: {error}") from error
    if offload is not None:
        _offload(pipe, offload, device)
    if options.compile:
        pipe.unet.compile()
    return pipe


def _scaled(lora: str) -> tuple[str, float]:
    """``PATH:SCALE`` taken apart; the weight of a path alone is 1.

    Raises:
        SettingsError: If the weight is infinite or no number (``nan``).
    """
    path, colon, told = lora.rpartition(":")
    try:
        scale = float(told) if path and colon else None
    except ValueError:
        scale = None
    if scale is None:
        return lora, 1.0
    if not math.isfinite(scale):
        raise SettingsError(
            f"loras: the weight of {short_repr(path)} must be a finite number (got {told})"
        )
    return path, scale


def _must_be_there(what: str, source: str, *, a_file: bool = False) -> None:
    """Refuse what is neither on the disk nor can be on the hub, before the hub is asked.

    On the hub are repositories, ``OWNER/NAME``, or, where it must be a file, one in a repository:
    ``OWNER/NAME/FOLDER/FILE``.

    Raises:
        LoadError: Says that there is no such file.
    """
    if os.path.exists(source):
        return
    repository = "/".join(source.split("/")[:2]) if a_file else source
    may_be_a_file = a_file and source.count("/") >= 2
    is_path = source.startswith((".", "~", "/")) or not HUB_ID.fullmatch(repository)
    files = ".safetensors" if a_file else FILES  # a pickle is refused in words of its own
    if is_path or (source.endswith(files) and not may_be_a_file):
        raise LoadError(f"{what} {short_repr(source)}: there is no such file or folder")


def _ip_adapter(told: str, allow_pickle: bool) -> dict[str, Any]:
    file = Path(told)
    if file.suffix != ".safetensors" and not allow_pickle:
        raise LoadError(f"{told} is no .safetensors file; --allow-pickle to load it all the same")
    if file.is_file():
        place: tuple[str, str] = (str(file.parent), "")
    else:
        parts = told.split("/")
        place = ("/".join(parts[:2]), "/".join(parts[2:-1]))
    found = dict(zip(("pretrained_model_name_or_path_or_dict", "subfolder"), place, strict=True))
    return found | {"weight_name": file.name}


def _offload(pipe: DiffusionPipeline, how: Offload, device: torch.device) -> None:
    if device.type == "cpu":
        raise SettingsError("cpu_offload: the model is on the CPU already; it needs another device")
    if how == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif how == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level")


@contextmanager
def _loading(what: str, source: str | None = None, needs: str | None = None) -> Iterator[None]:
    """Tell what diffusers and the hub raise, of kinds of their own, as an error of ours."""
    try:
        yield
    except AgentSDError:
        raise
    except Exception as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        hint = ""
        if source is not None:
            what = f"{what} {short_repr(source)}"
            if not os.path.exists(source):
                hint = "; it is neither a folder nor a file here, nor did the hub give it"
        if needs is not None and needs.upper() in said:
            hint = f"; pip install {needs}"
        raise LoadError(f"{what} cannot be loaded ({short_repr(said)}){hint}") from error
