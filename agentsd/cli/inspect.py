"""``agentsd inspect``: what a schedule does to each attention layer."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import show, show_table
from .image_options import Schedule
from .options import DEFAULT_SCHEDULE, AsJson

Side = Annotated[
    int | None, typer.Option(max=65_536, help="In pixels.", show_default="the model's own")
]


def inspect(
    model: Annotated[
        str, typer.Option(help="pocket, sd15, sd21, sdxl, a folder, or a hub id.")
    ] = "pocket",
    schedule: Schedule = DEFAULT_SCHEDULE,
    height: Side = None,
    width: Side = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda or mps; need not be available here.", show_default="the best available"
        ),
    ] = None,
    num_inference_steps: Annotated[
        int, typer.Option(min=1, max=1000, help="Denoising steps of the run to describe.")
    ] = 25,
    as_json: AsJson = False,
) -> None:
    """Show what a schedule does to each attention layer of a model, and why; needs no weights."""
    from ..models.architectures import load_architecture
    from ..models.loading import target_device
    from ..patching.inspection import inspect_patch
    from ..patching.patch import apply_patch

    device_type = device if device in ("cpu", "cuda", "mps") else target_device(device).type
    inspection = inspect_patch(
        apply_patch(load_architecture(model), schedule),
        height,
        width,
        device_type,
        num_inference_steps=num_inference_steps,
    )
    if as_json:
        show(inspection.to_dict(), "", as_json)
    else:
        show_table(inspection.table())
