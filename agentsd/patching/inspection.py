"""Describes what a patch does to each attention layer."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING, Any

from diffusers import UNet2DConditionModel

from ..methods import METHODS, Plan
from .layers import AttentionLayer, find_attention_layers
from .processor import LAYER, AgentAttnProcessor
from .runtime import UNTOUCHED, Runtime

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
        return (
            f"{patched} of {len(self['layers'])} attention layers patched, "
            f"at {self['height']}×{self['width']}"
        )

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


def describe(
    unet: UNet2DConditionModel,
    runtime: Runtime | None,
    height: int,
    width: int,
    factor: int,
    device: str,
) -> Inspection:
    """Describe every attention layer for images of ``height × width``.

    Args:
        unet: The UNet.
        runtime: Its patch, or None where it has none.
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        factor: Pixels per row of latents.
        device: Kind of device, which decides how many tokens a layer needs to be patched.

    Returns:
        The :class:`Inspection`; see :func:`agentsd.inspect_patch` for its keys.
    """
    layers = [
        _describe_layer(layer, runtime, height // factor, width // factor, device)
        for layer in find_attention_layers(unet)
    ]
    return Inspection(height=height, width=width, layers=layers)


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
