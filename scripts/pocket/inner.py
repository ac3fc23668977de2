"""The inner levels of a denoiser as a denoiser of their own, for pictures that are cheap.

What the outer levels hand inwards is, at first, nothing but the pooled latents. So the inner levels
can be trained alone, on pooled latents with pooled noise, ten samples in the time of one, and
nothing that they learnt changes meaning when the outer levels join in. (Training the whole denoiser
on small pictures instead teaches each level shapes of the wrong size; the recipe tried that.)
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel


def pool(latents: torch.Tensor, level: int) -> torch.Tensor:
    """Means over squares of side 2**level: [B, C, H, W] → [B, C, H/2**level, W/2**level]."""
    return torch.nn.functional.avg_pool2d(latents, 2**level) if level else latents


@torch.no_grad()
def pass_inwards(unet: UNet2DConditionModel) -> None:
    """Make every level begin by handing the pooled latents, in the first channels, inwards.

    Residual branches must start at nothing; what the other channels hand inwards starts at nothing
    too and is learnt from there.
    """
    count = unet.config.in_channels
    first = torch.arange(count)
    unet.conv_in.weight[first] = 0
    unet.conv_in.bias[first] = 0
    unet.conv_in.weight[first, first, 1, 1] = 1
    for block in unet.down_blocks[:-1]:
        for attention in block.attentions:
            torch.nn.init.zeros_(attention.proj_out.weight)
            torch.nn.init.zeros_(attention.proj_out.bias)
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                resnet.conv_shortcut.weight[first] = 0
                resnet.conv_shortcut.bias[first] = 0
                resnet.conv_shortcut.weight[first, first] = 1
        conv = block.downsamplers[0].conv  # 3×3, stride 2, padding 1: taps 1 and 2 are the square
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
        conv.weight[first, first, 1:, 1:] = 0.25


def inner_levels(unet: UNet2DConditionModel, level: int) -> UNet2DConditionModel:
    """The levels from `level` on as a denoiser of pooled latents.

    Args:
        unet: the whole denoiser, after `pass_inwards`.
        level: 1 or more outer levels to leave out.

    Returns:
        A denoiser that shares every module with `unet` but the first, which adds empty channels,
        and the last convolution.
    """
    config, count = unet.config, unet.config.in_channels
    channels, heads = config.block_out_channels, config.attention_head_dim
    inner = UNet2DConditionModel.from_config(
        config,
        block_out_channels=channels[level:],
        attention_head_dim=heads[level:],
        down_block_types=config.down_block_types[level:],
        up_block_types=config.up_block_types[: len(channels) - level],
    )
    inner.time_proj, inner.time_embedding = unet.time_proj, unet.time_embedding
    inner.conv_in = torch.nn.ZeroPad3d((0, 0, 0, 0, 0, channels[level - 1] - count))
    inner.down_blocks, inner.mid_block = unet.down_blocks[level:], unet.mid_block
    last, whole = inner.up_blocks[-1], unet.up_blocks[: len(channels) - level]
    last.resnets, last.attentions = whole[-1].resnets, whole[-1].attentions  # but no upsampler
    inner.up_blocks = torch.nn.ModuleList([*whole[:-1], last])
    torch.nn.init.zeros_(inner.conv_out.weight)
    torch.nn.init.zeros_(inner.conv_out.bias)
    return inner.to(unet.device)
