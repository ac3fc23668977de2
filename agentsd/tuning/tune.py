"""Tune a schedule for a model, device and quality budget."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers import DiffusionPipeline

from ..errors import GenerationError, SettingsError
from ..evaluation.report import require_packages
from ..generation.conditions import conditions
from ..generation.image_files import write_whole
from ..models.fingerprints import fingerprint
from ..models.loading import POCKET, default_guidance
from ..patching.patch import remove_patch
from ..schedule import Schedule
from .budget import Budget
from .clock import Clock, TuningProgress, TuningStopped
from .outcome import figures, tuned_yaml
from .report import write_report
from .split import split_prompts
from .tuner import Tuner
from .workspace import Workspace


@dataclass(frozen=True)
class Tuning:
    """The result of tuning.

    Args:
        schedule: The best schedule, with the conditions it was tuned for.
        front: Schedules that no other beats in both time and similarity, fastest first, each with
            its ``name``, its ``time`` (as a share of an unpatched run), its similarity and what it
            does.
        report: All figures, as plain values.
        yaml: File of the schedule, if one was written.
        page: The HTML report, likewise.
        stopped: Whether tuning was stopped early.
    """

    schedule: Schedule
    front: list[dict[str, Any]]
    report: dict[str, Any]
    yaml: Path | None
    page: Path | None
    stopped: bool

    @property
    def words(self) -> str:
        """The result in sentences."""
        return " ".join(self.report["words"])


def tune(
    pipe: DiffusionPipeline,
    budget: str,
    prompts: Sequence[str],
    *,
    out: str | Path | None = None,
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

    Single steps of many candidates are measured along unpatched runs; the most promising candidates
    then make real images. The winner is judged on other prompts than it was chosen on. Ctrl-C, or
    ``cancelled``, ends tuning with the best schedule so far.

    Args:
        pipe: A pipeline with a UNet, on its device; a patch on it is removed.
        budget: ``"psnr>=40"`` (dB), ``"ssim>=0.98"`` or ``"lpips<=0.1"``, which must hold for 9 of
            10 images, or ``"speed>=3"``.
        prompts: Two or more; 40 are better. Ten of them are held out, or about half if there are
            fewer than 19.
        out: A ``.yaml`` file for the schedule. The report and all measurements go into a folder
            beside it, of the same name with ``.tuning``. ``None`` keeps no files.
        minutes: Time limit. More time finds better schedules.
        resume: Reuse the measurements in that folder; the budget may differ.
        model: What the pipeline was loaded from, for the record.
        weights: Fingerprint of its weights, likewise.
        call_kwargs: Further arguments of the pipeline's call.
        progress: Called often with a :class:`TuningProgress`.
        cancelled: Called often; returns whether to stop.
        **settings: Settings of the images, as for :class:`agentsd.image_settings.ImageSettings`:
            ``num_inference_steps``, ``guidance_scale``, ``height``, ``width``, ``seed``.

    Returns:
        The best schedule, the front of similarity against time, the result in words, all figures,
        and the files if ``out`` was given.

    Raises:
        SettingsError: If an argument is invalid, or the time is too short.
        MissingPackageError: If ``out`` is given and jinja2 or matplotlib is not installed, or the
            budget is SSIM or LPIPS and torchmetrics is not.
        OutputError: If a file cannot be written.
        GenerationError: If it is stopped before any schedule was measured in full
            (``KeyboardInterrupt`` on Ctrl-C), or the pipeline fails.

    Example:
        >>> from agentsd import apply_patch, load_pipeline, tune
        >>> pipe, prompts = load_pipeline("pocket"), ["a red circle", "a blue star"]
        >>> tuning = tune(pipe, "psnr>=40", prompts)  # doctest: +SKIP
        >>> pipe = apply_patch(pipe, tuning.schedule)  # doctest: +SKIP
    """
    wanted = Budget.parse(budget)
    if out is None and resume:
        raise SettingsError("resume: needs out, the file of the run to resume")
    file = None if out is None else _checked(Path(out))
    source = model or str(pipe.config.get("_name_or_path") or "unknown")
    is_pocket = source in ("pocket", str(POCKET))
    settings = {"guidance_scale": default_guidance("pocket" if is_pocket else source)} | settings
    images = split_prompts(prompts, settings)
    if weights is None:
        weights = fingerprint(POCKET if is_pocket else source)
    source = "pocket" if is_pocket else source
    now = conditions(pipe, images.tuning[0].model_dump(), source, weights)
    about = now.model_dump() | {
        name: [image.model_dump() for image in part] for name, part in images._asdict().items()
    }
    kept = None if file is None else file.with_suffix(".tuning")
    with nullcontext(kept) if kept else TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder), about, resume=resume)
        remove_patch(pipe)
        clock = Clock(minutes, progress, cancelled)
        tuner = Tuner(pipe, wanted, images, workspace, clock, call_kwargs or {})
        stopped = _run(tuner)
        result = figures(tuner, now, stopped=stopped)
        text = tuned_yaml(result)
        page = None
        if file is not None:
            write_whole(workspace.folder / "report.json", json.dumps(result, indent=1).encode())
            write_whole(file, text.encode())
            page = write_report(result, workspace.folder, text)
    front = [{"name": name, **result["variants"][name]} for name in result["front"]]
    return Tuning(Schedule.from_yaml(text), front, result, file, page, stopped)


def _checked(out: Path) -> Path:
    """A file for the schedule, for which a report can be written."""
    if out.suffix not in (".yaml", ".yml") or out.is_dir():
        raise SettingsError(f"out: must be the name of a .yaml file (got {str(out)!r})")
    require_packages("a tuning report", "jinja2", "matplotlib")
    return out


def _run(tuner: Tuner) -> bool:
    """Run all stages; returns whether they were stopped, with a best schedule so far."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="this agentsd schedule changes nothing")
            for stage in (tuner.prepare, tuner.screen, tuner.find, tuner.judge):
                stage()
    except (KeyboardInterrupt, TuningStopped) as stop:
        if tuner.best() is not None:
            return True
        if isinstance(stop, KeyboardInterrupt):
            raise
        raise GenerationError(
            "tuning was stopped before any schedule was measured in full; resume it (--resume)"
        ) from None
    return False
