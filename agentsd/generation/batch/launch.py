"""Start a run of many images: in one process, or as one of those of ``accelerate launch``.

The processes share the run's folder and nothing else. They meet once, when the first has checked
the prompts and prepared the folder; from then on none waits for another's answer, so that a slow
or dead one holds nobody back.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import islice
from typing import Any

from accelerate import PartialState
from diffusers import DiffusionPipeline
from rich.console import Console

from ...errors import GenerationError
from ...models.fingerprints import check_unchanged
from ...models.loading import target_device
from ...models.options import recorded_fingerprints
from ...progress import Bar
from ..records import VERSIONS
from .batch_maker import largest_batch
from .claims import Claims
from .engine import Stop, Work, run, stopping
from .jobs import jobs
from .prompts import PromptList
from .request import BatchRequest
from .run_folder import RunFolder, only_run_in


def launch(
    request: BatchRequest, read: Callable[[], PromptList], console: Console
) -> tuple[dict[str, Any] | None, Stop]:
    """Make all images of a request that are not there yet.

    Args:
        request: What to make.
        read: Checks the prompts; called in the first process only, before a model is loaded.
        console: Where progress and notes go.

    Returns:
        The summary (``None`` except in the first process) and whether a signal ended the run early.

    Raises:
        AgentSDError: If something is wrong with the request, or stops the run.
    """
    request.options.check_files()
    state = PartialState(cpu=target_device(request.device).type == "cpu")
    several, first = state.num_processes > 1, state.is_main_process
    prompts = read() if first else None
    if first:
        request.check_fingerprints()
    pipe = request.load(str(state.device) if several and request.device is None else None)
    if first:
        request.check_fingerprints()  # again: files of the hub may have been downloaded only now
    name = f"{state.process_index}-{secrets.token_hex(4)}" if several else ""
    folder = RunFolder(request.out, name)
    with ExitStack() as stack:
        if prompts is not None:
            stack.enter_context(only_run_in(request.out))
            _prepare(folder, request, prompts, pipe)
        if several:
            try:
                state.wait_for_everyone()
            except RuntimeError as error:
                raise GenerationError("the first process ended before the run began") from error
        work = _work(folder, request)
        folder.open(work.total)
        there, begun = folder.made, time.monotonic()
        claims = stack.enter_context(Claims(folder.claims, request.stale_after))
        how = request.progress if first else "none"
        bar = stack.enter_context(Bar(how, work.total, there, console))
        stop = stack.enter_context(stopping(insist=not several))
        run(pipe, folder, work, claims, bar, stop)
    if several:
        state.destroy_process_group()
    if prompts is None:
        return None, stop
    seconds = time.monotonic() - begun
    summary = {
        "folder": str(request.out),
        "manifest": str(request.out / "manifest.jsonl"),
        "images": work.total,
        "made": folder.made - there,
        "there_before": there,
        "failed": folder.failed,
        "nsfw_content_detected": folder.hidden,
        "bad_rows": prompts.bad,
        "seconds": round(seconds, 3),
        "images_per_second": round((folder.made - there) / seconds, 3),
        "processes": state.num_processes,
    }
    return summary, stop


def _prepare(
    folder: RunFolder, request: BatchRequest, prompts: PromptList, pipe: DiffusionPipeline
) -> None:
    config = {
        "model": request.model,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "prompts_sha256": prompts.digest,
        "images": prompts.images,
        **({"batch": list(request.batch_position)} if request.batch_position else {}),
        **request.base,
        "schedule": request.schedule.to_dict() if request.schedule else None,
        "format": request.form,
        **request.recorded(),
    }
    old = folder.prepare(config, prompts, resume=request.resume)
    size = request.batch_size
    if size is None:
        size = old.get("batch_size")  # the same batches as before
    if type(size) is not int or size < 1:
        (job,) = islice(jobs(folder.prompts, request.base, request.schedule), 1)
        size = largest_batch(pipe, job.settings, request.options.call_kwargs)
    folder.describe({"config": config, "batch_size": size, "versions": VERSIONS})


def _work(folder: RunFolder, request: BatchRequest) -> Work:
    """What a prepared folder's run is to make."""
    described = folder.read_run()
    config, options = described["config"], request.options.recorded()

    def inputs(height: int | None, width: int | None) -> dict[str, Any]:
        now = request.options.recorded()  # a file may change during the hours of a run
        check_unchanged(recorded_fingerprints(options), recorded_fingerprints(now))
        return request.options.call_kwargs(height, width)

    return Work(
        jobs=lambda: jobs(folder.prompts, request.base, request.schedule),
        total=config["images"],
        batch_size=described["batch_size"],
        model=request.model,
        form=request.form,
        options=options | {name: config[name] for name in ("revision", "variant", "weights")},
        inputs=inputs,
        batch_position=request.batch_position,
    )
