"""Agents against softmax attention at equal size, on the scenes of the pocket world.

The model classifies a scene's layout, its background, and the colour and shape of its two items.
Scenes are numbered, so that all variants are trained on the same ones in the same order, and never
on those they are evaluated on.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from pocket.checkpoints import load, save_atomically
from pocket.scenes import LABEL_CLASSES, labels, render, sample_scene
from torch import Tensor, nn

import agentsd.nn  # noqa: F401  # registers the models
from agentsd.evaluation.intervals import bootstrap

VARIANTS = {"agent": "agent_deit_tiny", "softmax": "deit_tiny_patch16_224"}
PATCH = 8
LABELS = ("layout", "background", "colour_1", "shape_1", "colour_2", "shape_2")
UNSEEN = 10**7  # number of the first scene that models are evaluated on


@dataclass(frozen=True)
class Run:
    """One model and how it is trained.

    Args:
        variant: a key of VARIANTS.
        seed: of the weights.
        side: side of the grid, in patches of 8 x 8 pixels.
        agents: number of agents, a square.
        width: of the tokens; heads are 16 wide.
        depth: blocks.
        steps: batches to train on.
        batch: scenes per batch.
        rate: highest learning rate, after a tenth of the steps; then a cosine.
    """

    variant: str
    seed: int = 0
    side: int = 8
    agents: int = 16
    width: int = 64
    depth: int = 3
    steps: int = 1500
    batch: int = 32
    rate: float = 1e-3


def build(run: Run) -> nn.Module:
    """Make the model, one classifier for all labels."""
    torch.manual_seed(run.seed)
    options = {"agents": run.agents} if run.variant == "agent" else {}
    return timm.create_model(
        VARIANTS[run.variant],
        img_size=PATCH * run.side,
        patch_size=PATCH,
        embed_dim=run.width,
        depth=run.depth,
        num_heads=run.width // 16,
        num_classes=sum(LABEL_CLASSES),
        **options,
    )


def scenes(first: int, count: int, side: int) -> tuple[Tensor, Tensor]:
    """Pictures ``[count, 3, 8·side, 8·side]`` and the labels of each ``[count, 6]``."""
    drawn = [sample_scene(np.random.default_rng(first + i)) for i in range(count)]
    pictures = torch.tensor(np.stack([render(scene, PATCH * side) for scene in drawn]))
    named = torch.tensor([labels(scene) for scene in drawn])
    return pictures.movedim(3, 1).float() / 127.5 - 1, named


def train(run: Run, work: Path, save_every: int = 25) -> nn.Module:
    """Train a model, or resume from its checkpoint."""
    model = build(run)
    optimiser = torch.optim.AdamW(model.parameters(), lr=run.rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, run.rate, total_steps=run.steps, pct_start=0.1, cycle_momentum=False
    )
    path = work / f"{run.variant}-{run.seed}.pt"
    parts = {"model": model, "optimiser": optimiser, "schedule": schedule}
    step = 0
    if saved := load(path, torch.device("cpu")):
        if saved["run"] != asdict(run):
            raise SystemExit(f"error: {path} belongs to another run; give another --work")
        step = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    model.train()
    started = time.monotonic()
    while step < run.steps:
        pictures, named = scenes(step * run.batch, run.batch, run.side)
        logits = model(pictures).split(LABEL_CLASSES, dim=1)
        losses = [F.cross_entropy(x, y) for x, y in zip(logits, named.T, strict=True)]
        loss = torch.stack(losses).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        step += 1
        if step % save_every == 0 or step == run.steps:
            state = {name: part.state_dict() for name, part in parts.items()}
            save_atomically(state | {"step": step, "run": asdict(run)}, path)
            seconds = time.monotonic() - started
            print(f"{path.stem}: {step} steps, loss {loss:.4f}, {seconds:.0f} s", file=sys.stderr)
    return model.eval()


@torch.inference_mode()
def judge(model: nn.Module, run: Run, count: int) -> Tensor:
    """Which labels of unseen scenes are right, ``[count, 6]`` zeros and ones."""
    right = []
    for first in range(0, count, 50):
        pictures, named = scenes(UNSEEN + first, min(50, count - first), run.side)
        logits = model(pictures).split(LABEL_CLASSES, dim=1)
        right.append(torch.stack([x.argmax(1) for x in logits], dim=1) == named)
    return torch.cat(right).double()


def constant(run: Run, count: int) -> Tensor:
    """The result of :func:`judge` for the most frequent label of the training scenes."""
    frequent = scenes(0, 1000, run.side)[1].mode(dim=0).values
    return (scenes(UNSEEN, count, run.side)[1] == frequent).double()


def compare(runs: list[Run], work: Path, count: int) -> list[dict[str, object]]:
    """Train and judge each run: shares of right labels, with 95 % intervals over the scenes."""
    models = [train(run, work) for run in runs]
    rows = [row("constant", constant(runs[0], count))]
    for run, model in zip(runs, models, strict=True):
        parameters = sum(p.numel() for p in model.parameters())
        about = {"seed": run.seed, "parameters": parameters}
        rows.append(row(run.variant, judge(model, run, count)) | about)
    return rows


def row(name: str, right: Tensor) -> dict[str, object]:
    """Accuracy with its lower and upper end: over all labels, and for each."""
    intervals = bootstrap(torch.cat([right.mean(1, keepdim=True), right], dim=1).numpy())
    names = ("all", *LABELS)
    figures = {n: [i.mean, i.low, i.high] for n, i in zip(names, intervals, strict=True)}
    return {"variant": name} | figures
