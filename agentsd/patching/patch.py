"""Patch a UNet, and remove the patch."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import PatchError
from ..schedule import Phase, Schedule
from . import deep_features
from .diffusers_internals import AttnProcessor2_0
from .layers import find_attention_layers, find_unet
from .merged_parts import MergedPart
from .processor import LAYER, AgentAttnProcessor, PatchedLayer, get_processor, set_processor
from .runtime import Runtime

T = TypeVar("T")

DEFAULT_SCHEDULE = "faithful"
_PATCH = "_agentsd_patch"
"""Attribute of a patched UNet that holds its :class:`Patch`."""


class Patch(NamedTuple):
    """What :func:`apply_patch` leaves on a UNet, for :func:`remove_patch` to take away."""

    runtime: Runtime
    hooks: list[RemovableHandle]


def apply_patch(x: T, schedule: Schedule | str | Path | None = None, **overrides: Any) -> T:
    """Patch the self-attention of a UNet, so that each denoising step runs as a schedule says.

    Only the processors of the self-attention modules change (cross-attention, LoRA and
    IP-Adapter are left alone), in this one UNet. Applying twice equals applying once with the
    newer settings, and :func:`remove_patch` restores the model bit for bit.

    diffusers sees and sets the processors underneath. If it sets another of its own softmax
    processors (``set_default_attn_processor``), the patch stays on top of it. If something sets a
    processor that computes anything else (attention slicing, xFormers), the patch steps aside with
    a warning until that one is replaced.

    Args:
        x: A diffusers pipeline with a ``unet``, or a ``UNet2DConditionModel``. Give the pipeline
            if there is one: its scheduler knows how many steps a run has.
        schedule: A :class:`Schedule`, a preset's name (``"faithful"``, ``"fast"``,
            ``"balanced"``, ``"turbo"``, or ``"paper"``, the published one), or the path of a YAML
            file. ``None`` is ``"faithful"``, the closest to the unpatched image.
        **overrides: Parameters of :class:`Phase`, under their published names. Without a
            schedule they make one constant phase (``method`` is ``"agent"`` unless given); with
            one they change its phases that read them.

    Returns:
        ``x``, patched.

    Raises:
        ScheduleError: If the schedule or an override is not valid.
        PatchError: If ``x`` has no UNet to patch, or no layer of it matches.

    Example:
        >>> from agentsd import apply_patch, load_pipeline
        >>> pipe = apply_patch(load_pipeline("pocket"), sx=4, sy=4, ratio=0.4, agent_ratio=0.95)
        >>> image = pipe("a red circle", num_inference_steps=2, height=128, width=128).images[0]
        >>> image.size
        (128, 128)
    """
    if schedule is None and overrides:
        settings = Schedule(phases=(Phase(**overrides),))
    else:
        settings = Schedule.load(DEFAULT_SCHEDULE if schedule is None else schedule)
        settings = settings.override(**overrides) if overrides else settings
    unet = find_unet(x)
    layers = [layer for layer in find_attention_layers(unet) if layer.unpatchable_reason is None]
    if not layers:
        raise PatchError(_nothing_to_patch(unet))
    top = min(layer.downsample for layer in layers)
    reach = settings.reach(top)
    if reach < top:
        raise PatchError(
            f"max_downsample={reach} matches no layer: the self-attention of this UNet begins at "
            f"downsample {top}; give {top} or more, or leave it out"
        )
    runtime = Runtime(
        settings,
        ((s.downsample, s.module.heads) for s in layers if s.downsample <= reach),
        pipeline=None if isinstance(x, nn.Module) else x,
    )
    before = patch_of(unet)
    try:
        remove_patch(unet)
        install(unet, runtime)
    except BaseException:
        _restore(unet, before)
        raise
    return x


def install(unet: UNet2DConditionModel, runtime: Runtime) -> None:
    """Register the hooks and install the processors."""
    hooks: list[RemovableHandle] = []
    setattr(unet, _PATCH, Patch(runtime, hooks))
    hooks.append(unet.register_forward_pre_hook(runtime.follow, with_kwargs=True))
    hooks.append(unet.register_forward_pre_hook(_warn_if_replaced))
    if any(phase.cache_interval > 1 for phase in runtime.schedule.phases):
        hooks.append(unet.register_forward_hook(runtime.finish))
        deep_features.install(unet, runtime)
    modules = dict(unet.named_modules())
    for number, found in enumerate(find_attention_layers(unet)):
        attn, kind = found.module, (found.downsample, found.module.heads)
        if found.unpatchable_reason is not None or kind not in runtime.layers:
            continue
        layer = PatchedLayer(runtime, number, found.downsample, attn.processor)
        setattr(attn, LAYER, layer)
        attn.set_processor(AgentAttnProcessor())
        attn.get_processor = partial(get_processor, attn)
        attn.set_processor = partial(set_processor, attn)
        block = modules[found.name.rpartition(".")[0]]
        for option, part in (("merge_crossattn", block.attn2), ("merge_mlp", block.ff)):
            if part is not None and runtime.schedule.asks(option):
                merged = MergedPart(layer, option)
                hooks.append(part.register_forward_pre_hook(merged.enter))
                hooks.append(part.register_forward_hook(merged.leave))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # PyTorch has no types for it
def _warn_if_replaced(unet: UNet2DConditionModel, _: Any) -> None:
    """Warn, as a run begins, where others have since put their processors into every layer."""
    patch = patch_of(unet)
    step = patch.runtime.step if patch else None
    if step is None or step.position.step:
        return
    layers = [module for module in unet.modules() if LAYER in vars(module)]
    kinds = {type(module.processor).__name__ for module in layers}
    if AgentAttnProcessor.__name__ not in kinds:
        warnings.warn(
            f"agentsd does nothing: {', '.join(sorted(kinds))} took the place of its processors "
            "since (sliced attention and xFormers do); call unet.set_default_attn_processor() to "
            "bring the patch back, or apply_patch again",
            stacklevel=2,
        )


def _restore(unet: UNet2DConditionModel, before: Patch | None) -> None:
    """Put back the patch that was there before, or none."""
    remove_patch(unet)
    if before is not None:
        install(unet, before.runtime)


def _nothing_to_patch(unet: UNet2DConditionModel) -> str:
    found = Counter(layer.unpatchable_reason for layer in find_attention_layers(unet))
    listed = "; ".join(f"{count} × {reason}" for reason, count in found.items())
    return (
        "no self-attention layer to patch: agentsd looks for the attn1 of transformer blocks, "
        f"with diffusers' own softmax processors, and found {listed or 'no attention at all'}"
    )


def remove_patch(x: T) -> T:
    """Remove the patch, and restore every module bit for bit.

    Processors that something else has set since (an IP-Adapter, say) are left as they are.

    Args:
        x: What was given to :func:`apply_patch`, or its UNet; patched or not.

    Returns:
        ``x``, unpatched.

    Raises:
        PatchError: If ``x`` has no UNet.

    Example:
        >>> from agentsd import apply_patch, inspect_patch, load_pipeline, remove_patch
        >>> pipe = remove_patch(apply_patch(load_pipeline("pocket")))
        >>> any(layer["patched"] for layer in inspect_patch(pipe)["layers"])
        False
    """
    unet = find_unet(x)
    for module in unet.modules():
        layer: PatchedLayer | None = vars(module).get(LAYER)
        for name in ("get_processor", "set_processor"):
            if layer is not None:
                vars(module).pop(name, None)
        if isinstance(getattr(module, "processor", None), AgentAttnProcessor):
            module.set_processor(layer.original if layer else AttnProcessor2_0())
        if layer is not None:
            delattr(module, LAYER)
    deep_features.remove(unet)
    patch = patch_of(unet)
    if patch is not None:
        for hook in patch.hooks:
            hook.remove()
        delattr(unet, _PATCH)
    return x


def patch_of(unet: UNet2DConditionModel) -> Patch | None:
    found: Patch | None = vars(unet).get(_PATCH)
    return found


@contextmanager
def patched(x: T, schedule: Schedule | str | Path | None = None, **overrides: Any) -> Iterator[T]:
    """Patch for the length of a ``with`` block, then restore what was there, errors or not.

    Args:
        x: As for :func:`apply_patch`.
        schedule: As for :func:`apply_patch`.
        **overrides: As for :func:`apply_patch`.

    Yields:
        ``x``, patched.

    Raises:
        ScheduleError: As for :func:`apply_patch`.
        PatchError: As for :func:`apply_patch`.

    Example:
        >>> from agentsd import load_pipeline, patched
        >>> pipe = load_pipeline("pocket")
        >>> with patched(pipe, "faithful"):
        ...     image = pipe("a red circle", num_inference_steps=2, height=128, width=128).images[0]
    """
    unet = find_unet(x)
    before = patch_of(unet)
    apply_patch(x, schedule, **overrides)
    try:
        yield x
    finally:
        _restore(unet, before)
