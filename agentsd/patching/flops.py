"""Counts the floating-point operations of a run, on a copy of the UNet without weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from .denoising_step import Position
from .patch import install
from .runtime import Runtime
from .step_policy import Decision, GivenSteps

TEXT_TOKENS = 77


class Operations(NamedTuple):
    """Floating-point operations."""

    attention: float
    """Of the products of queries with keys and of weights with values."""
    other: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.attention + self.other

    def times(self, factor: float) -> Operations:
        """As many, so many times."""
        return Operations(factor * self.attention, factor * self.other)


def work_left(
    unet: torch.nn.Module,
    runtime: Runtime | None,
    size: tuple[int, int],
    device: str,
    whole: Sequence[bool],
) -> float | None:
    """The share of the floating-point operations of an unpatched run that a patched one needs.

    Args:
        unet: The UNet.
        runtime: Its patch, or None.
        size: Height and width of the latents.
        device: Kind of device, which decides how many tokens a layer needs to be patched.
        whole: Whether each denoising step of the run computes the whole UNet.

    Returns:
        The share, at most 1, or None if the inputs of this kind of UNet are not known.
    """
    if runtime is None:
        return 1.0
    unpatched = run_operations(unet, None, size, device, [True])
    ours = run_operations(unet, runtime, size, device, whole)
    return None if ours is None or unpatched is None else ours.total / len(whole) / unpatched.total


def run_operations(
    unet: torch.nn.Module,
    runtime: Runtime | None,
    size: tuple[int, int],
    device: str,
    whole: Sequence[bool],
) -> Operations | None:
    """The operations of a run with guidance; arguments and ``None`` as for :func:`work_left`."""
    if not isinstance(unet, UNet2DConditionModel):
        return None
    with torch.device("meta"):
        twin = UNet2DConditionModel.from_config(unet.config)
    inputs = _inputs(twin, size)
    if inputs is None:
        return None
    if runtime is None:
        return _operations(twin, inputs).times(len(whole))
    policy = GivenSteps()
    install(twin, Runtime(runtime.schedule, runtime.layers, policy, device))
    costs = {}
    for phase in runtime.schedule.phases:
        policy.decision = Decision(Position(0, len(whole)), phase, records=phase.cache is not None)
        costs[phase, True] = _operations(twin, inputs)
        if policy.feature is not None:
            policy.decision = policy.decision._replace(forecast=policy.feature)
            costs[phase, False] = _operations(twin, inputs)
            policy.feature = None
    schedule = runtime.schedule
    run = [
        costs[schedule.phase_at(number, len(whole)), is_whole]
        for number, is_whole in enumerate(whole)
    ]
    return Operations(sum(step.attention for step in run), sum(step.other for step in run))


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


def operation_counter() -> FlopCounterMode:
    """A counter that knows the product by which ``keys`` projects its keys, as PyTorch's does not.

    Example:
        >>> with operation_counter() as counter:
        ...     _ = torch.zeros(2, 3, 4).baddbmm_(torch.ones(2, 3, 5), torch.ones(2, 5, 4))
        >>> counter.get_total_flops() == 2 * 2 * 3 * 5 * 4
        True
    """
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: _product})


def _product(_: torch.Size, a: torch.Size, b: torch.Size, **__: Any) -> int:
    """Operations of a batched product ``[B, N, K]`` by ``[B, K, M]``."""
    return 2 * a.numel() * b[-1]


def _operations(unet: Any, inputs: dict[str, Any]) -> Operations:
    with torch.no_grad(), operation_counter() as counter:
        unet(**inputs)
    # A light step of a forecast output does nothing that is counted.
    counts = counter.get_flop_counts().get("Global", {})
    # On the meta device, attention is two batched products; projections are other ones.
    names = ("aten.bmm", "scaled_dot_product")
    attention = sum(n for kind, n in counts.items() if any(name in str(kind) for name in names))
    return Operations(attention, counter.get_total_flops() - attention)
