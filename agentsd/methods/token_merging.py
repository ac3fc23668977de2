"""Token merging by owner index (after ToMe for Stable Diffusion, arXiv 2303.17604).

The merged rows of a batch are one table, image after image. The *owner* of a token is the row that
it belongs to: merging is a mean by owner, unmerging one gather by owner. An image's rows begin with
its destinations; the unmerged tokens follow in their order, which does not affect attention.

A token can have a row at each of several *levels*, which are consecutive in the table.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .tensor_cache import CONSTANTS, integers

BLOCK = 2**25
"""Similarities computed at a time, to bound memory on large grids."""


class Matching(NamedTuple):
    """Every token's most similar destination."""

    destinations: Tensor
    """``[n]`` token indices of the destinations."""
    best: Tensor
    """``[B, N]`` index into ``destinations`` of each token's most similar one."""
    similarity: Tensor
    """``[B, N]`` cosine similarity to it; ``inf`` for the destinations themselves."""


def match(x: Tensor, destinations: Tensor) -> Matching:
    """Find each token's most similar destination (bipartite soft matching).

    Args:
        x: Tokens ``[B, N, C]`` to compare by cosine.
        destinations: ``[n]`` distinct token indices, the same for the whole batch.

    Returns:
        The :class:`Matching`, from which :func:`owners` can merge any number of tokens.
    """
    # An all-zero token would turn all similarities into NaN.
    length = torch.linalg.vector_norm(x, dim=-1).clamp_min(torch.finfo(x.dtype).tiny)  # [B, N]
    targets = x.index_select(1, destinations) / length.index_select(1, destinations)[..., None]
    rows = max(1, BLOCK // (len(x) * len(destinations)))
    maxima = [(block @ targets.mT).max(dim=-1) for block in x.split(rows, dim=1)]
    product, best = maxima[0]  # [B, N]
    if len(maxima) > 1:
        product, best = (torch.cat(parts, dim=1) for parts in zip(*maxima, strict=True))
    # A token's own length does not change which destination is nearest, so divide by it last.
    similarity = (product / length).index_fill_(1, destinations, torch.inf)
    return Matching(destinations, best, similarity)


def owners(matching: Matching, *merges: int) -> Tensor:
    """Merge the most similar tokens into their destinations.

    Args:
        matching: The result of :func:`match`.
        merges: Number of tokens to merge at each level, from 0 to ``N - n``.

    Returns:
        ``owner`` ``[levels, B, N]``: the row of each token.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.8]]])
        >>> owners(match(x, torch.tensor([0, 2])), 2, 1)
        tensor([[[0, 0, 1, 1]],
        <BLANKLINE>
                [[2, 2, 3, 4]]])
    """
    destinations, best, similarity = matching
    (batch, tokens), n = best.shape, len(destinations)
    rows = tuple(tokens - count for count in merges)

    def numbers(first: int, count: int) -> Tensor:
        """Rows ``first`` to ``first + count`` of each image at each level."""
        return CONSTANTS.get(_rows, batch, rows, first, count, best.device, like=best)

    owner = best + numbers(0, 1)
    owner.index_copy_(2, destinations, numbers(0, n))
    for level, unmerged in enumerate(count - n for count in rows):
        if unmerged:
            least = similarity.topk(unmerged, dim=1, largest=False, sorted=False).indices
            if least.device.type == "mps":  # older macOS releases only sort 32-bit integers
                least = least.int()
            order = least.sort(dim=1).values.long()
            owner[level].scatter_(1, order, numbers(n, unmerged)[level])
    return owner


def _rows(
    batch: int, rows: tuple[int, ...], first: int, count: int, device: torch.device
) -> Tensor:
    """Table indices ``[levels, B, count]`` of each image's rows from ``first`` on."""
    image = torch.arange(batch, device=device)
    starts = [batch * sum(rows[:level]) + image * size for level, size in enumerate(rows)]
    return torch.stack(starts)[..., None] + torch.arange(first, first + count, device=device)


def merge(x: Tensor, owner: Tensor, rows: int) -> Tensor:
    """Average the tokens of each owner.

    Args:
        x: Tokens ``[B, N, C]``.
        owner: ``[B, N]`` or ``[levels, B, N]`` with values in ``[0, rows)``, each used at least
            once; values do not decrease from level to level.
        rows: Length of the table.

    Returns:
        The table ``[rows, C]`` in the dtype of ``x``. Sums are accumulated in float32 or better,
        since counts above 256 are not exact in bfloat16.
    """
    x = x.flatten(0, 1)
    owner = owner.reshape(-1, len(x))  # [levels, B·N]
    if x.device.type == "mps" or (x.device.type == "cpu" and x.dtype == torch.float16):
        # embedding_bag is missing on MPS before PyTorch 2.10, and overflows in float16 on CPUs.
        return _mean_by_adding(x, owner, rows)
    # One pass and, unlike index_add on CUDA, always in the same order.
    index, order = owner.sort(dim=1)
    first = torch.searchsorted(index.flatten(), integers(rows, like=x))
    return F.embedding_bag(order.flatten(), x, first, mode="mean")


def _mean_by_adding(x: Tensor, owner: Tensor, rows: int) -> Tensor:
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    total, number = values.new_zeros(rows, x.shape[1]), values.new_zeros(rows)
    for index in owner:
        total = total.index_add(0, index, values)
        number = number.index_add(0, index, values.new_ones(index.shape))
    return (total / number[:, None]).to(x.dtype)


def unmerge(y: Tensor, owner: Tensor) -> Tensor:
    """Give every token its owner's row: ``[B, rows, C]`` and ``[B, N]`` to ``[B, N, C]``."""
    return y.flatten(0, 1).index_select(0, owner.flatten()).view(*owner.shape, -1)
