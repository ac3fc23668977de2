"""Where self-attention sits in a UNet, at which resolution, and what stands in the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from tiny_models import build, call, sdxl_unet, smallest_unet, tiny_unet

from agentsd.patching.layers import find_attention_layers


def check_resolutions(unet: Any, size: tuple[int, int]) -> None:
    """Each attention really gets as many tokens as its downsample says."""
    expected = {layer.name: layer.downsample for layer in find_attention_layers(unet)}
    found: dict[str, int] = {}
    handles = [
        layer.module.register_forward_pre_hook(
            lambda _, args, name=layer.name: found.update({name: args[0].shape[1]})
        )
        for layer in find_attention_layers(unet)
    ]
    call(unet, size=size)
    for handle in handles:
        handle.remove()
    height, width = size
    for name, downsample in expected.items():
        assert found[name] == -(-height // downsample) * -(-width // downsample), name


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (15, 9), (8, 12)])
@pytest.mark.parametrize("make", [tiny_unet, smallest_unet, sdxl_unet])
def test_resolutions_are_those_of_a_run(make: Any, size: tuple[int, int]) -> None:
    check_resolutions(make(), size)


def test_a_wrong_resolution_is_seen(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentsd.patching.layers._downsample", lambda *_: 1)
    with pytest.raises(AssertionError):
        check_resolutions(unet, (16, 16))


def test_every_attention_is_listed_once_in_order(unet: Any) -> None:
    names = [name for name, module in unet.named_modules() if isinstance(module, Attention)]
    assert [layer.name for layer in find_attention_layers(unet)] == names


@pytest.mark.parametrize("make", [tiny_unet, smallest_unet, sdxl_unet])
def test_self_attention_is_free_and_cross_attention_is_not(make: Any) -> None:
    for layer in find_attention_layers(make()):
        assert (layer.unpatchable_reason is None) == layer.name.endswith("attn1")


def _set(name: str, value: Any) -> Any:
    return lambda attn: setattr(attn, name, value)


@pytest.mark.parametrize(
    ("change", "unpatchable_reason"),
    [
        (_set("group_norm", torch.nn.GroupNorm(4, 16)), "group_norm"),
        (_set("norm_q", torch.nn.LayerNorm(8)), "norm_q"),
        (_set("norm_k", torch.nn.LayerNorm(8)), "norm_k"),
        (_set("residual_connection", True), "adds its input"),
        (_set("rescale_output_factor", 2.0), "rescales"),
        (_set("is_cross_attention", True), "cross-attention"),
        (_set("processor", type("Theirs", (AttnProcessor,), {})()), "own (Theirs)"),
    ],
)
def test_obstacles(unet: Any, change: Any, unpatchable_reason: str) -> None:
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    change(unet.get_submodule(name))
    (layer,) = (layer for layer in find_attention_layers(unet) if layer.name == name)
    assert layer.unpatchable_reason is not None
    assert unpatchable_reason in layer.unpatchable_reason


def test_blocks_that_only_read_the_text() -> None:
    """Their first attention is cross-attention too; diffusers leaves the middle as it is."""
    layers = find_attention_layers(tiny_unet(only_cross_attention=True))
    free = {layer.name.partition(".")[0] for layer in layers if layer.unpatchable_reason is None}
    assert free == {"mid_block"}


def test_attention_elsewhere_is_named_as_such(unet: Any) -> None:
    unet.add_module("extra", build(lambda: Attention(16)))
    assert (
        find_attention_layers(unet)[-1].unpatchable_reason
        == "not the self-attention of a transformer block"
    )
