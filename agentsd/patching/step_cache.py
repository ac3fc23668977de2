"""What outlives a UNet call: features of earlier steps of the same run, and nothing else.

A UNet may denoise several images in turn, so features belong to a *stream* of calls: those of one
run, on one batch of images, with one conditioning.
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

MOST_FEATURES = 3
"""Features that a forecast takes at most."""

MOST_STREAMS = 64
"""Streams that are followed at a time; the one that was called longest ago goes first."""

LARGEST_TURN = 6.0
"""Most that latents may turn from one call to the next, as a multiple of an even share of the
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
    """Say which run the UNet calls of a ``with`` block belong to.

    A schedule with a cache forecasts features from earlier calls of the same run. In a pipeline,
    runs tell themselves apart. A loop of your own that denoises several images in turn with one
    UNet should name them: features then pass from call to call of one key alone. Without a key,
    calls are told apart by their conditioning and, where that is the same, by their latents, which
    waits for the device; what cannot be told apart is computed whole, with a warning.

    Args:
        key: Names the run; anything hashable but None.

    Raises:
        PatchError: If the key is None or not hashable.

    Example:
        >>> from agentsd import cache_context
        >>> for image in range(2):
        ...     with cache_context(image):
        ...         pass  # unet(latents[image], t, prompt_embeds[image])
    """
    if key is None or not isinstance(key, Hashable):
        raise PatchError(f"cache_context: a key is hashable and not None (got {key!r})")
    token = _KEY.set(key)
    try:
        yield
    finally:
        _KEY.reset(token)


class Feature(NamedTuple):
    """The deep feature of a step that was computed whole."""

    step: int
    phase: Phase
    value: Tensor

    @property
    def branch(self) -> int | None:
        """Which layers it is the input of, as :class:`~agentsd.methods.base.Cache` counts them."""
        return None if self.phase.cache is None else self.phase.cache.branch


class _Seen:
    """A tensor that a UNet was called with, and whether it still has the same values."""

    def __init__(self, x: Tensor) -> None:
        self._x, self._version, self._object = x.detach(), _version(x), weakref.ref(x)

    def is_known_to_equal(self, x: Tensor) -> bool:
        """Whether another tensor is the same memory, unchanged; reads no values."""
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
        """The largest angle between an image's values and those in ``x``; waits for the device.

        Returns:
            Radians; infinite if the values that were seen are gone.
        """
        rewritten = _version(self._x) != self._version
        # A tensor of inference mode does not tell whether its memory was written again.
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
    """Its last call."""
    begins: int
    """Place of the run's first call in the list."""
    ends: int
    """The place after its last."""
    key: Hashable
    kind: object
    """Shapes, types and devices of the arguments."""
    conditioning: list[_Seen]
    latents: _Seen
    born: int
    """Number of its first call among all calls of the UNet."""
    called: int
    """Number of its last call, likewise."""
    calls: int = 0
    """Number of its calls."""
    opens: bool = False
    """Whether its last call was the first of any stream with its list of timesteps."""
    compared: bool = True
    """Whether the latents of its last call were compared with those before."""
    number: int = 0
    """Of the last call among those of its step: second-order schedulers make two, whose features
    lie on lines of their own."""
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
        """Whether its last call was the last of its run."""
        return self.call.place == self.ends - 1


class StepCache:
    """Tells which calls of a UNet go on with each other, and keeps their features.

    A call goes on with a stream if it is given the next entry of the same list of timesteps, the
    same conditioning (guidance in two calls makes two streams), and arguments of the same shapes.
    Where that is not enough, because several images share all of it or the list is not that of the
    pipeline's scheduler, its latents have to continue those of the stream's last call. Whatever
    does not go on with a stream begins one, so that no feature reaches another image.

    What a stream holds is freed with the last call of its run; where that was cut short, when
    another run has begun.
    """

    def __init__(self) -> None:
        self._streams: list[Stream] = []
        self._count = 0

    def follow(
        self, call: Call, inputs: Mapping[str, Any], expected: int | None = None
    ) -> tuple[Stream, str | None]:
        """The stream that a UNet call belongs to.

        Args:
            call: Its place in the list of timesteps.
            inputs: What the UNet is called with, by name.
            expected: Calls that the run is expected to make, if known.

        Returns:
            The stream, and why it begins anew in the middle of a run, if it does.
        """
        self._count += 1
        key, latents = _KEY.get(), inputs["sample"]
        tensors = list(_tensors({k: v for k, v in inputs.items() if k not in CHANGES}))
        kind = [(x.shape, x.dtype, x.device) for x in (latents, *tensors)], sorted(inputs)
        listed = [s for s in self._streams if s.key == key and s.call.is_of_the_same_list_as(call)]
        alike = [s for s in listed if s.kind == kind]
        rivals = _of_conditioning(alike, tensors)
        stream, problem = _continued(rivals, alike, call, latents)
        if stream is None:
            if problem and len(rivals) == 1:  # one image after another, rather than in turn
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
                    rival.kept.clear()  # which of the two it belonged to was never looked at
        else:
            same_step = call.step_of(call.place) == stream.step
            stream.number = stream.number + 1 if same_step else 0
        stream.call, stream.latents, stream.called = call, _Seen(latents), self._count
        stream.opens, stream.calls = not listed, stream.calls + 1
        # In turns, two images differ by one call at most: what others have overtaken is over.
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
        # A run that goes on otherwise (other conditioning, half the batch) began where it began.
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
        self._streams = [*self._streams, stream][-MOST_STREAMS:]
        return stream

    def put(self, stream: Stream, phase: Phase, value: Tensor) -> None:
        """Keep the feature of a stream's last call, and of those before as many as are used."""
        # A copy: a compiled UNet may return memory that its next call writes over.
        found = Feature(stream.step, phase, value.clone())
        stream.kept[stream.number] = [*stream.features, found][-MOST_FEATURES:]

    def end(self, stream: Stream) -> None:
        """After a call: free the stream if its run is over."""
        if stream.is_over:
            stream.kept.clear()
            self._streams = [s for s in self._streams if s is not stream]
        else:  # the one called longest ago comes first
            self._streams.sort(key=lambda s: s.called)


def _of_conditioning(streams: list[Stream], tensors: Sequence[Tensor]) -> list[Stream]:
    """The streams with a conditioning; it is read only where it is not in the same memory."""

    def like(stream: Stream, same: Any) -> bool:
        return all(same(seen, x) for seen, x in zip(stream.conditioning, tensors, strict=True))

    known = [s for s in streams if like(s, _Seen.is_known_to_equal)]
    return known or [s for s in streams if like(s, _Seen.equals)]


def _continued(
    rivals: list[Stream], alike: list[Stream], call: Call, latents: Tensor
) -> tuple[Stream | None, str | None]:
    """The stream of ``rivals`` that a call goes on with, or why it goes on with none."""
    candidates = [s for s in rivals if s.call.place == call.place - 1]
    if not candidates:
        # Some were called, but with another conditioning, or with entries further back.
        lost = any(s.call.place < call.place for s in alike) and not rivals
        skipped = any(s.call.place < call.place - 1 for s in rivals)
        if lost:
            return None, "its conditioning is not that of the call before"
        return None, "entries of the list of timesteps were left out" if skipped else None
    first = candidates[0]
    if first.key is not None:  # the caller has told them apart
        return first, None
    if call.is_entry and len(rivals) == 1:
        first.compared = False
        return first, None
    turns = [s.latents.turn_to(latents) for s in candidates]
    least = min(turns)
    if least > _largest_turn(call):
        return None, "its latents do not continue those of a call before"
    found = candidates[turns.index(least)]
    found.compared = True
    return found, None


def _largest_turn(call: Call) -> float:
    """Radians that the latents of a run may turn by from one call to the next."""
    return min(LARGEST_TURN * math.pi / 2 / call.num_steps, 1.0)


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
