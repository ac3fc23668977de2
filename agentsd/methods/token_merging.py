"""Token merging by owner index (after ToMe for Stable Diffusion, arXiv 2303.17604).

``owner[b, i]`` is the row of the merged sequence that token ``i`` belongs to. Merging is a mean
by owner, unmerging one gather by owner. The merged sequence starts with the destinations; the
unmerged tokens follow in their order. Attention does not depend on that order.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2**25
"""Similarities computed at a time, so that memory stays bounded on large grids."""


class Matching(NamedTuple):
    """Every token's most similar destination."""

    destinations: Tensor
    """``[n]`` token indices of the destinations."""
    best: Tensor
    """``[B, N]`` rank in ``destinations`` of each token's most similar one."""
    similarity: Tensor
    """``[B, N]`` cosine to it; ``-inf`` for the destinations, which are never merged."""


def match(x: Tensor, destinations: Tensor) -> Matching:
    """Find each token's most similar destination (bipartite soft matching).

    Args:
        x: Tokens ``[B, N, C]`` to compare by cosine.
        destinations: ``[n]`` distinct token indices, the same for the whole batch.

    Returns:
        The :class:`Matching`, from which :func:`owners` can merge any number of tokens.
    """
    # The default eps is 0 in float16, where a token of zeros would turn all similarities into NaN.
    tiny = torch.finfo(x.dtype).tiny
    targets = F.normalize(x[:, destinations], dim=-1, eps=tiny).mT  # [B, C, n]
    rows = max(1, BLOCK // (len(x) * len(destinations)))
    found = [(some @ targets).max(dim=-1) for some in x.split(rows, dim=1)]
    product, best = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))  # [B, N]
    # A token's own length does not change which destination is nearest, so divide by it last.
    similarity = product / torch.linalg.vector_norm(x, dim=-1).clamp_min(tiny)
    similarity = similarity.index_fill(1, destinations, -torch.inf)
    return Matching(destinations, best, similarity)


def owners(matching: Matching, merges: int) -> Tensor:
    """Merge the ``merges`` most similar tokens into their destinations.

    Args:
        matching: What :func:`match` returned.
        merges: Number of tokens to merge, from 0 to ``N - n``.

    Returns:
        ``owner`` ``[B, N]``: the row of each token among the ``N - merges`` merged ones.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]])
        >>> owners(match(x, torch.tensor([0, 2])), merges=2)
        tensor([[0, 0, 1, 1]])
    """
    destinations, best, similarity = matching
    n = destinations.shape[0]
    merged = torch.zeros_like(best, dtype=torch.bool)
    merged.scatter_(1, similarity.topk(merges, dim=1, sorted=False).indices, True)
    stays = (~merged).index_fill(1, destinations, False)
    owner = torch.where(merged, best, n - 1 + stays.cumsum(dim=1))
    owner[:, destinations] = torch.arange(n, device=best.device)
    return owner


def _flat(owner: Tensor, rows: int) -> Tensor:
    """``owner`` as rows ``[B·N]`` of a flattened batch, for one fast index over all of it."""
    start = torch.arange(owner.shape[0], device=owner.device) * rows
    return (owner + start[:, None]).flatten()


def merge(x: Tensor, owner: Tensor, rows: int) -> Tensor:
    """Average the tokens of each owner.

    Args:
        x: Tokens ``[B, N, C]``.
        owner: ``[B, N]`` with values in ``[0, rows)``, each taken at least once.
        rows: Length of the merged sequence.

    Returns:
        Merged tokens ``[B, rows, C]`` in the dtype of ``x``; sums are kept in float32 or better,
        since counts above 256 are not exact in bfloat16.
    """
    batch, _, channels = x.shape
    index, tokens = _flat(owner, rows), x.flatten(0, 1)
    if x.device.type == "mps" or (x.device.type == "cpu" and x.dtype == torch.float16):
        # Bags are missing on MPS before PyTorch 2.10, and overflow in float16 on CPUs.
        mean = _mean_by_adding(tokens, index, batch * rows)
    else:
        # One pass, and on CUDA, unlike adding, always in the same order.
        index, order = index.sort()
        first = torch.searchsorted(index, torch.arange(batch * rows, device=x.device))
        mean = F.embedding_bag(order, tokens, first, mode="mean")
    return mean.view(batch, rows, channels)


def _mean_by_adding(tokens: Tensor, index: Tensor, rows: int) -> Tensor:
    total = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    count = total.new_zeros(rows).index_add_(0, index, total.new_ones(index.shape))
    mean = total.new_zeros(rows, tokens.shape[1]).index_add_(0, index, total) / count[:, None]
    return mean.to(tokens.dtype)


def unmerge(y: Tensor, owner: Tensor) -> Tensor:
    """Give every token its owner's row: ``[B, rows, C]`` and ``[B, N]`` to ``[B, N, C]``."""
    batch, rows, channels = y.shape
    return y.flatten(0, 1).index_select(0, _flat(owner, rows)).view(batch, -1, channels)
