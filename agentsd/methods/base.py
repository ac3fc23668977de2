"""What all methods share: when a phase ends, which layers it covers, and what it must define."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, get_args

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from ..errors import ScheduleError
from ..settings import StrictModel, short_repr
from .observation import Observation

Share = Annotated[float, Field(ge=0, le=1)]
Stride = Annotated[int, Field(ge=1, le=64)]
Count = Annotated[int, Field(ge=1, le=65536)]

Downsample = Literal[1, 2, 4, 8]
Branch = Literal[-1, 0, 1]
Order = Literal[0, 1, 2]
CHOICES: dict[str, tuple[int, ...]] = {
    "max_downsample": get_args(Downsample),
    "cache_branch": get_args(Branch),
    "cache_order": get_args(Order),
}

ADVANCED: dict[str, Any] = {"advanced": True}
"""``json_schema_extra`` of a field that few people need to change."""

ENDS = ("until", "until_step")
"""Parameters that set when a phase ends."""

CACHE = ("cache_interval", "cache_branch", "cache_order")
"""Parameters of the cache of deep features."""

INTERVAL = "Compute the whole UNet once in so many steps. More: much faster, larger differences."

METHODS: dict[str, type[Phase]] = {}
"""The methods that a phase can have, by name; subclasses of :class:`Phase` add themselves."""


class Plan(NamedTuple):
    """The token counts of a phase on one grid, after all caps."""

    tokens: int
    merged_tokens: int
    """Tokens left after merging; equal to ``tokens`` where nothing is merged."""
    agents: int
    """Agent tokens; 0 where plain softmax attention is used."""
    keys: int
    """Keys that each query (or, with agents, each agent) attends to."""

    @property
    def untouched(self) -> bool:
        """Whether the layer behaves as if unpatched."""
        return not self.agents and self.merged_tokens == self.keys == self.tokens


class Draw(NamedTuple):
    """Everything that the choice of tokens depends on."""

    step: int
    """Denoising step, or the noise level where the steps are not known."""
    steps_known: bool
    seed: int
    """The schedule's seed."""
    device: torch.device | str = "cpu"


class SelfAttention(Protocol):
    """What a method needs of an attention layer with ``H`` heads of width ``d``."""

    @property
    def heads(self) -> int:
        """Number of heads."""

    def queries(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` to ``[B, H, N, d]``."""

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, N, C]`` to two of ``[B, H, N, d]``."""

    def some_keys_and_values(self, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Those of each head's own tokens ``chosen`` ``[H, n]`` only: two of ``[B, H, n, d]``."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Softmax attention, all ``[B, H, ·, d]``."""

    def output(self, x: Tensor) -> Tensor:
        """Output projection, ``[B, H, N, d]`` to ``[B, N, C]``."""


class Phase(StrictModel):
    """A range of denoising steps that share one method and its parameters.

    ``Phase(method=…)`` makes a phase of that method, ``agent`` by default. A parameter that the
    method does not have is an error, so that no setting is silently ignored. Try ``method``,
    ``sx``, ``sy`` and ``ratio`` first.

    A method is a subclass. Its fields with a description can be set on the page of the app, with
    their range, default and ``examples``; those marked :data:`ADVANCED` are folded away.

    Args:
        method: ``agent``: agent attention over merged tokens. ``merge``: softmax attention over
            merged tokens. ``keys``: every query, but one token of each cell as key and value.
            ``full``: as unpatched. Their parameters are those of :class:`Agent`,
            :class:`Merge`, :class:`Keys` and :class:`Full`.
        until: The phase ends at this share of the run, in (0, 1]. All phases but the last need
            this or ``until_step``; the last one runs to the end.
        until_step: The same as a number of steps, at least 1.
        max_downsample: Patch layers down to this resolution: 1 (top), 2, 4 or 8. ``None`` takes
            the highest resolution at which the model has self-attention.
        min_tokens: Leave layers with fewer tokens unpatched. ``None`` takes the number from which
            patching was measured to be faster on this kind of device
            (:data:`agentsd.patching.runtime.MIN_TOKENS`); 0 patches all.
        cache_interval: Compute the whole UNet only once in so many steps, 1 to 10. The steps in
            between compute its outermost layers alone, on a forecast of the deep feature that
            these build on (the idea is DeepCache's: Ma et al., 2023, arXiv 2312.00858). Larger is
            faster, with larger differences to the unpatched image. 1, the default, computes every
            step.
        cache_branch: What is computed in between. 0, the default: the last layer of the last
            block (DeepCache's branch 0); 1: the last two; -1: nothing, as the output itself is
            forecast.
        cache_order: Degree of the polynomial through the last ``cache_order + 1`` features that
            the forecast continues: 0 keeps the last feature, as DeepCache does; 1, the default,
            is linear; 2 quadratic.

    Raises:
        ScheduleError: On unknown keys, wrong types, values out of range, or a parameter that the
            method does not have.

    Example:
        >>> Phase(method="agent", sx=4, sy=4, ratio=0.4, agent_ratio=0.95).plan(64, 64)
        Plan(tokens=4096, merged_tokens=2458, agents=256, keys=2458)
    """

    error: ClassVar = ScheduleError
    summary: ClassVar[str] = ""
    """What the method does, in one line."""
    replaces: ClassVar[Mapping[str, str]] = {}
    """Parameters that, when given, take the place of another one, by name."""

    method: str
    until: Annotated[float, Field(gt=0, le=1)] | None = None
    until_step: Annotated[int, Field(ge=1)] | None = None
    max_downsample: Downsample | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    cache_interval: Annotated[int, Field(ge=1, le=10, description=INTERVAL)] = 1
    cache_branch: Branch = 0
    cache_order: Order = 1

    def __new__(cls, /, **data: Any) -> Phase:
        if cls is not Phase:
            return super().__new__(cls)
        method = data.get("method", "agent")
        if not isinstance(method, str) or method not in METHODS:
            *names, last = map(repr, METHODS)
            raise ScheduleError(
                f"method: input should be {', '.join(names)} or {last} (got {short_repr(method)})"
            )
        return super().__new__(METHODS[method])

    def __init__(self, /, **data: Any) -> None:
        allowed = type(self).model_fields
        known = {name for kind in METHODS.values() for name in kind.model_fields}
        if idle := sorted(data.keys() & known - allowed.keys()):
            raise ScheduleError(
                f"method {allowed['method'].default!r} does not read {', '.join(idle)}; "
                f"it reads {', '.join(self.parameters())}"
            )
        super().__init__(**data)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        METHODS[cls.model_fields["method"].default] = cls

    @field_validator(*CHOICES, mode="before")
    @classmethod
    def _is_whole(cls, value: Any, info: ValidationInfo) -> Any:
        # A Literal compares with ==, which lets True and 1.0 pass for 1.
        if value is not None and type(value) is not int:
            *allowed, last = CHOICES[str(info.field_name)]
            raise ScheduleError(
                f"{info.field_name}: input should be {', '.join(map(str, allowed))} or {last} "
                f"(got {short_repr(value)})"
            )
        return value

    def model_post_init(self, _: Any) -> None:
        if self.until is not None and self.until_step is not None:
            raise ScheduleError("give until or until_step, not both")
        for name in ("cache_branch", "cache_order"):
            if self.cache_interval == 1 and name in self.model_fields_set:
                raise ScheduleError(f"{name} needs a cache_interval of 2 or more")

    @classmethod
    def parameters(cls) -> tuple[str, ...]:
        """Names of the parameters that the method reads: its own first, then the shared ones."""
        shared = [name for name in Phase.model_fields if name not in ("method", *ENDS)]
        own = [name for name in cls.model_fields if name not in Phase.model_fields]
        return (*own, *shared)

    @classmethod
    def idle(cls, values: Mapping[str, Any]) -> set[str]:
        """Parameters that have no effect beside the given values of others."""
        replaced = {old for new, old in cls.replaces.items() if values.get(new)}
        uses_cache = values.get("cache_interval", 1) != 1
        return replaced if uses_cache else replaced | set(CACHE[1:])

    def holds(self, step: int, num_steps: int) -> bool:
        """Whether ``step`` (from 0) of a run of ``num_steps`` lies before the phase's end."""
        if self.until_step is not None:
            return step < self.until_step
        # Divided, not multiplied: 0.14 * 50 is above 7 in floating point, 7 / 50 is 0.14.
        return self.until is None or step / num_steps < self.until

    def asks(self, option: str) -> bool:
        """Whether the phase turns on ``option``; its method may not have it."""
        return bool(getattr(self, option, False))

    def plan(self, height: int, width: int) -> Plan:
        """Count the tokens of each kind on a grid of ``height × width`` tokens."""
        raise NotImplementedError

    def period(self, height: int, width: int) -> int | None:
        """The number of steps after which the same tokens are chosen again; None if never."""
        return None

    def choose(self, draw: Draw, heads: int, height: int, width: int) -> Tensor:
        """Choose one token of each cell: ``[cells]`` for all heads, or ``[heads, cells]``."""
        raise NotImplementedError

    def attention(
        self, layer: SelfAttention, x: Tensor, chosen: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention over tokens.

        Args:
            layer: The layer.
            x: The tokens, ``[B, N, C]``.
            chosen: The tokens that :meth:`choose` returned.
            plan: The plan that :meth:`plan` returned.

        Returns:
            ``[B, N, C]``, and the owner ``[B, N]`` of each token if tokens were merged.
        """
        raise NotImplementedError

    def observe(self, layer: SelfAttention, x: Tensor, chosen: Tensor, plan: Plan) -> Observation:
        """Observe what :meth:`attention` does to the last image of the batch."""
        return Observation()

    def stages(self, plan: Plan) -> tuple[str, ...]:
        """The tokens left after each stage of a plan, in a few words."""
        raise NotImplementedError

    def caps(self, plan: Plan) -> list[str]:
        """Where a plan differs from what the parameters ask for, and why."""
        return []

    def override(self, **changes: Any) -> Phase:
        """A copy with those of the parameters changed that its method reads."""
        changes = {k: v for k, v in changes.items() if k in self.parameters()}
        # Of two parameters that replace each other, a new one drops the old one.
        pairs = [set(pair) for pair in self.replaces.items()]
        dropped = {name for pair in pairs if pair & changes.keys() for name in pair}
        values = {k: v for k, v in self.to_dict().items() if k not in dropped} | changes
        idle = self.idle(values) - changes.keys()
        return Phase(**{name: value for name, value in values.items() if name not in idle})

    def to_dict(self) -> dict[str, Any]:
        """The end, the method and all parameters in effect, except those that are None."""
        unused = CACHE if self.cache_interval == 1 else ()
        names = [name for name in (*ENDS, "method", *self.parameters()) if name not in unused]
        return {name: value for name in names if (value := getattr(self, name)) is not None}
