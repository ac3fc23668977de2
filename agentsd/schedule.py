"""The phases of a run: validated, immutable, read from and written as YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from .errors import ScheduleError
from .measured import Measured, TunedFor
from .methods import METHODS, Phase, Plan
from .methods.base import FLAT_CACHE, BasePhase, nest_cache
from .settings import StrictModel, dump_yaml, parse_yaml, short_repr
from .text_files import read_text

_HERE = Path(__file__).resolve().parent
PRESETS = next((p for p in (_HERE / "configs", _HERE.parent / "configs") if p.is_dir()), _HERE)
"""Folder of the presets: beside the package in a clone, inside it once installed."""

__all__ = ["METHODS", "Phase", "Plan", "Schedule"]


class Schedule(StrictModel):
    """The phases of a run, in order.

    Args:
        phases: One or more phases (:class:`Agent`, :class:`Full`, :class:`Keys`, :class:`Merge`,
            or dicts of their parameters); all but the last need ``until`` or ``until_step``.
        seed: Seed for choosing destinations and keys, in [0, 2**32). The choice depends only on the
            seed, the step and the grid; the images' generators are not touched.
        tuned_for: The conditions that ``agentsd tune`` tuned it for; other runs cause a warning.
            :meth:`override` drops it.
        measured: Measurements of its speed and quality, the most informative first.
            :meth:`override` drops them.

    Raises:
        ScheduleError: If a phase is invalid, or phase ends are not strictly increasing.

    Example:
        >>> from agentsd import Agent, Keys
        >>> schedule = Schedule(phases=[Agent(until=0.4), Keys(sx=4, sy=4)])
        >>> schedule.phase_at(19, 50).method, schedule.phase_at(20, 50).method
        ('agent', 'keys')
    """

    error: ClassVar = ScheduleError

    phases: Sequence[Annotated[Phase, Field(discriminator="method")]]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    tuned_for: TunedFor | None = None
    measured: Sequence[Measured] = ()

    @field_validator("phases", mode="before")
    @classmethod
    def _read_phases(cls, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not value:
            raise ScheduleError(
                f"phases: must be a list of one or more phases (got {short_repr(value)})"
            )
        return tuple(_read_phase(item, number) for number, item in enumerate(value, start=1))

    @field_validator("measured", mode="before")
    @classmethod
    def _read_measured(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @classmethod
    def place(cls, location: tuple[int | str, ...]) -> str:
        """``phase 2: sx`` instead of ``phases.1.keys.sx``."""
        match location:
            case "phases", int(index), *rest:
                return ": ".join([f"phase {index + 1}", *map(str, rest[1:])])
        return super().place(location)

    def model_post_init(self, _: Any) -> None:
        *early, last = self.phases
        for number, phase in enumerate(early, start=1):
            if phase.until is None and phase.until_step is None:
                raise ScheduleError(
                    f"phase {number}: needs until or until_step, since other phases follow"
                )
        if last.until_step is not None or last.until not in (None, 1.0):
            raise ScheduleError(
                f"phase {len(self.phases)}: the last phase runs to the end; drop its until, "
                "or add a phase after it (method: full leaves the model unpatched)"
            )
        for kind in ("until", "until_step"):
            ends = [end for phase in early if (end := getattr(phase, kind)) is not None]
            if any(a >= b for a, b in pairwise(ends)):
                raise ScheduleError(
                    f"{kind} must increase from phase to phase (got {short_repr(ends)})"
                )

    def phase_at(self, step: int, num_steps: int) -> Phase:
        """The phase of ``step`` (from 0) in a run of ``num_steps`` denoising steps."""
        return next(
            (p for p in self.phases[:-1] if p.is_active_at(step, num_steps)), self.phases[-1]
        )

    def reach(self, top_downsample: int) -> int:
        """The largest ``max_downsample`` of its phases; None counts as ``top_downsample``."""
        return max(phase.max_downsample or top_downsample for phase in self.phases)

    @property
    def counts_steps(self) -> bool:
        """Whether a phase ends at a step number, so that the steps must be known."""
        return any(phase.until_step is not None for phase in self.phases)

    @property
    def has_cache(self) -> bool:
        """Whether any phase has a cache."""
        return any(phase.cache is not None for phase in self.phases)

    def enables(self, option: str) -> bool:
        """Whether any phase turns on ``option``."""
        return any(phase.enables(option) for phase in self.phases)

    def is_equivalent_to(self, other: Schedule) -> bool:
        """Whether another schedule does the same in every step; measurements do not count."""
        return (self.phases, self.seed) == (other.phases, other.seed)

    def override(self, **changes: Any) -> Schedule:
        """A copy with parameters changed in every phase whose method reads them.

        Raises:
            ScheduleError: If no phase reads one of them, or a value is out of range.
        """
        known = sorted({name for method in METHODS.values() for name in method.parameters()})
        for name in changes:
            if any(phase.reads(name) for phase in self.phases):
                continue
            readers = [k for k, method in METHODS.items() if method.reads(name)]
            close = get_close_matches(name.lower(), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ScheduleError(
                f"no phase of this schedule reads {name!r}"
                + (f", a parameter of {' and '.join(readers)}" if readers else hint)
            )
        cache_only = FLAT_CACHE.keys() if self.has_cache and "cache_interval" not in changes else ()
        without_cache = {k: v for k, v in changes.items() if k not in cache_only}
        phases = [
            phase.override(**(without_cache if phase.cache is None else changes))
            for phase in self.phases
        ]
        return Schedule(phases=phases, seed=self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and strings; :meth:`from_dict` reads them back.

        They leave out ``measured``, which would burden the record of every image.
        """
        plain: dict[str, Any] = {
            "phases": [phase.to_dict() for phase in self.phases],
            "seed": self.seed,
        }
        if self.tuned_for is not None:
            plain["tuned_for"] = self.tuned_for.model_dump()
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Schedule:
        """Read plain values, as from :meth:`to_dict` or a YAML file.

        Raises:
            ScheduleError: As for :class:`Schedule`.
        """
        return cls(**_as_mapping(data, "a schedule"))

    def to_yaml(self) -> str:
        """The schedule as YAML text, with ``measured``."""
        measured = [entry.model_dump(exclude_none=True) for entry in self.measured]
        return dump_yaml(self.to_dict() | ({"measured": measured} if measured else {}))

    @classmethod
    def from_yaml(cls, source: str | Path) -> Schedule:
        """Read a schedule from a YAML file (a path) or from YAML text (a string with newlines).

        Raises:
            ScheduleError: Names the file and, for broken YAML, the line.
        """
        if not isinstance(source, str | Path):
            raise ScheduleError(f"expected a path or YAML text (got {short_repr(source)})")
        is_text = isinstance(source, str) and "\n" in source
        origin = "YAML text" if is_text else str(source)
        text = str(source) if is_text else read_text(source, ScheduleError)
        data = parse_yaml(text, origin, ScheduleError)
        try:
            return cls.from_dict(data)
        except ScheduleError as error:
            raise ScheduleError(f"{origin}: {error}") from None

    @classmethod
    def presets(cls) -> list[str]:
        """Names of the preset schedules."""
        return sorted(path.stem for path in PRESETS.glob("*.yaml"))

    @classmethod
    def preset(cls, name: str) -> Schedule:
        """A preset schedule by name.

        Raises:
            ScheduleError: If there is no such preset; lists the presets.
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
        """Return a schedule unchanged, or read a preset by name or a YAML file by path."""
        if isinstance(schedule, Schedule):
            return schedule
        if not isinstance(schedule, str | Path):
            raise ScheduleError(
                "schedule must be a Schedule, a preset's name or the path of a .yaml file "
                f"(got {type(schedule).__name__})"
            )
        path = Path(schedule)
        has_suffix = path.suffix.lower() in (".yaml", ".yml")
        if isinstance(schedule, str) and not (has_suffix or len(path.parts) > 1 or path.is_file()):
            return cls.preset(schedule)
        return cls.from_yaml(path)


DEFAULT_METHOD = "agent"
"""Method of a phase that names no method, as in the published parameters."""

REMOVED = {"share": "none", "refresh": 1, "reuse": 1}
"""Parameters of agentsd 0.1 that old records contain, with the values that had no effect."""


def _read_phase(phase: Any, number: int) -> Any:
    """A phase unchanged, or its parameters with old names updated."""
    if isinstance(phase, BasePhase):
        return phase
    phase = _as_mapping(phase, f"phase {number}")
    try:
        values = nest_cache(phase)
    except ScheduleError as error:
        raise ScheduleError(f"phase {number}: {error}") from None
    for name, no_effect in REMOVED.items():
        if values.pop(name, no_effect) != no_effect:
            raise ScheduleError(
                f"phase {number}: {name} was removed in agentsd 0.2: keys are closer to the "
                f"unpatched image at the same speed (got {name}: {short_repr(phase[name])})"
            )
    return {"method": DEFAULT_METHOD} | values


def _as_mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ScheduleError(
            f"{what} must be a mapping of names to values (got {short_repr(value)})"
        )
    return dict(value)
