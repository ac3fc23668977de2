"""Temporarily replaces attributes of objects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced_attribute(x: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an object's own attribute until the end of the ``with`` block.

    Args:
        x: An object with a ``__dict__``; an attribute of its class is not touched.
        name: The attribute.
        value: Its temporary value.

    Example:
        >>> class Counter:
        ...     def step(self): return 1
        >>> counter = Counter()
        >>> with replaced_attribute(counter, "step", lambda: 2):
        ...     counter.step()
        2
        >>> counter.step(), vars(counter)
        (1, {})
    """
    own, missing = vars(x), object()
    before = own.get(name, missing)
    setattr(x, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(x, name)
        else:
            setattr(x, name, before)
