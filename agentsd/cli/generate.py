"""``agentsd generate``: prompts to a folder of images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import SettingsError
from .console import note, progress_style, show, stderr
from .image_options import ImageOptions, ModelOptions, build_request, check_out
from .options import DEFAULT_SCHEDULE, named_options, spelled, with_option_groups

if TYPE_CHECKING:
    from ..generation.batch.request import BatchRequest

_prompt_option = partial(typer.Option, rich_help_panel="Prompts")
_run_option = partial(typer.Option, rich_help_panel="Run")


@dataclass
class PromptOptions:
    """What to draw."""

    prompt: Annotated[
        list[str] | None, _prompt_option(help="What to draw; repeat for several.")
    ] = None
    prompts: Annotated[
        str | None,
        _prompt_option(
            help="A .txt, .jsonl, .csv or .tsv file of prompts; - reads standard input."
        ),
    ] = None
    template: Annotated[
        str, _prompt_option(help="Text around each prompt; {} stands for the prompt.")
    ] = "{}"
    on_error: Annotated[
        Literal["stop", "skip"],
        _prompt_option(help="Invalid rows: stop before any work, or skip them."),
    ] = "stop"
    from_image: Annotated[
        Path | None,
        _prompt_option(help="Regenerate an image from the settings stored in its file."),
    ] = None
    num_images: Annotated[
        int, _prompt_option(min=1, max=1_000_000, help="Number of images per prompt.")
    ] = 1


@dataclass
class RunOptions:
    """How images are made and written."""

    format: Annotated[
        Literal["png", "jpg", "webp", "webdataset"],
        _run_option(help="File format; webdataset packs PNGs into .tar shards."),
    ] = "png"
    batch_size: Annotated[
        str, _run_option(help="Images per batch, or 'auto' for as many as fit in memory.")
    ] = "1"
    resume: Annotated[bool, _run_option(help="Continue the run that is in --out.")] = True
    progress: Annotated[
        Literal["none", "plain", "rich"] | None,
        _run_option(
            help="How progress is shown on stderr.", show_default="rich on a terminal, else plain"
        ),
    ] = None
    stale_after: Annotated[
        float,
        _run_option(
            min=1, max=86400, help="Seconds of silence after which another process counts as dead."
        ),
    ] = 60.0
    as_json: Annotated[bool, _run_option("--json", help="Print the summary as JSON.")] = False

    def fields_of_request(self) -> dict[str, Any]:
        """These options, checked, as fields of a request."""
        return {
            "form": self.format,
            "batch_size": _batch_size(self.batch_size),
            "resume": self.resume,
            "progress": self.progress or progress_style(),
            "stale_after": self.stale_after,
        }


BESIDE_FROM_IMAGE = {
    *("from_image", "out", "device", "cpu_offload", "allow_pickle"),
    *RunOptions.__dataclass_fields__,
}
"""Options that may be combined with ``--from-image``."""


@with_option_groups
def generate(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the run; created if missing.")],
    *,
    prompts: PromptOptions,
    schedule: Annotated[
        str, typer.Option(help="faithful, fast, balanced, turbo, paper, a YAML file, or 'none'.")
    ] = DEFAULT_SCHEDULE,
    image: ImageOptions,
    model: ModelOptions,
    run: RunOptions,
) -> None:
    """Make images from prompts into a folder; an interrupted run continues where it stopped."""
    if prompts.from_image is not None:
        request = _request_from_image(context, prompts, out, model)
    else:
        request = build_request(out, image.settings(model.model), model, schedule)
    if not prompts.prompt and prompts.prompts is None:
        raise SettingsError("nothing to draw: give --prompt, --prompts or --from-image")
    check_out(out)
    _run(replace(request, **run.fields_of_request()), prompts, run)


def _request_from_image(
    context: typer.Context, prompts: PromptOptions, out: Path, model: ModelOptions
) -> BatchRequest:
    """The request that an image records; its prompt becomes the prompt to draw."""
    from ..generation.regeneration import regeneration

    assert prompts.from_image is not None
    if unused := named_options(context) - BESIDE_FROM_IMAGE:
        raise SettingsError(
            f"--from-image takes the image's own settings; drop {spelled(unused, context)}"
        )
    prompt, request, notes = regeneration(prompts.from_image, out)
    for text in notes:
        note(text)
    prompts.prompt = [prompt]
    return replace(request, **model.placement())


def _run(request: BatchRequest, prompts: PromptOptions, run: RunOptions) -> None:
    """Make the images and report; exits with 1 if some failed, 128 + n on signal n."""
    from ..generation.batch.launch import launch
    from ..generation.batch.prompts import read_prompts

    skipped = 0

    def report(problem: str) -> None:
        nonlocal skipped
        skipped += 1
        if prompts.on_error == "skip" and skipped <= SHOWN_ROWS:
            note(f"{problem}; skipped")

    summary, stop = launch(
        request,
        lambda: read_prompts(
            prompts.prompt or (),
            prompts.prompts,
            request.base,
            template=prompts.template,
            count=prompts.num_images,
            check=request.options.check,
            on_error=prompts.on_error,
            report=report,
        ),
        stderr,
    )
    if summary is not None:
        show(summary, _text(summary), run.as_json)
    if stop.signal is not None:
        raise typer.Exit(128 + stop.signal)
    if summary is not None and summary["failed"]:
        raise typer.Exit(1)


SHOWN_ROWS = 20
"""Maximum number of invalid rows to name; the summary counts all."""


def _batch_size(text: str) -> int | None:
    from ..generation.records import LARGEST_BATCH

    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= LARGEST_BATCH):
        raise SettingsError(f"batch-size: must be 1 to {LARGEST_BATCH}, or auto (got {text!r})")
    return int(text)


def _text(summary: dict[str, Any]) -> str:
    """The summary as text."""
    made, existing, total = summary["made"], summary["there_before"], summary["images"]
    plural = "" if made == 1 else "s"
    before = f", {existing} already there" if existing else ""
    lines = [
        f"{made} image{plural} made{before}, of {total}, in {summary['seconds']:.1f} s "
        f"({summary['images_per_second']:.2f} images/s): {summary['manifest']}"
    ]
    if missing := total - made - existing - summary["failed"]:
        lines.append(f"{missing} still missing; run the same command again to continue")
    if summary["failed"]:
        lines.append(f"{summary['failed']} failed; {summary['folder']}/failed.jsonl says why")
    if hidden := summary["nsfw_content_detected"]:
        lines.append(f"{hidden} of these: the model's safety checker returned a black image")
    if summary["bad_rows"]:
        lines.append(f"{summary['bad_rows']} invalid rows skipped")
    return "\n".join(lines)
