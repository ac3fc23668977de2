"""Tensors that follow from numbers alone, made once for all layers, steps and images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any

import torch
from torch import Tensor

LIMIT = 2**25
"""Bytes that a cache holds."""


class TensorCache:
    """Keeps what functions make of their arguments, up to a limit; the oldest go first.

    Threads may share it.

    Args:
        limit: Bytes; a single tensor above it is made anew at each call.

    Example:
        >>> cache, x = TensorCache(), torch.zeros(1)
        >>> a, b = (cache.get(torch.arange, 3, like=x) for _ in range(2))
        >>> a is b, a
        (True, tensor([0, 1, 2]))
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit, self._held = limit, 0
        self._lock = Lock()  # processors of two pipelines may run in two threads
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __reduce__(self) -> tuple[type[TensorCache], tuple[int]]:
        return TensorCache, (self._limit,)  # copies and pickles start empty

    def get(self, make: Callable[..., Tensor], *args: Any, like: Tensor) -> Tensor:
        """``make(*args)``, or the tensor that an earlier call made of the same arguments.

        Args:
            make: A function of numbers.
            *args: Its arguments, hashable, the device among them.
            like: A tensor that the new one is computed with; it tells a real call from a trace.
        """
        if torch.compiler.is_compiling() or _is_capturing(like.device):
            return make(*args)  # it becomes part of the graph
        # A fake tensor, as exporters trace with, must not be met in a real call.
        key = make, args, type(like)
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
                return kept
            # A tensor of inference mode would be refused wherever gradients are computed.
            with torch.inference_mode(False):
                made = make(*args)
            self._kept[key] = made
            self._held += made.nbytes
            while self._held > self._limit:
                self._held -= self._kept.popitem(last=False)[1].nbytes
            return made


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


CONSTANTS = TensorCache()
"""For what is the same in every model."""


def integers(*bounds: int, like: Tensor) -> Tensor:
    """``torch.arange(*bounds)`` on the device of ``like``, made once."""
    return CONSTANTS.get(_arange, bounds, like.device, like=like)


def _arange(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.arange(*bounds, device=device)
