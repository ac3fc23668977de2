"""Find the UNet of a pipeline, and the attention layers of a UNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    Transformer2DModel,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from torch import nn

from ..errors import PatchError
from .diffusers_internals import (
    Attention,
    BasicTransformerBlock,
    TransformerSpatioTemporalModel,
)
from .processor import REPLACEABLE

MODELS = (
    UNet2DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
    UNet3DConditionModel,
    ControlNetModel,
)
"""Models that can be patched: UNets (and ControlNets) whose tokens form a grid of latents."""

WRAPPED = ("_orig_mod", "module", "base_model", "model")
"""Attributes in which wrappers hold the model: ``torch.compile``, data parallelism, PEFT."""

ACROSS_IMAGE = (Transformer2DModel, TransformerSpatioTemporalModel)
"""Parents of blocks that attend across an image; other blocks attend across a video's frames."""

_SUPPORTED = (
    "agentsd patches the UNets of Stable Diffusion 1.x, 2.x, SDXL and the like, of AnimateDiff "
    "and Stable Video Diffusion, and a ControlNet on its own"
)


@dataclass(frozen=True)
class AttentionLayer:
    """An attention module of a UNet, and its resolution."""

    name: str
    module: Attention
    downsample: int
    unpatchable_reason: str | None
    """Why it cannot be patched; None if it can."""


def find_unet(x: Any) -> UNet2DConditionModel:
    """The UNet of a pipeline, or ``x`` itself; wrappers (:data:`WRAPPED`) are removed.

    Returns:
        One of :data:`MODELS`.

    Raises:
        PatchError: If there is no UNet; says what was found instead.
    """
    unet = getattr(x, "unet", None) if not isinstance(x, nn.Module) else x
    unet = _unwrapped(unet)
    if isinstance(unet, MODELS):
        return unet
    what = type(x).__name__
    if unet is not None and unet is not x:
        what += f", whose unet is a {type(unet).__name__}"
    elif isinstance(getattr(x, "transformer", None), nn.Module):
        what += f", whose model is a transformer ({type(x.transformer).__name__}), not a UNet"
    elif isinstance(x, DiffusionPipeline):
        what += f", whose components are {', '.join(x.components)}"
    nets = getattr(x, "nets", None)
    give = "one of its nets" if isinstance(nets, nn.ModuleList) else "the pipeline or its unet"
    raise PatchError(f"no UNet to patch in {what}; {_SUPPORTED}: pass {give}")


def _unwrapped(module: Any) -> Any:
    """The model inside its wrappers; ``module`` if there is no model inside."""
    inner = module
    while isinstance(inner, nn.Module) and not isinstance(inner, MODELS):
        parts = (getattr(inner, name, None) for name in WRAPPED)
        inner = next((part for part in parts if isinstance(part, nn.Module)), None)
    return inner if isinstance(inner, MODELS) else module


def top_attention_layers(unet: UNet2DConditionModel) -> list[AttentionLayer]:
    """The layers that can be patched, at the highest resolution that has any."""
    layers = [layer for layer in find_attention_layers(unet) if layer.unpatchable_reason is None]
    top = min((layer.downsample for layer in layers), default=0)
    return [layer for layer in layers if layer.downsample == top]


@contextmanager
def replaced_processors(layers: list[AttentionLayer], make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace the processors of layers until the end of the ``with`` block.

    Args:
        layers: The layers.
        make: Makes a layer's new processor from its current one.
    """
    before = [layer.module.processor for layer in layers]
    try:
        for layer, original in zip(layers, before, strict=True):
            layer.module.set_processor(make(original))
        yield
    finally:
        for layer, original in zip(layers, before, strict=True):
            layer.module.set_processor(original)


def find_attention_layers(unet: UNet2DConditionModel) -> list[AttentionLayer]:
    """All attention modules of a UNet, in order."""
    modules = dict(unet.named_modules())
    return [
        AttentionLayer(
            name,
            module,
            _downsample(unet, name),
            _misplaced(name, modules) or _unsupported_feature(module),
        )
        for name, module in modules.items()
        if isinstance(module, Attention)
    ]


def _misplaced(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Why an attention module does not attend across an image; None if it does."""
    if getattr(modules[name], "added_kv_proj_dim", None) is not None:
        return "it attends to image and text at once (Kandinsky, DeepFloyd)"
    block, _, role = name.rpartition(".")
    if role != "attn1" or not isinstance(modules[block], BasicTransformerBlock):
        return "not the self-attention of a transformer block"
    owner = modules[block.rpartition(".")[0].rpartition(".")[0]]  # …transformer_blocks.0
    across_image = isinstance(owner, ACROSS_IMAGE)
    return None if across_image else "it attends across frames, not across the image"


def _unsupported_feature(attn: Attention) -> str | None:
    """The feature of the module that the patch does not support; None if there is none."""
    if attn.is_cross_attention:
        return "cross-attention where self-attention was expected"
    if type(attn.processor) not in REPLACEABLE:
        return f"its processor is not one of diffusers' own ({type(attn.processor).__name__})"
    for part in ("group_norm", "spatial_norm", "norm_q", "norm_k"):
        if getattr(attn, part, None) is not None:
            return f"it has {part}, unlike Stable Diffusion's attention"
    if attn.residual_connection or attn.rescale_output_factor != 1:
        return "it rescales its output or adds its input, unlike Stable Diffusion's attention"
    return None


def _downsample(unet: UNet2DConditionModel, name: str) -> int:
    """Latent rows per row of tokens, counted along the UNet's blocks, down and up again."""
    down, up = list(unet.down_blocks), list(getattr(unet, "up_blocks", []))
    halvings = [bool(getattr(block, "downsamplers", None)) for block in down]
    doublings = [bool(getattr(block, "upsamplers", None)) for block in up]
    part, _, rest = name.partition(".")
    index = int(rest.partition(".")[0]) if part.endswith("_blocks") else 0
    if part == "down_blocks":
        return 1 << sum(halvings[:index])
    return 1 << sum(halvings) - (sum(doublings[:index]) if part == "up_blocks" else 0)
