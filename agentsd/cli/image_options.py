"""Options of the commands that make images, and the request that they define."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import SettingsError

if TYPE_CHECKING:
    from ..generation.batch.request import BatchRequest
    from ..models.options import PipelineOptions

_option = partial(typer.Option, rich_help_panel="Model and adapters")
SIDE = (
    "In pixels, a multiple of 8. With --init-image, which is resized to fit, the default is that "
    "image's own size; if only one side is given, the other keeps the aspect ratio."
)

Schedule = Annotated[
    str, typer.Option(help="faithful, fast, balanced, turbo, paper, or a YAML file.")
]


@dataclass
class ImageOptions:
    """Settings of an image other than its prompt."""

    seed: Annotated[
        int, typer.Option(help="Seed of the first image; later seeds are derived from it.")
    ] = 0
    num_inference_steps: Annotated[int, typer.Option(help="Denoising steps, 1 to 1000.")] = 25
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Weight of the prompt, 0 to 100.", show_default="7.5; pocket: 2"),
    ] = None
    height: Annotated[int | None, typer.Option(help=SIDE, show_default="the model's")] = None
    width: Annotated[
        int | None, typer.Option(help="As for --height.", show_default="the model's")
    ] = None
    negative_prompt: Annotated[str, typer.Option(help="What to avoid.")] = ""

    def settings(self, model: str) -> dict[str, Any]:
        """The settings, checked, with the guidance scale that suits the model."""
        from ..image_settings import ImageSettings
        from ..models.loading import default_guidance

        given = vars(self)
        if self.guidance_scale is None:
            given = given | {"guidance_scale": default_guidance(model)}
        return ImageSettings(prompt="-", **given).model_dump(exclude={"prompt"})


@dataclass
class ModelOptions:
    """The model, its adapters and options, and where it runs."""

    model: Annotated[str, _option(help="pocket, a folder, a .safetensors file, or a hub id.")] = (
        "pocket"
    )
    revision: Annotated[str | None, _option(help="Branch, tag or commit on the hub.")] = None
    variant: Annotated[
        str | None, _option(help="Weight variant, such as fp16.", show_default="the one available")
    ] = None
    allow_pickle: Annotated[
        bool,
        _option("--allow-pickle", help="Allow pickle weights, which can execute arbitrary code."),
    ] = False
    device: Annotated[
        str | None, _option(help="cuda, mps, cpu, …", show_default="the best available")
    ] = None
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        _option(help="Floating-point type.", show_default="float32 on the CPU, else float16"),
    ] = None
    scheduler: Annotated[
        str | None,
        _option(
            help="DDIM, Euler a, DPM++ 2M, …, or the name of a diffusers class.",
            show_default="the model's",
        ),
    ] = None
    lora: Annotated[list[str] | None, _option(help="PATH or PATH:SCALE; repeat for several.")] = (
        None
    )
    controlnet: Annotated[
        str | None, _option(help="Folder or hub id; requires --control-image.")
    ] = None
    control_image: Annotated[str | None, _option(help="Image that guides the ControlNet.")] = None
    ip_adapter: Annotated[
        str | None,
        _option(help="A file, local or OWNER/NAME/FOLDER/FILE on the hub; requires --ip-image."),
    ] = None
    ip_image: Annotated[str | None, _option(help="Image prompt of the IP-Adapter.")] = None
    init_image: Annotated[str | None, _option(help="Image to start from (image to image).")] = None
    strength: Annotated[
        float | None,
        _option(help="How much of the init image to change, 0 to 1.", show_default="0.8"),
    ] = None
    vae_tiling: Annotated[bool, _option("--vae-tiling", help="Decode in tiles.")] = False
    vae_slicing: Annotated[bool, _option("--vae-slicing", help="Decode one image at a time.")] = (
        False
    )
    attention_backend: Annotated[str | None, _option(help="A diffusers attention backend.")] = None
    compile_unet: Annotated[bool, _option("--compile", help="Compile the UNet.")] = False
    cpu_offload: Annotated[
        Literal["model", "sequential", "group"] | None,
        _option(help="Keep unused parts of the model on the CPU."),
    ] = None

    def pipeline_options(self) -> PipelineOptions:
        """Adapters and options of the pipeline."""
        from ..models.options import PipelineOptions

        given = {k: v for k, v in vars(self).items() if k in PipelineOptions.model_fields}
        if self.strength is None:
            del given["strength"]
        return PipelineOptions(**given, loras=tuple(self.lora or ()), compile=self.compile_unet)

    def placement(self) -> dict[str, Any]:
        """Where and how the model runs: fields of a request that an image does not record."""
        return {
            "device": self.device,
            "offload": self.cpu_offload,
            "allow_pickle": self.allow_pickle,
        }


def build_request(
    out: Path, settings: dict[str, Any], model: ModelOptions, schedule: str = "none"
) -> BatchRequest:
    """What to load, and the settings of every image other than its prompt."""
    from ..generation.batch.request import BatchRequest
    from ..schedule import Schedule

    return BatchRequest(
        out=out,
        base=settings,
        schedule=None if schedule == "none" else Schedule.load(schedule),
        options=model.pipeline_options(),
        model=model.model,
        revision=model.revision,
        variant=model.variant,
        dtype=model.dtype,
        **model.placement(),
    )


def check_out(out: Path) -> None:
    """Refuse an ``--out`` that cannot be a folder, before any work."""
    if out.is_file():
        raise SettingsError(f"{out} is a file; --out takes a folder")
