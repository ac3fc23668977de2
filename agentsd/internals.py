"""What agentsd uses of diffusers beyond its public names: all of it, and nothing else.

A release of diffusers that moves one of these is told of here, and mended here.
"""

import diffusers

from .errors import LoadError

try:
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_dispatch import dispatch_attention_fn
    from diffusers.models.attention_processor import (
        Attention,
        AttnProcessor,
        AttnProcessor2_0,
        FusedAttnProcessor2_0,
    )
    from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
except ImportError as error:
    raise LoadError(
        f"diffusers {diffusers.__version__} lacks what agentsd builds on ({error}); "
        "upgrade agentsd, or install a diffusers that it was made for (pip check names them)"
    ) from error

__all__ = [
    "Attention",
    "AttnProcessor",
    "AttnProcessor2_0",
    "BasicTransformerBlock",
    "FusedAttnProcessor2_0",
    "TransformerSpatioTemporalModel",
    "dispatch_attention_fn",
]
