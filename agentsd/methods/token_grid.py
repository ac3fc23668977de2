"""Choose one token per cell, by draws that depend only on the seed, the step and the grid.

A draw is a hash of its key, not the next number of a random stream. So no state is stored or moved
between devices, PyTorch's generators are not touched, and an image cannot depend on its batch or on
earlier runs. A *place* is an index, row by row, within a cell of ``sy × sx`` tokens.
"""

import itertools
from typing import TypeVar

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF

Integers = TypeVar("Integers", int, Tensor)


def _hash(x: Integers) -> Integers:
    """Mix 32-bit integers; tensors hold them in int64, so that no product overflows."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x045D9F3B) & _MASK
    return x ^ (x >> 16)


def draw(shape: tuple[int, ...], *key: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform 32-bit integers, int64 of ``shape``, that depend only on ``shape`` and ``key``."""
    state = 0
    for part in (*shape, *key):
        state = _hash(state + 0x9E3779B9 + (part & _MASK) & _MASK)
    count = torch.Size(shape).numel()
    return _hash(state + _hash(torch.arange(count, device=device)) & _MASK).view(shape)


def cells(height: int, width: int, sy: int, sx: int, *, partial: bool) -> tuple[int, int]:
    """Rows and columns of cells on a grid; ``partial`` also counts cells cut off by the edge."""
    if partial:
        return -(-height // sy), -(-width // sx)
    return height // sy, width // sx


def strides_for(height: int, width: int, count: int, *, partial: bool) -> tuple[int, int]:
    """Size of the smallest, squarest cells such that a grid holds at most ``count`` of them.

    Args:
        height: Height of the grid, in tokens.
        width: Width of the grid, in tokens.
        count: Maximum number of cells, at least 1.
        partial: As for :func:`cells`.

    Returns:
        ``(sy, sx)``, which differ by at most one unless the grid is narrower.

    Example:
        >>> [strides_for(size, size, 256, partial=True) for size in (64, 72, 192)]
        [(4, 4), (5, 5), (12, 12)]
    """
    for side in itertools.count(1):
        for sy, sx in ((side, side), (side, side + 1), (side + 1, side)):
            sy, sx = min(sy, height), min(sx, width)
            rows, columns = cells(height, width, sy, sx, partial=partial)
            if rows * columns <= count:
                return sy, sx
    raise AssertionError("one cell as large as the grid always fits")


def tokens_at(place: Tensor, height: int, width: int, sy: int, sx: int, rows: int) -> Tensor:
    """Convert a place in each cell to a token index of the row-major grid.

    Args:
        place: ``[..., rows · columns]`` in ``[0, sy · sx)``, cells row by row.
        height: Height of the grid, in tokens.
        width: Width of the grid, in tokens.
        sy: Height of a cell.
        sx: Width of a cell.
        rows: Rows of cells. In cells cut off by the edge, places wrap around.

    Returns:
        Token indices, in the shape of ``place``.
    """
    cell = torch.arange(place.shape[-1], device=place.device)
    columns = place.shape[-1] // rows
    top, left = cell // columns * sy, cell % columns * sx
    y = top + place // sx % (height - top).clamp(max=sy)
    x = left + place % sx % (width - left).clamp(max=sx)
    return y * width + x


def random_places(
    shape: tuple[int, ...], size: int, step: int, seed: int, device: torch.device | str
) -> Tensor:
    """Places in ``[0, size)`` of ``shape`` (heads and cells), drawn anew at each step."""
    return draw(shape, seed, step, device=device) % size


def cycled_places(
    shape: tuple[int, ...], size: int, step: int, seed: int, device: torch.device | str
) -> Tensor:
    """Places that visit every token of their cell once in ``size`` steps.

    Each entry of ``shape`` (heads and cells) starts at its own place and moves along one fixed
    random order, so that the sampling errors of neighbouring steps and of different heads
    cancel, as in low-discrepancy integration.
    """
    order = draw((size,), seed, 1, device=device).argsort()
    start = draw(shape, seed, 2, device=device)
    return order[(start + step) % size]
