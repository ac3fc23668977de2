"""Recordings of images, kept for a while under a key that only their visitor has."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from typing import Generic, TypeVar

MOST = 4
"""Recordings kept at a time, of all visitors; those longest unused go first."""

Recording = TypeVar("Recording")


class Recordings(Generic[Recording]):
    """The last few recordings of one kind.

    Example:
        >>> kept = Recordings[str]()
        >>> keys = [kept.add(name) for name in "abcde"]
        >>> [kept.get(key) for key in keys]
        [None, 'b', 'c', 'd', 'e']
    """

    def __init__(self) -> None:
        self._by_key: OrderedDict[str, Recording] = OrderedDict()

    def add(self, made: Recording) -> str:
        """Keep a recording, and drop the one longest unused if there are too many.

        Returns:
            Its key.
        """
        key = secrets.token_hex(16)
        self._by_key[key] = made
        while len(self._by_key) > MOST:
            self._by_key.popitem(last=False)
        return key

    def get(self, key: str) -> Recording | None:
        """The recording of a key; ``None`` if it is no longer there."""
        found = self._by_key.get(key)
        if found is not None:
            self._by_key.move_to_end(key)
        return found
