"""Stage 2: a small CLIP that judges pictures and lends its text tower to the pipeline."""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from .batches import HardGroups, stream, to_unit
from .checkpoints import Clock, load, rng_state, save_atomically, set_rng_state
from .progress import Watch, say
from .scenes import LABEL_CLASSES, SHAPES
from .settings import Settings
from .tokenizer import MAX_LENGTH, build_tokenizer

SIZE = 64  # pixels; the processor shrinks larger pictures to this
WIDTH = 128
LEARNING_RATE = 1.2e-3


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP: 64 patches, four layers of vision, two of text."""
    tower = {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 3 * WIDTH}
    text = {
        **tower,
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": 96,
    }
    vision = {
        **tower,
        "num_hidden_layers": 4,
        "image_size": SIZE,
        "patch_size": 8,
        "projection_dim": 96,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str], device: torch.device) -> torch.Tensor:
    """Captions → token ids [B, 24], padded with the end token."""
    batch = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return batch.input_ids.to(device)


def embed_pictures(clip: CLIPModel, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, 64, 64] in -1..1 → unit vectors [B, 96]."""
    pooled = clip.vision_model(pixel_values=pictures).pooler_output
    return F.normalize(clip.visual_projection(pooled).float(), dim=-1)


def embed_texts(clip: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """Token ids [B, 24] → unit vectors [B, 96]."""
    pooled = clip.text_model(input_ids=ids).pooler_output
    return F.normalize(clip.text_projection(pooled).float(), dim=-1)


class Readers(torch.nn.Module):
    """Linear readers of what is known of a picture; used in training alone.

    The contrastive loss can be low from colours alone for long. Reading every attribute from the
    very vectors that are compared makes each of them count, and naming the shape in each patch
    teaches edges and corners long before they pay in the comparison.
    """

    def __init__(self, width: int = 96):
        super().__init__()
        self.heads = torch.nn.ModuleList(torch.nn.Linear(width, n) for n in LABEL_CLASSES)
        self.patch = torch.nn.Linear(WIDTH, 1 + len(SHAPES))

    def attributes(self, vectors: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Unit vectors [B, 96] and labels [B, 6] → mean cross-entropy."""
        losses = [
            F.cross_entropy(head(vectors * 10), labels[:, i]) for i, head in enumerate(self.heads)
        ]
        return torch.stack(losses).mean()

    def shapes(self, patches: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Patch tokens [B, 64, 128] and shape numbers [B, 8, 8] → mean cross-entropy."""
        weights = torch.ones(1 + len(SHAPES), device=where.device)
        weights[0] = 0.2  # most patches are background alone
        found = self.patch(patches.float()).flatten(0, 1)
        return F.cross_entropy(found, where.flatten(), weights)


def contrastive(
    pictures: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Symmetric contrastive loss in which samples with the same caption all count as right.

    Args:
        pictures: unit vectors [B, D].
        texts: unit vectors [B, D].
        scale: factor on the cosines.
        ids: token ids [B, T], to find equal captions.
    """
    cosines = scale * pictures @ texts.T  # [B, B]
    same = (ids[:, None] == ids[None]).all(-1)
    right = cosines.masked_fill(~same, -math.inf)
    rows = cosines.logsumexp(1) - right.logsumexp(1)
    columns = cosines.logsumexp(0) - right.logsumexp(0)
    return (rows.mean() + columns.mean()) / 2


def _roughen(pictures: torch.Tensor, step: int) -> torch.Tensor:
    """Blur and noise of random strength: the judge must stand what a decoder leaves behind."""
    if step % 2:
        soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
        pictures = torch.lerp(
            pictures, soft, torch.rand(len(pictures), 1, 1, 1, device=pictures.device)
        )
    strength = 0.15 * torch.rand(len(pictures), 1, 1, 1, device=pictures.device) ** 2
    return pictures + strength * torch.randn_like(pictures)


def train_clip(settings: Settings, seconds: float) -> CLIPModel:
    """Train to the end of the time budget, from a checkpoint if there is one."""
    torch.manual_seed(settings.seed + 1)
    path, device = settings.work / "clip.pt", settings.device
    tokenizer = build_tokenizer(settings.work / "tokenizer")
    clip, readers = build_clip(tokenizer).to(device), Readers().to(device)
    parameters = [*clip.parameters(), *readers.parameters()]
    optimiser = torch.optim.AdamW(parameters, LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    clock, step = Clock(seconds), 0
    saved = load(path, device) if settings.resume else None
    if saved:
        clip.load_state_dict(saved["model"])
        readers.load_state_dict(saved["readers"])
        optimiser.load_state_dict(saved["optimiser"])
        set_rng_state(saved["rng"], device)
        clock, step = Clock(seconds, saved["spent"]), saved["step"]
        say(f"clip: resumed at step {step}")

    def save() -> None:
        save_atomically(
            {
                "model": clip.state_dict(), "readers": readers.state_dict(),
                "optimiser": optimiser.state_dict(), "rng": rng_state(device),
                "spent": clock.spent, "step": step,
            },
            path,
        )  # fmt: skip

    groups = 2 if settings.smoke else 256 if settings.gpu else 32
    saved_at = time.monotonic()
    batches = stream(HardGroups(settings.seed, SIZE, step * groups), groups, settings.workers)
    watch = Watch(
        "clip", settings.work, resumed=saved is not None, every=1 if settings.smoke else 20
    )
    with watch:
        while clock.tick() < 1 and step < settings.last_step:
            progress = clock.progress
            for group in optimiser.param_groups:
                warm = min(1.0, (step + 1) / 60)
                group["lr"] = LEARNING_RATE * warm * (1 - progress) ** 0.8 + 1e-6
            pictures, captions, labels, where = next(batches)
            pictures = _roughen(to_unit(pictures.flatten(0, 1), device), step)
            # The loader collates the groups' captions by place: four lists of one a group.
            captions = [text for group in zip(*captions, strict=True) for text in group]
            ids, labels = tokenize(tokenizer, captions, device), labels.flatten(0, 1).to(device)
            where = where.flatten(0, 1).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                vision = clip.vision_model(pixel_values=pictures)
                seen = F.normalize(clip.visual_projection(vision.pooler_output).float(), dim=-1)
                read = embed_texts(clip, ids)
            scale = clip.logit_scale.exp().clamp(max=100)
            pull = (1 - (seen * read).sum(-1)).mean()
            match = contrastive(seen, read, scale, ids)
            attributes = readers.attributes(seen, labels) + readers.attributes(read, labels)
            shapes = readers.shapes(vision.last_hidden_state[:, 1:], where)
            loss = match + 0.5 * attributes + shapes + pull
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            step += 1
            losses = {"match": match, "attributes": attributes, "shapes": shapes}
            losses["one minus cosine"] = pull
            figures = {name: value.item() for name, value in losses.items()}
            watch.step(step, clock.spent, progress, figures)
            if time.monotonic() - saved_at > settings.save_every:
                save()
                saved_at = time.monotonic()
    save()
    return clip.eval()
