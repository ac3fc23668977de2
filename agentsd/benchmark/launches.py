"""Count the operations that a call launches: on a fast GPU at small sizes they take the time."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

FREE = {
    "_unsafe_view",
    "device",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}
"""Operations that launch nothing, besides those whose schema says that they return a view."""


class LaunchCounter(TorchDispatchMode):
    """Counts the operations launched in its ``with`` block, by name, without views and allocations.

    Example:
        >>> import torch
        >>> x = torch.ones(2, 8)
        >>> with LaunchCounter() as counter:
        ...     y = (x.T.reshape(16) + 1).view(4, 4)
        >>> dict(counter.by_name)
        {'clone': 1, 'add': 1}
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_name: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Operations launched in total."""
        return sum(self.by_name.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE:
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))
