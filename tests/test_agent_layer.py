"""The trainable layer: parity with its specification, gradients, cost, compilation."""

from __future__ import annotations

from typing import get_args

import naive_vision
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from agentsd.errors import ModelError
from agentsd.nn import AgentAttention, AgentBias
from agentsd.nn.bias import resize_bias


def make_layer(grid: tuple[int, int], dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    """A layer whose biases are large enough to matter."""
    torch.manual_seed(0)
    layer = AgentAttention(12, 3, grid, **{"agents": 4, "dtype": dtype} | options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def tokens(layer: nn.Module, batch: int = 2, seed: int = 1) -> Tensor:
    height, width = layer.bias.grid
    count = height * width + layer.bias.class_token
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, count, 12, generator=generator, dtype=torch.float64)
    return x.to(layer.qkv.weight.dtype)


def naive(layer: nn.Module, x: Tensor, mistake: str | None = None) -> Tensor:
    with torch.no_grad():
        return torch.stack(
            [naive_vision.agent_layer(layer, image, *layer.bias.grid, mistake) for image in x]
        )


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize(
    ("grid", "agents", "batch"), [((4, 4), 4, 2), ((5, 3), 4, 3), ((7, 9), 9, 1), ((2, 3), 1, 1)]
)
def test_parity_with_loops(
    grid: tuple[int, int], agents: int, batch: int, class_token: bool
) -> None:
    layer = make_layer(grid, agents=agents, class_token=class_token)
    x = tokens(layer, batch)
    torch.testing.assert_close(layer(x).detach(), naive(layer, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mistake", get_args(naive_vision.Mistake))
def test_parity_fails_for_a_wrong_layer(mistake: str) -> None:
    layer = make_layer((5, 3), class_token=True)
    x = tokens(layer)
    difference = (layer(x).detach() - naive(layer, x, mistake)).norm() / layer(x).norm()
    assert difference > 1e-2


def test_gradients_are_right() -> None:
    layer = make_layer((3, 4), class_token=True)
    x = tokens(layer, batch=1).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def macs_per_token(attend: nn.Module, side: int) -> float:
    with FlopCounterMode(display=False) as counter:
        attend(torch.empty(1, side * side, 12, device="meta"), (side, side))
    return counter.get_total_flops() / 2 / side**2


class SoftmaxAttention(nn.Module):
    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x.unflatten(2, (3, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(x, x, x)


def test_cost_grows_linearly() -> None:
    layer = AgentAttention(12, 3, (28, 28), device="meta")
    assert macs_per_token(layer, 112) == macs_per_token(layer, 28)
    assert macs_per_token(SoftmaxAttention(), 112) == 16 * macs_per_token(SoftmaxAttention(), 28)


@pytest.mark.slow
def test_compiles_to_one_graph() -> None:
    layer = make_layer((4, 5), torch.float32, class_token=True)
    x = tokens(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.slow
def test_exports() -> None:
    layer = make_layer((4, 5), torch.float32).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (tokens(layer),), dynamic_shapes=({0: batch},))
    x = tokens(layer, batch=5, seed=2)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)], ids=str
)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(dtype: torch.dtype, tolerance: float, autocast: bool) -> None:
    layer = make_layer((6, 6), torch.float32, class_token=True)
    x = tokens(layer)
    expected = layer(x)
    if autocast:
        with torch.autocast("cpu", dtype):
            out = layer(x)
    else:
        out = layer.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert (out.float() - expected).norm() < tolerance * expected.norm()


def test_biases_of_another_grid() -> None:
    """A grid given to a call and a layer made for that grid agree, and weights stay smooth."""
    layer = make_layer((4, 6))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 70, 12, generator=generator, dtype=torch.float64)
    given = layer(x, (7, 10)).detach()
    with pytest.raises(ModelError, match="70 tokens are not 4 × 6"):
        layer(x)
    layer.set_grid((7, 10))
    torch.testing.assert_close(layer(x).detach(), given)
    torch.testing.assert_close(naive(layer, x), given)


def test_biases_of_other_agents_are_resized_as_published() -> None:
    """As for detection: bilinearly over space, then over the agents (checked as one map there)."""
    bias = AgentBias(2, 9, (6, 6))
    wanted = {name: p.shape for name, p in AgentBias(2, 25, (8, 9)).named_parameters()}
    resized = AgentBias(2, 25, (8, 9))
    resized.load_state_dict(
        {name: resize_bias(name, p, tuple(wanted[name])) for name, p in bias.named_parameters()}
    )

    def enlarge(maps: Tensor) -> Tensor:
        maps = F.interpolate(maps, (8, 9), mode="bilinear").reshape(2, 3, 3, 72)
        maps = F.interpolate(maps.permute(0, 3, 1, 2), (5, 5), mode="bilinear")
        return maps.reshape(2, 72, 25)

    to_agents = enlarge(bias.an_bias) + enlarge((bias.ah_bias + bias.aw_bias)[0])
    terms = (bias.ha_bias + bias.wa_bias)[0].permute(0, 3, 1, 2)
    from_agents = enlarge(bias.na_bias) + enlarge(terms)
    gather, broadcast = resized()
    torch.testing.assert_close(gather[0], to_agents.mT)
    torch.testing.assert_close(broadcast[0], from_agents)
    assert (broadcast[0] - enlarge(bias.na_bias)).abs().max() > 1e-3


def test_class_token_is_neither_pooled_nor_convolved() -> None:
    layer = make_layer((3, 3), class_token=True)
    x = tokens(layer, batch=1)
    layer.dwc.bias.data.fill_(100)
    with torch.no_grad():
        difference = (layer(x) - naive(layer, x)).abs().max()
        layer.proj.weight.copy_(torch.eye(12))
        assert difference < 1e-11
        assert layer(x)[:, 0].abs().max() < 50 < layer(x)[:, 1:].abs().mean()


def test_dropout_only_in_training() -> None:
    layer = make_layer((4, 4), attn_drop=0.5, proj_drop=0.5)
    x = tokens(layer)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x).detach(), naive(layer, x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"agents": 8}, "square number"),
        ({"dim": 13}, "divisible by num_heads"),
        ({"agents": 0}, ""),
    ],
)
def test_bad_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        AgentAttention(**{"dim": 12, "num_heads": 3, "grid": (4, 4)} | options)
