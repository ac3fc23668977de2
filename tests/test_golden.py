"""Parity with the published method: six layers that its research code computed in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.attention_processor import Attention
from safetensors import safe_open
from tiny_models import make_phase, run_layer
from torch import Tensor

from agentsd.methods import Full
from agentsd.methods import merge as merging_method
from agentsd.methods import token_merging as merging
from agentsd.schedule import METHODS, Phase

LIMIT = 1e-5
FILES = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))


class Golden(NamedTuple):
    """One case: a layer, what goes in and what must come out."""

    attn: Attention
    x: Tensor
    output: Tensor
    softmax_output: Tensor
    config: dict[str, Any]

    def phase(self, **changes: Any) -> Phase:
        settings = {k: v for k, v in self.config.items() if k in METHODS["agent"].parameters()}
        return make_phase(**settings | changes)

    def distance(self, phase: Phase, expected: Tensor) -> float:
        """Relative L2 distance of the float32 layer to the file's result."""
        out = run_layer(self.attn, self.x, phase, self.config["height"], self.config["width"])
        return float((out - expected).norm() / expected.norm())


def check(distance: float) -> None:
    assert distance <= LIMIT, f"relative L2 distance {distance:.2e} is above {LIMIT:.0e}"


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    with safe_open(request.param, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    channels, heads = config["channels"], config["heads"]
    attn = Attention(channels, heads=heads, dim_head=channels // heads).requires_grad_(False)
    attn.load_state_dict({k: v for k, v in tensors.items() if k.startswith("to_")})
    x, output, softmax = (tensors[k] for k in ("hidden_states", "output", "softmax_output"))
    return Golden(attn, x, output, softmax, config)


def test_all_cases_are_there() -> None:
    assert [path.stem for path in FILES] == [f"case{i:02}" for i in range(6)]


def test_output_is_the_published_one(
    golden: Golden, figure: Callable[..., None], request: pytest.FixtureRequest
) -> None:
    distance = golden.distance(golden.phase(), golden.output)
    figure(request.node.callspec.id, "output", distance, f"within {LIMIT:.0e}")
    check(distance)


def test_full_phase_is_the_published_softmax(
    golden: Golden, figure: Callable[..., None], request: pytest.FixtureRequest
) -> None:
    distance = golden.distance(Full(), golden.softmax_output)
    figure(request.node.callspec.id, "softmax_output", distance, f"within {LIMIT:.0e}")
    check(distance)


def test_plan_counts_what_the_published_code_counted(golden: Golden) -> None:
    config = golden.config
    plan = golden.phase().plan(config["height"], config["width"])
    assert plan.merged_tokens == config["merged_tokens"]
    assert plan.agents == config["agent_tokens"]
    assert bool(plan.agents) == config["agent_attention_used"]


def _owner_shifted(matching: merging.Matching, *merges: int) -> Tensor:
    return merging.owners(matching, *merges).roll(1, dims=-1)


def _unmerge_shifted(y: Tensor, owner: Tensor) -> Tensor:
    return merging.unmerge(y, (owner + 1) % y.flatten(0, 1).shape[0])


def _least_similar(matching: merging.Matching, *merges: int) -> Tensor:
    similarity = torch.where(matching.similarity.isinf(), torch.inf, -matching.similarity)
    return merging.owners(matching._replace(similarity=similarity), *merges)


def _sum(x: Tensor, owner: Tensor, rows: int) -> Tensor:
    return merging.merge(x, owner, rows) * owner.flatten().bincount(minlength=rows)[:, None]


WRONG_AGENTS: dict[str, tuple[str, Callable[[float], float]]] = {
    "k_shortcut dropped": ("k_shortcut", lambda _: 0.0),
    "k_shortcut 1 % off": ("k_shortcut", lambda right: right * 1.01),
    "second scale d^-0.5 (k_scale2 1)": ("k_scale2", lambda _: 1.0),
    "k_scale2 1 % off": ("k_scale2", lambda right: right * 1.01),
    "agent_ratio 10 % lower": ("agent_ratio", lambda right: right * 0.9),
    "no agents": ("agent_ratio", lambda _: 0.0),
}
WRONG_MERGING: dict[str, tuple[str, Callable[..., Any]]] = {
    "owner shifted by one": ("owners", _owner_shifted),
    "unmerged from the next row": ("unmerge", _unmerge_shifted),
    "least similar tokens merged": ("owners", _least_similar),
    "sum in place of mean": ("merge", _sum),
}


@pytest.fixture
def must_fail(
    figure: Callable[..., None], request: pytest.FixtureRequest
) -> Callable[[float, str], None]:
    """Assert that the check which the right layer passes refuses a wrong one."""

    def refuse(distance: float, control: str) -> None:
        case = request.node.callspec.id.partition("-")[0]
        figure(case, f"control: {control}", distance, f"fails, above {LIMIT:.0e}")
        with pytest.raises(AssertionError, match="relative L2 distance"):
            check(distance)

    return refuse


@pytest.mark.parametrize("control", WRONG_AGENTS)
def test_wrong_agents_fail(
    golden: Golden, control: str, must_fail: Callable[[float, str], None]
) -> None:
    name, change = WRONG_AGENTS[control]
    phase = golden.phase()
    distance = golden.distance(golden.phase(**{name: change(getattr(phase, name))}), golden.output)
    if phase.plan(golden.config["height"], golden.config["width"]).agents:
        must_fail(distance, control)
    else:  # nothing that shapes agents may change a layer that has none
        check(distance)


@pytest.mark.parametrize("control", WRONG_MERGING)
def test_wrong_merging_fails(
    golden: Golden, control: str, must_fail: Callable[[float, str], None]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging_method, *WRONG_MERGING[control])
        distance = golden.distance(golden.phase(), golden.output)
    must_fail(distance, control)
