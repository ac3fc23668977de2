"""The diffusers attention processor that joins merging, agent attention and the schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from .attention import Attend, agent_attention
from .merging import match, merge, owners, unmerge
from .runtime import Runtime
from .schedule import Phase, Plan

LAYER = "_agentsd_layer"
"""Attribute of a patched attention module that holds its :class:`Layer`."""


@dataclass(frozen=True)
class Layer:
    """What a patched attention module needs to know of itself."""

    runtime: Runtime
    downsample: int
    original: Any
    """The processor that was there before, used wherever nothing is to be changed."""


class AgentAttnProcessor:
    """Self-attention as the schedule's phase says.

    It holds nothing and takes no arguments, because diffusers makes processors anew from their
    class (loading an IP-Adapter does); what it needs hangs on the attention module. Whatever it
    was not made for goes to the processor that was there before: a ``full`` phase, an attention
    mask, cross-attention, another number of tokens than the latents' grid has.
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
        layer: Layer | None = vars(attn).get(LAYER)
        step = layer.runtime.step if layer else None
        plain = encoder_hidden_states is attention_mask is None and hidden_states.ndim == 3
        if layer and step and plain:
            plan = step.plans[layer.downsample]
            if plan.tokens == hidden_states.shape[1] and not plan.untouched:
                chosen = step.chosen[layer.downsample, attn.heads]
                if step.phase.method == "keys":
                    return _over_keys(attn, hidden_states, step.phase, chosen)
                return _over_merged(attn, hidden_states, step.phase, plan, chosen)
        # Without a layer it was put back by somebody who had kept it past the patch's removal.
        original = layer.original if layer else AttnProcessor2_0()
        out: Tensor = original(
            attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
        )
        return out


def _over_keys(attn: Attention, x: Tensor, phase: Phase, chosen: Tensor) -> Tensor:
    """Every query; the ``chosen`` ``[H, n]`` tokens of each head as its keys and values."""
    heads: int = attn.heads
    # One index over tokens and heads together gathers the rows of all heads at once.
    rows = (chosen * heads + torch.arange(heads, device=x.device)[:, None]).flatten()
    k, v = (
        project(x)
        .view(len(x), x.shape[1] * heads, -1)  # [B, N·H, d]
        .index_select(1, rows)
        .view(len(x), heads, chosen.shape[1], -1)  # [B, H, n, d]
        for project in (attn.to_k, attn.to_v)
    )
    q = _split(attn, attn.to_q(x))
    return _project_out(attn, _attend(phase)(q, k, v, q.shape[-1] ** -0.5))


def _over_merged(attn: Attention, x: Tensor, phase: Phase, plan: Plan, chosen: Tensor) -> Tensor:
    """Merge into the ``chosen`` ``[n]`` tokens, attend (through agents if planned), unmerge."""
    matching = match(x, chosen)
    owner = owners(matching, plan.tokens - plan.merged_tokens)
    merged = merge(x, owner, plan.merged_tokens)  # [B, M, C]
    q, k, v = (_split(attn, project(merged)) for project in (attn.to_q, attn.to_k, attn.to_v))
    attend = _attend(phase)
    if plan.agents:
        agents = merge(x, owners(matching, plan.tokens - plan.agents), plan.agents)  # [B, n, C]
        out = agent_attention(
            q,
            k,
            v,
            _split(attn, attn.to_q(agents)),
            k_scale2=phase.k_scale2,
            k_shortcut=phase.k_shortcut,
            attend=attend,
        )
    else:
        out = attend(q, k, v, q.shape[-1] ** -0.5)
    return unmerge(_project_out(attn, out), owner)


def _split(attn: Attention, x: Tensor) -> Tensor:
    """``[B, N, H·d]`` to ``[B, H, N, d]``."""
    return x.view(*x.shape[:-1], attn.heads, -1).transpose(1, 2)


def _project_out(attn: Attention, x: Tensor) -> Tensor:
    """``[B, H, N, d]`` through the output projection and its dropout to ``[B, N, C]``."""
    out: Tensor = attn.to_out[1](attn.to_out[0](x.transpose(1, 2).flatten(2)))
    return out


def _attend(phase: Phase) -> Attend:
    """Softmax attention by the backend that the user chose for diffusers."""

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        dtype = q.dtype
        if phase.attn_precision == "fp32":
            q, k, v = q.float(), k.float(), v.float()
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # diffusers' layout is [B, N, H, d]
        out: Tensor = dispatch_attention_fn(q, k, v, scale=scale)
        return out.transpose(1, 2).to(dtype)

    return attend
