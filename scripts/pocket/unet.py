"""Stage 3: the denoiser and the text encoder, which starts from CLIP's text tower."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch.utils.data import DataLoader
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from .attention import train_blockwise
from .batches import KINDS, Batches, to_unit
from .checkpoints import Average, Clock, load, save_atomically
from .clip import WIDTH, tokenize
from .optimisers import build_optimisers
from .progress import Watch, say
from .scenes import SHAPES
from .settings import Settings
from .shards import Shards
from .tokenizer import CLOSE_UP
from .vae import latents_of

DROPPED = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
DECAY = 0.999
SHAPES_WEIGHT = 0.25  # of the probe's cross-entropy, relative to the v-prediction loss
LAST_STRETCH = 0.9  # progress after which all pictures are whole and the learning rates decay


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
    """An untrained denoiser: attention over 64², 32² and 16² tokens, most weights at the last.

    One head of 32 channels at the top, where a second would cost a third of the training's speed.
    """
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(16, 16, 16) if smoke else (32, 96, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=WIDTH,
        attention_head_dim=(1, 2, 4) if smoke else (1, 3, 6),  # diffusers reads counts of heads
        norm_num_groups=8,
    )
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    for module in unet.modules():  # residual branches start at zero
        if type(module).__name__ == "ResnetBlock2D":
            torch.nn.init.zeros_(module.conv2.weight)
            torch.nn.init.zeros_(module.conv2.bias)
    return unet


def build_text_encoder(clip: CLIPModel) -> CLIPTextModel:
    """A text encoder that starts as a copy of CLIP's text tower."""
    text = CLIPTextModel(clip.config.text_config)
    getattr(text, "text_model", text).load_state_dict(clip.text_model.state_dict())
    return text


def batch_of(progress: float, settings: Settings) -> dict[str, int]:
    """Samples of each kind in a step of one shard.

    On a CPU, a close-up costs a sixth of a whole picture and teaches as much about shapes; only
    whole pictures teach the layout. Each kind takes half of the time until the final phase.

    Args:
        progress: 0..1.
        settings: of the run.
    """
    whole = 1 if settings.smoke else 64 if settings.gpu else 2
    if progress >= LAST_STRETCH:
        return {"close-up": 0, "whole": 2 * whole}
    return {"close-up": (2 if settings.smoke else 6 * whole), "whole": whole}


def rate_at(progress: float, step: int) -> float:
    """Factor of the learning rates: a short warm-up, constant, decaying in the final phase.

    Constant, so that a run can be extended at any time before its final phase.
    """
    rise = min(1.0, (step + 1) / 100)
    return rise * min(1.0, max(0.0, 1 - progress) / (1 - LAST_STRETCH)) ** 0.8


def times_at(share: torch.Tensor, kind: str, progress: float) -> torch.Tensor:
    """Quantiles of the training timesteps: uniform, but shifted to more noise for whole pictures.

    The layout is decided at high noise (Hoogeboom et al. 2023, arXiv 2301.11093), and only whole
    pictures can teach it; the details at low noise are learnt from close-ups.

    Args:
        share: quantiles in 0..1, any shape.
        kind: one of KINDS.
        progress: 0..1; in the final phase, which has no close-ups, there is no shift.

    Returns:
        Times 0..999 of the same shape.
    """
    shift = 2.5 if kind == "whole" and progress < LAST_STRETCH else 1.0
    return (1000 * shift * share / (1 + (shift - 1) * share)).long().clamp(0, 999)


class ShapeReader(torch.nn.Linear):
    """Predicts the shape map from the middle of the denoiser; discarded after training.

    The v-prediction loss hardly depends on the kind of shape: a blob in the right place is nearly
    as good. Predicting the known shape inside the network binds it to the caption sooner (compare
    Yu et al. 2024, arXiv 2410.06940, who predict the features of another network).
    """

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__(unet.config.block_out_channels[-1], 1 + len(SHAPES))
        self.inside = threading.local()  # shards run at once
        unet.mid_block.register_forward_hook(self._keep)

    def _keep(self, _: torch.nn.Module, __: tuple, features: torch.Tensor) -> None:
        self.inside.features = features

    def loss(self, maps: torch.Tensor) -> torch.Tensor:
        """Cross-entropy for the batch that this thread's denoiser saw last, with its maps."""
        read = self(self.inside.features.float().permute(0, 2, 3, 1))
        return F.cross_entropy(read.flatten(0, 2), maps.to(read.device).flatten())


class Trainer:
    """The parts of a step: which samples, their loss, their gradients.

    Args:
        settings: of the run.
        clip: initialises the text encoder.
        tokenizer: of the captions.
        samples: of the whole run; close-ups count as much as whole pictures.
    """

    def __init__(self, settings: Settings, clip: CLIPModel, tokenizer: CLIPTokenizer, samples: int):
        device = settings.device
        self.settings, self.tokenizer, self.samples = settings, tokenizer, samples
        self.unet = build_unet(settings.smoke).to(device)
        self.text = build_text_encoder(clip).to(device)
        if not settings.gpu:
            train_blockwise(self.unet)
        self.alphas = build_scheduler().alphas_cumprod.to(device)
        self.reader = ShapeReader(self.unet).to(device)
        self.parts = {"unet": self.unet, "text": self.text, "reader": self.reader}
        self.parameters = [p for part in self.parts.values() for p in part.parameters()]
        self.optimisers = build_optimisers(*self.parts.values())
        self.average = Average(self.parameters, DECAY)
        self.step, self.seen = 0, 0
        self.drawn: tuple[dict[str, int], Iterator] | None = None
        self.shards = Shards(settings, self.parameters)
        if not settings.gpu:
            torch.set_num_threads(1)

    @property
    def progress(self) -> float:
        """Share of the samples seen, 0..1."""
        return min(1.0, self.seen / self.samples)

    def batches(self, shard: int, counts: dict[str, int]) -> list:
        """This step's pictures of a shard; see `Batches`. A GPU has workers that draw ahead."""
        if not self.settings.workers:
            return Batches(self.settings, counts, self.seen)[shard]
        if self.drawn is None or self.drawn[0] != counts:
            ahead = Batches(self.settings, counts, self.seen)
            loader = DataLoader(ahead, None, num_workers=self.settings.workers, pin_memory=True)
            self.drawn = counts, iter(loader)
        return next(self.drawn[1])

    def loss(self, shard: int) -> torch.Tensor:
        """The v-prediction loss (Salimans & Ho 2022) of each kind, then the probe's loss."""
        counts = batch_of(self.progress, self.settings)
        random = torch.Generator().manual_seed(self.seen * 7919 + shard)
        losses, read = [], []
        for kind, pictures, captions, maps in self.batches(shard, counts):
            empty = CLOSE_UP if kind == "close-up" else ""
            keep = torch.rand(len(captions), generator=random) >= DROPPED
            captions = [c if k else empty for c, k in zip(captions, keep, strict=True)]
            losses.append(self.velocity_error(kind, pictures, captions, random))
            read.append(self.reader.loss(maps))
        return torch.stack([*losses, SHAPES_WEIGHT * torch.stack(read).mean()])

    def velocity_error(
        self, kind: str, pictures: torch.Tensor, captions: list[str], random: torch.Generator
    ) -> torch.Tensor:
        """Mean squared error of the predicted velocity on a batch of one kind."""
        device, count = self.settings.device, len(captions)
        # Stratified times: every batch covers the whole range of noise.
        spread = (torch.arange(count) + torch.rand(count, generator=random)) / count
        times = times_at(spread, kind, self.progress).to(device)
        clean = latents_of(to_unit(pictures, device)).contiguous()
        noise = torch.randn(clean.shape, generator=random).to(device)
        signal = self.alphas[times].sqrt()[:, None, None, None]
        sigma = (1 - self.alphas[times]).sqrt()[:, None, None, None]
        with torch.autocast(device.type, torch.bfloat16):
            context = self.text(tokenize(self.tokenizer, captions, device)).last_hidden_state
            predicted = self.unet(signal * clean + sigma * noise, times, context).sample
        return F.mse_loss(predicted.float(), signal * noise - sigma * clean)

    def train_step(self) -> dict[str, float]:
        """Take a step; return the loss of each kind."""
        counts = batch_of(self.progress, self.settings)
        losses = self.shards.backward(self.loss)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * rate_at(self.progress, self.step)
            optimiser.step()
        self.average.update()
        self.step += 1
        self.seen += sum(counts.values()) * self.shards.count
        return dict(zip((*(k for k in KINDS if counts[k]), "shapes"), losses, strict=True))

    @torch.no_grad()
    def sample(self, captions: list[str], side: int, steps: int, guidance: float) -> torch.Tensor:
        """Latents [B, 4, side, side] of the averaged weights; seed 0."""
        device = self.settings.device
        scheduler = build_scheduler()
        scheduler.set_timesteps(steps)
        random = torch.Generator().manual_seed(0)
        sample = torch.randn((len(captions), 4, side, side), generator=random).to(device)
        empty = [CLOSE_UP if text.startswith(CLOSE_UP) else "" for text in captions]
        self.average.swap()
        with torch.autocast(device.type, torch.bfloat16):
            ids = tokenize(self.tokenizer, [*captions, *empty], device)
            context = self.text(ids).last_hidden_state
            for t in scheduler.timesteps:
                both = torch.cat([sample, sample])
                wanted, plain = self.unet(both, t, context).sample.float().chunk(2)
                guided = plain + guidance * (wanted - plain)
                sample = scheduler.step(guided, t, sample).prev_sample
        self.average.swap()
        return sample

    def state(self, clock: Clock) -> dict:
        """The state for a checkpoint; random draws need none, since samples are numbered."""
        return {
            **{name: part.state_dict() for name, part in self.parts.items()},
            "optimisers": [o.state_dict() for o in self.optimisers],
            "average": self.average.state_dict(),
            "spent": clock.spent, "step": self.step, "seen": self.seen,
        }  # fmt: skip

    def restore(self, saved: dict) -> None:
        """Restore from a checkpoint."""
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        for optimiser, state in zip(self.optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.average.load_state_dict(saved["average"])
        self.step, self.seen = saved["step"], saved["seen"]


def train_unet(
    settings: Settings,
    samples: int,
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    preview: Callable[[Trainer, Clock], None],
) -> None:
    """Train on a number of samples, with a preview every `settings.preview_every`."""
    torch.manual_seed(settings.seed + 2)
    path = settings.work / "unet.pt"
    trainer, clock = Trainer(settings, clip, tokenizer, samples), Clock(math.inf)
    saved = load(path, settings.device) if settings.resume else None
    if saved:
        trainer.restore(saved)
        clock = Clock(math.inf, saved["spent"])
        say(f"unet: resumed at step {trainer.step}, {trainer.seen} samples")
    saved_at, shown = time.monotonic(), trainer.seen // settings.preview_every
    every = 1 if settings.smoke else 20
    with Watch("unet", settings.work, resumed=saved is not None, every=every) as watch:
        while trainer.progress < 1 and trainer.step < settings.last_step:
            losses = trainer.train_step()
            clock.tick()
            watch.step(trainer.step, clock.spent, trainer.progress, losses)
            if time.monotonic() - saved_at > settings.save_every:
                save_atomically(trainer.state(clock), path)
                saved_at = time.monotonic()
            if trainer.seen // settings.preview_every > shown:
                shown = trainer.seen // settings.preview_every
                preview(trainer, clock)
                clock.rest()
    save_atomically(trainer.state(clock), path)
    preview(trainer, clock)
