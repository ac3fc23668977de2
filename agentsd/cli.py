"""The ``agentsd`` command."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from . import __version__, cli_evaluate
from .cli_benchmark import benchmark
from .errors import AgentSDError, OutputError, SettingsError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Stable Diffusion with agent attention and token merging: faster images, no training.",
)
app.add_typer(cli_evaluate.app, name="evaluate")
stdout = Console(highlight=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


class Dtype(str, Enum):
    """Names of the floating-point types that a model can run in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def _show_version(asked: bool) -> None:
    if asked:
        stdout.print(f"agentsd {__version__}")
        raise typer.Exit


@app.callback()
def _agentsd(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Options of the command itself; its work is in the subcommands."""


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="Folder for the images; made if missing.")],
    model: Annotated[
        str, typer.Option(help="'pocket', a folder, a .safetensors file, or a hub id.")
    ] = "pocket",
    schedule: Annotated[
        str, typer.Option(help="A preset's name, a YAML file, or 'none' for no patch.")
    ] = "paper",
    seed: Annotated[int, typer.Option(help="Of the first image; the next ones count up.")] = 0,
    num_inference_steps: Annotated[int, typer.Option(help="Denoising steps, 1 to 1000.")] = 25,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Weight of the prompt, 0 to 100.", show_default="7.5; pocket: 2"),
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="In pixels, a multiple of 8.", show_default="the model's")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="In pixels, a multiple of 8.", show_default="the model's")
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="What to keep away from.")] = "",
    num_images: Annotated[int, typer.Option(min=1, help="How many images.")] = 1,
    device: Annotated[
        str | None, typer.Option(help="cuda, mps, cpu, …", show_default="the best there is")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(show_default="float32 on the CPU, else float16")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also make the unpatched image, and time both.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON on stdout.")
    ] = False,
) -> None:
    """Make images from a prompt, with agent attention and, to compare, without."""
    # Here, not above: diffusers takes seconds to import, and --help should not.
    from . import generation
    from .pipelines import POCKET_GUIDANCE, load_pipeline
    from .schedule import Schedule

    if guidance_scale is None:
        guidance_scale = POCKET_GUIDANCE if model == "pocket" else 7.5
    settings = generation.ImageSettings(
        prompt=prompt,
        negative_prompt=negative_prompt,
        seed=seed,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
    )
    plan = None if schedule == "none" else Schedule.load(schedule)
    if compare and plan is None:
        raise SettingsError("--compare needs a schedule other than 'none'")
    if os.path.isfile(out):
        raise OutputError(f"{out} is a file; --out takes a folder")
    _quiet_libraries()
    with stderr.status(Text(f"loading {model} …")):
        pipe = load_pipeline(model, device=device, dtype=dtype.value if dtype else None)
    for note in generation.warnings_for(pipe, prompt):
        stderr.print(f"note: {note}", style="yellow", markup=False)
    summary = generation.generate(
        pipe,
        settings,
        out,
        schedule=plan,
        model=model,
        num_images=num_images,
        compare=compare,
    )
    stdout.print(json.dumps(summary) if as_json else _told(summary, out), markup=False)


app.command()(benchmark)


def _told(summary: dict[str, Any], out: Path) -> str:
    """The summary for people: a line per image, and the speed-up."""
    lines = []
    for image in summary["images"]:
        file = out / image.get("comparison_file", image["file"])
        lines.append(f"{file}  (seed {image['seed']}, {image['seconds']:.1f} s)")
    if "speedup" in summary:
        alike = f"PSNR {summary['psnr']:.1f} dB" if summary["psnr"] else "the same image"
        lines.append(
            f"unpatched {summary['unpatched_seconds']:.1f} s, agentsd {summary['seconds']:.1f} s: "
            f"{summary['speedup']:.2f}× as fast; likeness to the unpatched image: {alike}"
        )
    return "\n".join(lines)


def _quiet_libraries() -> None:
    """Loading takes a moment, and both libraries draw bars for each of its parts."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def main(argv: list[str] | None = None) -> None:
    """Run the command; an error of ours is one line on stderr and a non-zero exit code."""
    # Keep stderr for our progress and notes; what matters of theirs comes as an error.
    for library in ("DIFFUSERS", "TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may know ASCII alone
    try:
        app(argv, obj=sys.argv[1:] if argv is None else argv)
    except AgentSDError as error:
        told = "".join(c if c.isprintable() else " " for c in str(error))
        stderr.print(f"error: {told}", style="red", markup=False)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
