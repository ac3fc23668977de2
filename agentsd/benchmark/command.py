"""``agentsd benchmark``: a table, a CSV and a plot of what each variant takes."""

from __future__ import annotations

import re
import shlex
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import OutputError, SettingsError

stdout = Console(highlight=False)
if not stdout.is_terminal:
    stdout.width = 120  # a file or a pipe need not cut the table to 80 columns
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


class Model(str, Enum):
    """Names of the shapes that can be timed."""

    sd15 = "sd15"
    sd15_top = "sd15-top"
    sd21 = "sd21"
    sdxl = "sdxl"
    pocket = "pocket"


def benchmark(
    context: typer.Context,
    model: Annotated[
        Model,
        typer.Option(
            help="Real shapes with random weights (sd15-top is one block of sd15), or the "
            "pocket model."
        ),
    ] = Model.sd15,
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="Of the image in pixels, 512 or 768x512; repeat for several.",
            show_default="the model's own",
        ),
    ] = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(help="Preset or YAML file; repeat for several.", show_default="all presets"),
    ] = None,
    peers: Annotated[bool, typer.Option(help="Also time tomesd, ToDo and tiles.")] = True,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="2 is one image with guidance.")] = 2,
    dtype: Annotated[
        str | None, typer.Option(show_default="float16; on a CPU bfloat16, and float32 for pocket")
    ] = None,
    device: Annotated[str | None, typer.Option(show_default="the best there is")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, show_default="PyTorch's choice")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the UNet.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="After the warm-up.")] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="The pocket model, two rounds: two minutes.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="CSV file; a plot is put beside it.")] = None,
) -> None:
    """Time a call of the UNet, unpatched and patched, in turns. Ctrl-C keeps what there is."""
    import torch

    from ..models.loading import hide_loading_bars, target_device, target_dtype
    from ..schedule import Schedule
    from . import timing

    if quick:
        model, rounds = Model.pocket, 2
    if out is not None and (out.suffix != ".csv" or out.is_dir()):
        raise OutputError(f"--out takes the name of a .csv file (got {out})")
    plots = out is not None and find_spec("matplotlib") is not None
    if out is not None and not plots:
        stderr.print(
            "without a plot: matplotlib is not here (pip install matplotlib)", markup=False
        )
    target = target_device(device)
    if dtype is None and target.type == "cpu" and model is not Model.pocket:
        dtype = "bfloat16"  # the real shapes are slow enough
    kind = str(target_dtype(dtype, target)).removeprefix("torch.")
    if threads:
        torch.set_num_threads(threads)
    hide_loading_bars()
    names = schedule or Schedule.presets()
    variants = timing.variants_of(names, peers)
    if peers and not timing.PEERS.keys() <= variants.keys():
        stderr.print(
            "without the peer tomesd, which is not here (pip install tomesd)", markup=False
        )
    own = {"sdxl": 1024, "pocket": 256}.get(model.value, 512)
    rows: list[Any] = []
    try:
        for height, width in [_latents(text, model) for text in size or [str(own)]]:
            case = timing.Case(model.value, height, width, batch, kind, str(target), compile)
            before = list(rows)
            with stderr.status("") as status:

                def note(text: str) -> None:
                    status.update(Text(f"{model.value} {height}x{width}: {text}"))  # noqa: B023

                for found in timing.run(case, variants, rounds, note):
                    rows = before + found
                    if out is not None:
                        timing.write_csv(rows, out, shlex.join(["agentsd", *context.obj]))
    except KeyboardInterrupt:
        stderr.print("stopped; these are the rounds that were complete", style="yellow")
        _show(rows, out, plots)
        raise typer.Exit(130) from None
    _show(rows, out, plots)


def _show(rows: list[Any], out: Path | None, plots: bool) -> None:
    """Print the table, draw the plot, and tell where both lie."""
    from . import timing

    if not rows:
        return
    stdout.print(_table(rows))
    if out is not None:
        written = [out]
        if plots:
            written.append(out.with_suffix(".png"))
            timing.plot(rows, written[-1])
        stdout.print(", ".join(map(str, written)), markup=False)


def _latents(size: str, model: Model) -> tuple[int, int]:
    """Height and width of the latents of an image of ``size``, which says width first."""
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", size.strip())
    factor = 4 if model is Model.pocket else 8
    width, height = (int(n) for n in (found[1], found[2] or found[1])) if found else (0, 0)
    if not 8 * factor <= min(width, height) <= max(width, height) <= 8192 or (width | height) % 8:
        raise SettingsError(
            f"--size is WIDTHxHEIGHT or one number, in pixels, multiples of 8, at least "
            f"{8 * factor} and at most 8,192 (got {size[:40]!r})"
        )
    return height // factor, width // factor


def _table(rows: list[Any]) -> Table:
    table = Table(
        caption="medians; % of the unpatched time, with quartiles; ~: too noisy to mean much"
    )
    names = ("tokens", "variant", "s/call", "%", "quartiles", "speed-up", "removed", "MiB", "apart")
    for name in names:
        table.add_column(name, justify="left" if name == "variant" else "right", no_wrap=True)
    rough = {row.tokens: row.noisy for row in rows if row.variant == "floor"}
    for row in rows:
        table.add_row(
            f"{row.tokens:,}",
            row.variant,
            f"{row.seconds:.3f}",
            f"{'~' if row.noisy else ''}{100 * row.ratio:.1f}",
            f"{100 * row.ratio_low:.1f}-{100 * row.ratio_high:.1f}",
            f"{1 / row.ratio:.2f}x",
            f"{'~' if row.noisy or rough[row.tokens] else ''}{row.removed:.2f}",
            f"{row.peak_mib:,.0f}",
            f"{row.distance:.3f}",
        )
    return table
