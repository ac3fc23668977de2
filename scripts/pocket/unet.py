"""Stage 3: the denoiser and, from CLIP's text tower on, the text encoder."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from .attention import train_blockwise
from .batches import ScenePictures, stream, to_unit
from .checkpoints import Average, Clock, load, save_atomically
from .clip import WIDTH, tokenize
from .progress import Watch, plot_log, say
from .settings import Settings
from .vae import FACTOR, encode

LEARNING_RATE = 1.2e-3
TEXT_RATE = 0.4  # the text encoder's share of the learning rate
DROPPED = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
DECAY = 0.997
BATCH = {16: 32, 32: 8, 64: 2}  # latent side → samples a shard on a CPU


def build_scheduler() -> DDIMScheduler:
    """Nearly zero terminal SNR, v-prediction, trailing steps."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.03,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,  # means nothing with trailing steps; diffusers warns of any other value
        clip_sample=False,
        set_alpha_to_one=True,
    )


def build_unet(smoke: bool = False) -> UNet2DConditionModel:
    """An untrained denoiser: attention at every level, most of its weights at the small ones."""
    channels = (16, 16, 16, 16) if smoke else (32, 64, 128, 192)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 4,
        up_block_types=("CrossAttnUpBlock2D",) * 4,
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 2, 4, 4),  # diffusers reads these as counts of heads
        norm_num_groups=8,
    )
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    for module in unet.modules():  # residual branches start at nothing
        if type(module).__name__ == "ResnetBlock2D":
            torch.nn.init.zeros_(module.conv2.weight)
            torch.nn.init.zeros_(module.conv2.bias)
    return unet


def build_text_encoder(clip: CLIPModel) -> CLIPTextModel:
    """A text encoder that starts as a copy of CLIP's text tower."""
    text = CLIPTextModel(clip.config.text_config)
    getattr(text, "text_model", text).load_state_dict(clip.text_model.state_dict())
    return text


def shares(progress: float) -> dict[int, float]:
    """How often each latent side is trained on.

    What the words mean is learnt where samples are cheap: 25 of 16² in the time of one of 64².
    The full size then has the second half nearly to itself. With few small samples the model knows
    neither colours nor their binding at any size (tried: 7,000 were far too few).

    Args:
        progress: 0..1.
    """
    if progress < 0.35:
        return {16: 0.97, 32: 0.02, 64: 0.01}
    if progress < 0.50:
        return {16: 0.35, 32: 0.60, 64: 0.05}
    return {16: 0.06, 32: 0.10, 64: 0.84}


def times_at(share: torch.Tensor, side: int) -> torch.Tensor:
    """Quantiles of the training times: uniform, and shifted to more noise at the full size.

    The larger an image, the more noise it takes to hide its layout (Hoogeboom et al. 2023,
    arXiv 2301.11093), so at 64² the layout is learnt at later times than at 16².

    Args:
        share: quantiles in 0..1, any shape.
        side: latent side.

    Returns:
        Times 0..999 of the same shape.
    """
    shift = max(1.0, side / 32)
    return (1000 * shift * share / (1 + (shift - 1) * share)).long().clamp(0, 999)


class Trainer:
    """The parts of a step: which samples, their loss, their gradients.

    On a CPU a step is split into shards, one single-threaded Python thread each: no barrier inside
    an operation, so a busy neighbour on one core does not stall the other.
    """

    def __init__(
        self, settings: Settings, vae: AutoencoderKL, clip: CLIPModel, tokenizer: CLIPTokenizer
    ):
        device = settings.device
        self.settings, self.tokenizer = settings, tokenizer
        self.vae = vae.to(device).eval().requires_grad_(False)
        layout = {"device": device, "memory_format": torch.channels_last}
        self.unet = build_unet(settings.smoke).to(**layout)
        self.text = build_text_encoder(clip).to(device)
        if not settings.gpu:
            train_blockwise(self.unet)
        self.alphas = build_scheduler().alphas_cumprod.to(device)
        self.parameters = [*self.unet.parameters(), *self.text.parameters()]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": list(self.unet.parameters()), "share": 1.0},
                {"params": list(self.text.parameters()), "share": TEXT_RATE},
            ],
            LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01,
        )  # fmt: skip
        self.average = Average(self.parameters, DECAY)
        self.step, self.drawn = 0, None
        self.shards = 1 if settings.gpu else settings.shards
        self.pool = ThreadPoolExecutor(
            self.shards, initializer=torch.set_num_threads, initargs=(1,)
        )
        if not settings.gpu:
            torch.set_num_threads(1)

    def side(self, progress: float) -> int:
        """Draw the latent side of this step; the draw depends on the step's number alone."""
        if self.settings.gpu:
            return 64
        if self.settings.smoke:
            return 16
        odds = shares(progress)
        draw = torch.rand(1, generator=torch.Generator().manual_seed(self.step)).item()
        return next((s for s in (16, 32) if (draw := draw - odds[s]) < 0), 64)

    def batch(self, side: int, shard: int) -> tuple[torch.Tensor, list[str]]:
        """Pictures uint8 [B, 3, 4·side, 4·side] and captions of this step and shard."""
        seed, size = self.settings.seed, side * FACTOR
        if self.settings.gpu:
            if self.drawn is None:
                dataset = ScenePictures(seed, size, self.step * 128)
                self.drawn = stream(dataset, 128, self.settings.workers)
            return next(self.drawn)
        count = 2 if self.settings.smoke else BATCH[side]
        first = (self.step * self.shards + shard) * max(BATCH.values())
        return next(stream(ScenePictures(seed, size, first), count))

    def loss(self, side: int, shard: int) -> torch.Tensor:
        """Mean squared error of the predicted velocity (Salimans & Ho 2022) on one shard."""
        device = self.settings.device
        random = torch.Generator().manual_seed((self.step * self.shards + shard) * 7919 + 1)
        pictures, captions = self.batch(side, shard)
        count = len(captions)
        keep = torch.rand(count, generator=random) >= DROPPED
        captions = [text if kept else "" for text, kept in zip(captions, keep, strict=True)]
        # Stratified times: every batch covers the whole range of noise.
        spread = torch.arange(count) * self.shards + shard + torch.rand(count, generator=random)
        times = times_at(spread / (count * self.shards), side).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                clean = encode(self.vae, to_unit(pictures, device)).float()
            noise = torch.randn(clean.shape, generator=random).to(device)
            signal = self.alphas[times].sqrt()[:, None, None, None]
            sigma = (1 - self.alphas[times]).sqrt()[:, None, None, None]
            noisy = (signal * clean + sigma * noise).contiguous(memory_format=torch.channels_last)
            context = self.text(tokenize(self.tokenizer, captions, device)).last_hidden_state
            predicted = self.unet(noisy, times, context).sample
        return F.mse_loss(predicted.float(), signal * noise - sigma * clean)

    def gradients(self, side: int, shard: int) -> tuple[float, list[torch.Tensor | None]]:
        """One shard's loss and its gradients; shards run at once, so none writes to `.grad`."""
        loss = self.loss(side, shard)
        return loss.item(), list(torch.autograd.grad(loss, self.parameters, allow_unused=True))

    def train_step(self, progress: float) -> tuple[int, float]:
        """Take a step; return its latent side and loss."""
        side = self.side(progress)
        jobs = [self.pool.submit(self.gradients, side, shard) for shard in range(self.shards)]
        results = [job.result() for job in jobs]
        for i, parameter in enumerate(self.parameters):
            parts = [grads[i] for _, grads in results if grads[i] is not None]
            parameter.grad = sum(parts[1:], parts[0]) / self.shards if parts else None
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        rate = LEARNING_RATE * min(1.0, (self.step + 1) / 50) * (1 - progress) ** 0.8 + 1e-6
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["share"]
        self.optimiser.step()
        self.average.update()
        self.step += 1
        return side, sum(loss for loss, _ in results) / self.shards

    def state(self, clock: Clock) -> dict:
        """All that a checkpoint holds; random draws need no state, they go by step numbers."""
        return {
            "unet": self.unet.state_dict(), "text": self.text.state_dict(),
            "optimiser": self.optimiser.state_dict(), "average": self.average.state_dict(),
            "spent": clock.spent, "step": self.step,
        }  # fmt: skip

    def restore(self, saved: dict) -> None:
        """Take up a checkpoint."""
        self.unet.load_state_dict(saved["unet"])
        self.text.load_state_dict(saved["text"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.average.load_state_dict(saved["average"])
        self.step = saved["step"]


def train_unet(
    settings: Settings,
    seconds: float,
    vae: AutoencoderKL,
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
) -> Trainer:
    """Train to the end of the time budget; the returned models hold the averaged weights."""
    torch.manual_seed(settings.seed + 2)
    path = settings.work / "unet.pt"
    trainer = Trainer(settings, vae, clip, tokenizer)
    clock = Clock(seconds)
    saved = load(path, settings.device) if settings.resume else None
    if saved:
        trainer.restore(saved)
        clock = Clock(seconds, saved["spent"])
        say(f"unet: resumed at step {trainer.step}")
    saved_at = time.monotonic()
    every = 1 if settings.smoke else 20
    with Watch("unet", settings.work, resumed=saved is not None, every=every) as watch:
        while clock.tick() < 1 and trainer.step < settings.last_step:
            side, loss = trainer.train_step(clock.progress)
            watch.step(trainer.step, clock.spent, clock.progress, {f"{side}x{side}": loss})
            if time.monotonic() - saved_at > settings.save_every:
                save_atomically(trainer.state(clock), path)
                plot_log(watch.log, settings.work / "unet-loss.png")
                saved_at = time.monotonic()
    save_atomically(trainer.state(clock), path)
    trainer.average.swap()
    return trainer
