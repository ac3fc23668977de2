"""Agents against softmax attention at equal size, on the masks of the pocket world's scenes.

The model says which shape, if any, touches each cell of a grid. Scenes are numbered, so that all
variants see the same ones in the same order, and none of those that they are judged by.
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
from pocket.scenes import SHAPES, render, sample_scene, shape_map
from torch import Tensor, nn

import agentsd.nn  # noqa: F401  # registers the models
from agentsd.evaluation.intervals import bootstrap

VARIANTS = {"agent": "agent_deit_tiny", "softmax": "deit_tiny_patch16_224"}
UNSEEN = 10**7  # number of the first scene that models are judged by


@dataclass(frozen=True)
class Run:
    """One model and how it is trained.

    Args:
        variant: a key of VARIANTS.
        seed: of the weights.
        cells: side of the grid, in cells of 4 x 4 pixels.
        agents: number of agents, a square.
        width: of the tokens; heads are 16 wide.
        depth: blocks.
        steps: batches to train on.
        batch: scenes a batch.
        rate: highest learning rate, after a tenth of the steps; then a cosine.
    """

    variant: str
    seed: int = 0
    cells: int = 16
    agents: int = 16
    width: int = 64
    depth: int = 3
    steps: int = 600
    batch: int = 24
    rate: float = 2e-3


def build(run: Run) -> nn.Module:
    """Make the model, a classifier of every token."""
    torch.manual_seed(run.seed)
    options = {"agents": run.agents} if run.variant == "agent" else {}
    return timm.create_model(
        VARIANTS[run.variant],
        img_size=4 * run.cells,
        patch_size=4,
        embed_dim=run.width,
        depth=run.depth,
        num_heads=run.width // 16,
        num_classes=1 + len(SHAPES),
        global_pool="",
        **options,
    )


def scenes(first: int, count: int, cells: int) -> tuple[Tensor, Tensor]:
    """Pictures ``[count, 3, 4·cells, 4·cells]`` and their cells' classes ``[count, cells²]``."""
    drawn = [sample_scene(np.random.default_rng(first + i)) for i in range(count)]
    pictures = torch.tensor(np.stack([render(scene, 4 * cells) for scene in drawn]))
    maps = torch.tensor(np.stack([shape_map(scene, cells) for scene in drawn]))
    return pictures.movedim(3, 1).float() / 127.5 - 1, maps.flatten(1)


def train(run: Run, work: Path, save_every: int = 25) -> nn.Module:
    """Train a model, or go on with it from its checkpoint."""
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
            raise SystemExit(f"error: {path} is of another run; give another --work")
        step = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    model.train()
    started = time.monotonic()
    while step < run.steps:
        pictures, maps = scenes(step * run.batch, run.batch, run.cells)
        logits = model(pictures)[:, 1:]  # without the class token
        loss = F.cross_entropy(logits.flatten(0, 1), maps.flatten())
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
def judge(model: nn.Module, run: Run, count: int) -> tuple[Tensor, Tensor]:
    """Of unseen scenes, share of cells that are right, and mean intersection over union.

    Returns:
        Two of ``[count]``; the second over the shapes that the scene or the model has.
    """
    shares, unions = [], []
    for first in range(0, count, 50):
        pictures, maps = scenes(UNSEEN + first, min(50, count - first), run.cells)
        found = model(pictures)[:, 1:].argmax(-1)
        shares.append((found == maps).double().mean(1))
        of = [(found == c, maps == c) for c in range(1, 1 + len(SHAPES))]
        both = torch.stack([(a & b).sum(1) for a, b in of], 1).double()
        either = torch.stack([(a | b).sum(1) for a, b in of], 1).double()
        unions.append((both / either).nanmean(1))
    return torch.cat(shares), torch.cat(unions)


def compare(runs: list[Run], work: Path, count: int) -> list[dict[str, object]]:
    """Train and judge each run; figures with 95 % intervals over the scenes."""
    rows = []
    models = [train(run, work) for run in runs]
    for run, model in zip(runs, models, strict=True):
        parameters = sum(p.numel() for p in model.parameters())
        intervals = bootstrap(torch.stack(judge(model, run, count), 1).numpy())
        names = ("cells_right", "mean_iou")
        rows.append(
            {"variant": run.variant, "seed": run.seed, "parameters": parameters}
            | {name: [i.mean, i.low, i.high] for name, i in zip(names, intervals, strict=True)}
        )
    return rows
