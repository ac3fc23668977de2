"""``agentsd app``: serve the web page."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..errors import MissingPackageError
from .console import loading, note, stdout
from .options import Device, Dtype


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Models that visitors can choose from, as for generate; repeat for several.",
            show_default="pocket",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 opens it to the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    auth_file: Annotated[
        Path | None,
        typer.Option(
            help="File of accounts, one user:password per line; or set the environment variable "
            "AGENTSD_AUTH.",
            show_default="no login",
        ),
    ] = None,
    root_path: Annotated[
        str, typer.Option(help="Path that a reverse proxy serves the page under, such as /agentsd.")
    ] = "",
    queue_size: Annotated[int, typer.Option(help="Maximum queued requests.")] = 32,
    max_pixels: Annotated[int, typer.Option(help="Maximum image size, width times height.")] = 1024
    * 1024,
    max_steps: Annotated[int, typer.Option(help="Maximum denoising steps per image.")] = 100,
    max_images: Annotated[int, typer.Option(help="Maximum images per X/Y plot.")] = 16,
    max_minutes: Annotated[
        float, typer.Option(help="Time limit for tuning a schedule; 0 disables tuning on the page.")
    ] = 10,
    schedules: Annotated[
        Path | None,
        typer.Option(
            help="Folder of schedules (YAML) to offer in addition to the presets, such as those "
            "written by agentsd tune.",
            show_default="only the presets",
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="LoRA that visitors can choose; repeat for several.", show_default="none"
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Serve a web page that compares patched with unpatched images and edits schedules."""
    if find_spec("gradio") is None:
        raise MissingPackageError("gradio", "the app", "app")
    from ..app.requests.limits import Limits
    from ..app.requests.request_options import named_loras
    from ..app.requests.schedule_library import ScheduleLibrary
    from ..app.server import ServerAddress, read_auth, start
    from ..models.loading import load_pipeline
    from ..models.options import PipelineOptions

    limits = Limits(
        max_pixels=max_pixels,
        max_steps=max_steps,
        max_images=max_images,
        max_minutes=max_minutes,
        queue_size=queue_size,
    )
    accounts = read_auth(auth_file, os.environ.get("AGENTSD_AUTH"))
    address = ServerAddress(host, port, root_path, accounts)
    library = ScheduleLibrary(schedules)
    PipelineOptions(loras=tuple(lora or ())).check_files()
    loras = named_loras(lora or [])
    pipes = {}
    for name in model or ["pocket"]:
        with loading(name):
            pipes[name] = load_pipeline(name, device=device, dtype=dtype)
    server = start(pipes, limits, address, library, loras)
    stdout.print(server.url)
    if accounts is None and host not in ("127.0.0.1", "localhost", "::1"):
        note("anyone on the network can use this page; --auth-file restricts it to named users")
    server.wait()
