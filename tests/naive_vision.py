"""The trainable layer as plain loops in float64, from its specification."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from agentsd.nn import AgentAttention

Mistake = Literal["no bias", "class token pooled", "convolved before attention", "scaled twice"]


def agent_layer(
    layer: AgentAttention, x: Tensor, height: int, width: int, mistake: Mistake | None = None
) -> Tensor:
    """The output for one image's tokens ``x`` ``[N, C]``, or that of a wrong layer."""
    heads, side, bias = layer.num_heads, layer.agent_side, layer.bias
    first = int(bias.class_token)
    q, k, v = (x @ layer.qkv.weight.mT + layer.qkv.bias).chunk(3, dim=-1)
    pooled = q if mistake == "class token pooled" else q[first:]
    agents = pool(pooled[: height * width], height, width, side)
    local = torch.zeros_like(v)
    local[first:] = depthwise(v[first:], height, width, layer.dwc.weight, layer.dwc.bias)
    if mistake == "convolved before attention":
        v = local
    d = q.shape[1] // heads
    scale = 1 / d if mistake == "scaled twice" else d**-0.5
    out = torch.zeros_like(q)
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        to_agents, from_agents = biases(layer, head, height, width)
        if mistake == "no bias":
            from_agents = torch.zeros_like(from_agents)
        gathered = softmax_rows(agents[:, part], k[:, part], v[:, part], scale, to_agents)
        out[:, part] = softmax_rows(q[:, part], agents[:, part], gathered, scale, from_agents)
    return (out + local) @ layer.proj.weight.mT + layer.proj.bias


def biases(layer: AgentAttention, head: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """B₁ ``[n, N]`` and B₂ ``[N, n]`` of one head, an entry at a time."""
    bias, first = layer.bias, int(layer.bias.class_token)
    n, tokens = layer.agent_side**2, first + height * width
    to_agents, from_agents = torch.zeros(n, tokens), torch.zeros(tokens, n)
    to_agents, from_agents = to_agents.double(), from_agents.double()
    for agent in range(n):
        for row in range(height):
            for column in range(width):
                token = first + row * width + column
                to_agents[agent, token] = (
                    bilinear(bias.an_bias[head, agent], row, column, height, width)
                    + bias.ah_bias[0, head, agent, row, 0]
                    + bias.aw_bias[0, head, agent, 0, column]
                )
                from_agents[token, agent] = (
                    bilinear(bias.na_bias[head, agent], row, column, height, width)
                    + bias.ha_bias[0, head, row, 0, agent]
                    + bias.wa_bias[0, head, 0, column, agent]
                )
        if first:
            to_agents[agent, 0] = bias.ac_bias[0, head, agent, 0]
            from_agents[0, agent] = bias.ca_bias[0, head, 0, agent]
    return to_agents, from_agents


def bilinear(image: Tensor, row: int, column: int, height: int, width: int) -> float:
    """One pixel of an image enlarged to ``height × width``; pixels are areas, not points."""
    y, x = ((row + 0.5) * len(image) / height - 0.5, (column + 0.5) * len(image[0]) / width - 0.5)
    total = 0.0
    for j in (math.floor(y), math.floor(y) + 1):
        for i in (math.floor(x), math.floor(x) + 1):
            weight = (1 - abs(y - j)) * (1 - abs(x - i))
            at = min(max(j, 0), len(image) - 1), min(max(i, 0), len(image[0]) - 1)
            total += weight * float(image[at])
    return total


def pool(q: Tensor, height: int, width: int, side: int) -> Tensor:
    """Adaptive average pooling of ``[h·w, C]`` to ``[side², C]``; areas may overlap."""
    rows = []
    for a in range(side):
        for b in range(side):
            tokens = [
                row * width + column
                for row in range(a * height // side, -(-(a + 1) * height // side))
                for column in range(b * width // side, -(-(b + 1) * width // side))
            ]
            rows.append(sum(q[token] for token in tokens) / len(tokens))
    return torch.stack(rows)


def depthwise(v: Tensor, height: int, width: int, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3 × 3 convolution of each channel of ``[h·w, C]``, with zeros beyond the edge."""
    out = torch.zeros_like(v)
    for row in range(height):
        for column in range(width):
            total = bias.clone()
            for j in (-1, 0, 1):
                for i in (-1, 0, 1):
                    if 0 <= row + j < height and 0 <= column + i < width:
                        near = v[(row + j) * width + column + i]
                        total = total + weight[:, 0, j + 1, i + 1] * near
            out[row * width + column] = total
    return out


def softmax_rows(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor) -> Tensor:
    """Softmax attention of one head, a query at a time: ``[N, d]``."""
    out = []
    for query, added in zip(q, bias, strict=True):
        weights = [
            math.exp(float(query @ key) * scale + float(b)) for key, b in zip(k, added, strict=True)
        ]
        out.append(sum(w / sum(weights) * value for w, value in zip(weights, v, strict=True)))
    return torch.stack(out)
