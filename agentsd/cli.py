"""The ``agentsd`` command."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Mapping
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from . import __version__
from .benchmark.command import benchmark
from .errors import AgentSDError, LoadError, OutputError, SettingsError
from .evaluation.command import app as evaluate

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Stable Diffusion with agent attention and token merging: faster images, no training.",
)
app.add_typer(evaluate, name="evaluate")
app.command()(benchmark)
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
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options of the command itself; its work is in the subcommands."""


class Format(str, Enum):
    """What images are written as."""

    png = "png"
    jpg = "jpg"
    webp = "webp"
    webdataset = "webdataset"


class OnError(str, Enum):
    """What is done about bad rows."""

    stop = "stop"
    skip = "skip"


class How(str, Enum):
    """How progress is shown."""

    none = "none"
    plain = "plain"
    rich = "rich"


class Offloading(str, Enum):
    """What waits on the CPU until it is used."""

    model = "model"
    sequential = "sequential"
    group = "group"


SCHEDULE = "faithful"  # agentsd.patching.patch's own default; to name it here needs no torch
PROMPTS, MODEL, RUNNING = "Prompts", "Model and what is added to it", "The run"
OF_THE_RUN = {
    *("from_image", "out", "device", "format", "batch_size", "cpu_offload", "allow_pickle"),
    *("resume", "progress", "stale_after", "as_json"),
}
"""Options that an image does not carry."""
NOT_COMPARED = {"on_error", "format", "batch_size", "resume", "progress", "stale_after"}
"""Options that --compare, which is no run, has no use for."""


@app.command()
def generate(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the run; made if missing.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What to draw; may be repeated.", rich_help_panel=PROMPTS),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A .txt, .jsonl, .csv or .tsv of prompts; - reads standard input.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    template: Annotated[
        str,
        typer.Option(help="Text around each prompt; {} stands for it.", rich_help_panel=PROMPTS),
    ] = "{}",
    on_error: Annotated[
        OnError,
        typer.Option(help="Bad rows: stop before any work, or skip.", rich_help_panel=PROMPTS),
    ] = OnError.stop,
    from_image: Annotated[
        Path | None,
        typer.Option(
            help="Regenerate an image from the settings in its file.", rich_help_panel=PROMPTS
        ),
    ] = None,
    num_images: Annotated[
        int,
        typer.Option(min=1, max=1_000_000, help="How many of each.", rich_help_panel=PROMPTS),
    ] = 1,
    schedule: Annotated[
        str,
        typer.Option(help="faithful, fast or paper; a YAML file; or 'none' for no patch."),
    ] = SCHEDULE,
    seed: Annotated[
        int, typer.Option(help="Seed of the first image; later seeds are derived from it.")
    ] = 0,
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
    negative_prompt: Annotated[str, typer.Option(help="What to avoid.")] = "",
    compare: Annotated[
        bool, typer.Option("--compare", help="Also make the unpatched image, and time both.")
    ] = False,
    model: Annotated[
        str,
        typer.Option(
            help="'pocket', a folder, a .safetensors file, or a hub id.", rich_help_panel=MODEL
        ),
    ] = "pocket",
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit on the hub.", rich_help_panel=MODEL),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            help="Weight variant, such as fp16.",
            show_default="those there are",
            rich_help_panel=MODEL,
        ),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="Allow pickle weights, which can execute arbitrary code.",
            rich_help_panel=MODEL,
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="cuda, mps, cpu, …", show_default="the best there is", rich_help_panel=MODEL
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(show_default="float32 on the CPU, else float16", rich_help_panel=MODEL),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="DDIM, Euler a, DPM++ 2M, …, or diffusers' name.",
            show_default="the model's",
            rich_help_panel=MODEL,
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="PATH or PATH:SCALE; may be repeated.", rich_help_panel=MODEL),
    ] = None,
    controlnet: Annotated[
        str | None,
        typer.Option(help="Folder or hub id; needs --control-image.", rich_help_panel=MODEL),
    ] = None,
    control_image: Annotated[
        str | None, typer.Option(help="What a ControlNet follows.", rich_help_panel=MODEL)
    ] = None,
    ip_adapter: Annotated[
        str | None,
        typer.Option(
            help="A file, here or OWNER/NAME/FOLDER/FILE; needs --ip-image.", rich_help_panel=MODEL
        ),
    ] = None,
    ip_image: Annotated[
        str | None, typer.Option(help="What an IP-Adapter follows.", rich_help_panel=MODEL)
    ] = None,
    init_image: Annotated[
        str | None, typer.Option(help="Image to begin from.", rich_help_panel=MODEL)
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How much of it to change, 0 to 1.", show_default="0.8", rich_help_panel=MODEL
        ),
    ] = None,
    vae_tiling: Annotated[
        bool, typer.Option("--vae-tiling", help="Decode in tiles.", rich_help_panel=MODEL)
    ] = False,
    vae_slicing: Annotated[
        bool, typer.Option("--vae-slicing", help="Decode one by one.", rich_help_panel=MODEL)
    ] = False,
    attention_backend: Annotated[
        str | None, typer.Option(help="One of diffusers' backends.", rich_help_panel=MODEL)
    ] = None,
    compile_unet: Annotated[
        bool, typer.Option("--compile", help="Compile the UNet.", rich_help_panel=MODEL)
    ] = False,
    cpu_offload: Annotated[
        Offloading | None,
        typer.Option(help="Keep on the CPU what is not in use.", rich_help_panel=MODEL),
    ] = None,
    format: Annotated[
        Format, typer.Option(help="webdataset packs PNGs into shards.", rich_help_panel=RUNNING)
    ] = Format.png,
    batch_size: Annotated[
        str,
        typer.Option(help="Images at a time, or 'auto' for what fits.", rich_help_panel=RUNNING),
    ] = "1",
    resume: Annotated[
        bool, typer.Option(help="Go on with the run that is in --out.", rich_help_panel=RUNNING)
    ] = True,
    progress: Annotated[
        How | None,
        typer.Option(show_default="rich on a terminal, else plain", rich_help_panel=RUNNING),
    ] = None,
    stale_after: Annotated[
        float,
        typer.Option(
            min=1,
            max=86400,
            help="Seconds of silence after which another process counts as dead.",
            rich_help_panel=RUNNING,
        ),
    ] = 60.0,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the summary as JSON on stdout.", rich_help_panel=RUNNING
        ),
    ] = False,
) -> None:
    """Make images from prompts into a folder; one that was interrupted goes on where it stood.

    With --compare, make one prompt's images with agent attention and without, side by side.
    """
    # Here, not above: diffusers takes seconds to import, and --help should not.
    from .generation.batch.launch import launch
    from .generation.batch.prompts import checked_template, read_prompts
    from .generation.batch.request import BatchRequest
    from .generation.comparison import compare as compare_ways
    from .generation.prompt_encoding import warnings_for
    from .generation.regeneration import regeneration
    from .image_settings import ImageSettings
    from .models.loading import default_guidance, hide_loading_bars
    from .models.options import PipelineOptions
    from .schedule import Schedule

    position: tuple[int, int] | None = None
    known: Mapping[str, Any] = {}
    if from_image is not None:
        _only_of_the_run(ctx)
        text, again, notes = regeneration(from_image, out)
        prompt, base, plan, options = [text], again.base, again.schedule, again.options
        model, revision, variant = again.model, again.revision, again.variant
        dtype = Dtype(again.dtype) if again.dtype else dtype
        position, known = again.batch_position, again.known
        for note in notes:
            _note(note)
    else:
        if guidance_scale is None:
            guidance_scale = default_guidance(model)
        given: dict[str, Any] = {
            "negative_prompt": negative_prompt,
            "seed": seed,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
        }
        base = ImageSettings(prompt="-", **given).model_dump(exclude={"prompt"})
        plan = None if schedule == "none" else Schedule.load(schedule)
        options = PipelineOptions(
            scheduler=scheduler,
            loras=tuple(lora or ()),
            controlnet=controlnet,
            control_image=control_image,
            ip_adapter=ip_adapter,
            ip_image=ip_image,
            init_image=init_image,
            vae_tiling=vae_tiling,
            vae_slicing=vae_slicing,
            attention_backend=attention_backend,
            compile=compile_unet,
            **({} if strength is None else {"strength": strength}),
        )
    if not prompt and prompts is None:
        raise SettingsError("nothing to draw: give --prompt, --prompts or --from-image")
    if os.path.isfile(out):
        raise OutputError(f"{out} is a file; --out takes a folder")
    hide_loading_bars()
    request = BatchRequest(
        out=out,
        base=base,
        schedule=plan,
        options=options,
        model=model,
        revision=revision,
        variant=variant,
        device=device,
        dtype=dtype.value if dtype else None,
        form=format.value,
        batch_size=_batch_size(batch_size),
        batch_position=position,
        offload=cpu_offload.value if cpu_offload else None,
        allow_pickle=allow_pickle,
        resume=resume,
        progress=progress.value if progress else ("rich" if stderr.is_terminal else "plain"),
        stale_after=stale_after,
        known=known,
    )
    if compare:
        if plan is None:
            raise SettingsError("--compare needs a schedule other than 'none'")
        if prompts is not None or prompt is None or len(prompt) != 1:
            raise SettingsError("--compare takes one --prompt")
        if useless := _given(ctx) & NOT_COMPARED:
            drop = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(useless))
            raise SettingsError(
                f"--compare cannot be combined with other options of a run; drop {drop}"
            )
        text = checked_template(template).replace("{}", prompt[0])
        settings = ImageSettings(prompt=text, **base)
        options.check(settings)
        with stderr.status(Text(f"loading {model} …")):
            pipe = request.load()
        for note in warnings_for(pipe, settings):
            _note(note)
        both = compare_ways(
            pipe,
            settings,
            out,
            schedule=plan,
            model=model,
            num_images=num_images,
            options=request.recorded(),
            inputs=options.inputs(settings.height, settings.width),
        )
        stdout.print(json.dumps(both) if as_json else _compared(both, out), markup=False)
        if both["nsfw_content_detected"]:
            raise typer.Exit(1)
        return
    told_rows = 0

    def report(problem: str) -> None:
        nonlocal told_rows
        told_rows += 1
        if on_error is OnError.skip and told_rows <= SHOWN_ROWS:
            _note(f"{problem}; left out")

    summary, stop = launch(
        request,
        lambda: read_prompts(
            prompt or (),
            prompts,
            base,
            template=template,
            count=num_images,
            check=options.check,
            on_error=on_error.value,
            report=report,
        ),
        stderr,
    )
    if summary is not None:
        stdout.print(json.dumps(summary) if as_json else _told(summary), markup=False)
    if stop.signal is not None:
        raise typer.Exit(128 + stop.signal)
    if summary is not None and summary["failed"]:
        raise typer.Exit(1)


SHOWN_ROWS = 20
"""Bad rows told one by one; the summary counts all."""


def _note(text: str) -> None:
    told = "".join(c if c.isprintable() else " " for c in text)
    stderr.print(f"note: {told}", style="yellow", markup=False)


def _only_of_the_run(ctx: typer.Context) -> None:
    """Refuse options beside --from-image that would be without effect."""
    given = _given(ctx)
    for param in ctx.command.params:
        if param.name in given - OF_THE_RUN:
            raise SettingsError(
                f"--from-image takes the image's own settings; drop {param.opts[0]}"
            )


def _given(ctx: typer.Context) -> set[str]:
    """The options that the command line names."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


@app.command()
def inspect(
    model: Annotated[
        str, typer.Option(help="pocket, sd15, sd21, sdxl, a folder, or an id of the hub.")
    ] = "pocket",
    schedule: Annotated[
        str, typer.Option(help="faithful, fast or paper; or a YAML file.")
    ] = SCHEDULE,
    height: Annotated[
        int | None,
        typer.Option(max=65_536, help="Of the image in pixels.", show_default="the model's own"),
    ] = None,
    width: Annotated[int | None, typer.Option(max=65_536, show_default="the model's own")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or mps.", show_default="the best there is")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Tell what a schedule does to each attention layer of a model, and why; needs no weights."""
    from .models.architectures import load_architecture
    from .models.loading import target_device
    from .patching.patch import apply_patch, inspect_patch

    kind = device if device in ("cpu", "cuda", "mps") else target_device(device).type
    shape = load_architecture(model)
    found = inspect_patch(apply_patch(shape, schedule), height, width, kind)
    if as_json:
        stdout.print(json.dumps(found), markup=False)
    else:
        Console(width=None if stdout.is_terminal else 120).print(found.table())


@app.command(name="app")
def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="What visitors may choose from; may be repeated. As for generate.",
            show_default="pocket",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets the network in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    auth_file: Annotated[
        Path | None,
        typer.Option(
            help="Who may come in: a user:password a line. Or the environment variable "
            "AGENTSD_AUTH.",
            show_default="everybody",
        ),
    ] = None,
    root_path: Annotated[
        str, typer.Option(help="Where a reverse proxy puts the page: /agentsd, say.")
    ] = "",
    queue_size: Annotated[int, typer.Option(help="Requests that may wait.")] = 32,
    max_pixels: Annotated[int, typer.Option(help="Width times height of an image.")] = 1024 * 1024,
    max_steps: Annotated[int, typer.Option(help="Denoising steps of an image.")] = 100,
    max_images: Annotated[int, typer.Option(help="Images of an X/Y plot.")] = 16,
    device: Annotated[
        str | None, typer.Option(help="cuda, mps, cpu, …", show_default="the best there is")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(show_default="float32 on the CPU, else float16")
    ] = None,
) -> None:
    """Serve a page to make images with and without agent attention, and to shape the schedule."""
    if find_spec("gradio") is None:
        raise LoadError("the app needs gradio: pip install gradio")
    from .app.limits import Limits
    from .app.server import ServerAddress, read_auth, start
    from .models.loading import hide_loading_bars, load_pipeline

    limits = Limits(
        max_pixels=max_pixels, max_steps=max_steps, max_images=max_images, queue_size=queue_size
    )
    place = ServerAddress(
        host, port, root_path, read_auth(auth_file, os.environ.get("AGENTSD_AUTH"))
    )
    hide_loading_bars()
    pipes = {}
    for name in model or ["pocket"]:
        with stderr.status(Text(f"loading {name} …")):
            pipes[name] = load_pipeline(name, device=device, dtype=dtype.value if dtype else None)
    server = start(pipes, limits, place)
    stdout.print(server.url)
    if place.auth is None and host not in ("127.0.0.1", "localhost", "::1"):
        _note("everybody on the network may come in; --auth-file names who may")
    server.wait()


def _batch_size(told: str) -> int | None:
    if told == "auto":
        return None
    from .generation.records import LARGEST_BATCH

    if not (told.isascii() and told.isdigit() and 1 <= int(told) <= LARGEST_BATCH):
        raise SettingsError(f"batch-size: must be 1 to {LARGEST_BATCH}, or auto (got {told!r})")
    return int(told)


def _told(summary: dict[str, Any]) -> str:
    """The summary for people."""
    made = f"{summary['made']} image{'s' * (summary['made'] != 1)} made"
    there = summary["there_before"]
    before = f", {there} {'was' if there == 1 else 'were'} there" if there else ""
    missing = summary["images"] - summary["made"] - summary["there_before"] - summary["failed"]
    parts = [
        f"{made}{before}, of {summary['images']}, in {summary['seconds']:.1f} s "
        f"({summary['images_per_second']:.2f} images/s): {summary['manifest']}"
    ]
    if missing:
        parts.append(f"still to be made: {missing}; give the same command again")
    if summary["failed"]:
        parts.append(f"{summary['failed']} failed: {summary['folder']}/failed.jsonl says why")
    if hidden := summary["nsfw_content_detected"]:
        parts.append(f"{hidden} of these: the model's safety checker returned a black image")
    if summary["bad_rows"]:
        parts.append(f"bad rows left out: {summary['bad_rows']}")
    return "\n".join(parts)


def _compared(summary: dict[str, Any], out: Path) -> str:
    """A comparison for people: a line per image, and the speed-up."""
    lines = [
        f"{out / image['comparison_file']}  (seed {image['seed']}, {image['seconds']:.1f} s)"
        for image in summary["images"]
    ]
    hidden = [
        image["nsfw_content_detected"] or image["unpatched_nsfw_content_detected"]
        for image in summary["images"]
    ]
    equal = "not measured" if all(hidden) else "the same image"
    alike = equal if summary["psnr"] is None else f"PSNR {summary['psnr']:.1f} dB"
    lines.append(
        f"unpatched {summary['unpatched_seconds']:.1f} s, agentsd {summary['seconds']:.1f} s: "
        f"{summary['speedup']:.2f}× as fast; likeness to the unpatched image: {alike}"
    )
    if any(hidden):
        lines.append(
            f"{sum(map(bool, hidden))} of {len(hidden)} are not compared: the model's safety "
            "checker returned a black image"
        )
    return "\n".join(lines)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A line of its own, without the place in the code that it comes from."""
    stderr.print(f"note: {message}", style="yellow", markup=False)


def main(argv: list[str] | None = None) -> None:
    """Run the command; an error of ours is one line on stderr and a non-zero exit code."""
    # Keep stderr for our progress and notes; what matters of theirs comes as an error.
    for library in ("DIFFUSERS", "TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = _show_warning
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # diffusers' own affair
    warnings.filterwarnings("ignore", message="Should have t[ab][<>]=t")  # torchsde's rounding
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may know ASCII alone
    try:
        app(argv, obj=sys.argv[1:] if argv is None else argv)
    except AgentSDError as error:
        _end(str(error), error.exit_code)
    except Exception as error:
        # Nobody foresaw it, so no words of ours fit; the traceback is for who would mend it.
        if os.environ.get("AGENTSD_TRACEBACK"):
            raise
        more = "(unexpected error; set AGENTSD_TRACEBACK=1 for the traceback)"
        _end(f"{type(error).__name__}: {error!s:.500} {more}", 1)


def _end(why: str, code: int) -> NoReturn:
    """Exit, with the reason in one line."""
    told = "".join(c if c.isprintable() else " " for c in why)
    stderr.print(f"error: {told}", style="red", markup=False)
    sys.exit(code)


if __name__ == "__main__":
    main()
