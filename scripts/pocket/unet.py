"""Stage 3: the denoiser and, from CLIP's text tower on, the text encoder."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from .attention import train_blockwise
from .batches import ScenePictures, stream, to_unit
from .checkpoints import Average, Clock, load, save_atomically
from .clip import WIDTH, tokenize
from .inner import inner_levels, pass_inwards, pool
from .progress import Watch, say
from .settings import Settings
from .shards import Shards
from .vae import latents_of

LEARNING_RATE = 1.2e-3
TEXT_RATE = 0.4  # the text encoder's share of the learning rate
DROPPED = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
DECAY = 0.997
BATCH = {2: 32, 1: 12, 0: 2}  # level → samples a shard on a CPU; steps take about the same time


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
    """How often each level is trained on: 2 is all but the two outer levels of the denoiser.

    What the words mean and where things go is learnt where samples are cheap: 15 of level 2 in the
    time of one of the whole. The whole then has the last third nearly to itself.

    Args:
        progress: 0..1.
    """
    if progress < 0.4:
        return {2: 0.96, 1: 0.02, 0: 0.02}
    if progress < 0.62:
        return {2: 0.25, 1: 0.70, 0: 0.05}
    return {2: 0.06, 1: 0.12, 0: 0.82}


def times_at(share: torch.Tensor, level: int) -> torch.Tensor:
    """Quantiles of the training times: uniform for the whole, shifted to more noise inwards.

    Pooling takes noise away, so the inner levels are needed at later times (Hoogeboom et al. 2023,
    arXiv 2301.11093). What the whole has to learn after them is fine detail, at little noise.

    Args:
        share: quantiles in 0..1, any shape.
        level: levels left out, 0 for the whole denoiser.

    Returns:
        Times 0..999 of the same shape.
    """
    shift = 1.0 + 1.5 * level
    return (1000 * shift * share / (1 + (shift - 1) * share)).long().clamp(0, 999)


class Trainer:
    """The parts of a step: which samples, their loss, their gradients."""

    def __init__(
        self,
        settings: Settings,
        clip: CLIPModel,
        tokenizer: CLIPTokenizer,
    ):
        device = settings.device
        self.settings, self.tokenizer = settings, tokenizer
        layout = {"device": device, "memory_format": torch.channels_last}
        unet = build_unet(settings.smoke)
        pass_inwards(unet)
        self.levels = torch.nn.ModuleList([unet, *(inner_levels(unet, n) for n in (1, 2))])
        self.levels.to(**layout)
        self.text = build_text_encoder(clip).to(device)
        if not settings.gpu:
            for level in self.levels:
                train_blockwise(level)
        self.alphas = build_scheduler().alphas_cumprod.to(device)
        self.parameters = [*self.levels.parameters(), *self.text.parameters()]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": list(self.levels.parameters()), "share": 1.0},
                {"params": list(self.text.parameters()), "share": TEXT_RATE},
            ],
            LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01,
        )  # fmt: skip
        self.average = Average(self.parameters, DECAY)
        self.step, self.drawn = 0, None
        self.shards = Shards(settings, self.parameters)
        if not settings.gpu:
            torch.set_num_threads(1)

    def level(self, progress: float) -> int:
        """Draw the level of this step; the draw depends on the step's number alone."""
        if self.settings.gpu:
            return 0
        odds = shares(progress)
        draw = torch.rand(1, generator=torch.Generator().manual_seed(self.step)).item()
        return next((n for n in (2, 1) if (draw := draw - odds[n]) < 0), 0)

    def batch(self, level: int, shard: int) -> tuple[torch.Tensor, list[str]]:
        """Pictures uint8 [B, 3, H, W] and captions of this step and shard."""
        seed, size = self.settings.seed, 64 if self.settings.smoke else 256
        if self.settings.gpu:
            if self.drawn is None:
                dataset = ScenePictures(seed, size, self.step * 128)
                self.drawn = stream(dataset, 128, self.settings.workers)
            return next(self.drawn)
        count = 2 if self.settings.smoke else BATCH[level]
        first = (self.step * self.shards.count + shard) * max(BATCH.values())
        return next(stream(ScenePictures(seed, size, first), count))

    def loss(self, level: int, shard: int) -> torch.Tensor:
        """Mean squared error of the predicted velocity (Salimans & Ho 2022) on one shard."""
        device = self.settings.device
        random = torch.Generator().manual_seed((self.step * self.shards.count + shard) * 7919 + 1)
        pictures, captions = self.batch(level, shard)
        count = len(captions)
        keep = torch.rand(count, generator=random) >= DROPPED
        captions = [text if kept else "" for text, kept in zip(captions, keep, strict=True)]
        # Stratified times: every batch covers the whole range of noise.
        spread = (
            torch.arange(count) * self.shards.count + shard + torch.rand(count, generator=random)
        )
        times = times_at(spread / (count * self.shards.count), level).to(device)
        clean = latents_of(to_unit(pictures, device))
        noise = torch.randn(clean.shape, generator=random).to(device)
        clean, noise = pool(clean, level), pool(noise, level)
        signal = self.alphas[times].sqrt()[:, None, None, None]
        sigma = (1 - self.alphas[times]).sqrt()[:, None, None, None]
        # Not channels-last, as the weights are: on CPUs PyTorch 2.13 then dies in the backward of
        # a 1×1 convolution whose input needs no gradient, which the inner levels begin with.
        noisy = (signal * clean + sigma * noise).contiguous()
        with torch.autocast(device.type, torch.bfloat16):
            context = self.text(tokenize(self.tokenizer, captions, device)).last_hidden_state
            predicted = self.levels[level](noisy, times, context).sample
        return F.mse_loss(predicted.float(), signal * noise - sigma * clean)

    def train_step(self, progress: float) -> tuple[int, float]:
        """Take a step; return its level and loss."""
        level = self.level(progress)
        loss = self.shards.backward(lambda shard: self.loss(level, shard))
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        rate = LEARNING_RATE * min(1.0, (self.step + 1) / 50) * (1 - progress) ** 0.8 + 1e-6
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["share"]
        self.optimiser.step()
        self.average.update()
        self.step += 1
        return level, loss

    @torch.no_grad()
    def sample(self, level: int, captions: list[str], steps: int, guidance: float) -> torch.Tensor:
        """Latents [B, 4, 64 >> level, 64 >> level] of the averaged weights; seed 0."""
        device, side = self.settings.device, (16 if self.settings.smoke else 64) >> level
        scheduler = build_scheduler()
        scheduler.set_timesteps(steps)
        random = torch.Generator().manual_seed(0)
        noise = torch.randn((len(captions), 4, side << level, side << level), generator=random)
        sample = pool(noise, level).to(device)
        self.average.swap()
        with torch.autocast(device.type, torch.bfloat16):
            ids = tokenize(self.tokenizer, [*captions, *[""] * len(captions)], device)
            context = self.text(ids).last_hidden_state
            for t in scheduler.timesteps:
                both = torch.cat([sample, sample])
                wanted, plain = self.levels[level](both, t, context).sample.float().chunk(2)
                guided = plain + guidance * (wanted - plain)
                sample = scheduler.step(guided, t, sample).prev_sample
        self.average.swap()
        return sample

    def state(self, clock: Clock) -> dict:
        """All that a checkpoint holds; random draws need no state, they go by step numbers."""
        return {
            "levels": self.levels.state_dict(), "text": self.text.state_dict(),
            "optimiser": self.optimiser.state_dict(), "average": self.average.state_dict(),
            "spent": clock.spent, "step": self.step,
        }  # fmt: skip

    def restore(self, saved: dict) -> None:
        """Take up a checkpoint."""
        self.levels.load_state_dict(saved["levels"])
        self.text.load_state_dict(saved["text"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.average.load_state_dict(saved["average"])
        self.step = saved["step"]


def train_unet(
    settings: Settings,
    seconds: float,
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    preview: Callable[[Trainer, Clock], None],
) -> None:
    """Train to the end of the time budget, with a preview every tenth of it and at the end."""
    torch.manual_seed(settings.seed + 2)
    path = settings.work / "unet.pt"
    trainer = Trainer(settings, clip, tokenizer)
    clock = Clock(seconds)
    saved = load(path, settings.device) if settings.resume else None
    if saved:
        trainer.restore(saved)
        clock = Clock(seconds, saved["spent"])
        say(f"unet: resumed at step {trainer.step}")
    saved_at, shown = time.monotonic(), int(10 * clock.progress)
    every = 1 if settings.smoke else 20
    with Watch("unet", settings.work, resumed=saved is not None, every=every) as watch:
        while clock.tick() < 1 and trainer.step < settings.last_step:
            level, loss = trainer.train_step(clock.progress)
            watch.step(trainer.step, clock.spent, clock.progress, {f"level {level}": loss})
            if time.monotonic() - saved_at > settings.save_every:
                save_atomically(trainer.state(clock), path)
                saved_at = time.monotonic()
            if int(10 * clock.progress) > shown:
                shown = int(10 * clock.progress)
                preview(trainer, clock)
                clock.rest()
    save_atomically(trainer.state(clock), path)
    preview(trainer, clock)
