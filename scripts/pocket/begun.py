"""The denoiser as far as it came, in the repository: tomorrow's machine has no work folder."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from .checkpoints import Clock, save_atomically
from .unet import Trainer

BEGUN = Path(__file__).with_name("begun.safetensors")


def keep(trainer: Trainer, clock: Clock, file: Path = BEGUN) -> None:
    """Write the averaged weights, as float16, and how many samples they saw.

    The optimisers' state is left out: it would be three times as large, and is found again in a
    hundred steps.
    """
    trainer.average.swap()
    weights = {
        f"{name}.{key}": value.detach().half().contiguous()
        for name, part in trainer.parts.items()
        for key, value in part.state_dict().items()
    }
    trainer.average.swap()
    facts = {"step": trainer.step, "seen": trainer.seen, "spent": round(clock.spent)}
    save_file(weights, file, {name: str(value) for name, value in facts.items()})


def take_up(trainer: Trainer, checkpoint: Path, file: Path = BEGUN) -> None:
    """Write a checkpoint that goes on from kept weights.

    Raises:
        RuntimeError: If they are those of another network.
    """
    with safe_open(file, "pt") as kept:
        facts = {name: int(value) for name, value in kept.metadata().items()}
        weights = {key: kept.get_tensor(key).float() for key in kept.keys()}  # noqa: SIM118
    for name, part in trainer.parts.items():
        own = f"{name}."
        of_part = {k.removeprefix(own): w for k, w in weights.items() if k.startswith(own)}
        part.load_state_dict(of_part)
    trainer.average.restart(facts["step"])
    trainer.step, trainer.seen = facts["step"], facts["seen"]
    save_atomically(trainer.state(Clock(math.inf, facts["spent"])), checkpoint)
