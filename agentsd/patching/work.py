"""Counts the floating-point operations of a run, on a copy of the UNet without weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from .deep_features import whole_steps
from .denoising_step import Position
from .patch import install
from .runtime import Runtime
from .still_runtime import StillRuntime

TEXT_TOKENS = 77


def work_left(
    unet: torch.nn.Module,
    runtime: Runtime | None,
    size: tuple[int, int],
    device: str,
    num_steps: int,
) -> float | None:
    """The share of the floating-point operations of an unpatched run that a patched one needs.

    Args:
        unet: The UNet.
        runtime: Its patch, or None.
        size: Height and width of the latents.
        device: Kind of device, which decides how many tokens a layer needs to be patched.
        num_steps: Denoising steps of the run.

    Returns:
        The share, at most 1, or None if the inputs of this kind of UNet are not known.
    """
    if runtime is None:
        return 1.0
    if not isinstance(unet, UNet2DConditionModel):
        return None
    with torch.device("meta"):
        twin = UNet2DConditionModel.from_config(unet.config)
    inputs = _inputs(twin, size)
    if inputs is None:
        return None
    unpatched = _operations(twin, inputs)
    still = StillRuntime(runtime.schedule, runtime.layers)
    install(twin, still)
    costs = {}
    for phase in runtime.schedule.phases:
        step = still.step_at(Position(0, num_steps), phase, *size, inputs["sample"], device)
        still.step = replace(step, records=phase.cache_branch)
        costs[phase, True] = _operations(twin, inputs)
        if phase.cache_interval > 1:
            still.step = replace(step, forecast=still.step.features["deep"])
            costs[phase, False] = _operations(twin, inputs)
    schedule = runtime.schedule
    run = [
        costs[schedule.phase_at(step, num_steps), whole]
        for step, whole in enumerate(whole_steps(schedule, num_steps))
    ]
    return sum(run) / (num_steps * unpatched)


def _inputs(unet: Any, size: tuple[int, int]) -> dict[str, Any] | None:
    """Arguments of a call with guidance, without values."""
    config = unet.config
    if config.encoder_hid_dim_type or config.addition_embed_type not in (None, "text_time"):
        return None
    with torch.device("meta"):
        found: dict[str, Any] = {
            "sample": torch.empty(2, config.in_channels, *size),
            "timestep": torch.empty(2),
            "encoder_hidden_states": torch.empty(2, TEXT_TOKENS, config.cross_attention_dim),
        }
        if config.num_class_embeds:
            found["class_labels"] = torch.empty(2, dtype=torch.long)
        elif config.class_embed_type:
            return None
        if config.addition_embed_type:
            times = 6 * config.addition_time_embed_dim
            text = torch.empty(2, config.projection_class_embeddings_input_dim - times)
            found["added_cond_kwargs"] = {"text_embeds": text, "time_ids": torch.empty(2, 6)}
    return found


def _operations(unet: Any, inputs: dict[str, Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(**inputs)
    return int(counter.get_total_flops())
