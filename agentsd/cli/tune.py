"""``agentsd tune``: the fastest schedule for a model, device and quality budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from ..errors import SettingsError
from ..progress import PLAIN_EVERY
from .console import loading, note, progress_style, show, stderr
from .image_options import ImageOptions, ModelOptions, build_request
from .options import AsJson, with_option_groups

if TYPE_CHECKING:
    from ..tuning.clock import TuningProgress


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
        typer.Option(help="A .txt file with one prompt per line; 40 are best, ten are held out."),
    ],
    out: Annotated[
        Path, typer.Option(help="YAML file to write; the report goes into a folder beside it.")
    ],
    *,
    minutes: Annotated[
        float, typer.Option(min=0.1, max=1440, help="Time limit; more time finds better schedules.")
    ] = 10.0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Reuse an earlier run's measurements; the budget may differ."
        ),
    ] = False,
    image: ImageOptions,
    model: ModelOptions,
    as_json: AsJson = False,
) -> None:
    """Find the fastest schedule that keeps to a budget, by measuring. Ctrl-C keeps the best."""
    from ..image_settings import ImageSettings
    from ..text_files import prompt_lines
    from ..tuning.budget import Budget
    from ..tuning.tune import tune

    Budget.parse(budget)
    lines = prompt_lines(prompts, SettingsError)
    settings = image.settings(model.model)
    request = build_request(out, settings, model)
    request.options.check(ImageSettings(prompt="-", **settings))
    with loading(model.model):
        pipe = request.load()
    with _Display() as display:
        result = tune(
            pipe,
            budget,
            lines,
            out=out,
            minutes=minutes,
            resume=resume,
            model=model.model,
            weights=request.recorded()["weights"].get(model.model),
            call_kwargs=request.options.call_kwargs(settings["height"], settings["width"]),
            progress=display.show,
            **settings,
        )
    if result.stopped:
        note("stopped; this is the best so far, and --resume continues")
    text = "\n".join([*result.report["words"], f"{result.yaml}, {result.page}"])
    show(result.report, text, as_json)
    if result.stopped:
        raise typer.Exit(130)


class _Display:
    """Shows the stage, the time and the best so far, in place on a terminal, else line by line."""

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
