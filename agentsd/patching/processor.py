"""The diffusers attention processor that runs the method of the schedule's phase."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from .diffusers_internals import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    dispatch_attention_fn,
)
from .runtime import Runtime, Step

REST_OF_BLOCK = ("merge_crossattn", "merge_mlp")
"""Parameters that merge the tokens of the rest of a block, too."""

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
    """The processor that was there before, which handles all calls that are left unpatched."""

    def step_for(self, tokens: int) -> Step | None:
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
            # Without a layer, the processor was kept and set again after the patch was removed.
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
        if owner is not None and any(map(step.phase.asks, REST_OF_BLOCK)):
            step.owners[layer.number] = owner
        return out


REPLACEABLE = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, AgentAttnProcessor)
"""Processors of plain softmax attention, which the patch can stand in for."""


def get_processor(attn: Attention, *args: Any, **kwargs: Any) -> Any:
    """A patched module's ``get_processor``: the processor underneath the patch.

    diffusers makes decisions by the kinds of processors, and does not know the patch's own.
    """
    found = type(attn).get_processor(attn, *args, **kwargs)
    return vars(attn)[LAYER].original if isinstance(found, AgentAttnProcessor) else found


def set_processor(attn: Attention, processor: Any) -> None:
    """A patched module's ``set_processor``: underneath the patch if it can stand in for it."""
    if type(processor) not in REPLACEABLE:
        warnings.warn(
            f"agentsd steps aside for {type(processor).__name__}, which it cannot stand in for; "
            "unet.set_default_attn_processor() brings the patch back",
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
        """``[B, N, C]`` to ``[B, H, N, d]``."""
        return self._split(self.attn.to_q(x))

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, N, C]`` to two of ``[B, H, N, d]``."""
        return self._split(self.attn.to_k(x)), self._split(self.attn.to_v(x))

    def some_keys_and_values(self, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Those of each head's own tokens ``chosen`` ``[H, n]`` only: two of ``[B, H, n, d]``."""
        # Each head has its own keys, so only its own rows of the weights are needed.
        tokens = x.index_select(1, chosen.flatten()).view(len(x), *chosen.shape, -1)
        k, v = (
            self._project_heads(project, x, tokens, chosen)
            for project in (self.attn.to_k, self.attn.to_v)
        )
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Softmax attention by the attention backend that is set in diffusers."""
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
        self, project: nn.Module, x: Tensor, tokens: Tensor, chosen: Tensor
    ) -> Tensor:
        """Project ``tokens`` ``[B, H, n, C]`` (``x`` at ``chosen``), each for its own head."""
        heads = self.heads
        if _is_plain(project):
            weight = project.weight.view(heads, -1, x.shape[-1])  # [H, d, C]
            out = tokens @ weight.mT
            return out if project.bias is None else out + project.bias.view(heads, 1, -1)
        # LoRA, offloading and quantisation only take effect in a call of the whole module.
        rows = (chosen * heads + torch.arange(heads, device=x.device)[:, None]).flatten()
        every: Tensor = project(x).view(len(x), x.shape[1] * heads, -1)  # [B, N·H, d]
        return every.index_select(1, rows).view(*tokens.shape[:3], -1)


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the module does nothing but multiply by its weight and add its bias."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and getattr(module.forward, "__func__", None) is nn.Linear.forward
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )
