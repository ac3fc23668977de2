"""Agent attention against plain loops: the tensors alone, then a whole layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from naive import agent_layer, agent_rows, keys_layer
from tiny_models import make_phase, run_layer, tiny_layer
from torch import Tensor

from agentsd.methods import Keys
from agentsd.methods.agent_attention import agent_attention, softmax_attention
from agentsd.patching.denoising_step import Position
from agentsd.patching.runtime import Runtime
from agentsd.patching.step_policy import GivenSteps
from agentsd.schedule import Phase, Schedule


def check(found: Tensor, expected: Tensor) -> None:
    """Assert equality up to float64 rounding."""
    distance = float((found - expected).norm() / expected.norm())
    assert distance <= 1e-12, f"relative L2 distance {distance:.2e}"


def randn(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class TestTensors:
    @pytest.mark.parametrize("batch", [1, 2, 3])
    @pytest.mark.parametrize(("tokens", "agents"), [(15, 4), (7, 7), (9, 1), (1, 1)])
    @pytest.mark.parametrize(("k_scale2", "k_shortcut"), [(0.3, 0.075), (1.0, 0.0), (2.0, -0.5)])
    def test_equals_loops(
        self, batch: int, tokens: int, agents: int, k_scale2: float, k_shortcut: float
    ) -> None:
        q, k, v = randn(3, batch, 2, tokens, 5)
        a = randn(batch, 2, agents, 5, seed=4)
        out = agent_attention(q, k, v, a, k_scale2=k_scale2, k_shortcut=k_shortcut)
        naive = [
            [agent_rows(*(t[b, h] for t in (q, k, v, a)), k_scale2, k_shortcut) for h in range(2)]
            for b in range(batch)
        ]
        check(out, torch.stack([torch.stack(heads) for heads in naive]))

    @pytest.mark.parametrize("wrong", [{"k_scale2": 1.0}, {"k_shortcut": 0.0}])
    def test_loops_detect_a_wrong_parameter(self, wrong: dict[str, float]) -> None:
        q, k, v, a = randn(4, 1, 1, 6, 5)
        naive = agent_rows(*(t[0, 0] for t in (q, k, v, a)), 0.3, 0.075)
        check(agent_attention(q, k, v, a)[0, 0], naive)
        with pytest.raises(AssertionError, match="relative L2"):
            check(agent_attention(q, k, v, a, **wrong)[0, 0], naive)

    def test_attend_does_both_softmaxes(self) -> None:
        calls: list[tuple[int, int, float]] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            calls.append((q.shape[2], k.shape[2], scale))
            return softmax_attention(q, k, v, scale)

        q, k, v = randn(3, 1, 2, 12, 4)
        agent_attention(q, k, v, q[:, :, ::4], attend=attend)
        assert calls == [(3, 12, 0.5), (12, 3, pytest.approx(4**-0.15))]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_keeps_the_dtype(self, dtype: torch.dtype) -> None:
        q = randn(1, 2, 8, 4).to(dtype)
        assert agent_attention(q, q, q, q[:, :, :2]).dtype == dtype

    def test_has_gradients(self) -> None:
        q, k, v, a = (randn(1, 1, 5, 3, seed=i).requires_grad_() for i in range(4))
        assert torch.autograd.gradcheck(agent_attention, (q, k, v, a))


SIZES = [(6, 6), (5, 7), (9, 4), (3, 8), (1, 6), (2, 2)]
SETTINGS: dict[str, Any] = {"k_scale2": 0.3, "k_shortcut": 0.075}


def _layer(batch: int, height: int, width: int) -> tuple[Any, Tensor]:
    return tiny_layer(), randn(batch, height * width, 16)


def _naive(attn: Any, x: Tensor, *grid: int, **settings: Any) -> Tensor:
    return torch.stack([agent_layer(attn, image, *grid, **settings) for image in x])


class TestLayer:
    """The processor on a real attention module, in float64."""

    @pytest.mark.parametrize(("sy", "sx"), [(1, 1), (2, 2), (3, 3), (4, 4), (2, 3), (4, 1)])
    @pytest.mark.parametrize(("height", "width"), SIZES)
    @pytest.mark.parametrize(("ratio", "agent_ratio"), [(0.0, 0.95), (0.4, 0.8), (1.0, 1.0)])
    def test_agent_equals_loops(
        self, height: int, width: int, sy: int, sx: int, ratio: float, agent_ratio: float
    ) -> None:
        attn, x = _layer(1, height, width)
        settings = SETTINGS | {"sy": sy, "sx": sx, "ratio": ratio, "agent_ratio": agent_ratio}
        found = run_layer(attn, x, make_phase(**settings, use_rand=False), height, width)
        check(found, _naive(attn, x, height, width, **settings))

    @pytest.mark.parametrize("batch", [1, 2, 3])
    @pytest.mark.parametrize("method", ["agent", "merge"])
    def test_batches_equal_loops(self, method: str, batch: int) -> None:
        attn, x = _layer(batch, 6, 7)
        shape = {"sx": 3, "sy": 2, "ratio": 0.3}
        agents = SETTINGS | {"agent_ratio": 0.9 if method == "agent" else 0.0}
        read = shape | (agents if method == "agent" else {})
        found = run_layer(attn, x, make_phase(method=method, **read, use_rand=False), 6, 7)
        check(found, _naive(attn, x, 6, 7, **shape, **agents))

    @pytest.mark.parametrize(
        "wrong", [{"sx": 3}, {"sy": 3}, {"ratio": 0.35}, {"agent_ratio": 0.85}, {"k_scale2": 0.31}]
    )
    def test_loops_detect_a_wrong_parameter(self, wrong: dict[str, Any]) -> None:
        attn, x = _layer(2, 8, 6)
        right = SETTINGS | {"sx": 2, "sy": 4, "ratio": 0.2, "agent_ratio": 0.9}
        expected = _naive(attn, x, 8, 6, **right)
        check(run_layer(attn, x, make_phase(**right, use_rand=False), 8, 6), expected)
        with pytest.raises(AssertionError, match="relative L2"):
            check(run_layer(attn, x, make_phase(**right | wrong, use_rand=False), 8, 6), expected)


def _chosen(phase: Phase, height: int, width: int, step: int = 0, heads: int = 2) -> Tensor:
    phase = phase.override(min_tokens=0)
    runtime = Runtime(Schedule(phases=(phase,)), [(1, heads)], GivenSteps())
    return runtime.step_at(Position(step, 1000), phase, height, width).chosen[1, heads]


class TestKeys:
    @pytest.mark.parametrize("select", ["grid", "random", "cycle"])
    @pytest.mark.parametrize(
        ("height", "width", "sy", "sx"), [(6, 6, 2, 2), (5, 7, 2, 3), (3, 2, 4, 4)]
    )
    @pytest.mark.parametrize("batch", [1, 3])
    def test_equals_loops(
        self, batch: int, height: int, width: int, sy: int, sx: int, select: str
    ) -> None:
        attn, x = _layer(batch, height, width)
        phase = Keys(sx=sx, sy=sy, select=select)
        chosen = _chosen(phase, height, width, step=3)
        naive = torch.stack([keys_layer(attn, image, chosen.tolist()) for image in x])
        found = run_layer(attn, x, phase, height, width, step=3)
        check(found, naive)
        next_tokens = ((chosen + 1) % (height * width)).tolist()
        with pytest.raises(AssertionError, match="relative L2"):
            check(found, torch.stack([keys_layer(attn, image, next_tokens) for image in x]))

    def test_heads_have_their_own_keys(self) -> None:
        first, second = _chosen(Keys(sx=2, sy=2), 8, 8)
        assert not torch.equal(first, second)
        attn, x = _layer(1, 8, 8)
        found = run_layer(attn, x, Keys(sx=2, sy=2), 8, 8)
        swapped = keys_layer(attn, x[0], [second.tolist(), first.tolist()])
        with pytest.raises(AssertionError, match="relative L2"):
            check(found[0], swapped)

    @pytest.mark.parametrize("select", ["grid", "random", "cycle"])
    def test_cells_of_one_token_are_full_attention(self, select: str) -> None:
        attn, x = _layer(2, 5, 6)
        check(run_layer(attn, x, Keys(sx=1, sy=1, select=select), 5, 6), attn(x))


@pytest.mark.parametrize("method", ["agent", "merge", "keys"])
def test_dropout_of_training_applies(method: str) -> None:
    attn, x = Attention(16, heads=2, dim_head=8, dropout=1.0).double().train(), randn(1, 64, 16)
    assert not run_layer(attn, x, make_phase(method=method), 8, 8).any()
    assert run_layer(attn.eval(), x, make_phase(method=method), 8, 8).any()


class TestPrecision:
    """``attn_precision="fp32"`` where the scores of the model's own precision overflow."""

    @staticmethod
    def _overflowing(dtype: torch.dtype) -> tuple[Any, Tensor]:
        attn, x = tiny_layer(dtype=torch.float32), randn(1, 64, 16).float()
        for weight in (attn.to_q.weight, attn.to_k.weight):
            weight.mul_(400)
        return attn.to(dtype), x.to(dtype)

    @pytest.mark.parametrize(
        "phase",
        [
            {"sx": 4, "sy": 4, "agent_ratio": 0.95},
            {"method": "merge"},
            {"method": "keys"},
        ],
        ids=["agent", "merge", "keys"],
    )
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_fp32_softmax_gets_float32_inputs(
        self, phase: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        attn, x = self._overflowing(dtype)
        scores: list[Tensor] = []

        def eager(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            """Attention that, like a kernel of the inputs' precision, rounds its scores to it."""
            score = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
            scores.append(score)
            return torch.einsum("bhqk,bkhd->bqhd", score.softmax(-1), v)

        monkeypatch.setattr("agentsd.patching.processor.dispatch_attention_fn", eager)
        run_layer(attn, x, make_phase(**phase), 8, 8)
        if dtype == torch.float16:
            assert not all(score.isfinite().all() for score in scores)
        assert {score.dtype for score in scores} == {dtype}
        scores.clear()
        out = run_layer(attn, x, make_phase(**phase, attn_precision="fp32"), 8, 8)
        assert {score.dtype for score in scores} == {torch.float32}
        assert out.dtype == dtype
        assert out.isfinite().all()
