"""Features cached between the UNet calls of a run.

A UNet may denoise several images in turn, so features belong to a *stream*: the calls of one run,
on one batch of images, with one conditioning.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import PatchError
from ..schedule import Phase
from .denoising_step import Call

MAX_FEATURES = 3
"""Maximum number of features that a forecast uses."""

MAX_STREAMS = 64
"""Maximum number of streams followed at a time; the least recently called is dropped first."""

MAX_TURN = 6.0
"""Largest angle between the latents of consecutive calls, as a multiple of an even share of the
quarter turn from noise to image. On the pocket model at 10, 25 and 50 steps, deterministic
schedulers stayed below 5.7; those that add noise reach 8 to 50, and other images more."""

CHANGES = frozenset(
    {
        "sample",
        "timestep",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
    }
)
"""Arguments of a UNet that change from step to step; the others are its conditioning."""

_KEY: ContextVar[Hashable] = ContextVar("agentsd_cache_context", default=None)


@contextmanager
def cache_context(key: Hashable) -> Iterator[None]:
    """Name the run that the UNet calls of a ``with`` block belong to.

    A schedule with a cache forecasts features from earlier calls of the same run. Pipelines need no
    key. If a loop of your own denoises several images in turn with one UNet, give each run a key:
    features are then only shared between calls with the same key. Without keys, calls are told
    apart by their conditioning and, if that is the same, by their latents, which waits for the
    device; calls that cannot be told apart are computed in full, with a warning.

    Args:
        key: Identifies the run; any hashable value except None.

    Raises:
        PatchError: If the key is None or not hashable.

    Example:
        >>> from agentsd import cache_context
        >>> for image in range(2):
        ...     with cache_context(image):
        ...         pass  # unet(latents[image], t, prompt_embeds[image])
    """
    if key is None or not isinstance(key, Hashable):
        raise PatchError(f"cache_context: the key must be hashable and not None (got {key!r})")
    token = _KEY.set(key)
    try:
        yield
    finally:
        _KEY.reset(token)


class Feature(NamedTuple):
    """The deep feature of a whole step."""

    step: int
    phase: Phase
    value: Tensor

    @property
    def branch(self) -> int | None:
        """The ``branch`` of the phase's :class:`~agentsd.methods.base.Cache`."""
        return None if self.phase.cache is None else self.phase.cache.branch


class _Seen:
    """A tensor that a UNet was called with, to compare with those of later calls."""

    def __init__(self, x: Tensor) -> None:
        self._x, self._version, self._object = x.detach(), _version(x), weakref.ref(x)

    def is_known_to_equal(self, x: Tensor) -> bool:
        """Whether another tensor shares its memory, unchanged; reads no values."""
        return self._version == _version(x) and (
            self._object() is x
            or (
                self._x.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
                and self._x.storage_offset() == x.storage_offset()
                and (self._x.shape, self._x.stride()) == (x.shape, x.stride())
            )
        )

    def equals(self, x: Tensor) -> bool:
        """Whether another tensor has the same values; waits for the device."""
        return _version(self._x) == self._version and torch.equal(self._x, x)

    def turn_to(self, x: Tensor) -> float:
        """The largest angle between an image's latents and those in ``x``; waits for the device.

        Returns:
            The angle in radians; infinite if the earlier values were overwritten.
        """
        rewritten = _version(self._x) != self._version
        # Inference-mode tensors do not record whether they were overwritten.
        if rewritten or (x.is_inference() and self.is_known_to_equal(x)):
            return math.inf
        a, b = self._x.flatten(1).float(), x.detach().flatten(1).float()
        cosine = torch.nn.functional.cosine_similarity(a, b).min()
        return math.acos(min(1.0, max(-1.0, float(cosine))))


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


@dataclass(eq=False)
class Stream:
    """The calls of one run, on one batch of images, with one conditioning."""

    call: Call
    """The last call."""
    begins: int
    """Place of the run's first call in the list."""
    ends: int
    """Place after the run's last call."""
    key: Hashable
    kind: object
    """Shapes, types and devices of the arguments."""
    conditioning: list[_Seen]
    latents: _Seen
    born: int
    """Number of the first call, among all calls of the UNet."""
    called: int
    """Number of the last call, likewise."""
    calls: int = 0
    """How many calls there were."""
    opens: bool = False
    """Whether the last call was the first of any stream with its list of timesteps."""
    compared: bool = True
    """Whether the latents of the last call were compared with the previous ones."""
    number: int = 0
    """Index of the last call within its step: second-order schedulers make two calls per step,
    whose features are forecast separately."""
    kept: dict[int, list[Feature]] = field(default_factory=dict)
    """Features by number, the oldest first."""

    @property
    def step(self) -> int:
        """The denoising step of the last call."""
        return self.call.step_of(self.call.place)

    @property
    def features(self) -> list[Feature]:
        """Features of earlier calls like the last one, the oldest first."""
        return self.kept.get(self.number, [])

    @property
    def steps(self) -> range:
        """The denoising steps that the run computes."""
        return range(self.call.step_of(self.begins), self.call.step_of(self.ends - 1) + 1)

    @property
    def is_over(self) -> bool:
        """Whether the last call was the last of the run."""
        return self.call.place == self.ends - 1


class StepCache:
    """Assigns the calls of a UNet to streams, and keeps their features.

    A call continues a stream if it has the next entry of the same list of timesteps, the same
    conditioning (guidance in two calls makes two streams), and arguments of the same shapes. If
    that is ambiguous, because several images share all of it or the list is not the scheduler's,
    the latents must also continue those of the stream's last call. Any other call begins a new
    stream, so that no feature reaches another image.

    A stream is freed after the last call of its run or, if the run was interrupted, once another
    run has begun.
    """

    def __init__(self) -> None:
        self._streams: list[Stream] = []
        self._count = 0

    def follow(
        self, call: Call, inputs: Mapping[str, Any], expected: int | None = None
    ) -> tuple[Stream, str | None]:
        """The stream that a UNet call belongs to.

        Args:
            call: The call's place in the list of timesteps.
            inputs: Arguments of the UNet, by name.
            expected: Number of calls that the run is expected to make, if known.

        Returns:
            The stream and, if it had to restart in the middle of a run, the reason.
        """
        self._count += 1
        key, latents = _KEY.get(), inputs["sample"]
        tensors = list(_tensors({k: v for k, v in inputs.items() if k not in CHANGES}))
        kind = [(x.shape, x.dtype, x.device) for x in (latents, *tensors)], sorted(inputs)
        of_list = [s for s in self._streams if s.call.is_of_the_same_list_as(call)]
        listed = [s for s in of_list if s.key == key]
        alike = [s for s in listed if s.kind == kind]
        rivals = _of_conditioning(alike, tensors)
        stream, problem = _continued(rivals, alike, call, latents)
        if stream is None:
            if problem and len(rivals) == 1:  # images come one after another, not in turn
                self._streams.remove(rivals[0])
            before = [
                s
                for s in listed
                if s.call.place == call.place - 1
                and (s.kind != kind or s.latents.turn_to(latents) <= _largest_turn(call))
            ]
            stream = self._begin(call, before, expected, key, kind, tensors, latents)
            for rival in rivals:
                if not rival.compared and rival.call.place == call.place:
                    rival.kept.clear()  # it was never checked which of the two it belonged to
        else:
            same_step = call.step_of(call.place) == stream.step
            stream.number = stream.number + 1 if same_step else 0
        stream.call, stream.latents, stream.called = call, _Seen(latents), self._count
        stream.opens, stream.calls = not of_list, stream.calls + 1
        # Images in turn differ by one call at most: a stream that others have overtaken is over.
        if stream.calls > 2:
            self._streams = [
                s for s in self._streams if s.called >= stream.born or s.key is not None
            ]
        if call.place >= stream.ends:
            stream.ends = call.length
        return stream, problem

    def _begin(
        self,
        call: Call,
        before: list[Stream],
        expected: int | None,
        key: Hashable,
        kind: object,
        tensors: Sequence[Tensor],
        latents: Tensor,
    ) -> Stream:
        # A run that continues with other conditioning or half the batch keeps its beginning.
        begins = min((s.begins for s in before), default=call.place)
        ends = max((s.ends for s in before), default=call.length)
        if not before and expected is not None and begins + expected <= call.length:
            ends = begins + expected
        if call.is_entry:  # the scheduler has a new list, so runs on its old one are over
            self._streams = [
                s
                for s in self._streams
                if not s.call.is_entry or s.call.is_of_the_same_list_as(call)
            ]
        seen = [_Seen(x) for x in tensors]
        number = self._count
        stream = Stream(
            call, begins, ends, key, kind, seen, _Seen(latents), born=number, called=number
        )
        self._streams = [*self._streams, stream][-MAX_STREAMS:]
        return stream

    def put(self, stream: Stream, phase: Phase, value: Tensor) -> None:
        """Keep the feature of a stream's last call, and as many earlier ones as forecasts use."""
        # A copy: a compiled UNet may return memory that its next call overwrites.
        feature = Feature(stream.step, phase, value.clone())
        stream.kept[stream.number] = [*stream.features, feature][-MAX_FEATURES:]

    def end(self, stream: Stream) -> None:
        """After a call: free the stream if its run is over."""
        if stream.is_over:
            stream.kept.clear()
            self._streams = [s for s in self._streams if s is not stream]
        else:  # the least recently called comes first
            self._streams.sort(key=lambda s: s.called)


def _of_conditioning(streams: list[Stream], tensors: Sequence[Tensor]) -> list[Stream]:
    """The streams with this conditioning; values are only read if no stream shares its memory."""

    def like(stream: Stream, same: Any) -> bool:
        return all(same(seen, x) for seen, x in zip(stream.conditioning, tensors, strict=True))

    known = [s for s in streams if like(s, _Seen.is_known_to_equal)]
    return known or [s for s in streams if like(s, _Seen.equals)]


def _continued(
    rivals: list[Stream], alike: list[Stream], call: Call, latents: Tensor
) -> tuple[Stream | None, str | None]:
    """The stream of ``rivals`` that a call continues, or why it continues none."""
    candidates = [s for s in rivals if s.call.place == call.place - 1]
    if not candidates:
        # Some were called, but with another conditioning, or with entries further back.
        lost = any(s.call.place < call.place for s in alike) and not rivals
        skipped = any(s.call.place < call.place - 1 for s in rivals)
        if lost:
            return None, "its conditioning differs from the previous call's"
        return None, "entries of the list of timesteps were skipped" if skipped else None
    first = candidates[0]
    if first.key is not None:  # the caller has told them apart
        return first, None
    if call.is_entry and len(rivals) == 1:
        first.compared = False
        return first, None
    turns = [s.latents.turn_to(latents) for s in candidates]
    least = min(turns)
    if least > _largest_turn(call):
        return None, "its latents do not continue those of a previous call"
    closest = candidates[turns.index(least)]
    closest.compared = True
    return closest, None


def _largest_turn(call: Call) -> float:
    """Largest angle in radians between the latents of consecutive calls of a run."""
    return min(MAX_TURN * math.pi / 2 / call.num_steps, 1.0)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested mappings and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
