"""``agentsd tune``: the schedule that suits a model, a device and an eye."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ..errors import SettingsError
from .console import loading, note, progress_style, show, stderr
from .image_options import ModelOptions
from .options import AsJson, with_option_groups

if TYPE_CHECKING:
    from ..tuning.clock import TuningProgress

PLAIN_EVERY = 10.0
"""Seconds between lines, where there is no terminal."""


@with_option_groups
def tune(
    budget: Annotated[
        str,
        typer.Option(
            help="psnr>=DB, ssim>=SHARE or lpips<=DISTANCE to the unpatched image, for 9 of 10 "
            "images; or speed>=FACTOR."
        ),
    ],
    prompts: Annotated[
        Path,
        typer.Option(help="A .txt file, a prompt a line; 40 are best, ten are held out."),
    ],
    out: Annotated[
        Path, typer.Option(help="YAML file to write; the report goes into a folder beside it.")
    ],
    *,
    minutes: Annotated[
        float, typer.Option(min=0.1, max=1440, help="Time to take; more finds better schedules.")
    ] = 10.0,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Use what an earlier run measured; the budget may differ."),
    ] = False,
    steps: Annotated[int, typer.Option(help="Denoising steps, 1 to 1000.")] = 25,
    size: Annotated[
        str | None,
        typer.Option(help="In pixels, 512 or 768x512 (width first).", show_default="the model's"),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Weight of the prompt, 0 to 100.", show_default="7.5; pocket: 2"),
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="What to avoid.")] = "",
    seed: Annotated[int, typer.Option(help="Seed that those of all images follow from.")] = 0,
    model: ModelOptions,
    as_json: AsJson = False,
) -> None:
    """Find the fastest schedule that keeps to a budget, by measuring. Ctrl-C keeps the best."""
    from ..evaluation.image_sets.prompts import prompt_lines
    from ..models.loading import default_guidance
    from ..tuning.budget import Budget
    from ..tuning.tune import tune

    Budget.parse(budget)
    lines = prompt_lines(prompts, SettingsError)
    settings: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": default_guidance(model.model)
        if guidance_scale is None
        else guidance_scale,
        "negative_prompt": negative_prompt,
        "seed": seed,
        **_sides(size),
    }
    request = _request(out, settings, model)
    with loading(model.model):
        pipe = request.load()
    with _Display() as display:
        found = tune(
            pipe,
            budget,
            lines,
            out=out,
            minutes=minutes,
            resume=resume,
            model=model.model,
            weights=request.recorded()["weights"].get(model.model),
            call_kwargs=request.options.call_kwargs(settings.get("height"), settings.get("width")),
            progress=display.show,
            **settings,
        )
    if found.stopped:
        note("stopped; this is the best so far, and --resume goes on")
    text = "\n".join([*found.report["words"], f"{found.yaml}, {found.page}"])
    show(found.report, text, as_json)
    if found.stopped:
        raise typer.Exit(130)


def _request(out: Path, settings: dict[str, Any], model: ModelOptions) -> Any:
    """What to load, checked before it is."""
    from ..generation.batch.request import BatchRequest
    from ..image_settings import ImageSettings

    image = ImageSettings(prompt="-", **settings)
    request = BatchRequest(
        out=out,
        base=settings,
        schedule=None,
        options=model.pipeline_options(),
        model=model.model,
        revision=model.revision,
        variant=model.variant,
        dtype=model.dtype.value if model.dtype else None,
        **model.placement(),
    )
    request.options.check(image)
    return request


def _sides(size: str | None) -> dict[str, int]:
    """The sides of an image of ``size``, which gives the width first."""
    if size is None:
        return {}
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", size.strip())
    if found is None:
        raise SettingsError(
            f"--size must be one number or WIDTHxHEIGHT, in pixels (got {size[:40]!r})"
        )
    return {"width": int(found[1]), "height": int(found[2] or found[1])}


class _Display:
    """Shows the stage, the time and the best so far: in one line that changes, or in lines."""

    def __init__(self) -> None:
        self._rich = progress_style() == "rich"
        self._status = stderr.status("")
        self._stage, self._shown_at = "", 0.0

    def __enter__(self) -> _Display:
        if self._rich:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def show(self, now: TuningProgress) -> None:
        """Show the progress."""
        left = max(now.limit - now.seconds, 0)
        text = f"{now.stage}: {_clock(now.seconds)}, at most {_clock(left)} left"
        text += f"; best so far {now.best}" if now.best else ""
        if self._rich:
            self._status.update(Text(text))
        elif now.stage != self._stage or now.seconds - self._shown_at >= PLAIN_EVERY:
            self._stage, self._shown_at = now.stage, now.seconds
            stderr.print(text, markup=False)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
