"""``agentsd generate``: prompts to a folder of images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SettingsError
from .compare import run_comparison
from .console import note, progress_style, show, stderr
from .image_options import ImageOptions, ModelOptions, build_request, check_out
from .options import DEFAULT_SCHEDULE, named_options, spelled, with_option_groups

if TYPE_CHECKING:
    from ..generation.batch.request import BatchRequest

PROMPTS, RUN = "Prompts", "Run"


class ImageFormat(str, Enum):
    """What images are written as."""

    png = "png"
    jpg = "jpg"
    webp = "webp"
    webdataset = "webdataset"


class OnError(str, Enum):
    """What to do about invalid rows."""

    stop = "stop"
    skip = "skip"


class ProgressStyle(str, Enum):
    """How progress is shown."""

    none = "none"
    plain = "plain"
    rich = "rich"


@dataclass
class PromptOptions:
    """What to draw."""

    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What to draw; repeat for several.", rich_help_panel=PROMPTS),
    ] = None
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A .txt, .jsonl, .csv or .tsv file of prompts; - reads standard input.",
            rich_help_panel=PROMPTS,
        ),
    ] = None
    template: Annotated[
        str,
        typer.Option(
            help="Text around each prompt, with {} in its place.", rich_help_panel=PROMPTS
        ),
    ] = "{}"
    on_error: Annotated[
        OnError,
        typer.Option(
            help="Invalid rows: stop before any work, or skip them.", rich_help_panel=PROMPTS
        ),
    ] = OnError.stop
    from_image: Annotated[
        Path | None,
        typer.Option(
            help="Regenerate an image from the settings stored in its file.",
            rich_help_panel=PROMPTS,
        ),
    ] = None
    num_images: Annotated[
        int,
        typer.Option(
            min=1,
            max=1_000_000,
            help="Number of images of each prompt.",
            rich_help_panel=PROMPTS,
        ),
    ] = 1


@dataclass
class RunOptions:
    """How the images are made and written."""

    format: Annotated[
        ImageFormat,
        typer.Option(
            help="File format; webdataset packs PNGs into .tar shards.", rich_help_panel=RUN
        ),
    ] = ImageFormat.png
    batch_size: Annotated[
        str,
        typer.Option(
            help="Images at a time, or 'auto' for the most that fit in memory.",
            rich_help_panel=RUN,
        ),
    ] = "1"
    resume: Annotated[
        bool, typer.Option(help="Continue the run that is in --out.", rich_help_panel=RUN)
    ] = True
    progress: Annotated[
        ProgressStyle | None,
        typer.Option(
            help="How progress is shown on stderr.",
            show_default="rich on a terminal, else plain",
            rich_help_panel=RUN,
        ),
    ] = None
    stale_after: Annotated[
        float,
        typer.Option(
            min=1,
            max=86400,
            help="Seconds of silence after which another process counts as dead.",
            rich_help_panel=RUN,
        ),
    ] = 60.0
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the summary as JSON.", rich_help_panel=RUN),
    ] = False

    def fields_of_request(self) -> dict[str, Any]:
        """These options, checked, as fields of a request."""
        return {
            "form": self.format.value,
            "batch_size": _batch_size(self.batch_size),
            "resume": self.resume,
            "progress": self.progress.value if self.progress else progress_style(),
            "stale_after": self.stale_after,
        }


BESIDE_FROM_IMAGE = {
    *("from_image", "out", "device", "cpu_offload", "allow_pickle"),
    *RunOptions.__dataclass_fields__,
}
"""Options that an image does not record."""

NOT_COMPARED = {"on_error", *RunOptions.__dataclass_fields__} - {"as_json"}
"""Options without effect on a comparison, which is not a run."""


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
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Compare with unpatched images, as agentsd compare does."),
    ] = False,
    model: ModelOptions,
    run: RunOptions,
) -> None:
    """Make images from prompts into a folder; an interrupted run continues where it stopped."""
    if prompts.from_image is not None:
        request = _request_from_image(context, prompts, out, model)
    else:
        request = build_request(out, schedule, image, model)
    if not prompts.prompt and prompts.prompts is None:
        raise SettingsError("nothing to draw: give --prompt, --prompts or --from-image")
    if compare:
        _compare(context, request, prompts, run)
    else:
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


def _compare(
    context: typer.Context, request: BatchRequest, prompts: PromptOptions, run: RunOptions
) -> None:
    from ..generation.batch.prompts import checked_template

    if unused := named_options(context) & NOT_COMPARED:
        raise SettingsError(
            f"--compare cannot be combined with options of a run; drop {spelled(unused, context)}"
        )
    if prompts.prompts is not None:
        raise SettingsError("--compare cannot be combined with --prompts; it takes one --prompt")
    template = checked_template(prompts.template)
    texts = [template.replace("{}", prompt) for prompt in prompts.prompt or ()]
    run_comparison(request, texts, prompts.num_images, run.as_json)


def _run(request: BatchRequest, prompts: PromptOptions, run: RunOptions) -> None:
    """Make the images and report; exits with 1 if some failed, 128 + n on signal n."""
    from ..generation.batch.launch import launch
    from ..generation.batch.prompts import read_prompts

    skipped = 0

    def report(problem: str) -> None:
        nonlocal skipped
        skipped += 1
        if prompts.on_error is OnError.skip and skipped <= SHOWN_ROWS:
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
            on_error=prompts.on_error.value,
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
"""Invalid rows named one by one; the summary counts all."""


def _batch_size(text: str) -> int | None:
    from ..generation.records import LARGEST_BATCH

    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= LARGEST_BATCH):
        raise SettingsError(f"batch-size: must be 1 to {LARGEST_BATCH}, or auto (got {text!r})")
    return int(text)


def _text(summary: dict[str, Any]) -> str:
    """The summary for people."""
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
