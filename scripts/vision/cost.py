"""Time and memory of one layer, agents against softmax attention, forward and backward."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import timm.layers
import torch
from torch import nn

from agentsd.nn import AgentAttention

DIM, HEADS, AGENTS = 64, 2, 49


def make(variant: str, side: int) -> nn.Module:
    """A layer of the given variant for ``side²`` tokens."""
    torch.manual_seed(0)
    if variant == "agent":
        return AgentAttention(DIM, HEADS, (side, side), AGENTS)
    return timm.layers.Attention(DIM, HEADS, qkv_bias=True)


def once(layer: nn.Module, x: torch.Tensor) -> float:
    """Milliseconds of one forward and backward pass."""
    started = time.perf_counter()
    layer(x).sum().backward()
    return 1e3 * (time.perf_counter() - started)


def times(sides: list[int], repeats: int) -> dict[str, list[float]]:
    """Median milliseconds, the variants interleaved and the first pass of each thrown away."""
    found: dict[str, list[float]] = {}
    for side in sides:
        x = torch.randn(1, side * side, DIM, requires_grad=True)
        layers = {variant: make(variant, side) for variant in ("agent", "softmax")}
        passes = [{name: once(layer, x) for name, layer in layers.items()} for _ in range(repeats)]
        for name in layers:
            of = statistics.median(each[name] for each in passes[1:])
            found.setdefault(name, []).append(of)
    return found


def peak(variant: str, side: int) -> float:
    """MiB that one pass adds to this process's peak."""
    layer, x = make(variant, side), torch.randn(1, side * side, DIM, requires_grad=True)
    small = torch.randn(1, 16, DIM)
    (make(variant, 4))(small).sum().backward()  # what PyTorch loads at its first use
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    once(layer, x)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def measure(sides: list[int], repeats: int) -> list[dict[str, object]]:
    """A row for each variant and size; each peak is measured in a process of its own."""
    found = times(sides, repeats)
    rows = []
    for variant, medians in found.items():
        for side, median in zip(sides, medians, strict=True):
            code = f"from vision.cost import peak; print(peak({variant!r}, {side}))"
            folder = Path(__file__).resolve().parents[1]
            result = subprocess.run(
                [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
            )
            rows.append(
                {
                    "variant": variant,
                    "tokens": side * side,
                    "ms": round(median, 1),
                    "peak_mib": round(float(result.stdout), 1),
                }
            )
    return rows
