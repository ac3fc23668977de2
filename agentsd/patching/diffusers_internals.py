"""All private names of diffusers that agentsd uses.

If a diffusers release moves one of these, fix it here.
"""

from typing import Any

import diffusers
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LoadError

RELEASE = tuple(int(part) for part in diffusers.__version__.split(".")[:2])

DTYPE = "dtype" if RELEASE >= (0, 40) else "torch_dtype"
"""Keyword of ``from_pretrained`` for the dtype; releases ignore or deprecate the other name."""

try:
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import (
        Attention,
        AttnProcessor,
        AttnProcessor2_0,
        FusedAttnProcessor2_0,
    )
    from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    if RELEASE >= (0, 35):
        from diffusers.models.attention_dispatch import dispatch_attention_fn
    else:  # there are no attention backends yet

        def dispatch_attention_fn(
            query: Tensor, key: Tensor, value: Tensor, scale: float | None = None
        ) -> Tensor:
            """Softmax attention in the layout of diffusers' function, ``[B, N, H, d]``."""
            q, k, v = (t.transpose(1, 2) for t in (query, key, value))
            return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

except ImportError as error:
    raise LoadError(
        f"diffusers {diffusers.__version__} lacks names that agentsd needs ({error}); agentsd "
        "supports diffusers 0.30 and later: upgrade whichever of the two is older"
    ) from error


def forward_slot(module: nn.Module) -> dict[str, Any]:
    """The dict whose entry ``"forward"`` is a module's forward, beneath diffusers' hooks.

    The hooks must still be called: group offloading also loads other modules' weights in them.
    """
    registry = vars(module).get("_diffusers_hook")
    references = getattr(registry, "_fn_refs", None)
    return vars(references[0]) if references else vars(module)


__all__ = [
    "DTYPE",
    "Attention",
    "AttnProcessor",
    "AttnProcessor2_0",
    "BasicTransformerBlock",
    "FusedAttnProcessor2_0",
    "TransformerSpatioTemporalModel",
    "UNet2DConditionOutput",
    "dispatch_attention_fn",
    "forward_slot",
]
