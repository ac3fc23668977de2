"""What a pipeline can be given besides its model: a scheduler, adapters, images to follow.

All of it is diffusers' own; here it is checked and recorded. :mod:`agentsd.models.adapters` puts it
on a pipeline.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import Field, PrivateAttr, field_validator

from ..errors import LoadError, SettingsError
from ..image_settings import LONGEST_SIDE, ImageSettings, check_steps
from ..settings import StrictModel, short_repr
from .fingerprints import file_sha256, fingerprint
from .input_images import fitted_size, read_input_image
from .loading import FILES, HUB_ID
from .schedulers import class_name

IMAGES = ("control_image", "ip_image", "init_image")
"""Settings that name an image file."""


class PipelineOptions(StrictModel):
    """What is added to a pipeline and changes its images; creating one opens no file.

    Args:
        scheduler: A diffusers scheduler, by class name or by the name that other tools give it
            (``DDIM``, ``Euler a``, ``DPM++ 2M``, …).
        loras: Folders, files or hub ids, each with its weight: ``PATH`` or ``PATH:SCALE``.
        controlnet: Folder or hub id of a ControlNet, which follows ``control_image``.
        control_image: An image file.
        ip_adapter: File of an IP-Adapter, local or on the hub (``OWNER/NAME/FOLDER/FILE``), which
            follows ``ip_image``.
        ip_image: An image file.
        init_image: An image file to start from (image to image).
        strength: How much of ``init_image`` to change, above 0 and at most 1.
        vae_tiling: Decode in tiles, which saves memory but can leave seams at high resolutions.
        vae_slicing: Decode one image at a time.
        attention_backend: Name of a diffusers attention backend.
        compile: Compile the UNet: a slow first batch, faster ones after it.

    Raises:
        SettingsError: Names the setting, its value and what is allowed.
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
        # One LoRA has one spelling on record: a, a:1 and a:1.0 are the same run.
        return tuple(str(Lora.parse(text)) for text in loras)

    @field_validator("scheduler")
    @classmethod
    def _class_name(cls, name: str | None) -> str | None:
        # Likewise one scheduler has one name, however it was spelled.
        return None if name is None else class_name(name)

    def model_post_init(self, _: Any) -> None:
        for one, other in (("controlnet", "control_image"), ("ip_adapter", "ip_image")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise SettingsError(f"{one} and {other}: each needs the other")
        if self.init_image is None and "strength" in self.model_fields_set:
            raise SettingsError("strength requires init_image")

    def check_files(self) -> None:
        """Check that the images can be read and that local weights exist.

        Raises:
            SettingsError: Names an image that cannot be used.
            LoadError: Names weights that are neither on the disk nor an id of the hub.
        """
        for path in self.images().values():
            read_input_image(path)
        if self.controlnet is not None:
            _check_exists("the ControlNet", self.controlnet)
        for lora in self.parsed_loras():
            _check_exists("the LoRA", lora.path)
        if self.ip_adapter is not None:
            _check_exists("the IP-Adapter", self.ip_adapter, is_file=True)

    def images(self) -> dict[str, str]:
        """The image files, by setting."""
        return {name: path for name in IMAGES if (path := getattr(self, name)) is not None}

    def parsed_loras(self) -> list[Lora]:
        """The LoRAs, each with its weight."""
        return [Lora.parse(text) for text in self.loras]

    def settings_record(self) -> dict[str, Any]:
        """The settings that were given, as plain values for a record."""
        given = self.model_dump(mode="json", exclude_defaults=True)
        return given if self.init_image is None else given | {"strength": self.strength}

    def recorded(self) -> dict[str, Any]:
        """The settings that were given and the hashes of the image files, for a record."""
        hashes = {f"{k}_sha256": file_sha256(path) for k, path in self.images().items()}
        return self.settings_record() | hashes

    def weights(self) -> dict[str, str | None]:
        """Fingerprints of the weights, by path or hub id; files are hashed the first time."""
        added = [self.controlnet, self.ip_adapter, *(lora.path for lora in self.parsed_loras())]
        if self.ip_adapter is not None:
            encoder = Path(self.ip_adapter).with_name("image_encoder")  # diffusers looks there
            added += [str(encoder)] if encoder.is_dir() else []
        return {source: fingerprint(source) for source in added if source is not None}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> PipelineOptions:
        """Read what :meth:`recorded` returned from the record of an image.

        Where no size is asked for, images to follow are then resized to the size on record, which
        may be one that :class:`agentsd.image_settings.ImageSettings` does not take.
        """
        options = cls(**{key: record[key] for key in cls.model_fields if key in record})
        match record:
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
            self.call_kwargs(settings.height, settings.width)

    def call_kwargs(self, height: int | None, width: int | None) -> dict[str, Any]:
        """Further arguments of the pipeline's call, for images of this height and width.

        Raises:
            SettingsError: If an image to follow would become too large.
        """
        images = {name: read_input_image(path) for name, path in self.images().items()}
        size = fitted_size(images.get("init_image") or images.get("control_image"), height, width)
        if height is width is None:
            size = self._size or size
        if size is not None and max(size) > LONGEST_SIDE:
            raise SettingsError(
                f"the image to follow would have {size[0]} × {size[1]} pixels; at most "
                f"{LONGEST_SIDE} a side are possible: give a height and a width"
            )
        fitted = {k: image.resize(size) if size else image for k, image in images.items()}
        kwargs: dict[str, Any] = {}
        if self.init_image is not None:
            kwargs |= {"image": fitted["init_image"], "strength": self.strength}
        if self.control_image is not None:
            name = "control_image" if self.init_image is not None else "image"
            kwargs[name] = fitted["control_image"]
        if self.ip_image is not None:
            kwargs["ip_adapter_image"] = images["ip_image"]
        return kwargs


class Lora(NamedTuple):
    """A LoRA and its weight."""

    path: str
    scale: float

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Read ``PATH:SCALE``; the weight of a path alone is 1.

        Raises:
            SettingsError: If the weight is infinite or not a number (``nan``).
        """
        path, colon, weight = text.rpartition(":")
        try:
            scale = float(weight) if path and colon else None
        except ValueError:
            scale = None
        if scale is None:
            return cls(text, 1.0)
        if not math.isfinite(scale):
            raise SettingsError(
                f"loras: the weight of {short_repr(path)} must be a finite number (got {weight})"
            )
        return cls(path, scale)

    def __str__(self) -> str:
        # A weight of 1 is left out, unless the path alone would read as another LoRA.
        return self.path if Lora.parse(self.path) == self else f"{self.path}:{self.scale}"


def recorded_fingerprints(record: Mapping[str, Any]) -> dict[str, Any]:
    """Fingerprints of all files that a record names, weights and images, by path or hub id."""
    images = {
        record[name]: record.get(f"{name}_sha256")
        for name in IMAGES
        if isinstance(record.get(name), str)
    }
    weights = record.get("weights")
    return images | (weights if isinstance(weights, dict) else {})


def _check_exists(what: str, source: str, *, is_file: bool = False) -> None:
    """Refuse what is neither on the disk nor can be on the hub, before the hub is asked.

    On the hub are repositories, ``OWNER/NAME``, or, where a file is needed, one in a repository:
    ``OWNER/NAME/FOLDER/FILE``.

    Raises:
        LoadError: Says that there is no such file.
    """
    if os.path.exists(source):
        return
    repository = "/".join(source.split("/")[:2]) if is_file else source
    may_be_a_file = is_file and source.count("/") >= 2
    is_path = source.startswith((".", "~", "/")) or not HUB_ID.fullmatch(repository)
    files = ".safetensors" if is_file else FILES  # pickles have an error of their own
    if is_path or (source.endswith(files) and not may_be_a_file):
        raise LoadError(f"{what} {short_repr(source)}: there is no such file or folder")
