"""The ``agentsd`` command: its subcommands, one per file, and its exit codes."""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import Annotated

import typer

from ..errors import AgentSDError
from ..version import __version__
from . import app, benchmark, compare, evaluate, generate, inspect, tune
from .console import error, note, stdout

agentsd = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Faster Stable Diffusion without training: agent attention, token merging, fewer keys.",
    epilog="Exit codes: 0 success; 1 the work failed, fully or partly; 2 an option, file or model "
    "cannot be used; 130 or 143 stopped by Ctrl-C or SIGTERM.",
)
agentsd.command()(generate.generate)
agentsd.command()(compare.compare)
agentsd.command()(inspect.inspect)
agentsd.command()(tune.tune)
agentsd.command()(benchmark.benchmark)
agentsd.add_typer(evaluate.evaluate, name="evaluate")
agentsd.command("app")(app.serve)


def _show_version(wanted: bool) -> None:
    if wanted:
        stdout.print(f"agentsd {__version__}")
        raise typer.Exit


@agentsd.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Options of ``agentsd`` itself."""


def main(argv: list[str] | None = None) -> None:
    """Run the command; errors are one line on stderr and a non-zero exit code."""
    _quieten_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may be limited to ASCII
    try:
        agentsd(argv, obj=sys.argv[1:] if argv is None else argv)
    except AgentSDError as problem:
        error(str(problem))
        sys.exit(problem.exit_code)
    except Exception as problem:
        if os.environ.get("AGENTSD_TRACEBACK"):
            raise
        error(
            f"{type(problem).__name__}: {problem!s:.500} "
            "(unexpected error; set AGENTSD_TRACEBACK=1 for the traceback)"
        )
        sys.exit(1)


def _quieten_libraries() -> None:
    """Keep stderr for our progress and notes; real problems of libraries are raised as errors."""
    for library in ("DIFFUSERS", "TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    warnings.showwarning = lambda message, *_, **__: note(message)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # from diffusers
    warnings.filterwarnings("ignore", message="Should have t[ab][<>]=t")  # torchsde's rounding
