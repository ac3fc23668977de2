"""Peak memory of tensors on any device, counted by storage."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors created in its ``with`` block, and their peak.

    Workspaces inside kernels are not counted.

    Example:
        >>> import torch
        >>> with PeakMemory() as memory:
        ...     x = torch.ones(1000)
        ...     x = x + 1
        ...     y = (x * 2).sum()
        >>> memory.peak, memory.held
        (8004, 4004)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.held = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if _is_tensor(x)}
        for tensor in filter(_is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._seen:
                self._count(storage)
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()

        def free(_: Any) -> None:
            self.held -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, free)
        self.held += size
        self.peak = max(self.peak, self.held)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)
