"""A tiny pipeline of every kind that diffusers makes of such UNets, with its inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from PIL import Image
from tiny_models import WIDTH, build, sdxl_unet, tiny_pipeline, tiny_unet
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

Example = tuple[Any, dict[str, Any]]


TEXT = {"prompt": "a cat", "height": 32, "width": 32}


PICTURE = Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 30).convert("RGB")


BLOCKS = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def of(kind: str, folder: Path, unet: Any = None, **parts: Any) -> Any:
    """A pipeline of that class around the tiny one's parts; its own parts last."""
    made = tiny_pipeline(folder, unet).components | parts
    pipe = getattr(diffusers, kind)(**made)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd21(folder: Path) -> Example:
    unet = tiny_unet(
        upcast_attention=True, use_linear_projection=True, attention_head_dim=(2, 4, 4)
    )
    pipe = of("StableDiffusionPipeline", folder, unet)
    pipe.scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    return pipe, TEXT


def xl(
    folder: Path, kind: str = "StableDiffusionXLPipeline", unet: Any = None, **parts: Any
) -> Any:
    base = tiny_pipeline(folder)
    pooled = base.text_encoder.config.to_dict() | {"projection_dim": WIDTH}
    two = build(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**pooled)))
    unet = unet or sdxl_unet(cross_attention_dim=2 * WIDTH)
    kept = {name: base.components[name] for name in ("vae", "text_encoder", "tokenizer")}
    kept |= {"text_encoder_2": two, "tokenizer_2": base.tokenizer, "scheduler": base.scheduler}
    pipe = getattr(diffusers, kind)(**kept, unet=unet, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def refiner(folder: Path) -> Example:
    unet = sdxl_unet(projection_class_embeddings_input_dim=8 * 5 + WIDTH)
    parts = {"requires_aesthetics_score": True}
    pipe = xl(folder, "StableDiffusionXLImg2ImgPipeline", unet, **parts)
    pipe.register_modules(text_encoder=None, tokenizer=None)
    return pipe, {"prompt": "a cat", "image": PICTURE, "strength": 1.0}


def inpaint(folder: Path) -> Example:
    mask = Image.new("L", (32, 32), 255)
    pipe = of("StableDiffusionInpaintPipeline", folder, tiny_unet(in_channels=9))
    return pipe, TEXT | {"image": PICTURE, "mask_image": mask}


def depth(folder: Path) -> Example:
    parts = tiny_pipeline(folder, tiny_unet(in_channels=5)).components
    for name in ("safety_checker", "image_encoder", "feature_extractor"):
        parts.pop(name, None)
    pipe = diffusers.StableDiffusionDepth2ImgPipeline(
        **parts, depth_estimator=None, feature_extractor=None
    )
    far = torch.arange(1024.0).view(1, 32, 32)
    return pipe, {"prompt": "a cat", "image": PICTURE, "strength": 1.0, "depth_map": far}


def upscale(folder: Path) -> Example:
    unet = tiny_unet(in_channels=7, num_class_embeds=1000)
    parts = tiny_pipeline(folder, unet).components
    parts.pop("image_encoder", None)
    low = diffusers.DDPMScheduler()
    pipe = diffusers.StableDiffusionUpscalePipeline(**parts, low_res_scheduler=low)
    return pipe, {"prompt": "a cat", "image": PICTURE.resize((16, 16))}


def controlnet(unet: Any) -> Any:
    net = build(
        lambda: diffusers.ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=(8, 16)
        )
    )
    for module in net.controlnet_down_blocks:  # zeros at first, which would hide all else
        nn.init.constant_(module.weight, 0.1)
    return net


def controlled(folder: Path, count: int = 1) -> Example:
    unet = tiny_unet()
    nets = [controlnet(unet) for _ in range(count)]
    pipe = of(
        "StableDiffusionControlNetPipeline", folder, unet, controlnet=nets if count > 1 else nets[0]
    )
    return pipe, TEXT | {"image": [PICTURE] * count if count > 1 else PICTURE}


def adapter(folder: Path) -> Example:
    net = build(
        lambda: diffusers.T2IAdapter(
            channels=[16, 32, 32], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
        )
    )
    parts = tiny_pipeline(folder).components
    parts.pop("image_encoder")
    pipe = diffusers.StableDiffusionAdapterPipeline(**parts, adapter=net)
    return pipe, TEXT | {"image": PICTURE}


def animated(folder: Path) -> Example:
    motion = build(
        lambda: diffusers.MotionAdapter(
            block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=2,
            motion_num_attention_heads=2, motion_max_seq_length=8,
        )
    )  # fmt: skip
    parts = tiny_pipeline(folder, tiny_unet(**BLOCKS)).components
    parts.pop("safety_checker")
    pipe = diffusers.AnimateDiffPipeline(**parts, motion_adapter=motion)
    return pipe, TEXT | {"num_frames": 3}


def video(folder: Path) -> Example:
    unet = build(
        lambda: diffusers.UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 64), sample_size=16, in_channels=8, out_channels=4,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            layers_per_block=1, cross_attention_dim=WIDTH, num_attention_heads=(2, 4),
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
        )
    )  # fmt: skip
    vae = build(
        lambda: diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
            latent_channels=4, layers_per_block=1,
        )
    )  # fmt: skip
    sees = CLIPVisionConfig(
        hidden_size=WIDTH, projection_dim=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        image_size=224, intermediate_size=WIDTH, patch_size=16,
    )  # fmt: skip
    pipe = diffusers.StableVideoDiffusionPipeline(
        vae=vae, unet=unet,
        image_encoder=build(lambda: CLIPVisionModelWithProjection(sees)),
        scheduler=diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction", use_karras_sigmas=True, timestep_type="continuous",
            timestep_spacing="leading", sigma_min=0.002, sigma_max=700.0,
        ),
        feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}
        ),
    )  # fmt: skip
    return pipe, {"image": PICTURE, "height": 32, "width": 32, "num_frames": 3}


def latent_diffusion(folder: Path) -> Example:
    base = tiny_pipeline(folder)
    config = LDMBertConfig(
        vocab_size=64, d_model=WIDTH, encoder_layers=1, encoder_attention_heads=2,
        encoder_ffn_dim=WIDTH, head_dim=4, max_position_embeddings=77,
    )  # fmt: skip
    pipe = diffusers.LDMTextToImagePipeline(
        vqvae=base.vae, bert=build(lambda: LDMBertModel(config)), tokenizer=base.tokenizer,
        unet=base.unet, scheduler=base.scheduler,
    )  # fmt: skip
    return pipe, TEXT


PIPELINES: dict[str, Callable[[Path], Example]] = {
    "Stable Diffusion 1.x": lambda f: (of("StableDiffusionPipeline", f), TEXT),
    "Stable Diffusion 2.1 (v-prediction, upcast attention)": sd21,
    "SDXL base": lambda f: (xl(f), TEXT),
    "SDXL refiner": refiner,
    "SSD-1B, Segmind (fewer transformer blocks)": lambda f: (
        xl(
            f,
            unet=sdxl_unet(
                cross_attention_dim=2 * WIDTH,
                transformer_layers_per_block=(1, 1, 2),
                reverse_transformer_layers_per_block=[[2, 1], [1, 1], 1],
                mid_block_type="UNetMidBlock2D",
            ),
        ),
        TEXT,
    ),
    "LDM text-to-image": latent_diffusion,
    "img2img": lambda f: (
        of("StableDiffusionImg2ImgPipeline", f),
        {"prompt": "a cat", "image": PICTURE, "strength": 1.0},
    ),
    "inpaint (9 channels)": inpaint,
    "instruct-pix2pix": lambda f: (
        of("StableDiffusionInstructPix2PixPipeline", f, tiny_unet(in_channels=8)),
        {"prompt": "a cat", "image": PICTURE},
    ),
    "depth2img": depth,
    "upscale (x4)": upscale,
    "ControlNet": controlled,
    "two ControlNets": lambda f: controlled(f, 2),
    "T2I-Adapter": adapter,
    "PAG": lambda f: (
        of("StableDiffusionPAGPipeline", f, pag_applied_layers=["mid", "down_blocks.0"]),
        TEXT,
    ),
    "AnimateDiff": animated,
    "Stable Video Diffusion": video,
}


def run(pipe: Any, inputs: dict[str, Any], steps: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    made = pipe(**inputs, num_inference_steps=steps, generator=generator, output_type="latent")
    out = torch.as_tensor(made[0] if isinstance(made, tuple) else next(iter(made.values())))
    assert torch.isfinite(out).all()
    return out
