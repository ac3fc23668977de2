"""Stage 1: the autoencoder between 256-pixel pictures and 64×64 latents of four channels.

Its encoder is set, not trained: the mean colour of 4×4 pixels. A trained one of this size found
latents in which a colour meant another thing in each place (its group norms look at the whole
picture), and a denoiser on them mixed colours up. Means are local and linear, so that a part of a
picture has its part of the latents. Of flat shapes they tell edges to a fraction of a pixel; what a
decoder has to learn is to draw them sharp.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from .batches import ScenePictures, stream, to_unit
from .checkpoints import Clock, load, save_atomically
from .progress import Watch, save_grid, say
from .scenes import render, sample_scene
from .settings import EVALUATION_SEED, Settings
from .shards import Shards

FACTOR = 4
# Red, green, blue and their mean, each brought to about zero mean and unit variance.
MEAN = torch.tensor([0.15, -0.11, -0.24, -0.07])
SPREAD = torch.tensor([0.75, 0.75, 0.75, 0.5])
NOISE = 0.06  # noise on latents while training: what a denoiser leaves, the decoder must stand
LEARNING_RATE = 1.5e-3


def build_vae() -> AutoencoderKL:
    """An autoencoder, 0.65 M parameters, whose decoder is untrained."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=256,
        scaling_factor=1.0,
    )
    _set_encoder(vae)
    return vae


@torch.no_grad()
def _set_encoder(vae: AutoencoderKL, large: float = 32.0) -> None:
    """Write the mean colour of 4×4 pixels into the weights of the encoder.

    Residual branches are nothing. The last group norm would divide by the picture's own spread; a
    large constant and its negative beside each colour make its divisor a constant. The SiLU after
    it is undone by silu(x) - silu(-x) = x.
    """
    encoder = vae.encoder
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    rgb = torch.arange(3)
    encoder.conv_in.weight[rgb, rgb, 1, 1] = 1
    for block in encoder.down_blocks[:2]:
        block.downsamplers[0].conv.weight[rgb, rgb, :2, :2] = 0.25
    encoder.down_blocks[1].resnets[0].conv_shortcut.weight[rgb, rgb] = 1
    last = encoder.down_blocks[2].resnets[0].conv_shortcut  # its groups are of eight channels
    last.weight[8 * rgb, rgb], last.weight[8 * rgb + 1, rgb] = 1, -1
    last.bias[8 * rgb + 2], last.bias[8 * rgb + 3] = large, -large
    encoder.conv_out.weight[rgb, 8 * rgb, 1, 1] = large / 2
    encoder.conv_out.weight[rgb, 8 * rgb + 1, 1, 1] = -large / 2
    quant = vae.quant_conv
    torch.nn.init.zeros_(quant.weight)
    torch.nn.init.zeros_(quant.bias)
    quant.weight[rgb, rgb, 0, 0] = 1 / SPREAD[:3]
    quant.weight[3, :3, 0, 0] = 1 / (3 * SPREAD[3])
    quant.bias[:4] = -MEAN / SPREAD
    quant.bias[4:] = 2 * math.log(NOISE)


def latents_of(pictures: torch.Tensor) -> torch.Tensor:
    """What the encoder computes, the short way: [B, 3, H, W] in -1..1 → [B, 4, H/4, W/4]."""
    means = F.avg_pool2d(pictures, FACTOR)
    means = torch.cat([means, means.mean(1, keepdim=True)], 1)
    mean, spread = (x.to(means.device)[:, None, None] for x in (MEAN, SPREAD))
    return (means - mean) / spread


def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, H, W] in -1..1 → latent means [B, 4, H/4, W/4]."""
    return vae.quant_conv(vae.encoder(pictures)).chunk(2, dim=1)[0]


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, 4, h, w] → pictures [B, 3, 4h, 4w] in about -1..1."""
    return vae.decoder(vae.post_quant_conv(latents))


def _slopes(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pictures.diff(dim=-1), pictures.diff(dim=-2)


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + 5 × squared error + half the L1 error of the slopes, which keeps edges sharp."""
    slopes = sum(F.l1_loss(a, b) for a, b in zip(_slopes(output), _slopes(target), strict=True))
    return F.l1_loss(output, target) + 5 * F.mse_loss(output, target) + 0.5 * slopes


def _crops(rng: np.random.Generator, size: int, count: int) -> torch.Tensor:
    """Squares of 256-pixel pictures, most of them with an edge in them: uint8 [B, 3, S, S]."""
    found: list[np.ndarray] = []
    while len(found) < count:
        picture = render(sample_scene(rng), 256)
        edges = np.argwhere(np.abs(np.diff(picture.astype(np.int16), axis=1)).sum(-1) > 10)
        for _ in range(4 if size < 256 else 1):
            near = edges[rng.integers(len(edges))] - rng.integers(0, size, 2)
            corner = near if rng.random() < 0.75 else rng.integers(0, 257 - size, 2)
            y, x = np.clip(corner, 0, 256 - size) // FACTOR * FACTOR
            found.append(picture[y : y + size, x : x + size])
    return torch.from_numpy(np.stack(found[:count])).permute(0, 3, 1, 2)


def _plan(progress: float, settings: Settings) -> tuple[int, int]:
    """Picture side and batch a shard: crops first, then whole pictures, as norms see the whole."""
    if settings.smoke:
        return 32, 4
    if settings.gpu:
        return 256, 64
    return (64, 8) if progress < 0.4 else (256, 1)


def train_vae(settings: Settings, seconds: float) -> AutoencoderKL:
    """Train the decoder to the end of the time budget, from a checkpoint if there is one."""
    path, device = settings.work / "vae.pt", settings.device
    torch.manual_seed(settings.seed)
    vae = build_vae().to(device, memory_format=torch.channels_last)
    parameters = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    optimiser = torch.optim.AdamW(parameters, LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    clock, step = Clock(seconds), 0
    saved = load(path, device) if settings.resume else None
    if saved:
        vae.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        clock, step = Clock(seconds, saved["spent"]), saved["step"]
        say(f"vae: resumed at step {step}")
    shards = Shards(settings, parameters)

    def shard_loss(shard: int) -> torch.Tensor:
        """One shard's loss; its pictures go by seed, step and shard alone."""
        size, count = _plan(clock.progress, settings)
        rng = np.random.default_rng((settings.seed, step, shard))
        random = torch.Generator().manual_seed(step * shards.count + shard)
        pictures = to_unit(_crops(rng, size, count), device)
        latents = latents_of(pictures)
        latents = latents + NOISE * torch.randn(latents.shape, generator=random).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            output = decode(vae, latents)
        return loss_of(output.float(), pictures)[None]

    def save() -> None:
        state = {"model": vae.state_dict(), "optimiser": optimiser.state_dict()}
        save_atomically(state | {"spent": clock.spent, "step": step}, path)

    saved_at = time.monotonic()
    every = 1 if settings.smoke else 50
    with Watch("vae", settings.work, resumed=saved is not None, every=every) as watch:
        while clock.tick() < 1 and step < settings.last_step:
            for group in optimiser.param_groups:
                warm = min(1.0, (step + 1) / 100)
                group["lr"] = LEARNING_RATE * warm * (1 - clock.progress) ** 0.8 + 1e-6
            (loss,) = shards.backward(shard_loss)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            step += 1
            watch.step(step, clock.spent, clock.progress, {"loss": loss})
            if time.monotonic() - saved_at > settings.save_every:
                save()
                saved_at = time.monotonic()
    save()
    report(vae, settings)
    return vae


@torch.no_grad()
def report(vae: AutoencoderKL, settings: Settings, count: int = 32) -> float:
    """PSNR in dB on unseen 256-pixel pictures (mean over pictures), with a grid beside the log."""
    size = 64 if settings.smoke else 256
    pictures = stream(ScenePictures(settings.seed + EVALUATION_SEED, size), 4)
    scores, shown = [], []
    for _ in range(1 if settings.smoke else count // 4):
        target = to_unit(next(pictures)[0], settings.device)
        output = decode(vae, encode(vae, target)).clamp(-1, 1)
        error = (output - target).square().mean((1, 2, 3)) / 4  # on the 0..1 scale
        scores += (-10 * error.log10()).tolist()
        shown.append(torch.cat([target, output], 3))
    pairs = torch.cat(shown)[:12].add(1).mul(127.5).round().byte().permute(0, 2, 3, 1)
    save_grid(pairs.cpu().numpy(), 3, settings.work / "vae.png")
    psnr = sum(scores) / len(scores)
    say(f"vae: {psnr:.2f} dB at {size} pixels")
    return psnr
