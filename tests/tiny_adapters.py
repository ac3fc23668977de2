"""LoRAs, IP-Adapters and ControlNets of random weights, for tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.models.attention_processor import Attention
from peft import LoraConfig
from tiny_models import WIDTH, build, tiny_unet
from torch import Tensor
from transformers import CLIPImageProcessor


def add_lora(unet: Any) -> None:
    """A LoRA on self- and cross-attention with weights that change the output."""
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    build(lambda: unet.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False)))
    unet.eval()


def ip_adapter(unet: Any) -> dict[str, dict[str, Tensor]]:
    """The weights of an IP-Adapter, as its published files hold them."""
    weights, number = {}, 1
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and name.endswith("attn2"):
            for kind in ("k", "v"):
                weights[f"{number}.to_{kind}_ip.weight"] = torch.randn(module.inner_dim, WIDTH)
            number += 2
    projection = {
        "proj.weight": torch.randn(4 * WIDTH, 8),
        "proj.bias": torch.zeros(4 * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }
    return {"image_proj": projection, "ip_adapter": weights}


def load_ip_adapter(pipe: Any) -> None:
    state = build(lambda: ip_adapter(pipe.unet))
    # Releases before 0.31 want one to be there, even without an image encoder.
    pipe.register_modules(feature_extractor=CLIPImageProcessor())
    pipe.load_ip_adapter(state, subfolder="", weight_name="", image_encoder_folder=None)


def save_lora(pipe: Any, folder: Path, name: str) -> str:
    """A LoRA on the UNet's cross-attention, saved as diffusers saves them."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["attn2.to_q"], init_lora_weights=False)
    unet = tiny_unet()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet.add_adapter(config)
    layers = peft.get_peft_model_state_dict(unet)
    pipe.save_lora_weights(str(folder), unet_lora_layers=layers, weight_name=name)
    return str(folder / name)


def controlnet(pipe: Any, tmp_path: Path) -> str:
    net = build(
        lambda: ControlNetModel.from_unet(
            pipe.unet, conditioning_embedding_out_channels=(4, 8), load_weights_from_unet=True
        )
    )
    for module in net.controlnet_down_blocks:
        torch.nn.init.constant_(module.weight, 0.1)
    net.save_pretrained(tmp_path / "net")
    return str(tmp_path / "net")
