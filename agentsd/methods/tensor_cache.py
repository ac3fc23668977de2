"""A cache of tensors computed from numbers alone, for all layers, steps and images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any

import torch
from torch import Tensor

LIMIT = 2**25
"""Default size of a cache, in bytes."""


class TensorCache:
    """Caches the results of functions and evicts the least recently used; thread-safe.

    Args:
        limit: Maximum size in bytes; a larger tensor is computed anew at each call.

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
        """``make(*args)``, or the result of an earlier call with the same arguments.

        Args:
            make: A function of numbers.
            *args: Its hashable arguments, including the device.
            like: A tensor that the result is used with; distinguishes real calls from traces.
        """
        if torch.compiler.is_compiling() or _is_capturing(like.device):
            return make(*args)  # the result becomes part of the graph
        # Fake tensors, which exporters trace with, must not leak into real calls.
        key = make, args, type(like)
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
                return kept
            # Inference-mode tensors cannot be used where gradients are computed.
            with torch.inference_mode(False):
                tensor = make(*args)
            self._kept[key] = tensor
            self._held += tensor.nbytes
            while self._held > self._limit:
                self._held -= self._kept.popitem(last=False)[1].nbytes
            return tensor


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


CONSTANTS = TensorCache()
"""Shared by all models."""


def integers(*bounds: int, like: Tensor) -> Tensor:
    """``torch.arange(*bounds)`` on the device of ``like``, cached."""
    return CONSTANTS.get(_arange, bounds, like.device, like=like)


def _arange(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.arange(*bounds, device=device)
