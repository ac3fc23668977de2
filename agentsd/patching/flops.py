"""Counts the floating-point operations of a run, on a weightless copy of the UNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from ..schedule import Phase
from .denoising_step import Position
from .patch import install
from .runtime import Runtime
from .step_policy import Decision, GivenSteps

TEXT_TOKENS = 77


class Flops(NamedTuple):
    """Floating-point operations."""

    attention: float
    """Operations of the products of queries with keys and of attention weights with values."""
    other: float

    @property
    def total(self) -> float:
        """The sum of both."""
        return self.attention + self.other

    def times(self, factor: float) -> Flops:
        """The operations of ``factor`` runs."""
        return Flops(factor * self.attention, factor * self.other)


def work_left(
    unet: torch.nn.Module,
    runtime: Runtime,
    size: tuple[int, int],
    device: str,
    calls: Sequence[tuple[Phase, bool]],
) -> float | None:
    """The floating-point operations of patched calls, as a share of the unpatched ones.

    Args:
        unet: The UNet.
        runtime: Its patch.
        size: Height and width of the latents.
        device: Kind of device, on which the default of ``min_tokens`` depends.
        calls: The phase of each call, and whether it computes the whole UNet.

    Returns:
        The share, at most 1, or None if the inputs of this kind of UNet are unknown.
    """
    twin = _twin(unet, size)
    if twin is None:
        return None
    unpatched = _flops(*twin)
    return _patched(*twin, runtime, device, calls).total / len(calls) / unpatched.total


def unpatched_flops(unet: torch.nn.Module, size: tuple[int, int]) -> Flops | None:
    """The operations of an unpatched call with guidance; ``None`` as for :func:`work_left`."""
    twin = _twin(unet, size)
    return None if twin is None else _flops(*twin)


def run_flops(
    unet: torch.nn.Module,
    runtime: Runtime,
    size: tuple[int, int],
    device: str,
    calls: Sequence[tuple[Phase, bool]],
) -> Flops | None:
    """The operations of a patched run with guidance; as for :func:`work_left`."""
    twin = _twin(unet, size)
    return None if twin is None else _patched(*twin, runtime, device, calls)


def _patched(
    twin: Any,
    inputs: dict[str, Any],
    runtime: Runtime,
    device: str,
    calls: Sequence[tuple[Phase, bool]],
) -> Flops:
    """Patch a copy of a UNet, and count the operations of a run."""
    policy = GivenSteps()
    install(twin, Runtime(runtime.schedule, runtime.layers, policy, device))
    costs = {}
    for phase in runtime.schedule.phases:
        policy.decision = Decision(Position(0, len(calls)), phase, records=phase.cache is not None)
        costs[phase, True] = _flops(twin, inputs)
        if policy.feature is not None:
            policy.decision = policy.decision._replace(forecast=policy.feature)
            costs[phase, False] = _flops(twin, inputs)
            policy.feature = None
    run = [costs[call] for call in calls]
    return Flops(sum(call.attention for call in run), sum(call.other for call in run))


def _twin(unet: torch.nn.Module, size: tuple[int, int]) -> tuple[Any, dict[str, Any]] | None:
    """A copy of the UNet without weights, and arguments to call it with."""
    if not isinstance(unet, UNet2DConditionModel):
        return None
    with torch.device("meta"):
        twin = UNet2DConditionModel.from_config(unet.config)
    inputs = _inputs(twin, size)
    return None if inputs is None else (twin, inputs)


def _inputs(unet: Any, size: tuple[int, int]) -> dict[str, Any] | None:
    """Arguments of a call with guidance, on the meta device."""
    config = unet.config
    if config.encoder_hid_dim_type or config.addition_embed_type not in (None, "text_time"):
        return None
    with torch.device("meta"):
        inputs: dict[str, Any] = {
            "sample": torch.empty(2, config.in_channels, *size),
            "timestep": torch.empty(2),
            "encoder_hidden_states": torch.empty(2, TEXT_TOKENS, config.cross_attention_dim),
        }
        if config.num_class_embeds:
            inputs["class_labels"] = torch.empty(2, dtype=torch.long)
        elif config.class_embed_type:
            return None
        if config.addition_embed_type:
            times = 6 * config.addition_time_embed_dim
            text = torch.empty(2, config.projection_class_embeddings_input_dim - times)
            inputs["added_cond_kwargs"] = {"text_embeds": text, "time_ids": torch.empty(2, 6)}
    return inputs


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, extended by the in-place product that ``keys`` projects its keys with.

    Example:
        >>> with flop_counter() as counter:
        ...     _ = torch.zeros(2, 3, 4).baddbmm_(torch.ones(2, 3, 5), torch.ones(2, 5, 4))
        >>> counter.get_total_flops() == 2 * 2 * 3 * 5 * 4
        True
    """
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: _product})


def _product(_: torch.Size, a: torch.Size, b: torch.Size, **__: Any) -> int:
    """Operations of a batched product ``[B, N, K]`` by ``[B, K, M]``."""
    return 2 * a.numel() * b[-1]


def _flops(unet: Any, inputs: dict[str, Any]) -> Flops:
    with torch.no_grad(), flop_counter() as counter:
        unet(**inputs)
    # A light step that forecasts the output performs no counted operation.
    counts = counter.get_flop_counts().get("Global", {})
    # On the meta device, attention is two batched products; projections use other operators.
    names = ("aten.bmm", "scaled_dot_product")
    attention = sum(n for kind, n in counts.items() if any(name in str(kind) for name in names))
    return Flops(attention, counter.get_total_flops() - attention)
