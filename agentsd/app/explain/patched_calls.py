"""What is seen of a patched image while it is made: the calls of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from torch import Tensor

from ...image_settings import ImageSettings
from ...methods.base import Plan
from ...patching.layers import AttentionLayer, find_attention_layers, find_unet
from ...patching.processor import LAYER, PatchedLayer
from ...patching.runtime import StepPlan


class PatchedCall(NamedTuple):
    """A call of an attention layer that its schedule changes."""

    attn: Any
    """The attention module."""
    x: Tensor
    """Its input, ``[B, N, C]``."""
    layer: PatchedLayer
    step: StepPlan

    @property
    def number(self) -> int:
        """The denoising step, from 0."""
        return self.step.position.step

    @property
    def num_steps(self) -> int:
        """Denoising steps of the run."""
        return self.step.position.num_steps

    @property
    def chosen(self) -> Tensor:
        """The tokens that this step chooses."""
        return self.step.chosen[self.layer.downsample, self.attn.heads]

    @property
    def plan(self) -> Plan:
        """The counts of tokens of each kind."""
        return self.step.plans[self.layer.downsample]

    def grid(self, pipe: DiffusionPipeline, settings: ImageSettings) -> tuple[int, int]:
        """Height and width of the layer's grid of tokens, for an image's settings."""
        rows, columns = (
            -(-((side or 0) // pipe.vae_scale_factor) // self.layer.downsample)
            for side in (settings.height, settings.width)
        )
        return rows, columns


def patchable_layers(pipe: DiffusionPipeline) -> list[AttentionLayer]:
    """The layers of a pipeline's UNet that a schedule can change, in the order of the UNet."""
    layers = find_attention_layers(find_unet(pipe))
    return [layer for layer in layers if layer.unpatchable_reason is None]


@contextmanager
def watched(
    layers: Sequence[AttentionLayer], see: Callable[[str, PatchedCall], None]
) -> Iterator[None]:
    """Call ``see`` with a layer's name and each of its calls, before it is made.

    Calls that the schedule leaves as they are do not count.

    Args:
        layers: The layers to watch.
        see: Called by the job's thread.
    """
    with ExitStack() as hooks:
        for layer in layers:
            hook = partial(_before, layer.name, see)
            handle = layer.module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def _before(
    name: str,
    see: Callable[[str, PatchedCall], None],
    attn: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    x = args[0] if args else kwargs["hidden_states"]
    layer: PatchedLayer | None = vars(attn).get(LAYER)
    step = layer.step_for(x.shape[1]) if layer is not None else None
    if layer is not None and step is not None:
        see(name, PatchedCall(attn, x, layer, step))
