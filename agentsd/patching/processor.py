"""The diffusers attention processor that joins merging, agent attention and the schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..methods.agent_attention import Attend, agent_attention
from ..methods.token_merging import match, merge, owners, unmerge
from ..schedule import Phase, Plan
from .diffusers_internals import Attention, AttnProcessor2_0, dispatch_attention_fn
from .runtime import Runtime, Step

LAYER = "_agentsd_layer"
"""Attribute of a patched attention module that holds its :class:`Layer`."""


@dataclass(frozen=True)
class Layer:
    """What a patched attention module needs to know of itself."""

    runtime: Runtime
    number: int
    """Of the layer in its UNet."""
    downsample: int
    original: Any
    """The processor that was there before, used wherever nothing is to be changed."""

    def step_for(self, tokens: int) -> Step | None:
        """The step the UNet stands at, if it changes this layer and its grid has ``tokens``."""
        step = self.runtime.step
        if step is None or self.downsample not in step.works:
            return None
        return step if step.plans[self.downsample].tokens == tokens else None


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
        layer: Layer | None = getattr(attn, LAYER, None)

        def unpatched() -> Tensor:
            # Without a layer it was put back by somebody who kept it past the patch's removal.
            original = layer.original if layer else AttnProcessor2_0()
            out: Tensor = original(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
            return out

        plain = encoder_hidden_states is attention_mask is None and hidden_states.ndim == 3
        step = layer.step_for(hidden_states.shape[1]) if layer and plain else None
        if layer is None or step is None:
            return unpatched()
        if step.phase.method == "keys":
            return _over_keys(attn, hidden_states, step, layer)
        return _over_merged(attn, hidden_states, step, layer)


def _over_keys(attn: Attention, x: Tensor, step: Step, layer: Layer) -> Tensor:
    """Every query; the chosen tokens of each head as its keys and values."""
    chosen = step.chosen[layer.downsample, attn.heads]  # [H, n]
    # Each head has keys of its own, so only its own rows of the projections are needed of them.
    tokens = x.index_select(1, chosen.flatten()).view(len(x), *chosen.shape, -1)  # [B, H, n, C]
    k, v = (_project_heads(attn, project, x, tokens, chosen) for project in (attn.to_k, attn.to_v))
    q = split_heads(attn, attn.to_q(x))
    return _project_out(attn, _attend(step.phase)(q, k, v, q.shape[-1] ** -0.5))


def _project_heads(
    attn: Attention, project: nn.Module, x: Tensor, tokens: Tensor, chosen: Tensor
) -> Tensor:
    """Project ``tokens`` ``[B, H, n, C]``, of ``x`` at ``chosen``, each for its head alone."""
    heads = attn.heads
    if _is_plain(project):
        weight = project.weight.view(heads, -1, x.shape[-1])  # [H, d, C]
        out = tokens @ weight.mT
        return out if project.bias is None else out + project.bias.view(heads, 1, -1)
    # LoRA, offloading and quantisation have their say in a call of the whole module only.
    rows = (chosen * heads + torch.arange(heads, device=x.device)[:, None]).flatten()
    every: Tensor = project(x).view(len(x), x.shape[1] * heads, -1)  # [B, N·H, d]
    return every.index_select(1, rows).view(*tokens.shape[:3], -1)


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a call of the module is a product with its weight, and nothing else."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and getattr(module.forward, "__func__", None) is nn.Linear.forward
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def _over_merged(attn: Attention, x: Tensor, step: Step, layer: Layer) -> Tensor:
    """Merge into the chosen tokens, attend (through agents if planned), unmerge."""
    phase, plan = step.phase, step.plans[layer.downsample]
    owner, agent_owner = matched(attn, x, step, layer)
    merged = merge(x, owner, plan.merged_tokens)  # [B, M, C]
    q, k, v = (split_heads(attn, project(merged)) for project in (attn.to_q, attn.to_k, attn.to_v))
    attend = _attend(phase)
    if agent_owner is None:
        out = attend(q, k, v, q.shape[-1] ** -0.5)
    else:
        out = agent_attention(
            q,
            k,
            v,
            split_heads(attn, attn.to_q(merge(x, agent_owner, plan.agents))),  # [B, H, n, d]
            k_scale2=phase.k_scale2,
            k_shortcut=phase.k_shortcut,
            attend=attend,
        )
    return unmerge(_project_out(attn, out), owner)


def matched(attn: Attention, x: Tensor, step: Step, layer: Layer) -> tuple[Tensor, Tensor | None]:
    """Owners of the tokens, and of the agents if planned."""
    phase, plan = step.phase, step.plans[layer.downsample]
    matching = match(x, step.chosen[layer.downsample, attn.heads])
    owner = owners(matching, plan.tokens - plan.merged_tokens)
    agent_owner = owners(matching, plan.tokens - plan.agents) if plan.agents else None
    if phase.keeps_matching:
        step.owners[layer.number] = owner
    return owner, agent_owner


@dataclass(frozen=True)
class MergedPart:
    """Hooks that merge the tokens of another part of a block as its self-attention does."""

    layer: Layer
    option: str
    """The phase's parameter that asks for it: ``merge_crossattn`` or ``merge_mlp``."""

    def enter(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Merge the tokens that go in; a forward pre-hook."""
        plan, owner = self._owner()
        if owner is None or args[0].shape[1] != plan.tokens:
            return None
        return merge(args[0], owner, plan.merged_tokens), *args[1:]

    def leave(self, _: nn.Module, __: tuple[Any, ...], out: Tensor) -> Tensor:
        """Unmerge what comes out; a forward hook."""
        plan, owner = self._owner()
        if owner is None or out.shape[1] != plan.merged_tokens:
            return out
        return unmerge(out, owner)

    def _owner(self) -> tuple[Plan, Tensor | None]:
        step, layer = self.layer.runtime.step, self.layer
        if step is None:
            return Plan(0, 0, 0, 0), None
        plan = step.plans[layer.downsample]
        wanted = getattr(step.phase, self.option) and plan.merged_tokens < plan.tokens
        return plan, step.owners.get(layer.number) if wanted else None


def split_heads(attn: Attention, x: Tensor) -> Tensor:
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
