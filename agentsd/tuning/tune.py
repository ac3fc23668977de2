"""Tune a schedule for a model, a device and an eye."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ..errors import GenerationError, SettingsError
from ..generation.conditions import conditions
from ..generation.image_files import prepare_folder, write_whole
from ..models.fingerprints import fingerprint
from ..models.loading import POCKET, default_guidance
from ..patching.patch import remove_patch
from ..schedule import Schedule
from .budget import Budget
from .clock import Clock, TuningProgress, TuningStopped
from .outcome import figures, tuned_yaml
from .prompts import split_prompts
from .report import require_packages, write_report
from .tuner import Tuner
from .workspace import Workspace


@dataclass(frozen=True)
class Tuning:
    """What tuning found.

    Args:
        schedule: The best, with what it was tuned for.
        front: Schedules that no other beats in both time and likeness, the fastest first: for
            each its ``name``, ``time`` (as a share of an unpatched run), the likeness and what it
            does.
        report: All figures, as plain values.
        yaml: The file of the schedule.
        page: The report.
        stopped: Whether it was stopped before its end.
    """

    schedule: Schedule
    front: list[dict[str, Any]]
    report: dict[str, Any]
    yaml: Path
    page: Path
    stopped: bool

    @property
    def words(self) -> str:
        """What was found, in sentences."""
        return " ".join(self.report["words"])


def tune(
    pipe: DiffusionPipeline,
    budget: str,
    prompts: Sequence[str],
    *,
    out: str | Path,
    minutes: float = 10,
    resume: bool = False,
    model: str | None = None,
    weights: str | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    progress: Callable[[TuningProgress], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Tuning:
    """Find the fastest schedule that keeps to a budget, by measuring on this device.

    Single steps of many candidates are measured along unpatched runs, and real images made with the
    most promising. The images that judge the winner have other prompts than those that it was
    chosen on. Ctrl-C, or ``cancelled``, ends it with the best so far.

    Args:
        pipe: A pipeline with a UNet, on its device; a patch on it is removed.
        budget: ``"psnr>=40"`` (dB), ``"ssim>=0.98"`` or ``"lpips<=0.1"``, which are to hold for 9
            of 10 images, or ``"speed>=3"``.
        prompts: Two or more, 40 are better; ten of them (of fewer than 19 about half) are held out.
        out: A ``.yaml`` file for the schedule. The report and all that is measured go into a folder
            beside it, of the same name with ``.tuning``.
        minutes: That it may take. More finds better schedules.
        resume: Use what is in that folder already; another budget may be given then.
        model: What the pipeline was loaded from, for the record.
        weights: The fingerprint of that.
        call_kwargs: Further arguments of the pipeline's call.
        progress: Called often with a :class:`TuningProgress`.
        cancelled: Called often; true ends tuning.
        **settings: Of the images, as for :class:`agentsd.image_settings.ImageSettings`:
            ``num_inference_steps``, ``guidance_scale``, ``height``, ``width``, ``seed``.

    Returns:
        A :class:`Tuning`: the ``schedule``, the ``front`` of likeness against time, what was found
        in ``words``, all figures as ``report``, and where they are (``yaml``, ``page``).

    Raises:
        SettingsError: If an argument is not valid, or the time is too short.
        OutputError: If a file cannot be written.
        GenerationError: If it is stopped before any schedule has all of its images
            (``KeyboardInterrupt`` on Ctrl-C), or the pipeline fails.

    Example:
        >>> from agentsd import apply_patch, load_pipeline, tune
        >>> pipe, prompts = load_pipeline("pocket"), ["a red circle", "a blue star"]
        >>> tuning = tune(pipe, "psnr>=40", prompts, out="mine.yaml")  # doctest: +SKIP
        >>> pipe = apply_patch(pipe, tuning.schedule)  # doctest: +SKIP
    """
    wanted, out = Budget.parse(budget), Path(out)
    if out.suffix not in (".yaml", ".yml") or out.is_dir():
        raise SettingsError(f"out: must be the name of a .yaml file (got {str(out)!r})")
    require_packages()
    source = model or str(pipe.config.get("_name_or_path") or "unknown")
    is_pocket = source in ("pocket", str(POCKET))
    settings = {"guidance_scale": default_guidance("pocket" if is_pocket else source)} | settings
    images = split_prompts(prompts, settings)
    if weights is None:
        weights = fingerprint(POCKET if is_pocket else source)
    source = "pocket" if is_pocket else source
    now = conditions(pipe, images.tuning[0].model_dump(), source, weights)
    prepare_folder(out.parent)
    about = now.model_dump() | {
        "tuning": [each.model_dump() for each in images.tuning],
        "held_out": [each.model_dump() for each in images.held_out],
        "more": [each.model_dump() for each in images.more],
    }
    workspace = Workspace(out.with_suffix(".tuning"), about, resume=resume)
    remove_patch(pipe)
    clock = Clock(minutes, progress, cancelled)
    tuner = Tuner(pipe, wanted, images, workspace, clock, call_kwargs or {})
    stopped = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="this agentsd schedule changes nothing")
            for stage in (tuner.prepare, tuner.screen, tuner.find, tuner.judge):
                stage()
    except (KeyboardInterrupt, TuningStopped) as stop:
        stopped = True
        if tuner.best() is None:
            if isinstance(stop, KeyboardInterrupt):
                raise
            raise GenerationError(
                "tuning was stopped before it knew any schedule; resume it (--resume)"
            ) from None
    found = figures(tuner, now, stopped=stopped)
    write_whole(workspace.folder / "report.json", json.dumps(found, indent=1).encode())
    text = tuned_yaml(found)
    write_whole(out, text.encode())
    page = write_report(found, workspace.folder, text)
    front = [{"name": name, **found["variants"][name]} for name in found["front"]]
    return Tuning(Schedule.from_yaml(text), front, found, out, page, stopped)
