"""What inspect_patch tells is what a run does."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from reversal import AGENTS
from tiny_models import call, latents, patched_layers, sdxl_unet, tiny_unet
from torch.nn.attention import SDPBackend, sdpa_kernel

from agentsd import Inspection, PatchError, apply_patch, inspect_patch
from agentsd.methods import Plan
from agentsd.patching import processor
from agentsd.patching.flops import flop_counter
from agentsd.patching.inspection import LayerInspection, PhaseEffect
from agentsd.schedule import Schedule

TWO = Schedule(
    phases=[
        AGENTS | {"until": 0.5},
        {"method": "keys", "sx": 2, "sy": 3, "min_tokens": 0},
    ]
)


def by_name(inspection: Inspection) -> dict[str, LayerInspection]:
    return {layer.name: layer for layer in inspection.layers}


def check_facts(inspection: Inspection, facts: list[dict[str, tuple[int, int, int]]]) -> None:
    """Tokens, queries and keys (or agents) of every softmax in a run are those reported.

    Args:
        inspection: What :func:`inspect_patch` said.
        facts: For each phase, by layer: its queries, agents and keys, as seen in a run.
    """
    for number, seen in enumerate(facts):
        expected = {}
        for name, layer in by_name(inspection).items():
            if layer.patched and layer.phases[number].method != "full":
                plan = layer.phases[number].plan
                expected[name] = (plan.merged_tokens, plan.agents, plan.keys)
        assert seen == expected


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a pipeline of two steps and notes the shapes of each layer's softmaxes."""

    def run(pipe: Any, **size: int) -> list[dict[str, tuple[int, int, int]]]:
        names = {id(module): name for name, module in patched_layers(pipe.unet)}
        current: list[str] = []
        shapes: list[tuple[str, int, int]] = []
        dispatch = processor.dispatch_attention_fn
        own_call = processor.AgentAttnProcessor.__call__

        def note_layer(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
            current.append(names[id(attn)])
            return own_call(self, attn, *args, **kwargs)

        def note_shapes(q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
            shapes.append((current[-1], q.shape[1], k.shape[1]))
            return dispatch(q, k, *args, **kwargs)

        monkeypatch.setattr(processor.AgentAttnProcessor, "__call__", note_layer)
        monkeypatch.setattr(processor, "dispatch_attention_fn", note_shapes)
        by_step: list[dict[str, tuple[int, int, int]]] = [{}]
        latents(
            pipe,
            steps=2,
            callback_on_step_end=lambda *a: [by_step.append(_read(shapes)), a[3]][1],
            **size,
        )
        return by_step[1:]

    return run


def _read(shapes: list[tuple[str, int, int]]) -> dict[str, tuple[int, int, int]]:
    """Queries, agents and keys by layer; an agent layer makes two softmaxes."""
    found: dict[str, tuple[int, int, int]] = {}
    for name, queries, keys in shapes:
        if name in found:
            agents, _, all_keys = found[name]
            assert keys == agents
            found[name] = (queries, agents, all_keys)
        else:
            found[name] = (queries, 0, keys)
    shapes.clear()
    return found


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (64, 32)])
def test_tells_what_a_run_does(pipe: Any, facts: Any, size: tuple[int, int]) -> None:
    apply_patch(pipe, TWO)
    inspection = inspect_patch(pipe, *size)
    seen = facts(pipe, size=size)
    assert all(phase for phase in seen)
    check_facts(inspection, seen)
    with pytest.raises(AssertionError):
        check_facts(inspect_patch(pipe, size[0] + 16, size[1]), seen)


class TestContent:
    def test_of_a_patched_layer(self, pipe: Any) -> None:
        layers = by_name(inspect_patch(apply_patch(pipe, TWO)))
        top = layers["down_blocks.0.attentions.0.transformer_blocks.0.attn1"]
        assert top == LayerInspection(
            name="down_blocks.0.attentions.0.transformer_blocks.0.attn1",
            downsample=1,
            tokens=256,
            patched=True,
            reason=None,
            can_be_patched=True,
            phases=(
                PhaseEffect("agent", Plan(256, 154, 16, 154)),
                PhaseEffect("keys", Plan(256, 256, 0, 48)),
            ),
        )
        below = layers["down_blocks.1.attentions.0.transformer_blocks.0.attn1"]
        assert (below.downsample, below.tokens, below.patched) == (2, 64, True)
        assert [phase.method for phase in below.phases] == ["agent", "full"]

    def test_reasons(self, pipe: Any) -> None:
        pipe.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn1.set_processor(
            type("Theirs", (AttnProcessor2_0,), {})()
        )
        most = {"sx": 16, "sy": 16, "ratio": 0.99, "agent_ratio": 0.99}
        apply_patch(pipe, method="agent", max_downsample=2, min_tokens=0, **most)
        layers = by_name(inspect_patch(pipe))
        reasons = {
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1": None,
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2": "not the self-attention",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1": "changes nothing at this size",
            "up_blocks.1.attentions.0.transformer_blocks.0.attn1": "own (Theirs)",
            "mid_block.attentions.0.transformer_blocks.0.attn1": "below max_downsample",
        }
        for name, reason in reasons.items():
            assert reason is None or reason in str(layers[name].reason)
            assert (layers[name].reason is None) == (reason is None)

    def test_unpatched(self, pipe: Any) -> None:
        inspection = inspect_patch(pipe)
        assert (inspection.height, inspection.width) == (32, 32)
        assert len(inspection.layers) == 14
        assert not any(layer.patched or layer.phases for layer in inspection.layers)
        own = {layer.reason for layer in inspection.layers if layer.name.endswith("attn1")}
        assert own == {"no patch applied"}

    def test_does_not_run_or_change_the_model(self, unet: Any) -> None:
        apply_patch(unet, TWO)
        expected = call(unet, 999)
        inspect_patch(unet, 64, 8)
        assert torch.equal(call(unet, 999), expected)

    def test_resolutions_of_sdxl(self) -> None:
        inspection = inspect_patch(apply_patch(sdxl_unet(), "paper", min_tokens=0), 32, 32)
        found = {(layer.downsample, layer.tokens) for layer in inspection.layers}
        assert found == {(2, 256), (4, 64)}
        assert {layer.downsample for layer in inspection.layers if layer.patched} == {2}


class TestSizes:
    def test_pixels_of_a_pipeline_and_latents_of_a_unet(self, pipe: Any) -> None:
        of_pipe, of_unet = inspect_patch(pipe, 48, 32), inspect_patch(pipe.unet, 24, 16)
        assert of_pipe.layers == of_unet.layers
        assert of_pipe.layers[0].tokens == 24 * 16

    def test_one_side_given(self, pipe: Any) -> None:
        inspection = inspect_patch(pipe, width=64)
        assert (inspection.height, inspection.width) == (32, 64)

    @pytest.mark.parametrize("size", [{"height": 33}, {"width": 0}, {"height": -32}, {"width": 1}])
    def test_refuses(self, pipe: Any, size: dict[str, int]) -> None:
        ((name, value),) = size.items()
        with pytest.raises(PatchError) as caught:
            inspect_patch(pipe, **size)
        assert f"{name} must be a positive multiple of 2 (got {value})" in str(caught.value)

    def test_odd_latents_round_up(self, unet: Any) -> None:
        apply_patch(unet, method="merge", max_downsample=4, min_tokens=0)
        tokens = {layer.downsample: layer.tokens for layer in inspect_patch(unet, 15, 9).layers}
        assert tokens == {1: 15 * 9, 2: 8 * 5, 4: 4 * 3}
        call(unet, size=(15, 9))


class TestShown:
    def test_as_a_table(self, pipe: Any) -> None:
        text = str(inspect_patch(apply_patch(pipe, TWO), 512, 512))
        assert "6 of 14 attention layers patched, at 512×512" in text
        for part in ("down_blocks.0.attentions.0.transformer_blocks.0.attn1", "65,536", "phase 2"):
            assert part in text
        assert "agent: 39,322, 4,096 agents" in text
        assert "keys: 11,008" in text
        assert "below max_downsample" in text

    def test_in_a_notebook(self, pipe: Any) -> None:
        html = inspect_patch(apply_patch(pipe, TWO))._repr_html_()
        # 14 layers: 7 of cross-attention in one row, the two of attn1 in an up block treated alike.
        assert html.count("<tr>") == 1 + 1 + 7 - 2
        assert "<td>attn2 × 7</td><td></td>" in html
        assert html.count("<tr>") == html.count("</tr>")
        assert "<td>agent: 154, 16 agents</td>" in html

    def test_without_a_patch(self, unet: Any) -> None:
        inspection = inspect_patch(unet)
        assert "0 of 14 attention layers patched, at 16×16" in str(inspection)
        assert "phase 1" not in str(inspection)
        assert "no patch applied" in inspection._repr_html_()


def test_a_processor_replaced_since_is_named(unet: Any) -> None:
    apply_patch(unet, "faithful", min_tokens=0)
    patched = {name for name, _ in patched_layers(unet)}
    for name in patched:  # past set_processor, which puts it under the patch
        unet.get_submodule(name).processor = AttnProcessor2_0()
    inspection = by_name(inspect_patch(unet))
    reasons = {inspection[name].reason for name in patched}
    assert reasons == {"its processor has been replaced (AttnProcessor2_0)"}


def test_a_processor_that_came_after_another_s_is_named(unet: Any) -> None:
    apply_patch(unet, "faithful", min_tokens=0)
    name, attn = patched_layers(unet)[0]
    attn.processor = type("Theirs", (AttnProcessor2_0,), {})()
    apply_patch(unet, "faithful", min_tokens=0)  # leaves that layer alone
    attn.set_processor(AttnProcessor2_0())
    assert "apply the patch again" in str(by_name(inspect_patch(unet))[name].reason)
    apply_patch(unet, "faithful", min_tokens=0)
    assert by_name(inspect_patch(unet))[name].patched


def test_a_run_is_described(unet: Any) -> None:
    plain = inspect_patch(unet, num_inference_steps=4)
    assert (plain.whole_steps, plain.work) == ([True] * 4, 1.0)
    apply_patch(unet, "paper", max_downsample=2, min_tokens=0)
    assert inspect_patch(unet).work is None
    less = inspect_patch(unet, num_inference_steps=10)
    assert less.whole_steps == [True] * 10
    assert 0.5 < less.work < 1
    apply_patch(unet, method="full", cache_interval=2)
    found = inspect_patch(unet, num_inference_steps=9)
    assert found.whole_steps == [True, False] * 4 + [True]
    assert "5 of 9 steps whole" in str(found)
    whole, light = (counted(unet, place) for place in (0, 1))
    assert found.work == pytest.approx((5 * whole + 4 * light) / (9 * whole), rel=1e-6)
    assert light < whole / 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "keys"])
def test_a_light_step_that_forecasts_the_output_costs_nothing(unet: Any, method: str) -> None:
    def work(**cache: int) -> float:
        apply_patch(unet, method=method, min_tokens=0, **cache)
        left = inspect_patch(unet, num_inference_steps=9).work
        assert left is not None
        return left

    whole = work()
    assert work(cache_interval=2, cache_branch=-1) == pytest.approx(5 / 9 * whole, rel=1e-6)
    assert work(cache_interval=2) > 5 / 9 * whole


def test_plain_values_are_json(pipe: Any) -> None:
    plain = inspect_patch(apply_patch(pipe, TWO)).to_dict()
    assert json.loads(json.dumps(plain)) == plain
    agents = {"method": "agent", "tokens": 256, "merged_tokens": 154, "agents": 16, "keys": 154}
    assert plain["layers"][0]["phases"][0] == agents


def counted(unet: Any, place: int) -> int:
    """Operations of a real call, after those before it in its run."""
    timesteps = torch.arange(900, 0, -100)
    for index in range(place):
        call(unet, timesteps[index], text=77)
    # The CPU's own kernel is not counted.
    with flop_counter() as counter, sdpa_kernel(SDPBackend.MATH):
        call(unet, timesteps[place], text=77)
    return int(counter.get_total_flops())


@pytest.mark.slow
@pytest.mark.parametrize("make", [sdxl_unet, lambda: tiny_unet(num_class_embeds=9)])
def test_work_is_counted_for_other_unets(make: Any) -> None:
    found = inspect_patch(apply_patch(make(), "paper", min_tokens=0), num_inference_steps=3)
    assert 0.5 < found.work < 1


def test_work_is_not_counted_where_inputs_are_unknown() -> None:
    unet = tiny_unet(encoder_hid_dim=8, encoder_hid_dim_type="text_proj")
    apply_patch(unet, "paper", min_tokens=0)
    assert inspect_patch(unet, num_inference_steps=3).work is None


@pytest.mark.parametrize("steps", [0, 1001])
def test_wrong_numbers_of_steps(unet: Any, steps: int) -> None:
    with pytest.raises(PatchError, match="num_inference_steps must be 1 to 1,000"):
        inspect_patch(unet, num_inference_steps=steps)
