"""Overhead of the batch engine over a bare loop around the pipeline.

Both make the same images, interleaved in small chunks, so that changes of the machine's speed
affect both.
The bare loop writes nothing; the engine writes, hashes and records every image. Prints JSON.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console

from agentsd.generation.batch.claims import Claims
from agentsd.generation.batch.engine import Stop, Work, run
from agentsd.generation.batch.jobs import Job, jobs
from agentsd.generation.batch.prompts import read_prompts
from agentsd.generation.batch.run_folder import RunFolder
from agentsd.image_settings import ImageSettings
from agentsd.models.loading import load_pipeline
from agentsd.progress import Bar


def main(
    model: str = "pocket",
    num_images: Annotated[int, typer.Option(help="For each variant.")] = 200,
    turn: Annotated[int, typer.Option(help="Images per turn.")] = 10,
    num_inference_steps: int = 25,
    device: str | None = None,
    warm_up: int = 2,
) -> None:
    """Time both variants, interleaved."""
    pipe = load_pipeline(model, device=device)
    pipe.set_progress_bar_config(disable=True)
    base = ImageSettings(prompt="-", num_inference_steps=num_inference_steps).model_dump(
        exclude={"prompt"}
    )
    prompts = [f"a red circle and {i} blue squares" for i in range(turn)]

    def bare(made: list[Job]) -> None:
        for job in made:
            pipe(
                job.settings.prompt,
                num_inference_steps=num_inference_steps,
                guidance_scale=job.settings.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(job.settings.seed),
            )

    def engine(folder: RunFolder) -> None:
        work = Work(lambda: jobs(folder.prompts, base, None), turn, 1, model)
        with Claims(folder.claims, 60) as claims, Bar("none", turn, 0, Console()) as bar:
            run(pipe, folder, work, claims, bar, Stop())

    seconds: dict[str, list[float]] = {"bare": [], "engine": []}
    busy: dict[str, list[float]] = {"bare": [], "engine": []}
    for number in range(num_images // turn):
        with tempfile.TemporaryDirectory() as place:
            folder = RunFolder(Path(place))
            folder.prepare({}, read_prompts(prompts, None, base), resume=True)
            folder.open(turn)
            made = list(jobs(folder.prompts, base, None))
            if not number:
                bare(made[:warm_up])
            variants = {"bare": lambda made=made: bare(made), "engine": lambda f=folder: engine(f)}
            for name in variants if number % 2 else reversed(variants):
                begun, before = time.perf_counter(), time.thread_time()
                variants[name]()
                seconds[name].append(time.perf_counter() - begun)
                busy[name].append(time.thread_time() - before)
    work = {name: median(times) / turn for name, times in busy.items()}
    per_image = {name: median(times) / turn for name, times in seconds.items()}
    paired = median(e / b for e, b in zip(seconds["engine"], seconds["bare"], strict=True))
    print(
        json.dumps(
            {
                "images": num_images,
                "bare_seconds_per_image": round(per_image["bare"], 5),
                "engine_seconds_per_image": round(per_image["engine"], 5),
                "overhead_percent": round(100 * (paired - 1), 2),
                # On a busy machine, the CPU time of the main thread is the better measure:
                # on the CPU it runs the model, and what else it does would keep a device waiting.
                "main_thread_ms_per_image": {n: round(1000 * s, 2) for n, s in work.items()},
                "main_thread_overhead_percent": round(100 * (work["engine"] / work["bare"] - 1), 2),
            }
        )
    )


if __name__ == "__main__":
    typer.run(main)
