"""Describes what a patch does to each attention layer."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import PatchError
from ..methods import METHODS, Plan
from ..schedule import Schedule
from .flops import work_left
from .forecasts import whole_steps
from .layers import AttentionLayer, find_attention_layers, find_unet
from .light_steps import why_none
from .patch import patch_of
from .processor import LAYER, AgentAttnProcessor
from .runtime import UNTOUCHED, Runtime
from .step_policy import FollowRuns

MOST_STEPS = 1000

if TYPE_CHECKING:
    from rich.table import Table


class Inspection(dict[str, Any]):
    """A dict that is displayed as a table, in a terminal and in a notebook.

    The table has one row for all layers of a block that are treated alike; the dict lists each.
    """

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        count = max((len(layer["phases"]) for layer in self["layers"]), default=0)
        header = ["layer", "downsample", "tokens", *(f"phase {i + 1}" for i in range(count)), "why"]
        alike: dict[tuple[str, ...], list[str]] = {}
        for layer in self["layers"]:
            shown = [_phase_text(phase) for phase in layer["phases"]]
            shown += [""] * (count - len(shown))
            size = str(layer["downsample"]), f"{layer['tokens']:,}"
            block, role = _ends(layer["name"])
            row = block, role, *size, *shown, layer["reason"] or "patched"
            alike.setdefault(row, []).append(layer["name"])
        rows = [
            [names[0] if len(names) == 1 else f"{block} {role} × {len(names)}", *rest]
            for (block, role, *rest), names in alike.items()
        ]
        return header, rows

    @property
    def _title(self) -> str:
        patched = sum(layer["patched"] for layer in self["layers"])
        title = (
            f"{patched} of {len(self['layers'])} attention layers patched, "
            f"at {self['height']}×{self['width']}"
        )
        if whole := self.get("whole_steps"):
            title += f"; {sum(whole)} of {len(whole)} steps whole"
        if (work := self.get("work")) is not None:
            title += f", {work:.0%} of the work left"
        if (run := self.get("last_run")) is not None:
            title += f"; in the last run {run['whole']} calls whole, {run['light']} light"
        return title

    def table(self) -> Table:
        """The table, for a terminal."""
        from rich.table import Table  # patching needs none of it

        header, rows = self._rows()
        table = Table(title=self._title)
        for name in header:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        out = StringIO()
        Console(file=out, width=240).print(self.table())
        return out.getvalue()

    def _repr_html_(self) -> str:
        header, rows = self._rows()
        head = "".join(f"<th>{cell}</th>" for cell in header)
        body = "".join(
            "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows
        )
        return f"<p>{self._title}</p><table><tr>{head}</tr>{body}</table>"


def _ends(name: str) -> tuple[str, str]:
    """The block of a layer and its role there: ``down_blocks.0``, ``attn1``."""
    first, *_, role = parts = name.split(".")
    return ".".join(parts[:2]) if first.endswith("_blocks") else first, role


def _phase_text(phase: dict[str, Any]) -> str:
    numbers = {name: phase[name] for name in Plan._fields}
    method = METHODS[phase["method"]]()
    return (
        method.method
        if method == UNTOUCHED
        else f"{method.method}: {', '.join(method.stages(Plan(**numbers)))}"
    )


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
        height: Height of the image in pixels (of the latents for a UNet on its own); by default
            the model's own size.
        width: Width, likewise.
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``, on which the default of ``min_tokens`` depends;
            by default the model's device.
        num_inference_steps: Also describe a run of so many denoising steps.

    Returns:
        A dict, shown as a table by ``print`` and in notebooks: ``height``, ``width``, and
        ``layers``, each with ``name``, ``downsample``, ``tokens``, ``patched``, ``reason``, and
        ``phases`` with the ``method`` in effect and the ``merged_tokens``, ``agents`` and
        ``keys`` after every cap. For a run, also ``whole_steps``, whether each step computes the
        whole UNet, and ``work``, the share of the unpatched run's floating-point operations that
        is left (None for kinds of UNets that cannot be counted). Once a UNet has run under a
        schedule with a cache, also ``last_run``: its ``whole`` and ``light`` calls.

    Raises:
        PatchError: If ``x`` has no UNet, a size is not a multiple of the model's factor, or the
            number of steps is not 1 to 1,000.

    Example:
        >>> from agentsd import apply_patch, inspect_patch, load_pipeline
        >>> layers = inspect_patch(apply_patch(load_pipeline("pocket"), "paper"))["layers"]
        >>> [p["agents"] for p in next(l for l in layers if l["patched"])["phases"]]
        [256, 0]
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
    if num_inference_steps is not None and not 1 <= num_inference_steps <= MOST_STEPS:
        raise PatchError(
            f"num_inference_steps must be 1 to {MOST_STEPS:,} (got {num_inference_steps!r})"
        )
    patch, kind = patch_of(unet), device or unet.device.type
    runtime = patch.runtime if patch else None
    rows, columns = height // factor, width // factor
    layers = [
        _describe_layer(layer, runtime, rows, columns, kind)
        for layer in find_attention_layers(unet)
    ]
    found = Inspection(height=height, width=width, layers=layers)
    if num_inference_steps is not None:
        schedule = runtime.schedule if runtime else Schedule(phases=(UNTOUCHED,))
        whole = whole_steps(schedule, num_inference_steps)
        if why_none(unet):  # as a run will find and say
            whole = [True] * num_inference_steps
        found["whole_steps"] = whole
        found["work"] = work_left(unet, runtime, (rows, columns), kind, whole)
    if runtime is not None and isinstance(runtime.policy, FollowRuns) and runtime.policy.last_run:
        found["last_run"] = runtime.policy.last_run._asdict()
    return found


def _describe_layer(
    layer: AttentionLayer, runtime: Runtime | None, rows: int, columns: int, device: str
) -> dict[str, Any]:
    installed = isinstance(layer.module.processor, AgentAttnProcessor) and runtime is not None
    phases = []
    if installed and runtime is not None:
        for phase in runtime.schedule.phases:
            plan = runtime.plan(phase, layer.downsample, rows, columns, device)
            method = UNTOUCHED.method if plan.untouched else phase.method
            phases.append({"method": method, **plan._asdict()})
    works = any(phase["method"] != UNTOUCHED.method for phase in phases)
    if layer.unpatchable_reason is not None:
        reason: str | None = layer.unpatchable_reason
    elif runtime is None:
        reason = "no patch applied"
    elif installed:
        reason = None if works else "the schedule changes nothing at this size"
    elif LAYER in vars(layer.module):
        reason = f"its processor has been replaced ({type(layer.module.processor).__name__})"
    elif (layer.downsample, layer.module.heads) in runtime.layers:
        reason = "its processor was not diffusers' own when the patch was applied; apply it again"
    else:
        reason = "below max_downsample"
    return {
        "name": layer.name,
        "downsample": layer.downsample,
        "tokens": -(-rows // layer.downsample) * -(-columns // layer.downsample),
        "patched": installed,
        "reason": reason,
        "phases": phases,
    }
