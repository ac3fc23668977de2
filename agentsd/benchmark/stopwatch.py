"""Call a UNet at consecutive steps of a run, and measure its time and memory."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import psutil
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from ..attributes import replaced_attribute
from ..methods import merge as merging
from ..models.devices import wait_for
from ..patching.layers import top_attention_layers
from .cases import Case
from .launches import LaunchCounter

STEPS = 64
"""Denoising steps of the run whose calls are timed."""


class Times(NamedTuple):
    """Seconds of a call and of its parts."""

    total: float
    attention: float
    merging: float


def inputs_of(
    unet: UNet2DConditionModel,
    batch: int,
    height: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Latents, text and further arguments of a UNet's call, the same at each time."""
    random = torch.Generator().manual_seed(0)
    config = unet.config
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    sample = torch.randn((batch, config.in_channels, height, width), generator=random).to(**like)
    text = torch.randn((batch, 77, config.cross_attention_dim), generator=random).to(**like)
    if config.addition_embed_type != "text_time":
        return sample, text, {}
    times = 6 * config.addition_time_embed_dim
    pooled = config.projection_class_embeddings_input_dim - times
    more = {
        "text_embeds": torch.randn((batch, pooled), generator=random).to(**like),
        "time_ids": torch.zeros((batch, 6), **like),
    }
    return sample, text, {"added_cond_kwargs": more}


class Stopwatch:
    """Calls a UNet at consecutive steps of a run and measures how long it takes."""

    def __init__(self, unet: UNet2DConditionModel, case: Case):
        self.unet, self.case = unet, case
        self.device = torch.device(case.device)
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(STEPS, device=self.device)
        self.timesteps = scheduler.timesteps
        dtype = getattr(torch, case.dtype)
        self.sample, self.text, self.extra = inputs_of(
            unet, case.batch, case.height, case.width, self.device, dtype
        )
        # Found before anything is patched: a baseline's processor is not recognised as attention.
        self.watched = [layer.module for layer in top_attention_layers(unet)]
        self.attention = self.merging = 0.0

    def call(self, step: int) -> Tensor:
        """The UNet's output at a step of the run."""
        with torch.inference_mode():
            out = self.unet(self.sample, self.timesteps[step], self.text, **self.extra).sample
        self._wait()
        return out  # type: ignore[no-any-return]

    def time(self, calls: int) -> Times:
        """Mean seconds of ``calls`` consecutive calls, and of their parts."""
        self.attention = self.merging = 0.0
        if self.case.compiled:
            self._run(calls)  # some baselines cause a recompilation whenever they are applied
            total = self._run(calls)
        elif self.device.type == "cpu":
            with self._parts_timed():
                total = self._run(calls)
        else:  # timing the parts waits for the device at each, which slows the whole
            total = self._run(calls)
            with self._parts_timed():
                self._run(calls)
        return Times(total / calls, self.attention / calls, self.merging / calls)

    def _run(self, calls: int) -> float:
        begun = time.perf_counter()
        for step in range(calls):
            self.call(step)
        return time.perf_counter() - begun

    @contextmanager
    def _parts_timed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self.watched:
                for hook in self._watch(module):
                    stack.callback(hook.remove)
            for name in ("match", "owners", "merge", "unmerge"):
                stack.enter_context(self._timed(name))
            yield

    def _watch(self, module: Any) -> list[Any]:
        begun = [0.0]

        def before(*_: Any) -> None:
            self._wait()
            begun[0] = time.perf_counter()

        def after(*_: Any) -> None:
            self._wait()
            self.attention += time.perf_counter() - begun[0]

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Time a function that merging calls."""
        function = getattr(merging, name)

        def timed(*args: Any) -> Any:
            self._wait()
            begun = time.perf_counter()
            out = function(*args)
            self._wait()
            self.merging += time.perf_counter() - begun
            return out

        with replaced_attribute(merging, name, timed):
            yield

    def _wait(self) -> None:
        wait_for(self.device)

    def launches(self) -> int | None:
        """Operations that a call launches; ``None`` if compiled. Call :meth:`peak` first."""
        if self.case.compiled:
            return None
        with LaunchCounter() as counter:
            self.call(0)  # the token choice of this step is cached since peak()
        return int(counter.total)

    def peak(self) -> tuple[float, Tensor]:
        """Peak memory of a call in MiB above what was held before it, and the call's output."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            held = torch.cuda.memory_allocated(self.device)
            out = self.call(0)
            return (torch.cuda.max_memory_allocated(self.device) - held) / 2**20, out
        process, done = psutil.Process(os.getpid()), threading.Event()
        held = most = process.memory_info().rss

        def poll() -> None:
            nonlocal most
            while not done.wait(0.002):
                most = max(most, process.memory_info().rss)

        thread = threading.Thread(target=poll)
        thread.start()
        try:
            out = self.call(0)
        finally:
            done.set()
            thread.join()
        return (most - held) / 2**20, out
