"""Time one call of a UNet: unpatched, under our schedules, under its peers, and the floor.

Speed may be measured on random weights of a real model's shape; likeness may not, and the distance
given here only tells that a variant did something.
"""

from __future__ import annotations

import csv
import gc
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple
from unittest import mock

import psutil
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from ..baselines import tiles, todo, tomesd
from ..errors import SettingsError
from ..generation.records import VERSIONS
from ..methods import merge as merging
from ..models.architectures import ARCHITECTURES
from ..models.loading import load_pipeline
from ..patching.layers import replaced_processors, top_attention_layers
from ..patching.patch import patched
from ..schedule import Phase, Schedule

TIMED: dict[str, dict[str, Any]] = {
    **ARCHITECTURES,
    "sd15-top": {
        **ARCHITECTURES["sd15"],
        "block_out_channels": (320,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
        "layers_per_block": 1,
    },
}
"""Shapes to time. ``sd15-top`` is one block of the highest resolution of ``sd15``, for sizes at
which the whole would take long."""

MODELS = (*TIMED, "pocket")
NOISY = 0.1
"""Spread of a ratio, interquartile range over median, from which on it means little."""

LEAST = 0.5
"""Seconds to time at once. What a first call does besides (to look at a new size, to warn) counts
for little in so many calls."""

STEPS = 64
"""Of the run whose calls are timed."""


@dataclass(frozen=True)
class Case:
    """What is timed: a model's shape, the size of its latents, and how it runs."""

    model: str = "sd15"
    height: int = 64
    width: int = 64
    batch: int = 2
    dtype: str = "float32"
    device: str = "cpu"
    compiled: bool = False


@dataclass(frozen=True)
class Row:
    """A variant's figures. Times are medians over the rounds, in seconds a call of the UNet."""

    model: str
    height: int
    width: int
    tokens: int
    """At the highest resolution that has self-attention."""
    batch: int
    dtype: str
    device: str
    threads: int
    compiled: bool
    variant: str
    rounds: int
    seconds: float
    attention_seconds: float
    """Within the self-attention modules of that resolution; 0 where compiled."""
    merging_seconds: float
    """Of those, in matching, merging and unmerging of ours."""
    ratio: float
    """Time over unpatched time, the median over the rounds."""
    ratio_low: float
    ratio_high: float
    """Its quartiles."""
    removed: float
    """Share of the removable time that is removed: (T₀ - T) / (T₀ - T_floor)."""
    peak_mib: float
    """Memory above what the idle model holds."""
    distance: float
    """Relative L2 distance of the output to the unpatched one."""
    noisy: bool


class Variant(NamedTuple):
    """A way to run a UNet."""

    enter: Callable[[UNet2DConditionModel], AbstractContextManager[Any]]
    """Changes a UNet until the end of a ``with`` block."""


def build(case: Case) -> UNet2DConditionModel:
    """The UNet of a case, with random weights, but for ``pocket``."""
    dtype = getattr(torch, case.dtype)
    if case.model == "pocket":
        return load_pipeline("pocket", device=case.device, dtype=case.dtype).unet
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(case.device):
            return UNet2DConditionModel(sample_size=case.height, **TIMED[case.model]).eval()
    finally:
        torch.set_default_dtype(before)


@contextmanager
def floor(unet: UNet2DConditionModel) -> Iterator[None]:
    """Self-attention at the highest resolution gives zeros at once: no patch can be faster."""
    with replaced_processors(top_attention_layers(unet), lambda _: _Zeros()):
        yield


class _Zeros:
    """Here and not in the function above, as a compiler takes each new class for new code."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


def variants_of(schedules: list[str], peers: bool = True) -> dict[str, Variant]:
    """Unpatched, the floor, each phase of the schedules for itself, and the peers that are here.

    Args:
        schedules: Names of presets or paths of YAML files.
        peers: Also tomesd (PyPI), keys downsampled (the ToDo idea), tiles (the HyperTile idea).

    Raises:
        ScheduleError: If a schedule cannot be read.
    """
    found = dict(BASES)
    for name in schedules:
        phases = Schedule.load(name).phases
        for number, phase in enumerate(phases, 1):
            label = Path(name).stem + (f", phase {number}" if len(phases) > 1 else "")
            found[label] = _constant(phase)
    here = {k: v for k, v in PEERS.items() if not k.startswith("tomesd") or find_spec("tomesd")}
    return found | here if peers else found


def _constant(phase: Phase) -> Variant:
    settings = {k: v for k, v in phase.to_dict().items() if k not in ("until", "until_step")}
    schedule = Schedule(phases=(Phase(**settings),))
    return Variant(lambda unet: patched(unet, schedule))


BASES = {"unpatched": Variant(lambda _: nullcontext()), "floor": Variant(floor)}
PEERS = {
    "tomesd 0.4": Variant(partial(tomesd, ratio=0.4)),
    "tomesd 0.5": Variant(partial(tomesd, ratio=0.5)),
    "ToDo, stride 2": Variant(partial(todo, stride=2)),
    "tiles of 256": Variant(partial(tiles, side=16)),
}


class Times(NamedTuple):
    """Seconds of a call."""

    total: float
    attention: float
    merging: float


class Stopwatch:
    """Calls a UNet at consecutive steps of a run, and tells how long it took."""

    def __init__(self, unet: UNet2DConditionModel, case: Case):
        self.unet, self.case = unet, case
        self.device = torch.device(case.device)
        solver = DDIMScheduler()
        solver.set_timesteps(STEPS, device=self.device)
        self.timesteps = solver.timesteps
        random = torch.Generator().manual_seed(0)
        config = unet.config
        like = {"device": self.device, "dtype": getattr(torch, case.dtype)}
        shape = (case.batch, config.in_channels, case.height, case.width)
        self.sample = torch.randn(shape, generator=random).to(**like)
        width = config.cross_attention_dim
        self.text = torch.randn((case.batch, 77, width), generator=random).to(**like)
        self.extra: dict[str, Any] = {}
        if config.addition_embed_type == "text_time":
            pooled = torch.randn((case.batch, 1280), generator=random).to(**like)
            ids = torch.zeros((case.batch, 6), **like)
            self.extra["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        # Looked up before anything is patched, as a peer's processor is not known for attention.
        self.watched = [layer.module for layer in top_attention_layers(unet)]
        self.attention = self.merging = 0.0

    def call(self, step: int) -> Tensor:
        """The UNet's output at a step of the run."""
        with torch.inference_mode():
            out = self.unet(self.sample, self.timesteps[step], self.text, **self.extra).sample
        self._wait()
        return out  # type: ignore[no-any-return]

    def time(self, calls: int) -> Times:
        """Mean seconds of ``calls`` consecutive calls, and of their parts."""
        self.attention = self.merging = 0.0
        if self.case.compiled:
            self._run(calls)  # some peers have a compiler begin again whenever they are applied
            total = self._run(calls)
        elif self.device.type == "cpu":
            with self._parts_timed():
                total = self._run(calls)
        else:  # timing the parts means to wait for the device at each, which slows the whole
            total = self._run(calls)
            with self._parts_timed():
                self._run(calls)
        return Times(total / calls, self.attention / calls, self.merging / calls)

    def _run(self, calls: int) -> float:
        begun = time.perf_counter()
        for step in range(calls):
            self.call(step)
        return time.perf_counter() - begun

    @contextmanager
    def _parts_timed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self.watched:
                for hook in self._watch(module):
                    stack.callback(hook.remove)
            for name in ("match", "owners", "merge", "unmerge"):
                stack.enter_context(self._timed(name))
            yield

    def _watch(self, module: Any) -> list[Any]:
        begun = [0.0]

        def before(*_: Any) -> None:
            self._wait()
            begun[0] = time.perf_counter()

        def after(*_: Any) -> None:
            self._wait()
            self.attention += time.perf_counter() - begun[0]

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Count the time within a function that merging calls."""
        function = getattr(merging, name)

        def timed(*args: Any) -> Any:
            self._wait()
            begun = time.perf_counter()
            out = function(*args)
            self._wait()
            self.merging += time.perf_counter() - begun
            return out

        with mock.patch.object(merging, name, timed):
            yield

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak(self) -> tuple[float, Tensor]:
        """Memory in MiB that a call takes above what is held before it, and the call's output."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            held = torch.cuda.memory_allocated(self.device)
            out = self.call(0)
            return (torch.cuda.max_memory_allocated(self.device) - held) / 2**20, out
        process, done = psutil.Process(os.getpid()), threading.Event()
        held = most = process.memory_info().rss

        def poll() -> None:
            nonlocal most
            while not done.wait(0.002):
                most = max(most, process.memory_info().rss)

        thread = threading.Thread(target=poll)
        thread.start()
        try:
            out = self.call(0)
        finally:
            done.set()
            thread.join()
        return (most - held) / 2**20, out


def run(
    case: Case,
    variants: dict[str, Variant],
    rounds: int,
    note: Callable[[str], None] = lambda _: None,
) -> Iterator[list[Row]]:
    """Time the variants in turns; the first round warms up and does not count.

    Args:
        case: What to time.
        variants: ``unpatched`` and ``floor`` among them.
        rounds: How many rounds count, at least 1.
        note: Told what is being done.

    Yields:
        After each round, the rows so far: whoever is interrupted keeps the last.

    Raises:
        SettingsError: If the case or ``rounds`` is out of range.

    Example:
        >>> case = Case("pocket", 16, 16)
        >>> *_, rows = run(case, BASES, rounds=1)
        >>> [row.variant for row in rows]
        ['unpatched', 'floor']
    """
    if case.model not in MODELS:
        raise SettingsError(f"no model {case.model!r} to time; there are {', '.join(MODELS)}")
    if rounds < 1 or min(case.height, case.width) < 8 or case.batch < 1:
        raise SettingsError("rounds and batch must be 1 or more, sides of the latents 8 or more")
    note("building the model")
    unet = build(case)
    top = top_attention_layers(unet)[0].downsample
    tokens = -(-case.height // top) * -(-case.width // top)
    if case.compiled:
        # PyTorch 2.6's name for it, which later ones (recompile_limit) still know.
        torch._dynamo.config.cache_size_limit = 8 * len(variants)
        unet.compile()
    watch = Stopwatch(unet, case)
    times: dict[str, list[Times]] = {name: [] for name in variants}
    memory: dict[str, float] = {}
    distance: dict[str, float] = {}
    calls: dict[str, int] = {}
    reference: Tensor | None = None
    for number in range(rounds + 1):
        names = list(variants)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            note(f"{'warm-up' if not number else f'round {number}/{rounds}'}: {name}")
            with variants[name].enter(unet):
                if number:
                    times[name].append(watch.time(calls[name]))
                    continue
                begun = time.perf_counter()
                memory[name], out = watch.peak()
                # A compiled UNet's first call says nothing of the others.
                seconds = watch.time(1).total if case.compiled else time.perf_counter() - begun
                calls[name] = _calls(seconds)
            if reference is None:  # unpatched comes first in the first round
                reference = out.float()
            distance[name] = float((out.float() - reference).norm() / reference.norm())
        if number:
            yield [
                _row(case, name, tokens, times, memory[name], distance[name]) for name in variants
            ]


def _calls(seconds: float) -> int:
    """How many calls to time at once: of :data:`LEAST` seconds, or one run's steps."""
    return min(max(1, round(LEAST / seconds)), STEPS)


def _row(
    case: Case,
    name: str,
    tokens: int,
    times: dict[str, list[Times]],
    peak: float,
    distance: float,
) -> Row:
    ratios = [a.total / b.total for a, b in zip(times[name], times["unpatched"], strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    seconds, unpatched, least = (
        median(t.total for t in times[key]) for key in (name, "unpatched", "floor")
    )
    ratio = median(ratios)
    return Row(
        **asdict(case),
        tokens=tokens,
        threads=torch.get_num_threads(),
        variant=name,
        rounds=len(ratios),
        seconds=seconds,
        attention_seconds=median(t.attention for t in times[name]),
        merging_seconds=median(t.merging for t in times[name]),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        removed=(unpatched - seconds) / (unpatched - least) if unpatched != least else 0.0,
        peak_mib=peak,
        distance=distance,
        noisy=len(ratios) > 1 and (high - low) / ratio > NOISY,
    )


def write_csv(rows: list[Row], path: Path, command: str) -> None:
    """Write the rows, below a comment that names the command, the machine and the versions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {command}\n# {machine()}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            shown = asdict(row).items()
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in shown})


def machine() -> str:
    """Processor, graphics processor and versions, in a line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = ", ".join(f"{name} {version}" for name, version in VERSIONS.items())
    return f"{cpu}{gpu}, {versions}"


def plot(rows: list[Row], path: Path) -> None:
    """Time against tokens on logarithmic axes, with each variant's slope.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row.variant for row in rows):
        found = sorted((row.tokens, row.seconds) for row in rows if row.variant == name)
        slope = ""
        if len(found) > 1:
            (a, s), (b, t) = found[0], found[-1]
            exponent = torch.tensor(t / s).log() / torch.tensor(b / a).log()
            slope = f", slope {exponent:.2f}"
        line = "o:" if name in PEERS else "o-"
        axes.plot(*zip(*found, strict=True), line, label=name + slope)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds a call")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)
