"""Options of the commands that make images, and the request that they amount to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SettingsError
from .options import Dtype

if TYPE_CHECKING:
    from ..generation.batch.request import BatchRequest
    from ..models.options import PipelineOptions

MODEL = "Model and adapters"
SIDE = (
    "In pixels, a multiple of 8. With --init-image, which is resized to fit, the default is that "
    "image's own size; if you give one side alone, the other keeps its proportions."
)

Schedule = Annotated[
    str, typer.Option(help="faithful, fast, balanced, turbo, paper, or a YAML file.")
]


class Offload(str, Enum):
    """What stays on the CPU while it is not in use."""

    model = "model"
    sequential = "sequential"
    group = "group"


@dataclass
class ImageOptions:
    """Settings of an image besides its prompt."""

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
    """The model, what is added to it, and where it runs."""

    model: Annotated[
        str,
        typer.Option(
            help="pocket, a folder, a .safetensors file, or a hub id.", rich_help_panel=MODEL
        ),
    ] = "pocket"
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit on the hub.", rich_help_panel=MODEL),
    ] = None
    variant: Annotated[
        str | None,
        typer.Option(
            help="Weight variant, such as fp16.",
            show_default="the one available",
            rich_help_panel=MODEL,
        ),
    ] = None
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="Allow pickle weights, which can execute arbitrary code.",
            rich_help_panel=MODEL,
        ),
    ] = False
    device: Annotated[
        str | None,
        typer.Option(
            help="cuda, mps, cpu, …", show_default="the best available", rich_help_panel=MODEL
        ),
    ] = None
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Floating-point type.",
            show_default="float32 on the CPU, else float16",
            rich_help_panel=MODEL,
        ),
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="DDIM, Euler a, DPM++ 2M, …, or the name of a diffusers class.",
            show_default="the model's",
            rich_help_panel=MODEL,
        ),
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option(help="PATH or PATH:SCALE; repeat for several.", rich_help_panel=MODEL),
    ] = None
    controlnet: Annotated[
        str | None,
        typer.Option(help="Folder or hub id; requires --control-image.", rich_help_panel=MODEL),
    ] = None
    control_image: Annotated[
        str | None, typer.Option(help="Image that guides the ControlNet.", rich_help_panel=MODEL)
    ] = None
    ip_adapter: Annotated[
        str | None,
        typer.Option(
            help="A file, local or OWNER/NAME/FOLDER/FILE on the hub; requires --ip-image.",
            rich_help_panel=MODEL,
        ),
    ] = None
    ip_image: Annotated[
        str | None, typer.Option(help="Image prompt of the IP-Adapter.", rich_help_panel=MODEL)
    ] = None
    init_image: Annotated[
        str | None,
        typer.Option(help="Image to start from (image to image).", rich_help_panel=MODEL),
    ] = None
    strength: Annotated[
        float | None,
        typer.Option(
            help="How much of the init image to change, 0 to 1.",
            show_default="0.8",
            rich_help_panel=MODEL,
        ),
    ] = None
    vae_tiling: Annotated[
        bool, typer.Option("--vae-tiling", help="Decode in tiles.", rich_help_panel=MODEL)
    ] = False
    vae_slicing: Annotated[
        bool,
        typer.Option("--vae-slicing", help="Decode one image at a time.", rich_help_panel=MODEL),
    ] = False
    attention_backend: Annotated[
        str | None, typer.Option(help="A diffusers attention backend.", rich_help_panel=MODEL)
    ] = None
    compile_unet: Annotated[
        bool, typer.Option("--compile", help="Compile the UNet.", rich_help_panel=MODEL)
    ] = False
    cpu_offload: Annotated[
        Offload | None,
        typer.Option(help="Keep on the CPU what is not in use.", rich_help_panel=MODEL),
    ] = None

    def pipeline_options(self) -> PipelineOptions:
        """What is added to the model."""
        from ..models.options import PipelineOptions

        given = {k: v for k, v in vars(self).items() if k in PipelineOptions.model_fields}
        if self.strength is None:
            del given["strength"]
        return PipelineOptions(**given, loras=tuple(self.lora or ()), compile=self.compile_unet)

    def placement(self) -> dict[str, Any]:
        """Where and how the model runs: fields of a request that an image does not record."""
        return {
            "device": self.device,
            "offload": self.cpu_offload.value if self.cpu_offload else None,
            "allow_pickle": self.allow_pickle,
        }


def build_request(
    out: Path, settings: dict[str, Any], model: ModelOptions, schedule: str = "none"
) -> BatchRequest:
    """What to load, and the settings of every image besides its prompt."""
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
        dtype=model.dtype.value if model.dtype else None,
        **model.placement(),
    )


def check_out(out: Path) -> None:
    """Refuse an ``--out`` that cannot be a folder, before any work."""
    if out.is_file():
        raise SettingsError(f"{out} is a file; --out takes a folder")
