"""``agentsd evaluate run`` and ``agentsd evaluate report``: whole experiments."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import note, progress_bar, show
from .options import AsJson, CacheFolder, Device, Dtype

if TYPE_CHECKING:
    from ..progress import Bar


def run(
    protocol: Annotated[
        str, typer.Argument(help="A YAML file, or a built-in one: pocket, cache, …, imagenet2k.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for images and report; existing images are kept.")
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="The protocol's short version: a few minutes.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Model to use.", show_default="the protocol's")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Real images for FID and KID.", show_default="the protocol's")
    ] = None,
    cache: CacheFolder = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Run an experiment: make missing images, measure, and write report.html and report.json."""
    from ..evaluation.experiment import run
    from ..evaluation.protocol import load_protocol
    from ..evaluation.report import require_packages, write
    from ..generation.image_files import prepare_folder
    from ..models.loading import load_pipeline

    plan = load_protocol(protocol, quick=quick, model=model, reference=reference)
    require_packages("an experiment", "jinja2", "matplotlib", "torchmetrics")
    prepare_folder(out)
    pipe = load_pipeline(plan.model, device=device, dtype=dtype)
    with ExitStack() as phase:
        bars: dict[str, Bar] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in bars:
                phase.close()  # one bar at a time
                bars[what] = phase.enter_context(progress_bar(what, total, done))
            bars[what].show(done)

        results = run(plan, out, pipe, cache=cache, progress=progress)
    _show(results, write(results, out), as_json)


def report(
    out: Annotated[Path, typer.Argument(help="Folder of an experiment.")],
    as_json: AsJson = False,
) -> None:
    """Rewrite an experiment's report.html from its report.json and images."""
    from ..evaluation.report import load, write

    results = load(out)
    _show(results, write(results, out), as_json)


def _show(results: dict[str, Any], page: Path, as_json: bool) -> None:
    from ..evaluation.report import markdown

    for text in results["notes"]:
        note(text)
    summary = {key: value for key, value in results.items() if key != "values"}
    show(summary, f"{markdown(results)}\n{page}", as_json)
