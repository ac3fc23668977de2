"""Describes what a patch does to each attention layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import nn

from ..errors import PatchError
from ..methods import METHODS, Plan
from .flops import work_left
from .forecasts import planned_calls
from .layers import AttentionLayer, find_attention_layers, find_unet
from .light_steps import light_step_conflict
from .patch import patch_of
from .processor import LAYER, AgentAttnProcessor
from .report_table import ReportTable
from .runtime import UNTOUCHED, Runtime

MAX_STEPS = 1000


class PhaseEffect(NamedTuple):
    """What a phase does to one layer, after all caps."""

    method: str
    """The method in effect; ``full`` if the phase leaves the layer unpatched."""
    plan: Plan


@dataclass(frozen=True)
class LayerInspection:
    """What a patch does to one attention layer."""

    name: str
    downsample: int
    """1 at the resolution of the latents, 2 at half of it, and so on."""
    tokens: int
    patched: bool
    reason: str | None
    """Why the layer does not change; None if it does."""
    can_be_patched: bool
    """False for layers that no schedule can patch, such as cross-attention."""
    phases: tuple[PhaseEffect, ...]
    """One per phase of the schedule; empty if the layer is not patched."""


@dataclass(frozen=True)
class Inspection(ReportTable):
    """The result of :func:`inspect_patch`; ``print`` and notebooks show it as a table.

    In the table, layers of a block that are treated alike share a row, and so do all layers that
    cannot be patched for the same reason.
    """

    height: int
    """Height and width in pixels; for a bare UNet, those of the latents."""
    width: int
    layers: list[LayerInspection]
    whole_steps: list[bool] | None = None
    """Whether each step of a run computes the whole UNet; None without ``num_inference_steps``."""
    work: float | None = None
    """Floating-point operations of a run, as a share of the unpatched run's; None without
    ``num_inference_steps``, and for kinds of UNets that cannot be counted."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; each phase has its method and its plan in one mapping."""
        plain = asdict(self)
        for plain_layer, layer in zip(plain["layers"], self.layers, strict=True):
            plain_layer["phases"] = [{"method": m, **plan._asdict()} for m, plan in layer.phases]
        return plain

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        count = max((len(layer.phases) for layer in self.layers), default=0)
        header = ["layer", "downsample", "tokens", *(f"phase {i + 1}" for i in range(count)), "why"]
        alike: dict[tuple[str, ...], list[str]] = {}
        for layer in self.layers:
            block, role = _ends(layer.name)
            size, why = (str(layer.downsample), f"{layer.tokens:,}"), layer.reason or "patched"
            if not layer.can_be_patched:
                block, size = "", ("", "")
            shown = [_effect_text(effect) for effect in layer.phases]
            shown += [""] * (count - len(shown))
            alike.setdefault((block, role, *size, *shown, why), []).append(layer.name)
        rows = [
            [names[0] if len(names) == 1 else f"{block} {role} × {len(names)}".strip(), *rest]
            for (block, role, *rest), names in alike.items()
        ]
        return header, rows

    @property
    def title(self) -> str:
        """The counts of layers and steps in one line."""
        patched = sum(layer.patched for layer in self.layers)
        title = (
            f"{patched} of {len(self.layers)} attention layers patched, "
            f"at {self.height}×{self.width}"
        )
        if self.whole_steps is not None:
            title += f"; {sum(self.whole_steps)} of {len(self.whole_steps)} steps whole"
        if self.work is not None:
            title += f", {self.work:.0%} of the work left"
        return title


def _ends(name: str) -> tuple[str, str]:
    """The block of a layer and its role there: ``down_blocks.0``, ``attn1``."""
    first, *_, role = parts = name.split(".")
    return ".".join(parts[:2]) if first.endswith("_blocks") else first, role


def _effect_text(effect: PhaseEffect) -> str:
    if effect.method == UNTOUCHED.method:
        return UNTOUCHED.method
    return f"{effect.method}: {', '.join(METHODS[effect.method]().stages(effect.plan))}"


def inspect_patch(
    x: Any,
    height: int | None = None,
    width: int | None = None,
    device: str | None = None,
    *,
    num_inference_steps: int | None = None,
) -> Inspection:
    """Describe which attention layers are patched, which are not, and why.

    Args:
        x: A pipeline or UNet, patched or not.
        height: Height of the image in pixels (of the latents for a bare UNet); by default the
            model's own size.
        width: Width, likewise.
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``, on which the default of ``min_tokens`` depends;
            by default the model's device.
        num_inference_steps: Also describe a run of this many denoising steps.

    Returns:
        The layers and, for a run, which steps are whole and how much work is left.

    Raises:
        PatchError: If ``x`` has no UNet, a size is not a multiple of the model's factor, or the
            number of steps is not 1 to 1,000.

    Example:
        >>> from agentsd import apply_patch, inspect_patch, load_pipeline
        >>> layers = inspect_patch(apply_patch(load_pipeline("pocket"), "paper")).layers
        >>> next(layer.phases[0].plan for layer in layers if layer.patched)
        Plan(tokens=4096, merged_tokens=2458, agents=256, keys=2458)
    """
    unet = find_unet(x)
    factor = 1 if isinstance(x, nn.Module) else int(getattr(x, "vae_scale_factor", 8))
    size = getattr(unet.config, "sample_size", None) or 64  # a ControlNet has none
    rows, columns = (size, size) if isinstance(size, int) else size
    height = rows * factor if height is None else height
    width = columns * factor if width is None else width
    for name, value in (("height", height), ("width", width)):
        if type(value) is not int or value < factor or value % factor:
            raise PatchError(f"{name} must be a positive multiple of {factor} (got {value!r})")
    if num_inference_steps is not None and not 1 <= num_inference_steps <= MAX_STEPS:
        raise PatchError(
            f"num_inference_steps must be 1 to {MAX_STEPS:,} (got {num_inference_steps!r})"
        )
    patch, kind = patch_of(unet), device or unet.device.type
    runtime = patch.runtime if patch else None
    rows, columns = height // factor, width // factor
    layers = [
        _describe_layer(layer, runtime, rows, columns, kind)
        for layer in find_attention_layers(unet)
    ]
    if num_inference_steps is None:
        return Inspection(height, width, layers)
    if runtime is None:
        return Inspection(height, width, layers, [True] * num_inference_steps, 1.0)
    calls = planned_calls(runtime.schedule, num_inference_steps)
    if light_step_conflict(unet):  # a run will warn of it
        calls = [(phase, True) for phase, _ in calls]
    work = work_left(unet, runtime, (rows, columns), kind, calls)
    return Inspection(height, width, layers, [whole for _, whole in calls], work)


def _describe_layer(
    layer: AttentionLayer, runtime: Runtime | None, rows: int, columns: int, device: str
) -> LayerInspection:
    installed = isinstance(layer.module.processor, AgentAttnProcessor) and runtime is not None
    phases: list[PhaseEffect] = []
    if installed and runtime is not None:
        for phase in runtime.schedule.phases:
            plan = runtime.plan(phase, layer.downsample, rows, columns, device)
            phases.append(PhaseEffect("full" if plan.untouched else phase.method, plan))
    works = any(method != UNTOUCHED.method for method, _ in phases)
    if layer.unpatchable_reason is not None:
        reason: str | None = layer.unpatchable_reason
    elif runtime is None:
        reason = "no patch applied"
    elif installed:
        reason = None if works else "the schedule changes nothing at this size"
    elif LAYER in vars(layer.module):
        reason = f"its processor has been replaced ({type(layer.module.processor).__name__})"
    elif (layer.downsample, layer.module.heads) in runtime.layers:
        reason = "it had a custom processor when the patch was applied; apply the patch again"
    else:
        reason = "below max_downsample"
    return LayerInspection(
        layer.name,
        layer.downsample,
        -(-rows // layer.downsample) * -(-columns // layer.downsample),
        installed,
        reason,
        layer.unpatchable_reason is None,
        tuple(phases),
    )
