"""The methods as plain loops in float64, step by step."""

from __future__ import annotations

import math

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

Groups = list[list[int]]
"""Which tokens are averaged into each row of a merged sequence."""


def top_left(height: int, width: int, sy: int, sx: int) -> list[int]:
    """The top-left token of each whole cell: the destinations."""
    return [
        row * sy * width + column * sx
        for row in range(height // sy)
        for column in range(width // sx)
    ]


def merge_most_similar(x: Tensor, destinations: list[int], merges: int) -> Groups:
    """Merge the ``merges`` sources of ``x`` ``[N, C]`` most similar to a destination."""
    groups = {token: [token] for token in destinations}
    sources = []
    for source in (i for i in range(len(x)) if i not in groups):
        cosines = [
            float(x[source] @ x[target] / (x[source].norm() * x[target].norm()))
            for target in destinations
        ]
        best = max(range(len(destinations)), key=cosines.__getitem__)
        sources.append((cosines[best], source, destinations[best]))
    sources.sort(reverse=True)
    for rank, (_, source, target) in enumerate(sources):
        if rank < merges:
            groups[target].append(source)
        else:
            groups[source] = [source]
    return list(groups.values())


def mean_rows(x: Tensor, groups: Groups) -> Tensor:
    rows = []
    for group in groups:
        total = torch.zeros_like(x[0])
        for token in group:
            total = total + x[token]
        rows.append(total / len(group))
    return torch.stack(rows)


def softmax_rows(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Softmax attention of one head, a query at a time: ``[N, d]``."""
    out = []
    for query in q:
        weights = [math.exp(float(query @ key) * scale) for key in k]
        out.append(sum(w / sum(weights) * value for w, value in zip(weights, v, strict=True)))
    return torch.stack(out)


def agent_rows(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, k_scale2: float, k_shortcut: float
) -> Tensor:
    """Agent attention of one head."""
    d = q.shape[-1]
    gathered = softmax_rows(agents, k, v, d**-0.5)
    return softmax_rows(q, agents, gathered, d ** (-0.5 * k_scale2)) + k_shortcut * v


def heads_of(projected: Tensor, heads: int) -> list[Tensor]:
    """``[N, H·d]`` as ``H`` tensors ``[N, d]``."""
    return list(projected.chunk(heads, dim=-1))


def agent_layer(
    attn: Attention,
    x: Tensor,
    height: int,
    width: int,
    *,
    sy: int,
    sx: int,
    ratio: float,
    agent_ratio: float,
    k_scale2: float,
    k_shortcut: float,
) -> Tensor:
    """A layer's output for one image's tokens ``x`` ``[N, C]``, with top-left destinations."""
    destinations = top_left(height, width, sy, sx)
    if not destinations:
        return attn(x[None])[0]
    sources = len(x) - len(destinations)
    groups = merge_most_similar(x, destinations, min(sources, int(len(x) * ratio)))
    agent_groups = merge_most_similar(x, destinations, min(sources, int(len(x) * agent_ratio)))
    merged = mean_rows(x, groups)
    q, k, v = (heads_of(p(merged), attn.heads) for p in (attn.to_q, attn.to_k, attn.to_v))
    if 2 * len(agent_groups) < len(groups):
        agents = heads_of(attn.to_q(mean_rows(x, agent_groups)), attn.heads)
        rows = [
            agent_rows(*head, k_scale2, k_shortcut) for head in zip(q, k, v, agents, strict=True)
        ]
    else:
        rows = [
            softmax_rows(*head, head[0].shape[-1] ** -0.5) for head in zip(q, k, v, strict=True)
        ]
    out = attn.to_out[0](torch.cat(rows, dim=-1))
    unmerged = torch.empty_like(x)
    for row, group in zip(out, groups, strict=True):
        for token in group:
            unmerged[token] = row
    return unmerged


def keys_layer(attn: Attention, x: Tensor, chosen: list[list[int]]) -> Tensor:
    """Softmax attention of one image in which head ``h`` has the keys ``chosen[h]``."""
    q, k, v = (heads_of(p(x), attn.heads) for p in (attn.to_q, attn.to_k, attn.to_v))
    rows = []
    for head, tokens in enumerate(chosen):
        keys = torch.stack([k[head][token] for token in tokens])
        values = torch.stack([v[head][token] for token in tokens])
        rows.append(softmax_rows(q[head], keys, values, q[head].shape[-1] ** -0.5))
    return attn.to_out[0](torch.cat(rows, dim=-1))
