"""What attention does to the tokens of one image, for people to look at."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

QUERIES_AT_ONCE = 2048
"""Queries scored at a time, so that memory stays bounded."""


class Observation(NamedTuple):
    """What a layer does at one step, for ``N`` tokens; every field is ``None`` where it does not.

    *Targets* are the few tokens that queries attend to: the agents, or the keys of the first head.
    """

    owner: Tensor | None = None
    """``[N]`` merged token that each token belongs to."""
    targets: str | None = None
    """What the targets are called, in the plural."""
    places: Tensor | None = None
    """``[n]`` token at which each target is."""
    target: Tensor | None = None
    """``[N]`` target that each token belongs to; -1 for none."""
    attended: Tensor | None = None
    """``[N]`` target that each token attends to most."""


def attended_most(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The key with the largest attention weight, averaged over the heads, for each query.

    Args:
        q: Queries ``[H, N, d]`` of one image.
        k: Keys ``[H, n, d]``.
        scale: Of the softmax.

    Returns:
        Indices ``[N]`` in ``[0, n)``.
    """
    return torch.cat(
        [
            (rows.float() @ k.float().mT * scale).softmax(dim=-1).mean(dim=0).argmax(dim=-1)
            for rows in q.split(QUERIES_AT_ONCE, dim=1)
        ]
    )
