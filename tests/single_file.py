"""Write a pipeline as one checkpoint file with the original names of Stable Diffusion's weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE = {
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut",
}


def save_single_file(pipe: Any, path: Path) -> Path:
    """Save the UNet, VAE and text encoder of a Stable Diffusion 1.x pipeline in one file."""
    weights = {f"model.diffusion_model.{k}": v for k, v in _unet(pipe.unet).items()}
    weights |= {f"first_stage_model.{k}": v for k, v in _vae(pipe.vae).items()}
    text = {k.removeprefix("text_model."): v for k, v in pipe.text_encoder.state_dict().items()}
    weights |= {f"cond_stage_model.transformer.text_model.{k}": v for k, v in text.items()}
    save_file({k: v.contiguous() for k, v in weights.items()}, path)
    return path


def _rename(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}(?=\.)", rf"\g<1>{theirs}", name)
    return name


def _unet(unet: UNet2DConditionModel) -> dict[str, Any]:
    layers = unet.config.layers_per_block + 1
    renamed = {}
    for name, weight in unet.state_dict().items():
        block = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)(?:\.conv)?\.", name)
        if block is None:
            theirs = _rename(name, UNET)
        else:
            way, level, part, index = block[1], int(block[2]), block[3], int(block[4])
            rest = name[block.end() :]
            if part == "downsamplers":
                theirs = f"input_blocks.{(level + 1) * layers}.0.op.{rest}"
            elif part == "upsamplers":
                place = 2 if hasattr(unet.up_blocks[level], "attentions") else 1
                theirs = f"output_blocks.{(level + 1) * layers - 1}.{place}.conv.{rest}"
            else:
                number = level * layers + index + (1 if way == "down" else 0)
                kind = "input" if way == "down" else "output"
                theirs = f"{kind}_blocks.{number}.{int(part == 'attentions')}.{rest}"
        renamed[theirs if "attentions" in name else _rename(theirs, RESNET)] = weight
    return renamed


def _vae(vae: AutoencoderKL) -> dict[str, Any]:
    levels = len(vae.config.block_out_channels)
    renamed = {}
    for name, weight in vae.state_dict().items():
        theirs = re.sub(r"(down|up)_blocks\.(\d+)\.resnets\.", r"\1.\2.block.", name)
        theirs = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", theirs)
        theirs = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample", theirs)
        theirs = re.sub(r"up\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", theirs)
        linear = "attentions" in name and weight.ndim == 2
        renamed[_rename(theirs, VAE)] = weight[:, :, None, None] if linear else weight
    return renamed
