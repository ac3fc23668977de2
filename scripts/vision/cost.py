"""Time and memory of one layer on the CPU, agents against softmax attention, with gradients.

Times are CPU times, which other work on the machine affects less than wall-clock times.
"""

from __future__ import annotations

import re
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
    """CPU milliseconds of a forward and backward pass."""
    started = time.process_time()
    layer(x).sum().backward()
    return 1e3 * (time.process_time() - started)


def times(sides: list[int], repeats: int) -> dict[str, list[float]]:
    """Median milliseconds, the variants interleaved and the first pass of each discarded."""
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
    """Peak MiB that a pass adds to this process; Linux only."""
    layer, x = make(variant, side), torch.randn(1, side * side, DIM, requires_grad=True)
    make(variant, 4)(torch.randn(1, 16, DIM)).sum().backward()  # what PyTorch loads on first use
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    once(layer, x)
    return _resident("VmHWM") - before


def _resident(name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def measure(sides: list[int], repeats: int) -> list[dict[str, object]]:
    """A row per variant and size; each peak is measured in a separate process."""
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
                    "cpu_ms": round(median, 1),
                    "peak_mib": round(float(result.stdout), 1),
                }
            )
    return rows
