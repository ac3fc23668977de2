"""``agentsd benchmark``: time variants of the UNet; a table, a CSV file and a plot."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from ..errors import MissingPackageError, SettingsError
from .console import note, show_table, stderr, stdout
from .options import Device

if TYPE_CHECKING:
    from ..benchmark.cases import Case
    from ..benchmark.timing import Measurement
    from ..benchmark.variants import UNetPatch


Model = Literal["sd15", "sd15-top", "sd21", "sdxl", "pocket"]

DEFAULT_SIZE: dict[Model, int] = {"sdxl": 1024, "pocket": 256}
"""Default image size in pixels, if it is not 512."""


def benchmark(
    context: typer.Context,
    model: Annotated[
        Model,
        typer.Option(
            help="A real architecture with random weights (sd15-top is one block of sd15), or the "
            "pocket model."
        ),
    ] = "sd15",
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="Image size in pixels, 512 or 768x512 (width first); repeat for several.",
            show_default="the model's own",
        ),
    ] = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(help="Preset or YAML file; repeat for several.", show_default="all presets"),
    ] = None,
    baselines: Annotated[bool, typer.Option(help="Also time tomesd, ToDo and tiles.")] = True,
    batch: Annotated[
        int, typer.Option(min=1, max=1024, help="UNet batch size; one guided image counts as 2.")
    ] = 2,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16.",
            show_default="float16; on the CPU bfloat16, for pocket float32",
        ),
    ] = None,
    device: Device = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="CPU threads.", show_default="PyTorch's choice"),
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the UNet.")] = False,
    steps: Annotated[
        int, typer.Option(min=1, max=1000, help="Denoising steps of the full runs to estimate.")
    ] = 25,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after the warm-up.")] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="The pocket model, two rounds: about two minutes.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="CSV file to write, with a plot beside it.")
    ] = None,
) -> None:
    """Time a UNet call, unpatched and patched, interleaved. Ctrl-C keeps finished rounds."""
    import torch

    from ..benchmark import output, variants
    from ..generation.image_files import prepare_folder
    from ..schedule import Schedule

    if quick:
        model, rounds = "pocket", 2
    if out is not None and (out.suffix != ".csv" or out.is_dir()):
        raise SettingsError(f"--out takes the name of a .csv file (got {out})")
    if out is not None and not find_spec("matplotlib"):
        note(f"no plot: {MissingPackageError('matplotlib', 'a plot', 'benchmark')}")
    cases = _cases(model, size, batch, dtype, device, compile)
    schedules = schedule or Schedule.presets()
    timed = variants.variants_of(schedules, baselines)
    if baselines and not variants.BASELINES.keys() <= timed.keys():
        note(f"no tomesd: {MissingPackageError('tomesd', 'this baseline', 'benchmark')}")
    if out is not None:
        prepare_folder(out.parent)
    if threads:
        torch.set_num_threads(threads)
    measured: list[Measurement] = []
    try:
        for measured in _measure(cases, timed, rounds):
            if out is not None:
                output.write_csv(measured, out, shlex.join(["agentsd", *context.obj]))
    except KeyboardInterrupt:
        note("stopped; these are the finished rounds")
        _show(measured, out, schedules, steps)
        raise typer.Exit(130) from None
    _show(measured, out, schedules, steps)


def _cases(
    model: Model,
    sizes: list[str] | None,
    batch: int,
    dtype: str | None,
    device: str | None,
    compiled: bool,
) -> list[Case]:
    """One case per size."""
    from ..benchmark.cases import Case
    from ..models.loading import target_device, target_dtype

    target = target_device(device)
    if dtype is None and target.type == "cpu" and model != "pocket":
        dtype = "bfloat16"  # real architectures are slow in float32
    name = str(target_dtype(dtype, target)).removeprefix("torch.")
    latents = [_latents(size, model) for size in sizes or [str(DEFAULT_SIZE.get(model, 512))]]
    return [
        Case(model, height, width, batch, name, str(target), compiled) for height, width in latents
    ]


def _latents(size: str, model: Model) -> tuple[int, int]:
    """Height and width of the latents of an image of ``size`` (width first)."""
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", size.strip())
    factor = 4 if model == "pocket" else 8
    width, height = (int(n) for n in (match[1], match[2] or match[1])) if match else (0, 0)
    if not 8 * factor <= min(width, height) <= max(width, height) <= 8192 or (width | height) % 8:
        raise SettingsError(
            f"--size must be WIDTHxHEIGHT or one number, in pixels, multiples of 8 from "
            f"{8 * factor} to 8,192 (got {size[:40]!r})"
        )
    return height // factor, width // factor


def _measure(
    cases: list[Case], variants: dict[str, UNetPatch], rounds: int
) -> Iterator[list[Measurement]]:
    """All measurements so far, after each round."""
    from ..benchmark import timing

    finished: list[Measurement] = []
    for case in cases:
        with stderr.status("") as status:

            def show_step(text: str) -> None:
                status.update(Text(f"{case.model} {case.height}x{case.width}: {text}"))  # noqa: B023

            measured: list[Measurement] = []
            for measured in timing.run(case, variants, rounds, show_step):
                yield finished + measured
        finished += measured


def _show(measured: list[Measurement], out: Path | None, schedules: list[str], steps: int) -> None:
    """Print the table and the speed of whole runs, draw the plot, and name the files."""
    from ..benchmark import output

    if not measured:
        return
    show_table(output.table(measured))
    for line in output.runs(measured, schedules, steps):
        stdout.print(line, markup=False)
    if text := output.removed_note(measured):
        note(text)
    if out is not None:
        written = [out]
        if find_spec("matplotlib"):
            written.append(out.with_suffix(".png"))
            output.plot(measured, written[-1])
        stdout.print(", ".join(map(str, written)), markup=False)
