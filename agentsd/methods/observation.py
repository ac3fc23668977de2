"""What attention does to the tokens of one image, for display."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

QUERIES_AT_ONCE = 2048
"""Queries scored at a time, to bound memory."""


class Observation(NamedTuple):
    """What a layer does at one step, for ``N`` tokens; fields that do not apply are ``None``.

    *Targets* are the few tokens that queries attend to: the agents, or the keys of the first head.
    """

    owner: Tensor | None = None
    """``[N]`` index of the merged token that each token belongs to."""
    targets: str | None = None
    """Plural noun for the targets."""
    places: Tensor | None = None
    """``[n]`` token index of each target."""
    target: Tensor | None = None
    """``[N]`` index of the target that each token belongs to; -1 if there is none."""
    attended: Tensor | None = None
    """``[N]`` index of the target that each token attends to most."""


def attended_most(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The key with the largest attention weight, averaged over the heads, for each query.

    Args:
        q: Queries ``[H, N, d]`` of one image.
        k: Keys ``[H, n, d]``.
        scale: Factor of the logits.

    Returns:
        Indices ``[N]`` in ``[0, n)``.
    """
    return torch.cat(
        [
            (rows.float() @ k.float().mT * scale).softmax(dim=-1).mean(dim=0).argmax(dim=-1)
            for rows in q.split(QUERIES_AT_ONCE, dim=1)
        ]
    )
