"""Start a run of many images: alone, or as one of the processes of ``accelerate launch``.

The processes share the run's folder and nothing else. They meet once, when the first has checked
the prompts and prepared the folder; from then on none waits for another's answer, so that a slow
or dead one holds nobody back.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from diffusers import DiffusionPipeline
from filelock import FileLock, Timeout
from rich.console import Console

from ...errors import GenerationError, OutputError, SettingsError
from ...models.adapters import Offload, PipelineOptions, configure_pipeline, recorded_fingerprints
from ...models.fingerprints import check_unchanged, snapshot_commit
from ...models.loading import load_pipeline, model_fingerprint, only_variant, target_device
from ...progress import Bar
from ...schedule import Schedule
from ..image_files import prepare_folder
from ..records import VERSIONS
from .claims import Claims
from .engine import Stop, Work, largest_batch, run, stopping
from .prompts import Plan, jobs
from .run_folder import RunFolder


@dataclass(frozen=True)
class Request:
    """What a run is to make, how, and where.

    Args:
        out: Folder of the run.
        base: Settings of images whose row does not say otherwise: fields of
            :class:`agentsd.image_settings.ImageSettings`.
        schedule: ``None`` for unpatched images.
        options: What is added to the model.
        model: What to load; see :func:`agentsd.load_pipeline`.
        revision: Branch, tag or commit of a model on the hub.
        variant: Which of a model's weights (``fp16``), where there are several.
        device: Where to run; by default the best there is, and each process on one of its own.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        form: ``png``, ``jpg``, ``webp`` or ``webdataset``.
        batch_size: Images at a time; ``None`` finds the largest that fits.
        place: See :class:`agentsd.batch.engine.Work`.
        offload: See :func:`agentsd.options.configure_pipeline`.
        allow_pickle: Likewise.
        resume: Whether a run that is in ``out`` already may be taken up.
        progress: ``none``, ``plain`` or ``rich``.
        stale_after: Seconds of silence after which another process's work is taken over.
        known: Fingerprints that files must have, by path or hub id; those of an image that is to
            be made again.
    """

    out: Path
    base: dict[str, Any]
    schedule: Schedule | None
    options: PipelineOptions
    model: str = "pocket"
    revision: str | None = None
    variant: str | None = None
    device: str | None = None
    dtype: str | None = None
    form: str = "png"
    batch_size: int | None = 1
    place: tuple[int, int] | None = None
    offload: Offload | None = None
    allow_pickle: bool = False
    resume: bool = True
    progress: str = "plain"
    stale_after: float = 60.0
    known: Mapping[str, Any] = field(default_factory=dict)

    def loading(self) -> dict[str, str]:
        """What to tell :func:`agentsd.load_pipeline` of the model besides its name."""
        given = {"revision": self.revision, "variant": self.loaded_variant()}
        return {name: value for name, value in given.items() if value is not None}

    def loaded_variant(self) -> str | None:
        """The variant that was asked for, or is the only one in the model's folder."""
        folder = Path(self.model)
        if self.variant is not None or not os.path.isdir(folder):
            return self.variant
        return only_variant(folder, allow_pickle=self.allow_pickle)

    def recorded(self) -> dict[str, Any]:
        """What was loaded, for the record: the options, and which of the model's weights."""
        return {
            "revision": self.commit(),
            "variant": self.loaded_variant(),
            "weights": self.weights(),
            **self.options.recorded(),
        }

    def commit(self) -> str | None:
        """The commit of a model that was loaded from the hub; None for what lies on the disk."""
        local = self.model == "pocket" or os.path.exists(self.model)
        return None if local else snapshot_commit(self.model, self.revision)

    def weights(self) -> dict[str, str | None]:
        """Fingerprints of all weights, by path or hub id."""
        model = model_fingerprint(self.model, self.revision)
        return {self.model: model, **self.options.weights()}

    def check_files(self) -> None:
        """Compare the files as they are with :attr:`known`, and with the run that is in ``out``.

        Raises:
            SettingsError: Names the first file that is another.
        """
        folder = RunFolder(self.out)
        begun = self.resume and folder.run_file.exists()
        if not (self.known or begun):
            return  # hashing takes a while
        now = recorded_fingerprints(self.options.recorded() | {"weights": self.weights()})
        check_unchanged(self.known, now)
        if begun:
            try:
                check_unchanged(recorded_fingerprints(folder.read_run()["config"]), now)
            except SettingsError as error:
                raise SettingsError(
                    f"{self.out} holds a run of another configuration: {error}"
                ) from None


def launch(
    asked: Request, read: Callable[[], Plan], console: Console
) -> tuple[dict[str, Any] | None, Stop]:
    """Make all images of a request that are not there yet.

    Args:
        asked: What to make.
        read: Checks the prompts; called by the first process alone, before a model is loaded.
        console: Where progress and notes go.

    Returns:
        The summary (``None`` but in the first process) and whether a signal ended the run early.

    Raises:
        AgentSDError: If something is wrong with the request, or stops the run.
    """
    state = PartialState(cpu=target_device(asked.device).type == "cpu")
    several, first = state.num_processes > 1, state.is_main_process
    plan = read() if first else None
    if first:
        asked.check_files()
    device = str(state.device) if several and asked.device is None else asked.device
    pipe = configure_pipeline(
        load_pipeline(
            asked.model,
            device=device,
            dtype=asked.dtype,
            allow_pickle=asked.allow_pickle,
            **asked.loading(),
        ),
        asked.options,
        offload=asked.offload,
        allow_pickle=asked.allow_pickle,
    )
    if first:
        asked.check_files()  # again, since the hub's may have come only now
    folder = RunFolder(
        asked.out, f"{state.process_index}-{secrets.token_hex(4)}" if several else ""
    )
    with ExitStack() as stack:
        if plan is not None:
            stack.enter_context(_alone_in(asked.out))
            _prepare(folder, asked, plan, pipe)
        if several:
            try:
                state.wait_for_everyone()
            except RuntimeError as error:
                raise GenerationError("the first process ended before the run began") from error
        described = folder.read_run()
        total = described["config"]["images"]
        folder.open(total)
        there, begun = folder.made, time.monotonic()
        added = asked.options.recorded()

        def inputs(height: int | None, width: int | None) -> dict[str, Any]:
            now = asked.options.recorded()  # a file may change in the hours of a run
            check_unchanged(recorded_fingerprints(added), recorded_fingerprints(now))
            return asked.options.inputs(height, width)

        work = Work(
            jobs=lambda: jobs(folder.prompts, asked.base, asked.schedule),
            total=total,
            batch_size=described["batch_size"],
            model=asked.model,
            form=asked.form,
            options=added
            | {name: described["config"][name] for name in ("revision", "variant", "weights")},
            inputs=inputs,
            place=asked.place,
        )
        claims = stack.enter_context(Claims(folder.claims, asked.stale_after))
        bar = stack.enter_context(Bar(asked.progress if first else "none", total, there, console))
        stop = stack.enter_context(stopping(insist=not several))
        run(pipe, folder, work, claims, bar, stop)
    if several:
        state.destroy_process_group()
    if plan is None:
        return None, stop
    seconds = time.monotonic() - begun
    summary = {
        "folder": str(asked.out),
        "manifest": str(asked.out / "manifest.jsonl"),
        "images": total,
        "made": folder.made - there,
        "there_before": there,
        "failed": folder.failed,
        "nsfw_content_detected": folder.hidden,
        "bad_rows": plan.bad,
        "seconds": round(seconds, 3),
        "images_per_second": round((folder.made - there) / seconds, 3),
        "processes": state.num_processes,
    }
    return summary, stop


def _prepare(folder: RunFolder, asked: Request, plan: Plan, pipe: DiffusionPipeline) -> None:
    config = {
        "model": asked.model,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "prompts_sha256": plan.digest,
        "images": plan.images,
        **({"batch": list(asked.place)} if asked.place else {}),
        **asked.base,
        "schedule": asked.schedule.to_dict() if asked.schedule else None,
        "format": asked.form,
        **asked.recorded(),
    }
    old = folder.prepare(config, plan, resume=asked.resume)
    size = asked.batch_size
    if size is None:
        size = old.get("batch_size")  # what fitted before makes the same batches again
    if type(size) is not int or size < 1:
        (job,) = islice(jobs(folder.prompts, asked.base, asked.schedule), 1)
        size = largest_batch(pipe, job.settings, asked.options.inputs)
    folder.describe({"config": config, "batch_size": size, "versions": VERSIONS})


def _alone_in(out: Path) -> Any:
    """Keep other runs out of a folder until this one ends, however it ends."""
    prepare_folder(out)
    lock = FileLock(out / ".lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"another run is at work in {out}; wait for it, or give another --out"
        ) from None
