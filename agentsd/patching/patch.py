"""Patch a UNet, and remove the patch."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import PatchError, ScheduleError
from ..schedule import METHODS, Schedule
from .diffusers_internals import AttnProcessor2_0
from .layers import find_attention_layers, find_unet
from .light_steps import LightSteps, light_step_conflict
from .merged_parts import MergedPart
from .processor import LAYER, AgentAttnProcessor, PatchedLayer, get_processor, set_processor
from .runtime import Runtime
from .step_policy import FollowRuns, StepPolicy

T = TypeVar("T")

DEFAULT_SCHEDULE = "faithful"
_PATCH = "_agentsd_patch"
"""Attribute of a patched UNet that holds its :class:`Patch`."""


@dataclass(eq=False)
class _Block:
    """An active ``with patched(…)`` block."""

    before: Patch | None
    """The patch to restore at its end."""


_BLOCKS: WeakKeyDictionary[nn.Module, list[_Block]] = WeakKeyDictionary()
"""Active blocks of each UNet, outermost first; notebooks may exit them in another order."""


class Patch(NamedTuple):
    """What :func:`apply_patch` adds to a UNet and :func:`remove_patch` removes."""

    runtime: Runtime
    hooks: list[RemovableHandle]


def apply_patch(x: T, schedule: Schedule | str | Path | None = None, **overrides: Any) -> T:
    """Patch the self-attention of a UNet, so that each denoising step follows a schedule.

    This replaces the processors of this UNet's self-attention modules (cross-attention, LoRA and
    IP-Adapter are left alone) and adds hooks that follow its calls. Applying twice equals applying
    once with the newer settings, and :func:`remove_patch` restores the model bit for bit.

    diffusers gets and sets the processors underneath the patch. If it sets another of its own
    softmax processors (``set_default_attn_processor``), the patch stays on top of it. If a
    processor that computes anything else is set (attention slicing, xFormers), the patch steps
    aside with a warning until that processor is replaced.

    Args:
        x: A diffusers pipeline with a ``unet``, or a ``UNet2DConditionModel``. Prefer the pipeline:
            its scheduler knows how many steps a run has.
        schedule: A :class:`Schedule`, a preset's name (``"faithful"``, ``"fast"``,
            ``"balanced"``, ``"turbo"``, or ``"paper"``, the published one), or the path of a YAML
            file. ``None`` means ``"faithful"``, the closest to the unpatched image.
        **overrides: Parameters of the methods, under their published names. They change the phases
            of the schedule that read them; ``cache_interval``, ``cache_branch`` and
            ``cache_order`` change one parameter of a phase's :class:`Cache`. Without a schedule,
            ``method`` makes a single phase of that method instead.

    Returns:
        ``x``, patched.

    Raises:
        ScheduleError: If the schedule or an override is not valid.
        PatchError: If ``x`` has no UNet to patch, or no layer matches.

    Example:
        >>> from agentsd import apply_patch, load_pipeline
        >>> pipe = apply_patch(load_pipeline("pocket"), cache_interval=2)  # faithful, with a cache
        >>> pipe = apply_patch(pipe, method="agent", ratio=0.3)  # replaces the first patch
        >>> image = pipe("a red circle", num_inference_steps=2, height=128, width=128).images[0]
        >>> image.size
        (128, 128)
    """
    settings = _settings(schedule, overrides)
    pipeline = None if isinstance(x, nn.Module) else x
    find_unet(x)  # raises PatchError before the policy takes x for a pipeline
    apply_schedule(x, settings, FollowRuns(settings, pipeline))
    return x


def apply_schedule(x: Any, schedule: Schedule, policy: StepPolicy) -> Runtime:
    """:func:`apply_patch`, with a policy that decides what each UNet call does.

    Args:
        x: As for :func:`apply_patch`.
        schedule: The phases that the policy chooses from.
        policy: Decides before each call.

    Returns:
        The runtime that follows the UNet's calls.

    Raises:
        PatchError: As for :func:`apply_patch`.
    """
    unet = find_unet(x)
    layers = [layer for layer in find_attention_layers(unet) if layer.unpatchable_reason is None]
    if not layers:
        raise PatchError(_nothing_to_patch(unet))
    top = min(layer.downsample for layer in layers)
    reach = schedule.reach(top)
    if reach < top:
        raise PatchError(
            f"max_downsample={reach} matches no layer: the self-attention of this UNet starts at "
            f"downsample {top}; give {top} or more, or leave it out"
        )
    if schedule.has_cache and (conflict := light_step_conflict(unet)):
        raise PatchError(conflict)
    kinds = ((s.downsample, s.module.heads) for s in layers if s.downsample <= reach)
    runtime = Runtime(schedule, kinds, policy)
    before = patch_of(unet)
    try:
        remove_patch(unet)
        install(unet, runtime)
    except BaseException:
        _restore(unet, before)
        raise
    return runtime


def _settings(schedule: Schedule | str | Path | None, overrides: dict[str, Any]) -> Schedule:
    """The schedule that :func:`apply_patch` was asked for."""
    if schedule is None and "method" in overrides:
        return Schedule.from_dict({"phases": [overrides]})
    settings = Schedule.load(DEFAULT_SCHEDULE if schedule is None else schedule)
    if not overrides:
        return settings
    try:
        return settings.override(**overrides)
    except ScheduleError as error:
        unread = [name for name in overrides if not any(p.reads(name) for p in settings.phases)]
        known = any(method.reads(name) for method in METHODS.values() for name in unread)
        if schedule is not None or not known:
            raise
        raise ScheduleError(
            f"{error}; without a schedule, parameters change the default, {DEFAULT_SCHEDULE!r}: "
            "to set parameters of another method, give method= as well"
        ) from None


def install(unet: UNet2DConditionModel, runtime: Runtime) -> None:
    """Register the hooks and install the processors."""
    hooks: list[RemovableHandle] = []
    setattr(unet, _PATCH, Patch(runtime, hooks))
    hooks.append(unet.register_forward_pre_hook(runtime.follow, with_kwargs=True))
    hooks.append(unet.register_forward_pre_hook(_warn_if_replaced))
    hooks.append(unet.conv_in.register_state_dict_pre_hook(_warn_of_copied_parts))
    if runtime.schedule.has_cache:
        caches = [phase.cache for phase in runtime.schedule.phases if phase.cache is not None]
        runtime.light_steps = LightSteps(unet, [cache.branch for cache in caches])
        hooks.append(unet.register_forward_hook(runtime.finish, always_call=True))
    modules = dict(unet.named_modules())
    for number, layer in enumerate(find_attention_layers(unet)):
        attn, kind = layer.module, (layer.downsample, layer.module.heads)
        if layer.unpatchable_reason is not None or kind not in runtime.layers:
            continue
        patched_layer = PatchedLayer(runtime, number, layer.downsample, attn.processor)
        setattr(attn, LAYER, patched_layer)
        attn.set_processor(AgentAttnProcessor())
        attn.get_processor = partial(get_processor, attn)
        attn.set_processor = partial(set_processor, attn)
        block = modules[layer.name.rpartition(".")[0]]
        for option, part in (("merge_crossattn", block.attn2), ("merge_mlp", block.ff)):
            if part is not None and runtime.schedule.enables(option):
                merged = MergedPart(patched_layer, option)
                hooks.append(part.register_forward_pre_hook(merged.enter))
                hooks.append(part.register_forward_hook(merged.leave))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # PyTorch has no types for it
def _warn_if_replaced(unet: UNet2DConditionModel, _: Any) -> None:
    """Warn, as a run begins, if every processor of the patch has been replaced."""
    patch = patch_of(unet)
    step = patch.runtime.step if patch else None
    if step is None or step.position.step:
        return
    layers = [module for module in unet.modules() if LAYER in vars(module)]
    kinds = {type(module.processor).__name__ for module in layers}
    if AgentAttnProcessor.__name__ not in kinds:
        warnings.warn(
            f"agentsd does nothing: its processors were replaced with {', '.join(sorted(kinds))}, "
            "as attention slicing and xFormers do; call unet.set_default_attn_processor() to "
            "restore the patch, or apply_patch again",
            stacklevel=2,
        )


def _warn_of_copied_parts(_: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Warn where the weights are copied part by part, as ``AnimateDiffPipeline`` does."""
    if not prefix:
        warnings.warn(
            "agentsd: a model is being built from parts of a patched UNet; the patch stays on the "
            "original. Call apply_patch on the new model's pipeline, too",
            stacklevel=2,
        )


def _restore(unet: UNet2DConditionModel, before: Patch | None) -> None:
    """Restore the patch that was there before, if any."""
    remove_patch(unet)
    if before is not None:
        install(unet, before.runtime)


def _nothing_to_patch(unet: UNet2DConditionModel) -> str:
    reasons = Counter(layer.unpatchable_reason for layer in find_attention_layers(unet))
    listed = "; ".join(f"{count} × {reason}" for reason, count in reasons.items())
    return (
        "no self-attention layer to patch: agentsd looks for the attn1 of transformer blocks, "
        f"with diffusers' own softmax processors, and found {listed or 'no attention at all'}"
    )


def remove_patch(x: T) -> T:
    """Remove the patch, and restore every module bit for bit.

    Processors that something else has set since (such as an IP-Adapter) are left unchanged.

    Args:
        x: A pipeline or UNet, patched or not.

    Returns:
        ``x``, unpatched.

    Raises:
        PatchError: If ``x`` has no UNet.

    Example:
        >>> from agentsd import apply_patch, inspect_patch, load_pipeline, remove_patch
        >>> pipe = remove_patch(apply_patch(load_pipeline("pocket")))
        >>> any(layer.patched for layer in inspect_patch(pipe).layers)
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
    patch = patch_of(unet)
    if patch is not None:
        patch.runtime.stop()
        for hook in patch.hooks:
            hook.remove()
        delattr(unet, _PATCH)
    return x


def patch_of(unet: UNet2DConditionModel) -> Patch | None:
    patch: Patch | None = vars(unet).get(_PATCH)
    return patch


@contextmanager
def patched(x: T, schedule: Schedule | str | Path | None = None, **overrides: Any) -> Iterator[T]:
    """Patch for the duration of a ``with`` block, then restore what was there, even on errors.

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
    block = _Block(patch_of(unet))
    apply_patch(x, schedule, **overrides)
    blocks = _BLOCKS.setdefault(unet, [])
    blocks.append(block)
    try:
        yield x
    finally:
        place = blocks.index(block)
        blocks.remove(block)
        if place < len(blocks):  # a block that was entered after this one is still active
            blocks[place].before = block.before
        else:
            _restore(unet, block.before)
