"""Stage 1: the autoencoder between 256-pixel pictures and 64×64 latents of four channels."""

from __future__ import annotations

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from .batches import ScenePictures, stream, to_unit
from .checkpoints import Clock, load, rng_state, save_atomically, set_rng_state
from .progress import Watch, plot_log, save_grid, say
from .settings import EVALUATION_SEED, Settings

FACTOR = 4
NOISE = 0.06  # noise on unit latents while training: keeps neighbouring latents alike
LEARNING_RATE = 2.5e-3
ENCODER_SHARE = 0.75  # of the time; then the decoder alone


def build_vae() -> AutoencoderKL:
    """An untrained autoencoder, 0.65 M parameters."""
    return AutoencoderKL(
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


def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, H, W] in -1..1 → latent means [B, 4, H/4, W/4]."""
    return vae.quant_conv(vae.encoder(pictures)).chunk(2, dim=1)[0]


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, 4, h, w] → pictures [B, 3, 4h, 4w] in about -1..1."""
    return vae.decoder(vae.post_quant_conv(latents))


def _slopes(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pictures.diff(dim=-1), pictures.diff(dim=-2)


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + squared error + half the L1 error of the slopes, which keeps edges sharp."""
    slopes = sum(F.l1_loss(a, b) for a, b in zip(_slopes(output), _slopes(target), strict=True))
    return F.l1_loss(output, target) + F.mse_loss(output, target) + 0.5 * slopes


def _plan(progress: float, settings: Settings) -> tuple[int, int]:
    """Picture side and batch for this moment: small crops first, whole pictures at the end."""
    if settings.smoke:
        return 32, 4
    if settings.gpu:
        return 256, 32
    return (32, 48) if progress < 0.6 else ((64, 24), (128, 8), (256, 2))[int(progress * 97) % 3]


def _batch(settings: Settings, step: int, size: int, batch: int) -> torch.Tensor:
    """Draw pictures for a step; the 32-pixel ones are crops of pictures four times as large."""
    whole = size * 4 if size == 32 else size
    pictures = next(stream(ScenePictures(settings.seed + step, whole), batch))[0]
    if whole > size:
        corner = np.random.default_rng((settings.seed, step)).integers(
            0, whole - size + 1, (batch, 2)
        )
        pictures = torch.stack(
            [p[:, y : y + size, x : x + size] for p, (y, x) in zip(pictures, corner, strict=True)]
        )
    return to_unit(pictures, settings.device)


def train_vae(settings: Settings, seconds: float) -> AutoencoderKL:
    """Train to the end of the time budget, from a checkpoint if there is one.

    After three quarters the latents are whitened and the encoder is frozen; the rest, and whatever
    hours a later run adds, polishes the decoder alone. So latents never change under a denoiser.
    """
    torch.manual_seed(settings.seed)
    path, device = settings.work / "vae.pt", settings.device
    vae = build_vae().to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(
        vae.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4
    )
    clock, step, frozen = Clock(seconds), 0, False
    saved = load(path, device) if settings.resume else None
    if saved:
        vae.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        set_rng_state(saved["rng"], device)
        clock, step, frozen = Clock(seconds, saved["spent"]), saved["step"], saved["frozen"]
        say(f"vae: resumed at step {step}")

    def save() -> None:
        save_atomically(
            {
                "model": vae.state_dict(), "optimiser": optimiser.state_dict(),
                "rng": rng_state(device), "spent": clock.spent, "step": step, "frozen": frozen,
            },
            path,
        )  # fmt: skip

    saved_at = time.monotonic()
    with Watch(
        "vae", settings.work, resumed=saved is not None, every=1 if settings.smoke else 50
    ) as watch:
        while clock.tick() < 1 and step < settings.last_step:
            progress = clock.progress
            for group in optimiser.param_groups:
                group["lr"] = LEARNING_RATE * (0.5 + 0.5 * math.cos(math.pi * progress)) + 1e-6
            if progress >= ENCODER_SHARE and not frozen:
                whiten(vae, settings)
                frozen = True
            pictures = _batch(settings, step, *_plan(progress, settings))
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.gpu):
                with torch.set_grad_enabled(not frozen):
                    latents = encode(vae, pictures)
                # A scale-free noise: the encoder cannot drown it by growing its latents.
                spread = latents.detach().std(dim=(0, 2, 3), keepdim=True) + 1e-4
                output = decode(vae, latents + NOISE * spread * torch.randn_like(latents))
            loss = loss_of(output.float(), pictures)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimiser.step()
            step += 1
            watch.step(step, clock.spent, progress, {"loss": loss.item()})
            if time.monotonic() - saved_at > settings.save_every:
                save()
                saved_at = time.monotonic()
    if not frozen:
        whiten(vae, settings)
        frozen = True
    save()
    report(vae, settings)
    return vae


@torch.no_grad()
def whiten(vae: AutoencoderKL, settings: Settings) -> None:
    """Fold into the 1×1 convolutions a map that gives the latents zero mean and unit covariance.

    The log-variance of the posterior becomes the constant that the training noise stands for.
    """
    size, count = (32, 8) if settings.smoke else (256, 64)
    pictures = stream(ScenePictures(settings.seed, size), 8)
    latents = torch.cat(
        [
            encode(vae, to_unit(next(pictures)[0], settings.device)).float()
            for _ in range(count // 8)
        ]
    )
    flat = latents.transpose(0, 1).flatten(1).double()  # [4, pixels]
    mean = flat.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(torch.cov(flat))
    values = values.clamp_min(1e-6)
    inward = (vectors * values.rsqrt()) @ vectors.T  # symmetric (ZCA): channels keep their meaning
    outward = (vectors * values.sqrt()) @ vectors.T
    quant, post = vae.quant_conv, vae.post_quant_conv
    weight, bias = quant.weight[:4, :, 0, 0].double(), quant.bias[:4].double()
    quant.weight[:4, :, 0, 0] = (inward @ weight).float()
    quant.bias[:4] = (inward @ (bias - mean[:, 0])).float()
    quant.weight[4:] = 0
    quant.bias[4:] = 2 * math.log(NOISE)
    weight = post.weight[:, :, 0, 0].double()
    post.bias += (weight @ mean[:, 0]).float()
    post.weight[:, :, 0, 0] = (weight @ outward).float()


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
    plot_log(settings.work / "vae.csv", settings.work / "vae-loss.png")
    psnr = sum(scores) / len(scores)
    say(f"vae: {psnr:.2f} dB at {size} pixels")
    return psnr
