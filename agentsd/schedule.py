"""What each denoising step does: phases of a run, validated and immutable, YAML in and out."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, field_validator

from .errors import ScheduleError
from .methods.token_grid import cells, strides_for
from .settings import Strict, dump_yaml, parse_yaml, shown
from .text_files import read_text

_HERE = Path(__file__).resolve().parent
PRESETS = next((p for p in (_HERE / "configs", _HERE.parent / "configs") if p.is_dir()), _HERE)
"""Folder of the preset schedules: beside the package in a clone, inside it once installed."""

_MERGING = ("ratio", "sx", "sy", "use_rand", "merge_crossattn", "merge_mlp")
_EVERY = ("attn_precision", "max_downsample", "min_tokens")
METHODS: dict[str, tuple[str, ...]] = {
    "agent": (*_MERGING, "agent_ratio", "agents", "k_scale2", "k_shortcut", *_EVERY),
    "merge": (*_MERGING, *_EVERY),
    "keys": ("sx", "sy", "keys", "select", *_EVERY),
    "full": ("max_downsample", "min_tokens"),
}
"""The parameters each method reads."""


class Plan(NamedTuple):
    """What a phase makes of one grid of tokens, after every cap."""

    tokens: int
    merged_tokens: int
    """Tokens left after merging; equal to ``tokens`` where nothing merges."""
    agents: int
    """Agent tokens; 0 where plain softmax attention is used."""
    keys: int
    """Keys that each query (or, with agents, each agent) attends to."""

    @property
    def untouched(self) -> bool:
        """Whether the layer does just what it would unpatched."""
        return not self.agents and self.merged_tokens == self.keys == self.tokens


Share = Annotated[float, Field(ge=0, le=1)]
Stride = Annotated[int, Field(ge=1, le=64)]
Count = Annotated[int, Field(ge=1, le=65536)]


class Phase(Strict):
    """A stretch of denoising steps that share one method and its parameters.

    Those worth changing first are ``method``, ``sx``, ``sy`` and ``ratio``. A parameter that the
    method does not read is an error, so that no setting is silently without effect.

    Args:
        method: ``agent``: agent attention over merged tokens. ``merge``: softmax attention over
            merged tokens. ``keys``: every query, but one token of each cell as key and value.
            ``full``: as unpatched.
        until: The phase holds for steps before this share of the run, in (0, 1]. Every phase but
            the last needs this or ``until_step``; the last runs to the end.
        until_step: The same as a number of steps, at least 1.
        ratio: Share of the tokens to merge, in [0, 1], capped at all that are not destinations
            (0.9375 at stride 4). More is faster and coarser.
        sx, sy: Width and height of a cell, in tokens, 1 to 64. A cell has one destination (or
            key); larger cells mean fewer agents (or keys).
        agent_ratio: Share of the tokens merged to make the agents, in [0, 1], capped likewise.
            Agents are used only where twice their number is below the merged tokens' number.
        agents: At most so many agents, at any resolution: where there would be more, cells are
            larger than ``sx`` × ``sy``. Instead of ``agent_ratio``.
        keys: At most so many keys, likewise.
        k_scale2: Exponent of the scale of the agents' broadcast softmax, in (0, 2].
        k_shortcut: Share of the values added to the output, in [-1, 1].
        use_rand: Draw the destination of a cell at random rather than take its top-left token.
        select: Key of a cell: its top-left token (``grid``), one drawn at each step (``random``),
            or each in turn (``cycle``, the closest to full attention).
        merge_crossattn: Also merge the queries of the cross-attention. Not recommended: little
            is gained, and details are lost.
        merge_mlp: Also merge the tokens that go through the feed-forward network. Not
            recommended, likewise.
        attn_precision: ``"fp32"`` computes the softmaxes in float32 (for Stable Diffusion 2.1 in
            float16); ``None`` leaves the model's precision.
        max_downsample: Patch layers down to this resolution: 1 (top), 2, 4 or 8. ``None`` takes
            the highest resolution at which the model has self-attention.
        min_tokens: Leave layers of fewer tokens alone. ``None`` takes what was measured to gain
            on this kind of device (:data:`agentsd.patching.runtime.MIN_TOKENS`); 0 patches all.

    Raises:
        ScheduleError: On unknown keys, wrong types, values out of range, or a parameter that the
            method does not read.

    Example:
        >>> Phase(method="agent", sx=4, sy=4, ratio=0.4, agent_ratio=0.95).plan(64, 64)
        Plan(tokens=4096, merged_tokens=2458, agents=256, keys=2458)
    """

    error: ClassVar = ScheduleError

    method: Literal["agent", "merge", "keys", "full"] = "agent"
    until: Annotated[float, Field(gt=0, le=1)] | None = None
    until_step: Annotated[int, Field(ge=1)] | None = None
    ratio: Share = 0.5
    sx: Stride = 2
    sy: Stride = 2
    agent_ratio: Share = 0.8
    agents: Count | None = None
    keys: Count | None = None
    k_scale2: Annotated[float, Field(gt=0, le=2)] = 0.3
    k_shortcut: Annotated[float, Field(ge=-1, le=1)] = 0.075
    use_rand: bool = True
    select: Literal["grid", "random", "cycle"] = "cycle"
    merge_crossattn: bool = False
    merge_mlp: bool = False
    attn_precision: Literal["fp32"] | None = None
    max_downsample: Literal[1, 2, 4, 8] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None

    @field_validator("max_downsample", mode="before")
    @classmethod
    def _is_whole(cls, value: Any) -> Any:
        # A Literal compares with ==, which lets True and 1.0 pass for 1.
        if value is not None and type(value) is not int:
            raise ScheduleError(
                f"max_downsample: input should be 1, 2, 4 or 8 (got {shown(value)})"
            )
        return value

    def model_post_init(self, _: Any) -> None:
        if self.until is not None and self.until_step is not None:
            raise ScheduleError("give until or until_step, not both")
        reads = METHODS[self.method]
        if idle := self.model_fields_set - {"method", "until", "until_step", *reads}:
            raise ScheduleError(
                f"method {self.method!r} does not read {', '.join(sorted(idle))}; "
                f"it reads {', '.join(reads)}"
            )
        if self.agents is not None and "agent_ratio" in self.model_fields_set:
            raise ScheduleError("agents says how many there may be; drop agent_ratio")

    def holds(self, step: int, num_steps: int) -> bool:
        """Whether ``step`` (from 0) of a run of ``num_steps`` lies before the phase's end."""
        if self.until_step is not None:
            return step < self.until_step
        # Divided, not multiplied: 0.14 * 50 is above 7 in floating point, 7 / 50 is 0.14.
        return self.until is None or step / num_steps < self.until

    @property
    def keeps_matching(self) -> bool:
        """Whether the layer's matching serves the rest of its block, too."""
        return self.merge_crossattn or self.merge_mlp

    def strides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width ``(sy, sx)`` of the cells on a grid of ``height × width`` tokens."""
        count = self.agents or self.keys
        if count is None:
            return self.sy, self.sx
        sy, sx = strides_for(height, width, count, partial=self.method == "keys")
        return max(sy, self.sy), max(sx, self.sx)

    def plan(self, height: int, width: int) -> Plan:
        """Count what the phase makes of a grid of ``height × width`` tokens."""
        tokens = height * width
        partial = self.method == "keys"
        rows, columns = cells(height, width, *self.strides(height, width), partial=partial)
        chosen = rows * columns  # destinations, or keys
        if self.method == "full" or not chosen:
            return Plan(tokens, tokens, 0, tokens)
        if self.method == "keys":
            return Plan(tokens, tokens, 0, chosen)
        merged = tokens - min(tokens - chosen, int(tokens * self.ratio))
        agent_ratio = self.agent_ratio if self.agents is None else 1.0
        agents = tokens - min(tokens - chosen, int(tokens * agent_ratio))
        if self.method == "merge" or 2 * agents >= merged:
            agents = 0
        return Plan(tokens, merged, agents, merged)

    def override(self, **changes: Any) -> Phase:
        """A copy with those parameters changed that its method reads."""
        changes = {k: v for k, v in changes.items() if k in METHODS[self.method]}
        # The newer way of saying how many agents there are takes the place of the older.
        ways = {"agents", "agent_ratio"}
        dropped = ways if ways & changes.keys() else set()
        return Phase(**{k: v for k, v in self.to_dict().items() if k not in dropped} | changes)

    def to_dict(self) -> dict[str, Any]:
        """The method, its end and every parameter in effect, without those that are None."""
        names = ("until", "until_step", "method", *METHODS[self.method])
        return {
            name: value
            for name in names
            if (value := getattr(self, name)) is not None
            and not (name == "agent_ratio" and self.agents is not None)
        }


class Schedule(Strict):
    """The phases of a run, in order.

    Args:
        phases: One or more :class:`Phase` (or dicts of their parameters); all but the last say
            until when they hold.
        seed: Seed of the draws of destinations and keys. They depend on it, on the step and on
            the grid alone; the images' generators are not touched.

    Raises:
        ScheduleError: On anything :class:`Phase` refuses, or phases whose ends do not rise.

    Example:
        >>> schedule = Schedule(phases=[
        ...     {"until": 0.4, "method": "agent", "sx": 4, "sy": 4, "agent_ratio": 0.95},
        ...     {"method": "keys"},
        ... ])
        >>> schedule.phase_at(19, 50).method, schedule.phase_at(20, 50).method
        ('agent', 'keys')
    """

    error: ClassVar = ScheduleError

    phases: tuple[Phase, ...]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @field_validator("phases", mode="before")
    @classmethod
    def _read_phases(cls, value: Any) -> tuple[Phase, ...]:
        if not isinstance(value, list | tuple) or not value:
            raise ScheduleError(
                f"phases: must be a list of one or more phases (got {shown(value)})"
            )
        phases = []
        for number, item in enumerate(value, start=1):
            if not isinstance(item, Phase):
                item = _as_mapping(item, f"phase {number}")
            try:
                phases.append(item if isinstance(item, Phase) else Phase(**item))
            except ScheduleError as error:
                raise ScheduleError(f"phase {number}: {error}") from None
        return tuple(phases)

    def model_post_init(self, _: Any) -> None:
        *early, last = self.phases
        for number, phase in enumerate(early, start=1):
            if phase.until is None and phase.until_step is None:
                raise ScheduleError(f"phase {number}: needs until or until_step, as others follow")
        if last.until_step is not None or last.until not in (None, 1.0):
            raise ScheduleError(
                f"phase {len(self.phases)}: the last phase runs to the end; drop its until, "
                "or add a phase after it (method: full leaves the model as it is)"
            )
        for kind in ("until", "until_step"):
            ends = [end for phase in early if (end := getattr(phase, kind)) is not None]
            if any(a >= b for a, b in pairwise(ends)):
                raise ScheduleError(f"{kind} must rise from phase to phase (got {shown(ends)})")

    def phase_at(self, step: int, num_steps: int) -> Phase:
        """The phase of ``step`` (from 0) in a run of ``num_steps`` denoising steps."""
        return next((p for p in self.phases[:-1] if p.holds(step, num_steps)), self.phases[-1])

    def reach(self, top_downsample: int) -> int:
        """The deepest ``max_downsample`` of its phases; None stands for ``top_downsample``."""
        return max(phase.max_downsample or top_downsample for phase in self.phases)

    @property
    def counts_steps(self) -> bool:
        """Whether a phase ends at a number of steps, so that the run's length must be known."""
        return any(phase.until_step is not None for phase in self.phases)

    def asks(self, option: str) -> bool:
        """Whether any phase turns on ``option``."""
        return any(getattr(phase, option) for phase in self.phases)

    def override(self, **changes: Any) -> Schedule:
        """A copy with parameters changed in every phase whose method reads them.

        Raises:
            ScheduleError: If no phase reads one of them, or a value is out of range.
        """
        for name in changes:
            if not any(name in METHODS[phase.method] for phase in self.phases):
                raise ScheduleError(f"no phase of this schedule reads {name!r}")
        return Schedule(phases=tuple(p.override(**changes) for p in self.phases), seed=self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and strings; :meth:`from_dict` reads them back."""
        return {"phases": [phase.to_dict() for phase in self.phases], "seed": self.seed}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Schedule:
        """Read what :meth:`to_dict` or a YAML file says.

        Raises:
            ScheduleError: As for :class:`Schedule`.
        """
        schedule = _as_mapping(data, "a schedule")
        phases = schedule.get("phases")
        if isinstance(phases, list | tuple):
            schedule["phases"] = [_without_removed(phase) for phase in phases]
        return cls(**schedule)

    def to_yaml(self) -> str:
        """The schedule as YAML text."""
        return dump_yaml(self.to_dict())

    @classmethod
    def from_yaml(cls, source: str | Path) -> Schedule:
        """Read a schedule from a YAML file (a path) or from YAML text (a string with newlines).

        Raises:
            ScheduleError: Names the file and, for broken YAML, the line.
        """
        if not isinstance(source, str | Path):
            raise ScheduleError(f"a path or YAML text was expected (got {shown(source)})")
        is_text = isinstance(source, str) and "\n" in source
        place = "YAML text" if is_text else str(source)
        text = str(source) if is_text else read_text(source, ScheduleError)
        data = parse_yaml(text, place, ScheduleError)
        try:
            return cls.from_dict(data)
        except ScheduleError as error:
            raise ScheduleError(f"{place}: {error}") from None

    @classmethod
    def presets(cls) -> list[str]:
        """Names of the schedules that come with agentsd."""
        return sorted(path.stem for path in PRESETS.glob("*.yaml"))

    @classmethod
    def preset(cls, name: str) -> Schedule:
        """One of the schedules that come with agentsd, by name.

        Raises:
            ScheduleError: If there is none of that name; lists those there are.
        """
        names = cls.presets()
        if name not in names:
            raise ScheduleError(
                f"no preset schedule {name!r}; presets are {', '.join(names)}, "
                "or give the path of a .yaml file"
            )
        return cls.from_yaml(PRESETS / f"{name}.yaml")

    @classmethod
    def load(cls, schedule: Schedule | str | Path) -> Schedule:
        """Take a schedule as it is, or read it by preset name or path of a YAML file."""
        if isinstance(schedule, Schedule):
            return schedule
        if not isinstance(schedule, str | Path):
            raise ScheduleError(
                "a schedule is a Schedule, a preset's name or the path of a .yaml file "
                f"(got {type(schedule).__name__})"
            )
        path = Path(schedule)
        has_suffix = path.suffix.lower() in (".yaml", ".yml")
        if isinstance(schedule, str) and not (has_suffix or len(path.parts) > 1 or path.is_file()):
            return cls.preset(schedule)
        return cls.from_yaml(path)


REMOVED = {"share": "none", "refresh": 1, "reuse": 1}
"""Parameters of agentsd 0.1 with the values at which they did nothing, which old records hold."""


def _without_removed(phase: Any) -> Any:
    if not isinstance(phase, Mapping):
        return phase
    for name, idle in REMOVED.items():
        if phase.get(name, idle) != idle:
            raise ScheduleError(
                f"{name} was removed in agentsd 0.2: keys are closer to the unpatched image at the "
                f"same speed (got {name}: {shown(phase[name])})"
            )
    return {name: value for name, value in phase.items() if name not in REMOVED}


def _as_mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ScheduleError(f"{what} must be a mapping of names to values (got {shown(value)})")
    return dict(value)
