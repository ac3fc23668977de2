"""The diffusers attention processor that runs the method of the schedule's phase."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from ..methods.tensor_cache import integers
from .diffusers_internals import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    dispatch_attention_fn,
)
from .runtime import Runtime, StepPlan

REST_OF_BLOCK = ("merge_crossattn", "merge_mlp")
"""Parameters that also merge tokens in the rest of a block."""

LAYER = "_agentsd_layer"
"""Attribute of a patched attention module that holds its :class:`PatchedLayer`."""


@dataclass(frozen=True)
class PatchedLayer:
    """What the processor needs to know about its attention module."""

    runtime: Runtime
    number: int
    """Its index among the attention layers of the UNet."""
    downsample: int
    original: Any
    """The processor that was there before, which handles all unpatched calls."""

    def step_for(self, tokens: int) -> StepPlan | None:
        """The current step, if it changes this layer and its grid has ``tokens`` tokens."""
        step = self.runtime.step
        if step is None or self.downsample not in step.works:
            return None
        return step if step.plans[self.downsample].tokens == tokens else None


class AgentAttnProcessor:
    """Self-attention by the method of the current phase.

    It is stateless and takes no arguments, because diffusers recreates processors from their class
    (when an IP-Adapter is loaded, for example); its state is an attribute of the attention module.
    Calls that it cannot handle go to the processor that was there before: ``full`` phases,
    attention masks, cross-attention, and numbers of tokens that do not match the latents.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        layer: PatchedLayer | None = getattr(attn, LAYER, None)

        def unpatched() -> Tensor:
            # Without a layer, someone saved the processor and set it again after remove_patch.
            original = layer.original if layer else AttnProcessor2_0()
            out: Tensor = original(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
            return out

        plain = encoder_hidden_states is attention_mask is None and hidden_states.ndim == 3
        step = layer.step_for(hidden_states.shape[1]) if layer and plain else None
        if layer is None or step is None:
            return unpatched()
        chosen = step.chosen[layer.downsample, attn.heads]
        plan = step.plans[layer.downsample]
        projections = Projections(attn, getattr(step.phase, "attn_precision", None) == "fp32")
        out, owner = step.phase.attention(projections, hidden_states, chosen, plan)
        if owner is not None and any(map(step.phase.enables, REST_OF_BLOCK)):
            layer.runtime.state.owners[layer.number] = owner
        return out


REPLACEABLE = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, AgentAttnProcessor)
"""Processors of plain softmax attention, which the patch can replace."""


def get_processor(attn: Attention, *args: Any, **kwargs: Any) -> Any:
    """A patched module's ``get_processor``: the processor underneath the patch.

    diffusers makes decisions based on processor types, and does not know the patch's own.
    """
    processor = type(attn).get_processor(attn, *args, **kwargs)
    is_ours = isinstance(processor, AgentAttnProcessor)
    return vars(attn)[LAYER].original if is_ours else processor


def set_processor(attn: Attention, processor: Any) -> None:
    """A patched module's ``set_processor``: sets a replaceable processor underneath the patch."""
    if type(processor) not in REPLACEABLE:
        warnings.warn(
            f"agentsd steps aside for {type(processor).__name__}, which it cannot replace; "
            "unet.set_default_attn_processor() restores the patch",
            stacklevel=3,
        )
    elif not isinstance(processor, AgentAttnProcessor):
        setattr(attn, LAYER, replace(vars(attn)[LAYER], original=processor))
        processor = AgentAttnProcessor()
    type(attn).set_processor(attn, processor)


class Projections(NamedTuple):
    """A diffusers attention module as a :class:`agentsd.methods.base.SelfAttention`."""

    attn: Attention
    in_float32: bool
    """Whether softmaxes are computed in float32, whatever the precision of the tokens."""

    @property
    def heads(self) -> int:
        """Number of heads."""
        heads: int = self.attn.heads
        return heads

    def queries(self, x: Tensor) -> Tensor:
        """Queries ``[B, H, N, d]`` of tokens ``[B, N, C]``."""
        return self._split(self.attn.to_q(x))

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, N, d]`` of tokens ``[B, N, C]``."""
        return self._split(self.attn.to_k(x)), self._split(self.attn.to_v(x))

    def some_keys_and_values(self, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, n, d]`` of each head's ``chosen`` tokens ``[H, n]``."""
        projections = self.attn.to_k, self.attn.to_v
        if all(map(_is_plain, projections)):
            return _project_heads(projections, x, chosen)
        # LoRA, offloading and quantisation only take effect when the module itself is called.
        heads, count = chosen.shape
        rows = (chosen * heads + torch.arange(heads, device=x.device)[:, None]).flatten()
        k, v = (
            project(x).view(len(x), x.shape[1] * heads, -1)  # [B, N·H, d]
            .index_select(1, rows).view(len(x), heads, count, -1)
            for project in projections
        )  # fmt: skip
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Softmax attention with the attention backend selected in diffusers."""
        dtype = q.dtype
        if self.in_float32:
            q, k, v = q.float(), k.float(), v.float()
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # diffusers' layout is [B, N, H, d]
        out: Tensor = dispatch_attention_fn(q, k, v, scale=scale)
        return out.transpose(1, 2).to(dtype)

    def output(self, x: Tensor) -> Tensor:
        """Output projection and dropout, ``[B, H, N, d]`` to ``[B, N, C]``."""
        out: Tensor = self.attn.to_out[1](self.attn.to_out[0](x.transpose(1, 2).flatten(2)))
        return out

    def _split(self, x: Tensor) -> Tensor:
        """``[B, N, H·d]`` to ``[B, H, N, d]``."""
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)


def _project_heads(
    projections: Sequence[nn.Linear], x: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Project each head's chosen tokens, for that head only.

    Args:
        projections: The projections of keys and values.
        x: Tokens ``[B, N, C]``.
        chosen: Indices of the tokens to project for each head, ``[H, n]``.

    Returns:
        Keys and values ``[B, H, n, d]``.
    """
    (batch, count, channels), (heads, some) = x.shape, chosen.shape
    # Each head has its own keys, so only its own rows of the weights are needed.
    weight = torch.cat([p.weight.view(heads, -1, channels) for p in projections], dim=1).mT
    images = integers(0, batch * count, count, like=x)[:, None]
    index = chosen[:, None] + images  # [H, B, n], into the flattened batch
    tokens = x.flatten(0, 1)
    out = weight.new_empty(heads, batch * some, weight.shape[-1])  # [H, B·n, 2·d]

    def gathered(part: slice) -> Tensor:
        """The tokens of some heads, ``[·, B·n, C]``."""
        rows = tokens.index_select(0, index[part].flatten())
        return rows.view(-1, batch * some, channels).to(weight.dtype)

    # Chunks of heads that need no more memory than the tokens themselves.
    size = max(1, count // some)
    for part in (slice(start, start + size) for start in range(0, heads, size)):
        out[part].baddbmm_(gathered(part), weight[part], beta=0)
    if projections[0].bias is not None:
        out += torch.cat([p.bias.view(heads, 1, -1) for p in projections], dim=-1)
    k, v = out.view(heads, batch, some, -1).transpose(0, 1).chunk(2, dim=-1)
    return k, v


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the module does nothing but multiply by its weight and add its bias."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and getattr(module.forward, "__func__", None) is nn.Linear.forward
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )
