"""Whole UNets on a device that is not the CPU, without such a device.

PyTorch's place for backends of other makers gets one that has tensors without values: an operation
on tensors of two devices is an error, and so is anything that waits for a value. That holds for the
whole process, so that tests run this as a script, which prints its findings as JSON:

    python tests/stand_in_device.py             # what the tests look at
    python tests/stand_in_device.py --table     # operations a call of SD 1.5 and SDXL, for the docs
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from scheduler_cases import SCHEDULERS, scheduler
from tiny_models import patched_layers, sdxl_unet, smallest_unet, tiny_unet
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import backend_registration

from agentsd import Schedule, patched
from agentsd.benchmark.launches import LaunchCounter
from agentsd.benchmark.stopwatch import inputs_of
from agentsd.methods.keys import Keys
from agentsd.models.architectures import ARCHITECTURES
from agentsd.patching import processor, runtime
from agentsd.patching.forecasts import whole_steps

DEVICE = torch.device("privateuseone", 0)
STEPS = 3
"""Enough for each kind of step of each preset."""

METHODS: dict[str, dict[str, Any]] = {
    "keys, grid": {"method": "keys", "select": "grid"},
    "keys, random": {"method": "keys", "select": "random"},
    "agent": {"method": "agent", "sx": 4, "sy": 4, "ratio": 0.4, "agent_ratio": 0.95},
    "agent, few merged": {"method": "agent", "sx": 4, "sy": 4, "ratio": 0.2, "agent_ratio": 0.7},
    "merge": {"method": "merge"},
    "merge, whole block": {"method": "merge", "merge_crossattn": True, "merge_mlp": True},
    "fp32": {"method": "keys", "attn_precision": "fp32"},
    "full": {"method": "full"},
}


@contextmanager
def stand_in() -> Iterator[None]:
    """The device, with a fused attention as real ones have."""
    backend_registration._setup_privateuseone_for_python_backend()

    def attention(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        fused = torch.ops.aten._scaled_dot_product_flash_attention
        return fused(query, key, value, scale=settings.get("scale"))[0]

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        # A parameter without values has a type of its own.
        stack.enter_context(
            mock.patch.object(processor, "_is_plain", lambda module: type(module) is nn.Linear)
        )
        least = dict.fromkeys(runtime.MIN_TOKENS, 0)
        stack.enter_context(mock.patch.object(runtime, "MIN_TOKENS", least))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.no_grad())
        yield


def on_device(make: Callable[[], UNet2DConditionModel]) -> UNet2DConditionModel:
    with DEVICE:
        return make().eval()


@dataclass
class Pipeline:
    """As much of a pipeline as the patch looks at."""

    unet: UNet2DConditionModel
    scheduler: Any


class Calls:
    """Calls a UNet at the steps of a scheduler whose timesteps are on the device."""

    def __init__(
        self, unet: UNet2DConditionModel, name: str = "DDIM", side: int = 16, steps: int = STEPS
    ) -> None:
        self.steps = steps
        with unset_fake_temporarily():  # schedulers compute their lists with NumPy
            self.pipe = Pipeline(unet, scheduler(name))
            self.pipe.scheduler.set_timesteps(steps)
        count = len(self.pipe.scheduler.timesteps)
        self.pipe.scheduler.timesteps = torch.empty(count, device=DEVICE)
        self.timesteps = list(self.pipe.scheduler.timesteps)
        self.inputs = inputs_of(unet, 2, side, side, DEVICE, torch.float32)

    def __call__(self, place: int) -> None:
        sample, text, more = self.inputs
        self.pipe.unet(sample, self.timesteps[place], text, **more)

    def all(self) -> None:
        for place in range(len(self.timesteps)):
            self(place)


def schedules() -> dict[str, Schedule]:
    read = {name: Schedule.load(name) for name in Schedule.presets()}
    read |= {name: Schedule(phases=[phase]) for name, phase in METHODS.items()}
    return {name: s.override(cache_min_steps=0) if s.has_cache else s for name, s in read.items()}


def raised(action: Callable[[], object]) -> str | None:
    """The name of the error that an action ends with; None without one."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def runs() -> dict[str, str | None]:
    """Runs of three phases under every scheduler."""
    found: dict[str, str | None] = {}
    unet = on_device(smallest_unet)
    phases = [
        {"until_step": 2, **METHODS["agent"]},
        {"until": 0.5, "method": "merge"},
        {"method": "keys", "cache": {"interval": 2, "min_steps": 0}},
    ]
    for name in SCHEDULERS:
        calls = Calls(unet, name, steps=5)
        with patched(calls.pipe, Schedule(phases=phases)):
            found[name] = raised(calls.all)
    as_with_lora = mock.patch.object(processor, "_is_plain", return_value=False)
    with as_with_lora, patched(unet, method="keys"):
        found["keys beside LoRA"] = raised(Calls(unet).all)
    return found


def controls() -> dict[str, str | None]:
    """Two faults that must be found."""
    found = {}
    calls = Calls(on_device(smallest_unet))
    right = Keys.choose

    def waits(self: Keys, *args: Any) -> Tensor:
        chosen = right(self, *args)
        return chosen + int(chosen.max().item())

    def left_behind(self: Keys, draw: Any, *args: Any) -> Tensor:
        return right(self, draw._replace(device="cpu"), *args)

    for name, wrong in (("a wait", waits), ("a tensor left on the CPU", left_behind)):
        with mock.patch.object(Keys, "choose", wrong), patched(calls.pipe, method="keys"):
            found[name] = raised(calls.all)
    return found


def operations(calls: Calls, schedule: Schedule) -> dict[str, dict[str, float]]:
    """Operations of each kind of call of a second image, beside those of an unpatched call."""
    with LaunchCounter() as unpatched:
        calls(0)
    found: dict[str, dict[str, float]] = {}
    follow, hook = runtime.Runtime.follow, LaunchCounter()

    def counted(*args: Any) -> Any:
        with hook:
            return follow(*args)

    with mock.patch.object(runtime.Runtime, "follow", counted), patched(calls.pipe, schedule):
        layers = len(patched_layers(calls.pipe.unet))
        calls.all()
        for place, whole in enumerate(whole_steps(schedule, calls.steps)):
            phase = schedule.phase_at(place, calls.steps)
            hook.by_name.clear()
            with LaunchCounter() as counter:
                calls(place)
            kind = f"{phase.method}, {'whole' if whole else 'light'}"
            extra = counter.total - unpatched.total - hook.total
            found[kind] = {
                "unpatched": unpatched.total,
                "total": counter.total,
                "hook": max(hook.total, found.get(kind, {}).get("hook", 0)),
                "a layer": extra / layers,
            }
    return found


def tiny_operations() -> dict[str, dict[str, dict[str, float]]]:
    """Two images of each preset and method, on small UNets of both structures or a smaller one."""
    presets = Schedule.presets()
    tried = {
        "sd15": (tiny_unet, presets),
        "sdxl": (sdxl_unet, ["faithful", "paper"]),
        "one level": (smallest_unet, METHODS),
    }
    found = {}
    for kind, (make, names) in tried.items():
        calls = Calls(on_device(make))
        for name in names:
            found[f"{kind}, {name}"] = operations(calls, schedules()[name])
    return found


def real_operations() -> None:
    """Print a table: the presets on real architectures, at the sizes that those are made for."""
    print("| model | schedule | step | operations | in the hook | more a patched layer |")
    print("|---|---|---|---|---|---|")
    for kind, side in (("sd15", 64), ("sdxl", 128)):
        settings = ARCHITECTURES[kind]
        unet = on_device(lambda: UNet2DConditionModel(**settings))  # noqa: B023
        calls = Calls(unet, side=side, steps=6)
        for name in ("faithful", "fast", "paper", "turbo"):
            for step, count in operations(calls, Schedule.load(name)).items():
                print(
                    f"| {kind} | {name} | {step} | {count['total']:,} | {count['hook']} | "
                    f"{count['a layer']:+.1f} |",
                    flush=True,
                )
        print(f"| {kind} | unpatched | | {count['unpatched']:,} | | |", flush=True)


if __name__ == "__main__":
    with stand_in():
        if sys.argv[1:] == ["--table"]:
            real_operations()
        else:
            found = {"runs": runs(), "controls": controls(), "operations": tiny_operations()}
            print(json.dumps(found, indent=1))
