"""Real diffusers classes at tiny sizes, with random weights and nothing to download."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from agentsd.patching.denoising_step import Position
from agentsd.patching.processor import LAYER, AgentAttnProcessor, PatchedLayer
from agentsd.patching.runtime import Runtime, StepPlan
from agentsd.patching.step_policy import GivenSteps
from agentsd.schedule import Phase, Schedule

WIDTH = 32
"""Channels of the text embeddings."""


def build(make: Any, seed: int = 0) -> Any:
    """Call ``make`` with seeded weights, and leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    return model.eval() if isinstance(model, nn.Module) else model


def tiny_unet(seed: int = 0, **config: Any) -> UNet2DConditionModel:
    """A UNet with self-attention at downsample 1 and 2, and at 4 in its middle."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        "cross_attention_dim": WIDTH,
    }
    return build(lambda: UNet2DConditionModel(**settings | config), seed)


def smallest_unet(**config: Any) -> UNet2DConditionModel:
    """A UNet with one level, for runs of many steps."""
    settings: dict[str, Any] = {
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "mid_block_type": None,
    }
    return tiny_unet(**settings | config)


def sdxl_unet(**config: Any) -> UNet2DConditionModel:
    """A UNet shaped like SDXL's: no attention at downsample 1, one and two blocks below."""
    settings: dict[str, Any] = {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 8 * 6 + WIDTH,
    }
    return tiny_unet(**settings | config)


def call(unet: UNet2DConditionModel, timestep: Any = 500, **inputs: Any) -> Tensor:
    """One forward pass on fixed inputs of the given ``size`` and ``batch``."""
    height, width = inputs.pop("size", (16, 16))
    batch = inputs.pop("batch", 2)
    random = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 4, height, width, generator=random)
    text = torch.randn(batch, inputs.pop("text", 7), WIDTH, generator=random)
    if unet.config.addition_embed_type == "text_time":
        added = {"text_embeds": torch.ones(batch, WIDTH), "time_ids": torch.ones(batch, 6)}
        inputs.setdefault("added_cond_kwargs", added)
    with torch.no_grad():
        dtype = unet.dtype
        return unet(sample.to(dtype), timestep, text.to(dtype), **inputs).sample


def tiny_pipeline(folder: Path, unet: UNet2DConditionModel | None = None) -> Any:
    """A Stable Diffusion pipeline whose latents are half the image's size.

    Args:
        folder: Where the tokenizer's two files are written.
        unet: Its UNet; a fresh :func:`tiny_unet` by default.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=16)
    text_config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    vae_config: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    }
    pipe = StableDiffusionPipeline(
        vae=build(lambda: AutoencoderKL(**vae_config)),
        text_encoder=build(lambda: CLIPTextModel(text_config)),
        tokenizer=tokenizer,
        unet=unet or tiny_unet(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class SafetyChecker(nn.Module):
    """Hides images as Stable Diffusion's checker does: flags them and makes them black.

    Args:
        hides: Whether to hide an image, given how many came before it.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, hides: Callable[[int], bool]) -> None:
        super().__init__()
        self.hides, self.seen = hides, 0

    def forward(self, images: Tensor, clip_input: Tensor) -> tuple[Tensor, list[bool]]:
        flags = [self.hides(self.seen + i) for i in range(len(images))]
        self.seen += len(images)
        return images * ~torch.tensor(flags)[:, None, None, None], flags


def with_safety_checker(pipe: Any, hides: Callable[[int], bool] = lambda _: True) -> Any:
    """Give a pipeline a :class:`SafetyChecker`."""
    pipe.feature_extractor = CLIPImageProcessor(size=8, crop_size=8)
    pipe.safety_checker = SafetyChecker(hides)
    return pipe


def tiny_layer(channels: int = 16, heads: int = 2, dtype: torch.dtype = torch.float64) -> Attention:
    """A single self-attention layer."""
    layer = build(lambda: Attention(channels, heads=heads, dim_head=channels // heads))
    return layer.to(dtype).requires_grad_(False)


def run_layer(
    attn: Attention, x: Tensor, phase: Phase, height: int, width: int, **at: int
) -> Tensor:
    """Call ``attn`` on ``x`` as if in a UNet patched with ``phase``, however few the tokens.

    Args:
        attn: The layer, which is restored afterwards.
        x: Tokens ``[B, height · width, C]``.
        phase: The phase to patch it with.
        height: Tokens down the grid.
        width: Tokens across it.
        **at: ``step`` of the run and ``seed`` of the schedule, 0 by default.
    """
    phase = phase.override(min_tokens=0)
    schedule = Schedule(phases=(phase,), seed=at.get("seed", 0))
    runtime = Runtime(schedule, [(1, attn.heads)], GivenSteps())
    runtime.step = runtime.step_at(Position(at.get("step", 0), 1000), phase, height, width)
    original = attn.processor
    setattr(attn, LAYER, PatchedLayer(runtime, 0, 1, original))
    attn.set_processor(AgentAttnProcessor())
    try:
        return attn(x)
    finally:
        attn.set_processor(original)
        delattr(attn, LAYER)


def patched_layers(unet: nn.Module) -> list[tuple[str, Attention]]:
    """Names and modules of the patched layers."""
    return [(name, module) for name, module in unet.named_modules() if LAYER in vars(module)]


def for_tiny(schedule: Schedule | str) -> Schedule:
    """A schedule, or a preset by name, that works on images too small, and in runs too short, to
    gain by it."""
    schedule = Schedule.load(schedule)
    changes = {"min_tokens": 0} | ({"cache_min_steps": 0} if schedule.has_cache else {})
    return schedule.override(**changes)


class RecordingBackend:
    """A compiler for ``torch.compile`` that compiles nothing and keeps what it was given."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward


def make_phase(**settings: Any) -> Phase:
    """A phase of any method."""
    return Schedule.from_dict({"phases": [settings]}).phases[0]


def watch(unet: nn.Module) -> list[StepPlan]:
    """A list to which each call of a UNet adds its step, while it is patched."""
    seen: list[StepPlan] = []

    def note(module: nn.Module, *_: Any) -> None:
        for _, layer in patched_layers(module)[:1]:
            seen.append(getattr(layer, LAYER).runtime.step)

    unet.register_forward_pre_hook(note)
    return seen


def latents(pipe: Any, steps: int = 4, size: tuple[int, int] = (32, 32), **inputs: Any) -> Tensor:
    """Run a pipeline and return its latents, for one or more prompts, each with its own seed."""
    prompts = inputs.pop("prompt", ["a cat"])
    seeds = inputs.pop("seeds", range(len(prompts)))
    return pipe(
        prompts,
        num_inference_steps=steps,
        height=size[0],
        width=size[1],
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **inputs,
    ).images
