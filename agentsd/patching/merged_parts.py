"""``merge_crossattn`` and ``merge_mlp``: run the rest of a block on merged tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..methods import Plan
from ..methods.token_merging import merge, unmerge
from .processor import PatchedLayer


@dataclass(frozen=True)
class MergedPart:
    """Hooks that run another part of a block on the tokens that its self-attention merged."""

    layer: PatchedLayer
    option: str
    """The parameter of the phase that turns it on: ``merge_crossattn`` or ``merge_mlp``."""

    def enter(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Merge the input tokens; a forward pre-hook."""
        plan, owner = self._owner()
        if owner is None or args[0].shape[1] != plan.tokens:
            return None
        table = merge(args[0], owner, len(owner) * plan.merged_tokens)
        return table.unflatten(0, (len(owner), -1)), *args[1:]

    def leave(self, _: nn.Module, __: tuple[Any, ...], out: Tensor) -> Tensor:
        """Unmerge the output; a forward hook."""
        plan, owner = self._owner()
        if owner is None or out.shape[1] != plan.merged_tokens:
            return out
        return unmerge(out, owner)

    def _owner(self) -> tuple[Plan, Tensor | None]:
        layer, runtime = self.layer, self.layer.runtime
        step = runtime.step
        if step is None:
            return Plan(0, 0, 0, 0), None
        plan = step.plans[layer.downsample]
        wanted = step.phase.enables(self.option) and plan.merged_tokens < plan.tokens
        return plan, runtime.state.owners.get(layer.number) if wanted else None
