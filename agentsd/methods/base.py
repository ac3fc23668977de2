"""What every method shares: a phase of a schedule, its end, and the layers that it leaves alone."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from ..errors import ScheduleError
from ..settings import StrictModel, short_repr

Share = Annotated[float, Field(ge=0, le=1)]
Stride = Annotated[int, Field(ge=1, le=64)]
Count = Annotated[int, Field(ge=1, le=65536)]

ENDS = ("until", "until_step")
"""Parameters that say when a phase ends."""

CACHE = ("cache_interval", "cache_branch", "cache_order")
"""Parameters of the cache of deep features."""

METHODS: dict[str, type[Phase]] = {}
"""The methods that a phase can have, by name."""


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


class Draw(NamedTuple):
    """What the choice of tokens depends on, and nothing else."""

    step: int
    """Denoising step, or the place on the noise scale where the steps are not known."""
    steps_known: bool
    seed: int
    """Of the schedule."""
    device: torch.device | str = "cpu"


class SelfAttention(Protocol):
    """What a method needs of an attention layer with ``H`` heads of width ``d``."""

    @property
    def heads(self) -> int:
        """How many heads the layer has."""

    def queries(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` to ``[B, H, N, d]``."""

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, N, C]`` to two of ``[B, H, N, d]``."""

    def some_keys_and_values(self, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The same of each head's own tokens ``chosen`` ``[H, n]`` alone: ``[B, H, n, d]``."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Softmax attention, all ``[B, H, ·, d]``."""

    def output(self, x: Tensor) -> Tensor:
        """The output projection, ``[B, H, N, d]`` to ``[B, N, C]``."""


class Phase(StrictModel):
    """A stretch of denoising steps that share one method and its parameters.

    ``Phase(method=…)`` makes a phase of that method, ``agent`` unless given. A parameter that the
    method does not have is an error, so that no setting is silently without effect. Those worth
    changing first are ``method``, ``sx``, ``sy`` and ``ratio``.

    Args:
        method: ``agent``: agent attention over merged tokens. ``merge``: softmax attention over
            merged tokens. ``keys``: every query, but one token of each cell as key and value.
            ``full``: as unpatched. For their parameters see :class:`Agent`, :class:`Merge`,
            :class:`Keys` and :class:`Full`.
        until: The phase holds for steps before this share of the run, in (0, 1]. Every phase but
            the last needs this or ``until_step``; the last runs to the end.
        until_step: The same as a number of steps, at least 1.
        max_downsample: Patch layers down to this resolution: 1 (top), 2, 4 or 8. ``None`` takes
            the highest resolution at which the model has self-attention.
        cache_interval: Compute the whole UNet at every so many steps, 1 to 10, and between them
            only its outermost layers, on a forecast of the deep feature that they take from the
            others (Ma et al., *DeepCache*, 2023, arXiv 2312.00858; the forecast is agentsd's own).
            The larger, the faster and the farther from the unpatched image; 1, the default,
            computes every step.
        cache_branch: How many more layers a step between computes: 0, the default, is the last
            one of the last block, as DeepCache's branch 0; 1 the last two.
        cache_order: How the deep feature is forecast: 0 holds the last one as DeepCache does, 1,
            the default, continues the line through the last two, 2 the parabola through three.
        min_tokens: Leave layers of fewer tokens alone. ``None`` takes what was measured to gain
            on this kind of device (:data:`agentsd.patching.runtime.MIN_TOKENS`); 0 patches all.

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

    method: str
    until: Annotated[float, Field(gt=0, le=1)] | None = None
    until_step: Annotated[int, Field(ge=1)] | None = None
    max_downsample: Literal[1, 2, 4, 8] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    cache_interval: Annotated[int, Field(ge=1, le=10)] = 1
    cache_branch: Literal[0, 1] = 0
    cache_order: Literal[0, 1, 2] = 1

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

    @field_validator("max_downsample", "cache_branch", "cache_order", mode="before")
    @classmethod
    def _is_whole(cls, value: Any, info: ValidationInfo) -> Any:
        # A Literal compares with ==, which lets True and 1.0 pass for 1.
        if value is not None and type(value) is not int:
            raise ScheduleError(
                f"{info.field_name}: input should be a whole number (got {short_repr(value)})"
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
        """Names of what the method reads: its own first, then what all share."""
        shared = [name for name in Phase.model_fields if name not in ("method", *ENDS)]
        own = [name for name in cls.model_fields if name not in Phase.model_fields]
        return (*own, *shared)

    def holds(self, step: int, num_steps: int) -> bool:
        """Whether ``step`` (from 0) of a run of ``num_steps`` lies before the phase's end."""
        if self.until_step is not None:
            return step < self.until_step
        # Divided, not multiplied: 0.14 * 50 is above 7 in floating point, 7 / 50 is 0.14.
        return self.until is None or step / num_steps < self.until

    def asks(self, option: str) -> bool:
        """Whether the phase turns on ``option``, which its method may not have."""
        return bool(getattr(self, option, False))

    def plan(self, height: int, width: int) -> Plan:
        """Count what the phase makes of a grid of ``height × width`` tokens."""
        raise NotImplementedError

    def choose(self, draw: Draw, heads: int, height: int, width: int) -> Tensor:
        """The tokens of a grid that serve: ``[cells]`` for all heads, or ``[heads, cells]``."""
        raise NotImplementedError

    def attention(
        self, layer: SelfAttention, x: Tensor, chosen: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention of the tokens ``x`` ``[B, N, C]``.

        Args:
            layer: The layer.
            x: The tokens.
            chosen: What :meth:`choose` gave.
            plan: What :meth:`plan` gave.

        Returns:
            ``[B, N, C]``, and the owner ``[B, N]`` of each token where tokens merged.
        """
        raise NotImplementedError

    def stages(self, plan: Plan) -> tuple[str, ...]:
        """What the tokens of a plan become, one after the other, in a few words."""
        raise NotImplementedError

    def caps(self, plan: Plan) -> list[str]:
        """Where a plan is not what the parameters ask for, and why."""
        return []

    def override(self, **changes: Any) -> Phase:
        """A copy with those parameters changed that its method reads."""
        changes = {k: v for k, v in changes.items() if k in self.parameters()}
        return Phase(**self.to_dict() | changes)

    def to_dict(self) -> dict[str, Any]:
        """The method, its end and every parameter in effect, without those that are None."""
        unused = CACHE if self.cache_interval == 1 else ()
        names = [name for name in (*ENDS, "method", *self.parameters()) if name not in unused]
        return {name: value for name in names if (value := getattr(self, name)) is not None}
