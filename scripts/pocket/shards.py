"""Gradients of a step from several threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from .settings import Settings


class Shards:
    """Splits a step: on a CPU, each shard is a single-threaded Python thread.

    So there is no barrier inside an operation, and a busy neighbour on one core does not stall the
    other. On a GPU there is one shard.

    Args:
        settings: says how many.
        parameters: what to compute the gradients of.
    """

    def __init__(self, settings: Settings, parameters: list[torch.nn.Parameter]):
        self.parameters = parameters
        self.count = 1 if settings.gpu else settings.shards
        self.pool = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(1,))

    def backward(self, losses_of: Callable[[int], torch.Tensor]) -> list[float]:
        """Leave the mean gradients in `.grad`, None where no shard has one.

        Args:
            losses_of: a shard's losses, a vector whose mean is minimised, given its number from 0.

        Returns:
            The mean of each over the shards.
        """

        def one(shard: int) -> tuple[list[float], tuple[torch.Tensor | None, ...]]:
            # Shards run at once, so none may write to `.grad`.
            losses = losses_of(shard)
            found = torch.autograd.grad(losses.mean(), self.parameters, allow_unused=True)
            return losses.tolist(), found

        losses, found = zip(*self.pool.map(one, range(self.count)), strict=True)
        for parameter, *parts in zip(self.parameters, *found, strict=True):
            some = [part for part in parts if part is not None]
            parameter.grad = sum(some[1:], some[0]) / self.count if some else None
        return [sum(values) / self.count for values in zip(*losses, strict=True)]
