"""What all methods share: where a phase ends, which layers it covers, and its feature cache."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor

from ..errors import ScheduleError
from ..settings import StrictModel, Whole
from .observation import Observation

if TYPE_CHECKING:
    from typing_extensions import Self

Share = Annotated[float, Field(ge=0, le=1)]
Stride = Annotated[int, Field(ge=1, le=64)]
Count = Annotated[int, Field(ge=1, le=65536)]

ADVANCED: dict[str, Any] = {"advanced": True}
"""``json_schema_extra`` for fields that few users need to change."""

ENDS = ("until", "until_step")
"""Parameters that set when a phase ends."""

MAX_INTERVAL = 10

INTERVAL = "Steps per computation of the whole UNet. More: much faster, larger differences."


class Cache(StrictModel):
    """Which steps of a phase compute the whole UNet, and what the light steps in between do.

    A light step computes only the outermost layers, from a forecast of the deep feature that they
    take as input. The idea comes from DeepCache (Ma et al., 2023, arXiv 2312.00858).

    Args:
        interval: Steps per computation of the whole UNet, 2 to 10. Larger is faster, with larger
            differences from the unpatched image.
        branch: What light steps compute. 0 (default): the last layer of the last block, like
            DeepCache's branch 0; 1: its last two layers; -1: nothing, as the output itself is
            forecast.
        order: How the feature is forecast. ``None`` (default): along a line, as far as each image's
            last features kept their direction. Otherwise the degree of the polynomial through the
            last ``order + 1`` features: 0 reuses the last one, as DeepCache does, 1 is linear, 2
            quadratic.
        min_steps: Shorter runs are computed in full. ``None`` (default) means four intervals: in
            shorter runs, features change so much between steps that simply taking fewer steps is
            closer to the unpatched image in the same time.

    Raises:
        ScheduleError: On unknown keys, wrong types or values out of range.

    Example:
        >>> Cache(interval=2)
        Cache(interval=2, branch=0, order=None, min_steps=None)
    """

    error: ClassVar = ScheduleError

    interval: Annotated[int, Field(ge=2, le=MAX_INTERVAL, description=INTERVAL)]
    branch: Annotated[Literal[-1, 0, 1], Whole] = 0
    order: Annotated[Literal[0, 1, 2], Whole] | None = None
    min_steps: Annotated[int, Field(ge=0)] | None = None

    def has_light_steps(self, num_steps: int) -> bool:
        """Whether a run of ``num_steps`` has light steps."""
        return num_steps >= self.fewest_steps

    @property
    def fewest_steps(self) -> int:
        """Length of the shortest run that has light steps."""
        return 4 * self.interval if self.min_steps is None else self.min_steps

    def to_dict(self) -> dict[str, Any]:
        """All parameters that are not None."""
        return self.model_dump(exclude_none=True)


FLAT_CACHE = {f"cache_{name}": name for name in Cache.model_fields}
"""Maps ``cache_interval`` to the cache's ``interval``, and so on. Overrides use these names, as do
files written before phases had a ``cache``."""


def nest_cache(values: Mapping[str, Any]) -> dict[str, Any]:
    """Move ``cache_interval`` and the like into a phase's ``cache``.

    Raises:
        ScheduleError: If light steps are configured although every step is whole.

    Example:
        >>> nest_cache({"method": "keys", "cache_interval": 2})
        {'method': 'keys', 'cache': {'interval': 2}}
        >>> nest_cache({"cache": {"interval": 3, "order": 2}, "cache_interval": 1})
        {}
    """
    flat = {new: values[old] for old, new in FLAT_CACHE.items() if old in values}
    if not flat:
        return dict(values)
    rest = {name: value for name, value in values.items() if name not in FLAT_CACHE}
    cache = rest.pop("cache", None) or {}
    if isinstance(cache, Cache):
        cache = cache.to_dict()
    interval = flat.get("interval", cache.get("interval", 1))
    if type(interval) is not int or interval != 1:
        return rest | {"cache": cache | flat}
    if useless := [old for old, new in FLAT_CACHE.items() if new in flat and new != "interval"]:
        raise ScheduleError(f"{useless[0]} needs a cache_interval of 2 or more")
    return rest


class Plan(NamedTuple):
    """The token counts of a phase on one grid, after all caps."""

    tokens: int
    merged_tokens: int
    """Tokens left after merging; equal to ``tokens`` if nothing is merged."""
    agents: int
    """Agent tokens; 0 if plain softmax attention is used."""
    keys: int
    """Keys that each query (or, with agents, each agent) attends to."""

    @property
    def untouched(self) -> bool:
        """Whether the layer behaves as if unpatched."""
        return not self.agents and self.merged_tokens == self.keys == self.tokens


class Draw(NamedTuple):
    """Everything that the choice of tokens depends on."""

    step: int
    """Denoising step, or the noise level if the steps are unknown."""
    steps_known: bool
    seed: int
    """The schedule's seed."""
    device: torch.device | str = "cpu"


class SelfAttention(Protocol):
    """What a method needs from an attention layer with ``H`` heads of width ``d``."""

    @property
    def heads(self) -> int:
        """Number of heads."""

    def queries(self, x: Tensor) -> Tensor:
        """Queries ``[B, H, N, d]`` of tokens ``[B, N, C]``."""

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, N, d]`` of tokens ``[B, N, C]``."""

    def some_keys_and_values(self, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, n, d]`` of each head's ``chosen`` tokens ``[H, n]``."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Softmax attention; all tensors are ``[B, H, ·, d]``."""

    def output(self, x: Tensor) -> Tensor:
        """Output projection, ``[B, H, N, d]`` to ``[B, N, C]``."""


class BasePhase(StrictModel):
    """A range of denoising steps that share one method and its parameters.

    Each method is a subclass with its own parameters: :class:`Agent`, :class:`Full`,
    :class:`Keys` and :class:`Merge`. The web app shows the fields that have a description, with
    their range, default and ``examples``; those marked :data:`ADVANCED` are collapsed.

    :class:`Full` documents the shared parameters.
    """

    error: ClassVar = ScheduleError
    summary: ClassVar[str] = ""
    """What the method does, in one line."""
    replaces: ClassVar[Mapping[str, str]] = {}
    """Maps parameters to those that they replace when given."""

    method: str
    until: Annotated[float, Field(gt=0, le=1)] | None = None
    until_step: Annotated[int, Field(ge=1)] | None = None
    max_downsample: Annotated[Literal[1, 2, 4, 8], Whole] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    cache: Cache | None = None

    def model_post_init(self, _: Any) -> None:
        if self.until is not None and self.until_step is not None:
            raise ScheduleError("give until or until_step, not both")

    @classmethod
    def method_name(cls) -> str:
        """The value of ``method`` for this class."""
        name: str = cls.model_fields["method"].default
        return name

    @classmethod
    def parameters(cls) -> tuple[str, ...]:
        """Names of the parameters that the method reads: its own first, then the shared ones."""
        shared = [name for name in BasePhase.model_fields if name not in ("method", *ENDS)]
        own = [name for name in cls.model_fields if name not in BasePhase.model_fields]
        return (*own, *shared)

    @classmethod
    def reads(cls, name: str) -> bool:
        """Whether the method reads a parameter, under its name or in :data:`FLAT_CACHE`."""
        return name in cls.parameters() or name in FLAT_CACHE

    @classmethod
    def unknown_key(cls, key: str) -> str:
        """Error message for a parameter that the method does not read."""
        close = get_close_matches(key.lower(), cls.model_fields, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        reads = ", ".join(cls.parameters())
        return f"method {cls.method_name()!r} does not read {key!r}{hint}; it reads {reads}"

    @classmethod
    def ignored_parameters(cls, values: Mapping[str, Any]) -> set[str]:
        """Parameters that have no effect, given the values of others."""
        return {old for new, old in cls.replaces.items() if values.get(new)}

    def is_active_at(self, step: int, num_steps: int) -> bool:
        """Whether ``step`` (from 0) of a run of ``num_steps`` lies before the phase's end."""
        if self.until_step is not None:
            return step < self.until_step
        # Divided, not multiplied: 0.14 * 50 is above 7 in floating point, 7 / 50 is 0.14.
        return self.until is None or step / num_steps < self.until

    def enables(self, option: str) -> bool:
        """Whether the phase turns on ``option``; False if its method does not have it."""
        return bool(getattr(self, option, False))

    def plan(self, height: int, width: int) -> Plan:
        """Count the tokens of each kind on a grid of ``height × width`` tokens."""
        raise NotImplementedError

    def period(self, height: int, width: int) -> int | None:
        """The number of steps after which the same tokens are chosen again; None if never."""
        return None

    def choose(self, draw: Draw, heads: int, height: int, width: int) -> Tensor:
        """Choose one token per cell: ``[cells]`` for all heads, or ``[heads, cells]``."""
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
            The output ``[B, N, C]`` and, if tokens were merged, each token's owner ``[B, N]``.
        """
        raise NotImplementedError

    def observe(self, layer: SelfAttention, x: Tensor, chosen: Tensor, plan: Plan) -> Observation:
        """Observe what :meth:`attention` does to the last image of the batch."""
        return Observation()

    def stages(self, plan: Plan) -> tuple[str, ...]:
        """Short descriptions of the tokens left after each stage of a plan."""
        raise NotImplementedError

    def caps(self, plan: Plan) -> list[str]:
        """Explain where a plan differs from the requested parameters."""
        return []

    def override(self, **changes: Any) -> Self:
        """A copy with parameters changed, except those that its method does not read."""
        changes = {k: v for k, v in changes.items() if self.reads(k)}
        # Of two parameters that replace each other, a new one drops the old one.
        pairs = [set(pair) for pair in self.replaces.items()]
        dropped = {name for pair in pairs if pair & changes.keys() for name in pair}
        values = {k: v for k, v in self.to_dict().items() if k not in dropped}
        return type(self)(**nest_cache(values | changes))

    def without(self, *names: str) -> Self:
        """A copy with some parameters reset to their defaults."""
        return type(self)(**{k: v for k, v in self.to_dict().items() if k not in names})

    def to_dict(self) -> dict[str, Any]:
        """The end, the method and all parameters in effect that are not None."""
        ignored = self.ignored_parameters(vars(self))
        names = [name for name in (*ENDS, "method", *self.parameters()) if name not in ignored]
        values = {name: value for name in names if (value := getattr(self, name)) is not None}
        return values if self.cache is None else values | {"cache": self.cache.to_dict()}
