"""What a pipeline can be given besides its model: a scheduler, adapters, images to follow.

All of it is diffusers' own; here it is checked, recorded, and put on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    ControlNetModel,
    DiffusionPipeline,
)
from PIL import Image
from pydantic import Field, field_validator

from .errors import AgentSDError, LoadError, SettingsError
from .output import SAMPLERS
from .validation import Strict, shown

Offload = Literal["model", "sequential", "group"]


class Extras(Strict):
    """What is added to a pipeline and changes its images.

    Args:
        sampler: A diffusers scheduler, by class name or by the name that other tools give it
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
    """

    error: ClassVar = SettingsError

    sampler: str | None = None
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

    @field_validator("loras", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    def model_post_init(self, _: Any) -> None:
        for one, other in (("controlnet", "control_image"), ("ip_adapter", "ip_image")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise SettingsError(f"{one} and {other}: one needs the other")
        if self.init_image is None and "strength" in self.model_fields_set:
            raise SettingsError("strength: is of init_image, and there is none")
        for path in self.images().values():
            _open(path)

    def images(self) -> dict[str, str]:
        """The image files, by setting."""
        names = ("control_image", "ip_image", "init_image")
        return {name: path for name in names if (path := getattr(self, name)) is not None}

    def recorded(self) -> dict[str, Any]:
        """The settings that were given, and hashes of the image files, for the record."""
        told = self.model_dump(mode="json", exclude_defaults=True)
        if self.init_image is not None:
            told["strength"] = self.strength
        hashes = {f"{k}_sha256": _digest(path) for k, path in self.images().items()}
        return told | hashes

    @classmethod
    def from_record(cls, told: Mapping[str, Any]) -> Extras:
        """Read what :meth:`recorded` told, out of a record of more."""
        return cls(**{key: told[key] for key in cls.model_fields if key in told})

    def inputs(self, height: int | None, width: int | None) -> dict[str, Any]:
        """What to call the pipeline with for images of a height and width."""
        images = {name: _open(path) for name, path in self.images().items()}
        size = (width, height)
        fitted = {
            name: image.resize(size) if None not in size else image  # type: ignore[arg-type]
            for name, image in images.items()
        }
        told: dict[str, Any] = {}
        if self.init_image is not None:
            told |= {"image": fitted["init_image"], "strength": self.strength}
        if self.control_image is not None:
            name = "control_image" if self.init_image is not None else "image"
            told[name] = fitted["control_image"]
        if self.ip_image is not None:
            told["ip_adapter_image"] = images["ip_image"]
        return told


def equip(
    pipe: DiffusionPipeline,
    extras: Extras,
    *,
    offload: Offload | None = None,
    allow_pickle: bool = False,
) -> DiffusionPipeline:
    """Put extras on a pipeline.

    Args:
        pipe: A text-to-image pipeline on its device.
        extras: What to add.
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
    if extras.sampler is not None:
        pipe.scheduler = scheduler_for(pipe, extras.sampler)
    if extras.controlnet is not None:
        with _loading(f"the ControlNet {shown(extras.controlnet)}"):
            net = ControlNetModel.from_pretrained(
                extras.controlnet, torch_dtype=pipe.dtype, use_safetensors=not allow_pickle or None
            )
            pipe = AutoPipelineForText2Image.from_pipe(pipe, controlnet=net.to(device))
    if extras.init_image is not None:
        with _loading("image to image"):
            pipe = AutoPipelineForImage2Image.from_pipe(pipe)
    names = [f"lora_{i}" for i in range(len(extras.loras))]
    scales = []
    for name, lora in zip(names, extras.loras, strict=True):
        path, scale = _scaled(lora)
        scales.append(scale)
        with _loading(f"the LoRA {shown(path)}", needs="peft"):
            safe = {} if allow_pickle else {"use_safetensors": True}
            pipe.load_lora_weights(path, adapter_name=name, **safe)
    if names:
        pipe.set_adapters(names, scales)
    if extras.ip_adapter is not None:
        with _loading(f"the IP-Adapter {shown(extras.ip_adapter)}"):
            pipe.load_ip_adapter(**_ip_adapter(extras.ip_adapter, allow_pickle))
    if extras.vae_tiling:
        pipe.vae.enable_tiling()
    if extras.vae_slicing:
        pipe.vae.enable_slicing()
    if extras.attention_backend is not None:
        try:
            pipe.unet.set_attention_backend(extras.attention_backend)
        except (ValueError, RuntimeError, ImportError) as error:
            raise SettingsError(f"attention_backend: {error}") from error
    if offload is not None:
        _offload(pipe, offload, device)
    if extras.compile:
        pipe.unet.compile()
    return pipe


def scheduler_for(pipe: DiffusionPipeline, name: str) -> Any:
    """Another scheduler for a pipeline, of its own scheduler's settings.

    Args:
        pipe: The pipeline, which stays as it is.
        name: A class of diffusers, or the name that other tools give it (``Euler a``). PNDM is
            PLMS: without the Runge-Kutta steps in which Stable Diffusion never begins.

    Raises:
        SettingsError: If there is none of that name for this pipeline (lists those there are), or
            it needs a package that is not installed.
    """
    known = {kind.__name__: kind for kind in pipe.scheduler.compatibles}
    given = {other.lower(): kind for kind, other in SAMPLERS.items()} | {
        k.lower(): k for k in known
    }
    kind = given.get(name.lower(), given.get(f"{name.lower()}scheduler"))
    if kind not in known:
        fit = sorted(SAMPLERS.get(k, k) for k in known)
        raise SettingsError(
            f"scheduler: no {shown(name)} for this model; there are {', '.join(fit)}"
        )
    settings = {"skip_prk_steps": True} if kind == "PNDMScheduler" else {}
    try:
        return known[kind].from_config(pipe.scheduler.config, **settings)
    except ImportError as error:  # SciPy, torchsde
        raise SettingsError(f"scheduler: {' '.join(str(error).split())}") from error


@contextmanager
def scheduled(pipe: DiffusionPipeline, name: str | None) -> Iterator[None]:
    """Give a pipeline another scheduler until the end of the block; ``None`` leaves it its own.

    Args:
        pipe: The pipeline.
        name: As for :func:`scheduler_for`.

    Raises:
        SettingsError: As :func:`scheduler_for`.
    """
    own = pipe.scheduler
    try:
        if name is not None:
            pipe.scheduler = scheduler_for(pipe, name)
        yield
    finally:
        pipe.scheduler = own


def _scaled(lora: str) -> tuple[str, float]:
    """``PATH:SCALE`` taken apart; the weight of a path alone is 1."""
    path, colon, scale = lora.rpartition(":")
    try:
        return (path, float(scale)) if path and colon else (lora, 1.0)
    except ValueError:
        return lora, 1.0


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
def _loading(what: str, needs: str | None = None) -> Iterator[None]:
    """Tell what diffusers and the hub raise, of kinds of their own, as an error of ours."""
    try:
        yield
    except AgentSDError:
        raise
    except Exception as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        hint = ""
        if needs is not None and needs.upper() in said:
            hint = f"; pip install {needs}"
        raise LoadError(f"{what} cannot be loaded ({shown(said)}){hint}") from error


@lru_cache(maxsize=8)
def _open(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "not an image"
        raise SettingsError(f"{path}: cannot be read ({reason})") from None


def _digest(path: str) -> str:
    return sha256(Path(path).read_bytes()).hexdigest()
