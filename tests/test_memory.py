"""What a patched layer holds at most: never more than an unpatched one."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention
from tiny_models import build, run_layer

from agentsd import Schedule
from agentsd.benchmark.memory import PeakMemory
from agentsd.methods import Keys, token_merging
from agentsd.methods.base import ENDS
from agentsd.patching.processor import Projections


def layer(channels: int, heads: int) -> Attention:
    make = lambda: Attention(channels, heads=heads, dim_head=channels // heads)  # noqa: E731
    return build(make).requires_grad_(False)


def in_activations(memory: PeakMemory, x: torch.Tensor) -> float:
    return memory.peak / x.nbytes


@pytest.mark.parametrize(("channels", "heads"), [(64, 8), (160, 20)], ids=["sd15", "sdxl"])
@pytest.mark.parametrize("keys", [64, 256, None])
def test_keys_are_gathered_within_one_activation(
    channels: int, heads: int, keys: int | None
) -> None:
    attn, x = layer(channels, heads), torch.randn(2, 1024, channels)
    phase = Keys(keys=keys)
    plan = phase.plan(32, 32)
    chosen = torch.arange(heads * plan.keys).view(heads, -1) % plan.tokens
    with PeakMemory() as memory:
        k, v = Projections(attn, False).some_keys_and_values(x, chosen)
    kept = 2 * plan.keys / plan.tokens  # keys and values
    weights = 3 * 2 * channels**2 * x.element_size() / x.nbytes
    index = heads * plan.keys * 8 * 2 * len(x) / x.nbytes
    assert in_activations(memory, x) <= 1 + kept + weights + index
    assert k.shape == v.shape == (2, heads, plan.keys, channels // heads)
    with PeakMemory() as memory:  # at once, as a control
        x.index_select(1, chosen.flatten())
    if heads * plan.keys > plan.tokens:
        assert in_activations(memory, x) > 1


def peaks(preset: str) -> tuple[int, dict[str, int]]:
    """Bytes of an unpatched layer of 64×64 tokens, and of each phase's, without their kernels'."""
    attn, x = layer(160, 8), torch.randn(1, 64 * 64, 160)
    with PeakMemory() as unpatched:
        attn(x)
    found = {}
    for phase in Schedule.load(preset).phases:
        alone = phase.without(*ENDS, "cache")
        with PeakMemory() as memory:
            run_layer(attn, x, alone, 64, 64)
        found[phase.method] = memory.peak
    return unpatched.peak, found


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["faithful", "fast", "balanced", "turbo"])
def test_a_layer_of_few_keys_needs_no_more_memory(preset: str) -> None:
    unpatched, found = peaks(preset)
    assert set(found) == {"keys"}
    assert found["keys"] <= unpatched


@pytest.mark.slow
def test_matching_needs_a_block_of_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    unpatched, whole = peaks("paper")
    assert whole["merge"] > unpatched  # 4,096 × 1,024 similarities
    monkeypatch.setattr(token_merging, "BLOCK", 2**18)
    assert peaks("paper")[1]["merge"] <= unpatched
