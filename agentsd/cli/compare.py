"""``agentsd compare``: the same images unpatched and patched, side by side and timed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SettingsError
from .console import loading, note, show
from .image_options import ImageOptions, ModelOptions, Schedule, build_request, check_out
from .options import DEFAULT_SCHEDULE, AsJson, with_option_groups


@with_option_groups
def compare(
    out: Annotated[Path, typer.Option(help="Folder for the images; created if missing.")],
    prompt: Annotated[list[str], typer.Option(help="What to draw.")],
    *,
    num_images: Annotated[
        int,
        typer.Option(min=1, max=1_000_000, help="Number of images, each patched and unpatched."),
    ] = 1,
    schedule: Schedule = DEFAULT_SCHEDULE,
    image: ImageOptions,
    model: ModelOptions,
    as_json: AsJson = False,
) -> None:
    """Make a prompt's images unpatched and patched, side by side, and time both.

    Exits with 1 if a safety checker hid an image.
    """
    from ..generation import comparison
    from ..generation.prompt_encoding import warnings_for
    from ..image_settings import ImageSettings

    request = build_request(out, image.settings(model.model), model, schedule)
    if request.schedule is None:
        raise SettingsError("a comparison requires a schedule other than 'none'")
    if len(prompt) != 1:
        raise SettingsError("a comparison takes one --prompt")
    check_out(out)
    settings = ImageSettings(prompt=prompt[0], **request.base)
    request.options.check(settings)
    with loading(request.model):
        pipe = request.load()
    for warning in warnings_for(pipe, settings):
        note(warning)
    summary = comparison.compare(
        pipe,
        settings,
        out,
        schedule=request.schedule,
        model=request.model,
        num_images=num_images,
        options=request.recorded(),
        call_kwargs=request.options.call_kwargs(settings.height, settings.width),
    )
    show(summary, _text(summary, out), as_json)
    if summary["nsfw_content_detected"]:
        raise typer.Exit(1)


def _text(summary: dict[str, Any], out: Path) -> str:
    """The comparison as text: one line per image, and the speed-up."""
    images = summary["images"]
    lines = [
        f"{out / image['comparison_file']}  (seed {image['seed']}, {image['seconds']:.1f} s)"
        for image in images
    ]
    hidden = [
        bool(image["nsfw_content_detected"] or image["unpatched_nsfw_content_detected"])
        for image in images
    ]
    if summary["psnr"] is not None:
        similarity = f"PSNR {summary['psnr']:.1f} dB"
    else:
        similarity = "not measured" if all(hidden) else "the same image"
    lines.append(
        f"unpatched {summary['unpatched_seconds']:.1f} s, agentsd {summary['seconds']:.1f} s: "
        f"{summary['speedup']:.2f}× as fast; similarity to the unpatched image: {similarity}"
    )
    if any(hidden):
        lines.append(
            f"{sum(hidden)} of {len(hidden)} images are not compared: the model's safety checker "
            "returned a black image"
        )
    return "\n".join(lines)
