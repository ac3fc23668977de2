"""How the published models were trained on ImageNet, as arguments of timm's ``train.py``."""

from __future__ import annotations

from dataclasses import dataclass

BASE_BATCH = 512
"""Learning rates are given for this batch size, and scale linearly with it."""


@dataclass(frozen=True)
class Recipe:
    """The settings that differ between models.

    Args:
        drop_path: rate of the last block.
        weight_decay: of AdamW.
        warmup_epochs: epochs of linear warm-up, of the 300.
        warmup_lr: first learning rate, at the base batch.
        min_lr: last learning rate, at the base batch.
        cooldown_epochs: epochs at the last learning rate, after the 300.
        clip_grad: largest norm of the gradient; None for any.
        ema_decay: of the weights' moving average; None for no average.
    """

    drop_path: float
    weight_decay: float = 0.05
    warmup_epochs: int = 20
    warmup_lr: float = 5e-7
    min_lr: float = 5e-6
    cooldown_epochs: int = 0
    clip_grad: float | None = 5.0
    ema_decay: float | None = None


def _pvt(drop_path: float, clip_grad: float | None) -> Recipe:
    return Recipe(drop_path, 0.05, 5, 1e-6, 1e-5, 10, clip_grad)


def _cswin(drop_path: float, weight_decay: float, ema_decay: float) -> Recipe:
    return Recipe(drop_path, weight_decay, 20, 1e-6, 1e-5, 10, None, ema_decay)


RECIPES = {
    "agent_deit_tiny": Recipe(0.0),
    "agent_deit_small": Recipe(0.1),
    "agent_deit_base": Recipe(0.3),
    "agent_pvt_tiny": _pvt(0.1, None),
    "agent_pvt_small": _pvt(0.1, None),
    "agent_pvt_medium": _pvt(0.3, 1.0),
    "agent_pvt_large": _pvt(0.3, 1.0),
    "agent_swin_tiny": Recipe(0.2),
    "agent_swin_small": Recipe(0.3),
    "agent_swin_base": Recipe(0.5),
    "agent_cswin_tiny": _cswin(0.2, 0.05, 0.99984),
    "agent_cswin_small": _cswin(0.4, 0.05, 0.99984),
    "agent_cswin_base": _cswin(0.5, 0.1, 0.99992),
}


def train_arguments(model: str, batch_size: int, processes: int) -> list[str]:
    """Arguments of timm's ``train.py`` for a model of :data:`RECIPES`.

    Args:
        model: its name.
        batch_size: images per process.
        processes: processes that train together.
    """
    recipe = RECIPES[model]
    scale = batch_size * processes / BASE_BATCH
    options: dict[str, object] = {
        "model": model,
        "batch-size": batch_size,
        "opt": "adamw",
        "opt-eps": 1e-8,
        "weight-decay": recipe.weight_decay,
        "sched": "cosine",
        "epochs": 300,
        "lr": 5e-4 * scale,
        "warmup-lr": recipe.warmup_lr * scale,
        "warmup-epochs": recipe.warmup_epochs,
        "min-lr": recipe.min_lr * scale,
        "cooldown-epochs": recipe.cooldown_epochs,
        "drop-path": recipe.drop_path,
        "aa": "rand-m9-mstd0.5-inc1",
        "color-jitter": 0.4,
        "reprob": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "smoothing": 0.1,
        "train-interpolation": "bicubic",
    }
    if recipe.clip_grad is not None:
        options["clip-grad"] = recipe.clip_grad
    if recipe.ema_decay is not None:
        options["model-ema-decay"] = recipe.ema_decay
    flags = ["--sched-on-updates"] + ["--model-ema"] * (recipe.ema_decay is not None)
    return [part for name, value in options.items() for part in (f"--{name}", str(value))] + flags
