"""Light steps: what they compute, when, and that nothing of a run reaches another."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from reversal import check_likeness, check_reversal
from sampling import with_samples
from scheduler_cases import NAMES, given, seeded
from tiny_models import (
    RecordingBackend,
    call,
    latents,
    patched_layers,
    sdxl_unet,
    smallest_unet,
    tiny_pipeline,
    tiny_unet,
    watch,
)
from tiny_pipelines import PIPELINES, run
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from agentsd import PatchError, Phase, Schedule, ScheduleError, apply_patch, patched, remove_patch
from agentsd.generation.images import make_image
from agentsd.generation.interleaving import warm_up, with_schedule
from agentsd.image_settings import ImageSettings
from agentsd.methods import Keys
from agentsd.patching.denoising_step import Call
from agentsd.patching.forecasts import extrapolated, forecast, whole_steps
from agentsd.patching.light_steps import find_parts
from agentsd.patching.patch import patch_of
from agentsd.patching.step_cache import Feature, StepCache, Stream


def cached(
    interval: int = 2, method: str = "full", min_steps: int | None = 0, **cache: Any
) -> Schedule:
    """A schedule with light steps in runs of any length, or of ``min_steps`` and more."""
    settings = {"interval": interval, "min_steps": min_steps, **cache}
    return Schedule(phases=[{"method": method, "min_tokens": 0, "cache": settings}])


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    """One whose UNet has one level: what lies below it makes no difference to most tests."""
    return tiny_pipeline(tmp_path, smallest_unet())


def pattern(pipe: Any, steps: int = 8, **inputs: Any) -> str:
    """The steps of a run: w for whole, l for light."""
    seen = watch(pipe.unet)
    latents(pipe, steps=steps, **inputs)
    return "".join("w" if step.forecast is None else "l" for step in seen)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_forecast_continues_polynomials_of_its_order(order: int) -> None:
    def value(x: float, degree: int) -> Tensor:
        return torch.tensor([2.0, -1.0], dtype=torch.float64) * x**degree + 3

    places = [1.0, 4.0, 6.0][: order + 1]
    for degree in range(order + 1):
        found = extrapolated({x: value(x, degree) for x in places}, 8.0)
        torch.testing.assert_close(found, value(8.0, degree), rtol=1e-12, atol=1e-12)
    beyond = extrapolated({x: value(x, order + 1) for x in places}, 8.0)
    assert not torch.allclose(beyond, value(8.0, order + 1), rtol=1e-3)


def feature_line(*values: Tensor, steps: Sequence[int] = (0, 2, 4)) -> list[Feature]:
    """Features of whole steps of a phase with the default forecast."""
    (phase,) = cached().phases
    return [Feature(step, phase, value) for step, value in zip(steps, values, strict=True)]


def test_a_forecast_goes_as_far_as_the_feature_keeps_its_direction() -> None:
    """An image at a time: a straight line goes on, a turn by 90 or 180 degrees is held."""
    x, y = torch.eye(8)[:2]
    known = torch.zeros(3, 8), torch.stack([x, x, x]), torch.stack([2 * x, x + y, 0 * x])
    found = forecast(feature_line(*known), 5).value
    torch.testing.assert_close(found, torch.stack([2.5 * x, x + y, 0 * x]))
    for image in range(3):
        alone = forecast(feature_line(*(value[image, None] for value in known)), 5).value
        assert torch.equal(alone[0], found[image]), "an image depends on its batch mates"
    plain = [Feature(f.step, cached(order=1).phases[0], f.value) for f in feature_line(*known)]
    linear = forecast(plain[1:], 5).value
    assert torch.allclose(linear[0], found[0])
    assert not torch.allclose(linear[1:], found[1:])


@pytest.mark.parametrize("steps", [(0, 2, 4), (0, 1, 4), (0, 3, 6), (1, 3, 4)])
@pytest.mark.parametrize("correlation", [0.2, 0.5, 0.8])
def test_the_share_of_the_line_is_the_best_for_autoregressive_changes(
    steps: tuple[int, int, int], correlation: float
) -> None:
    random = torch.Generator().manual_seed(0)
    change, value = torch.randn(1, 200_000, generator=random), torch.zeros(1, 200_000)
    path = [value]
    for _ in range(steps[-1] + 2):
        noise = torch.randn(change.shape, generator=random)
        change = correlation * change + (1 - correlation**2) ** 0.5 * noise
        path.append(path[-1] + change)
    features = feature_line(*(path[step] for step in steps), steps=steps)
    for step in (steps[-1] + 1, steps[-1] + 2):
        line = extrapolated({float(f.step): f.value for f in features[1:]}, float(step))
        last = features[-1].value

        def error(value: Tensor, step: int = step) -> float:
            return float((value - path[step]).square().mean())

        errors = [error(torch.lerp(last, line, share)) for share in torch.linspace(0, 1, 101)]
        found = error(forecast(features, step).value)
        assert found < 1.01 * min(errors)
        assert max(errors[0], errors[-1]) > 1.01 * min(errors)  # not every share would do


MODELS: dict[str, Callable[[], UNet2DConditionModel]] = {
    "Stable Diffusion 1.x": tiny_unet,
    "three layers a block": lambda: tiny_unet(layers_per_block=2),
    "SDXL": lambda: sdxl_unet(layers_per_block=2),
}


def held(pipe: Any) -> list[Feature]:
    """The features that a patch holds."""
    patch = patch_of(pipe.unet)
    assert patch is not None
    streams = patch.runtime.policy._cache._streams
    return [feature for stream in streams for kept in stream.kept.values() for feature in kept]


def feature_of(unet: UNet2DConditionModel, branch: int) -> nn.Module:
    """The module whose output is the deep feature, found another way: by counting from the end."""
    *rest, last = unet.up_blocks
    layers = [*zip(last.resnets, getattr(last, "attentions", last.resnets), strict=True)]
    before = len(layers) - 2 - branch
    return layers[before][-1] if before >= 0 else rest[-1]


def test_a_short_run_is_whole_and_says_so(pipe: Any) -> None:
    """As with the four steps of a distilled model."""
    expected = latents(pipe, steps=4)
    apply_patch(pipe, cached(2, min_steps=None))
    with pytest.warns(UserWarning, match="4 steps computes each step in full: .* 8 steps or more"):
        assert torch.equal(latents(pipe, steps=4), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once for each length
        assert pattern(pipe, 4) == "wwww"
        assert pattern(pipe, 8) == "wwlwlwlw"
    assert whole_steps(cached(2, min_steps=None), 7) == [True] * 7
    assert whole_steps(cached(2, min_steps=7), 7) != [True] * 7


def test_a_warm_up_does_not_call_itself_short(pipe: Any) -> None:
    short = ImageSettings(prompt="red", num_inference_steps=2, height=64, width=64)
    variant = with_schedule(cached(2, min_steps=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warm_up(pipe, {"cached": variant}, short)
    with variant(pipe), pytest.warns(UserWarning, match="computes each step in full"):
        make_image(pipe, short)


@pytest.mark.slow
@pytest.mark.parametrize("branch", [0, 1])
@pytest.mark.parametrize("name", with_samples(MODELS, "Stable Diffusion 1.x", "SDXL"))
def test_a_light_step_is_the_whole_unet_on_a_forecast(name: str, branch: int) -> None:
    """Bit for bit: the unpatched UNet, with its deep feature exchanged for the forecast."""
    unet = MODELS[name]()
    timesteps = torch.tensor([900, 700, 500, 300])
    features: list[Tensor] = []
    module = feature_of(unet, branch)

    def output(x: Any) -> Tensor:
        return x if isinstance(x, Tensor) else x[0]

    hook = module.register_forward_hook(lambda *args: features.append(output(args[-1])))
    wholes = [call(unet, timesteps[i]) for i in range(4)]
    hook.remove()
    forecasts = {0: features[1], 1: 2 * features[1] - features[0]}
    for order, deep in forecasts.items():
        hook = module.register_forward_hook(
            lambda _, __, out, f=deep: f if isinstance(out, Tensor) else (f, *out[1:])
        )
        expected = call(unet, timesteps[2])
        hook.remove()
        apply_patch(unet, cached(order=order, branch=branch))
        found = [call(unet, timesteps[i]) for i in range(4)]
        remove_patch(unet)
        assert all(torch.equal(found[i], wholes[i]) for i in (0, 1, 3))
        torch.testing.assert_close(found[2], expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found[2], wholes[2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(forecasts[0], forecasts[1])


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("return_dict", [True, False])
def test_the_output_itself_is_forecast(order: int, return_dict: bool) -> None:
    unet = tiny_unet()
    timesteps = torch.tensor([900, 700, 500, 300])
    wholes = [call(unet, timesteps[place]) for place in range(4)]
    apply_patch(unet, cached(order=order, branch=-1))
    random = torch.Generator().manual_seed(1)
    x, text = (torch.randn(s, generator=random) for s in ((2, 4, 16, 16), (2, 7, 32)))
    found, operations = [], []
    for place in range(3):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            made = unet(x, timesteps[place], text, return_dict=return_dict)
        found.append(made.sample if return_dict else made[0])
        operations.append(counter.get_total_flops())
    expected = wholes[1] if order == 0 else 2 * wholes[1] - wholes[0]
    assert operations[0] == operations[1] > 0 == operations[2]
    torch.testing.assert_close(found[-1], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[-1], wholes[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("branch", [0, 1])
def test_a_light_step_computes_nothing_of_what_it_leaves_out(branch: int) -> None:
    unet = tiny_unet(layers_per_block=2)
    apply_patch(unet, cached(order=0, branch=branch))
    ran: list[str] = []
    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    timesteps = torch.tensor([900, 700, 500])
    call(unet, timesteps[0])
    whole = len(ran)
    ran.clear()
    call(unet, timesteps[1])
    assert 0 < len(ran) < whole / 2
    rest = ("conv_in", "conv_out", "time_embedding", f"up_blocks.2.resnets.{2 - branch}")
    rest += ("up_blocks.2.resnets.2", "up_blocks.2.attentions.2")
    if branch:
        rest += (
            "up_blocks.2.attentions.1",
            "down_blocks.0.resnets.0",
            "down_blocks.0.attentions.0",
        )
    assert {name for name in ran if not name.startswith(rest)} == set()
    assert all(any(name.startswith(part) for name in ran) for part in rest)


@pytest.mark.parametrize(
    ("phases", "steps", "expected"),
    [
        ([{"cache_interval": 2}], 8, "wwlwlwlw"),
        ([{"cache_interval": 2, "cache_order": 0}], 6, "wwlwlw"),
        ([{"cache_interval": 3, "cache_order": 2}], 9, "wlwllwllw"),
        ([{"until": 0.5}, {"cache_interval": 4}], 12, "wwwwwwwwlllw"),
        ([{"until": 0.5, "cache_interval": 2}, {"cache_interval": 3}], 12, "wwlwlwwlwllw"),
        (
            [{"until": 0.5, "cache_interval": 2}, {"cache_interval": 2, "cache_branch": 1}],
            10,
            "wwlwlwlwlw",
        ),
        ([{"cache_interval": 10}], 2, "ww"),
        (
            [
                {"until": 0.3, "cache_interval": 2},
                {"until": 0.5},
                {"until": 0.9, "cache_interval": 2},
                {},
            ],
            10,
            "wwlwwwlwlw",
        ),
    ],
)
def test_which_steps_are_whole(
    tmp_path: Path, phases: list[dict[str, Any]], steps: int, expected: str
) -> None:
    pipe = tiny_pipeline(tmp_path, smallest_unet(layers_per_block=2))  # enough for branch 1
    schedule = Schedule(phases=[{"method": "full"} | phase for phase in phases])
    schedule = schedule.override(cache_min_steps=0)
    assert "".join("lw"[whole] for whole in whole_steps(schedule, steps)) == expected
    apply_patch(pipe, schedule)
    assert pattern(pipe, steps) == expected
    assert not held(pipe), "features outlive the run"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cache": {"interval": 1}}, "interval: input should be greater than or equal to 2"),
        ({"cache": {"branch": 0}}, "interval: is missing"),
        ({"cache": {"interval": 2, "depth": 3}}, "unknown key 'depth': allowed are interval"),
        ({"cache": 2}, "cache: input should be a valid dictionary or instance of Cache"),
        ({"cache_interval": 0}, "interval: input should be greater than or equal to 2"),
        ({"cache_interval": 11}, "interval: input should be less than or equal to 10"),
        ({"cache_interval": 2.0}, "interval: input should be a valid integer"),
        ({"cache_interval": True}, "interval: input should be a valid integer"),
        ({"cache_interval": 2, "cache_branch": 2}, "branch: input should be -1, 0 or 1"),
        ({"cache_interval": 2, "cache_branch": True}, "branch: input should be -1, 0 or 1"),
        ({"cache_interval": 2, "cache_order": 3}, "order: input should be 0, 1 or 2"),
        ({"cache_branch": 1}, "cache_branch needs a cache_interval of 2 or more"),
        ({"cache_order": 0}, "cache_order needs a cache_interval of 2 or more"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ScheduleError, match=f"phase 1: .*{says}"):
        Schedule.from_dict({"phases": [settings]})


@pytest.mark.parametrize("order", [1, 2])
def test_flat_keys_of_older_files_are_read(order: int) -> None:
    flat = {"cache_interval": 3, "cache_branch": -1, "cache_order": order}
    nested = {"cache": {"interval": 3, "branch": -1, "order": order}}
    assert Schedule(phases=[flat]) == Schedule(phases=[nested])
    assert Schedule(phases=[flat]) != Schedule(phases=[{"cache": {"interval": 3}}])
    assert Schedule(phases=[{"cache_interval": 1}]) == Schedule(phases=[{}])


def test_schedules_without_it_are_written_as_before() -> None:
    assert "cache" not in Keys().to_dict()
    schedule = cached(3, "keys")
    assert cached(3, min_steps=None).to_dict()["phases"][0]["cache"] == {
        "interval": 3,
        "branch": 0,
    }
    assert Schedule.from_yaml(schedule.to_yaml()) == schedule


def test_a_model_without_such_layers_is_refused() -> None:
    net = diffusers.ControlNetModel.from_unet(tiny_unet())
    with pytest.raises(PatchError, match="last block of two or more layers, which ControlNet"):
        apply_patch(net, cached())
    assert not any("forward" in vars(module) for module in net.modules())


def test_a_branch_with_nothing_to_forecast_is_refused() -> None:
    with pytest.raises(PatchError, match="branch 1: this UNet has no layers below"):
        apply_patch(unet := smallest_unet(), cached(branch=1))
    assert not patched_layers(unet)


@pytest.mark.cell("Pipelines, with light steps")
@pytest.mark.parametrize("name", with_samples(PIPELINES, "SDXL base"))
def test_pipelines(name: str, tmp_path: Path) -> None:
    pipe, inputs = PIPELINES[name](tmp_path)
    seen: list[bool] = []

    def outputs() -> Tensor:
        return run(pipe, inputs, steps=4)

    check_reversal(pipe.unet, outputs, pipe, schedule=cached(order=0))
    for branch in (-1, 1):
        with patched(pipe, cached(order=0, branch=branch)):
            outputs()
    apply_patch(pipe, cached())
    for step in (steps := watch(pipe.unet)):
        seen.append(step.forecast is None)
    outputs()
    assert [step.forecast is None for step in steps] == [True, True, False, True]


TWICE = {
    "DPMSolverSDEScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
}
"""Schedulers that call the UNet twice in all steps but the last."""


@pytest.mark.cell("Schedulers, with light steps")
@pytest.mark.parametrize("name", with_samples(NAMES, "DDIMScheduler"))
def test_schedulers(pipe: Any, name: str) -> None:
    plain = latents(seeded(given(pipe, name)), steps=8)
    apply_patch(pipe, cached())
    expected = "wwwwllwwllwwllw" if name in TWICE else "wwlwlwlw"
    if name == "PNDMScheduler":  # its first step is two calls
        expected = "w" + expected
    assert pattern(pipe, 8) == expected
    check_likeness(latents(pipe, steps=8), plain)


INTERRUPTED = 3


def interrupt(pipe: Any, step: int, *_: Any) -> Any:
    if step == INTERRUPTED:
        raise KeyboardInterrupt
    return _[-1]


@pytest.mark.parametrize(("order", "branch"), [(0, 0), (1, 0), (1, -1)])
def test_nothing_reaches_another_run(pipe: Any, order: int, branch: int) -> None:
    """An interrupted run, another pipeline of the same UNet, another size or batch before it."""
    apply_patch(pipe, cached(order=order, branch=branch))
    expected = latents(pipe, steps=6, seeds=[7])

    def same() -> bool:
        return torch.equal(latents(pipe, steps=6, seeds=[7]), expected)

    with pytest.raises(KeyboardInterrupt):
        latents(pipe, steps=6, seeds=[1], callback_on_step_end=interrupt)
    assert same(), "after an interrupted run"
    other = diffusers.StableDiffusionPipeline(**pipe.components)
    other.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(KeyboardInterrupt):
        latents(other, steps=9, seeds=[1], callback_on_step_end=interrupt)
    assert same(), "after a run by another scheduler"
    latents(pipe, steps=6, size=(48, 32))
    assert same(), "after another size"
    pair = latents(pipe, steps=6, prompt=["a cat", "a dog"], seeds=[7, 8])
    assert (pair[:1] - expected).norm() < 1e-4 * expected.norm()
    assert (pair[1:] - expected).norm() > 1e-2 * expected.norm()
    assert same(), "after a batch"


def test_the_check_of_leaks_can_fail(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that takes any call for the next of the one before is caught by the test above."""
    found: list[Stream] = []

    def follow(self: StepCache, call: Call, *_: Any) -> tuple[Stream, None]:
        found.append(found[-1] if found else real(self, call, *_)[0])
        found[-1].call = call
        return found[-1], None

    real = StepCache.follow
    monkeypatch.setattr(StepCache, "follow", follow)
    monkeypatch.setattr(StepCache, "end", lambda *_: None)
    with pytest.raises(AssertionError, match="after an interrupted run"):
        test_nothing_reaches_another_run(pipe, 0, 0)


def test_guidance_in_two_calls(pipe: Any) -> None:
    """Each of a step's calls has features of its own, known by the latents they share."""
    apply_patch(pipe, cached())
    unet, seen = pipe.unet, watch(pipe.unet)
    text = torch.randn(2, 1, 7, 32, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(6)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            without, guided = (unet(x, t, one).sample for one in text)
            x = pipe.scheduler.step(without + 2 * (guided - without), t, x).prev_sample
    assert ["lw"[s.forecast is None] for s in seen] == [*"wwwwllwwllww"]
    values = [s.forecast for s in seen if s.forecast is not None]
    assert not torch.equal(values[0], values[1])


def test_the_same_timestep_of_another_image_is_another_run(pipe: Any) -> None:
    apply_patch(pipe, cached(order=0))
    seen = watch(pipe.unet)
    pipe.scheduler.set_timesteps(3)
    first, second = pipe.scheduler.timesteps[:2]
    text = torch.ones(1, 7, 32)
    with torch.no_grad():
        for t in (first, second, second):
            pipe.unet(torch.randn(1, 4, 16, 16), t, text)
    assert [s.forecast is None for s in seen] == [True, False, True]


def test_a_timestep_of_no_list_is_computed_whole(pipe: Any) -> None:
    unet = pipe.unet
    apply_patch(unet, cached(order=0))
    seen = watch(unet)
    for timestep in (900, 700, 500):
        call(unet, timestep)
    assert all(step.forecast is None for step in seen)


def test_guidance_that_ends_midway(pipe: Any) -> None:
    """The batch halves: features of the whole batch are of no use, and it begins anew."""

    def halve(pipe: Any, step: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            pipe._guidance_scale = 1.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
        return values

    apply_patch(pipe, cached())
    inputs = {
        "callback_on_step_end": halve,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    assert pattern(pipe, 8, **inputs) == "wwlwwwlw"


def test_memory_is_freed(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    apply_patch(pipe, cached())
    kept: list[weakref.ref[Tensor]] = []
    real = StepCache.put

    def put(self: StepCache, stream: Stream, phase: Phase, value: Tensor) -> None:
        real(self, stream, phase, value)
        kept.append(weakref.ref(stream.features[-1].value))

    monkeypatch.setattr(StepCache, "put", put)
    latents(pipe, steps=8)
    gc.collect()
    assert len(kept) == 5
    assert not any(ref() is not None for ref in kept)
    with pytest.raises(KeyboardInterrupt):
        latents(pipe, steps=8, callback_on_step_end=interrupt)
    gc.collect()
    left = [ref for ref in kept if ref() is not None]
    assert left
    with pytest.raises(KeyboardInterrupt):
        latents(pipe, steps=6, callback_on_step_end=interrupt)
    gc.collect()
    assert not any(ref() is not None for ref in left), "the next run frees them"
    remove_patch(pipe)
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_a_copy_and_a_pickle_are_patched_alike(pipe: Any) -> None:
    apply_patch(pipe, cached())
    expected = latents(pipe, steps=6)
    own = pipe.unet
    for twin in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        stand_ins = patch_of(twin).runtime.light_steps._stand_ins
        assert {id(s.part.module) for s in stand_ins} <= {id(m) for m in twin.modules()}
        pipe.unet = twin
        apply_patch(pipe, cached())
        assert torch.equal(latents(pipe, steps=6), expected)
        assert not any("forward" in vars(m) for m in twin.modules())
    pipe.unet = own
    assert torch.equal(latents(pipe, steps=6), expected)


def test_forwards_that_others_replaced_are_put_back(pipe: Any) -> None:
    """accelerate's offloading, for one, replaces forwards before the patch or after it."""
    unet, calls = pipe.unet, []
    block = unet.down_blocks[0].resnets[-1]
    real = block.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    block.forward = counted
    plain = latents(pipe, steps=6)
    with patched(pipe, cached()):
        calls.clear()
        latents(pipe, steps=6)
        assert len(calls) == 4
    assert block.forward is counted
    assert torch.equal(latents(pipe, steps=6), plain)


def test_what_one_branch_computes_is_part_of_what_the_next_does() -> None:
    for unet in (tiny_unet(), tiny_unet(layers_per_block=2), sdxl_unet()):
        parts = find_parts(unet)
        assert len({id(part.module) for part in parts}) == len(parts)
        for branch in (-1, 0, 1):
            assert any(p.gives_feature and p.branch == branch + 1 for p in parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "method", "branch"),
    [("method", "full", 0), ("function", "keys", 0), ("method", "keys", -1)],
)
def test_compiled_whole_and_light(pipe: Any, how: str, method: str, branch: int) -> None:
    """No graph breaks, and two compilations: one whole, one light."""
    torch._dynamo.reset()
    apply_patch(pipe, cached(3, method, branch=branch))
    eager = latents(pipe, steps=9)
    backend = RecordingBackend()
    if how == "method":
        pipe.unet.compile(fullgraph=True, backend=backend)
    else:
        pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend=backend)
    torch.testing.assert_close(latents(pipe, steps=9), eager, rtol=1e-3, atol=1e-3)
    # The graph of a light step that computes nothing gives nothing.
    outputs = [next(iter(graph.graph.find_nodes(op="output"))).args[0] for graph in backend.graphs]
    assert [bool(output) for output in outputs] == [True, branch >= 0]


def test_saved_without_a_trace(pipe: Any, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    apply_patch(pipe, cached())
    latents(pipe, steps=4)
    pipe.unet.save_pretrained(tmp_path / "unet")
    saved = UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in before)


def test_a_call_past_the_hooks_is_whole(pipe: Any) -> None:
    """After a run that was left at a light step, too."""
    unet = pipe.unet
    expected = call(unet, 500)
    apply_patch(pipe, cached())
    seen = watch(unet)
    timesteps = torch.tensor([900, 700, 500])
    call(unet, timesteps[0])
    call(unet, timesteps[1])
    assert seen[-1].forecast is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(unet), "__call__", lambda self, *args, **kw: self.forward(*args, **kw))
        assert torch.equal(call(unet, 500), expected)


@dataclass
class Loop:
    """As much of a pipeline as the patch looks at."""

    unet: UNet2DConditionModel
    scheduler: Any


@pytest.mark.parametrize("order", [0, 1])
def test_freeu_in_the_last_block(order: int) -> None:
    """It scales hidden states in place: those that are kept must not be scaled twice."""
    unet = tiny_unet(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
    timesteps = torch.full((5,), 900)  # of a scheduler, as no other list has an entry twice
    lists = SimpleNamespace(timesteps=timesteps, num_inference_steps=5)
    apply_patch(Loop(unet, lists), cached(3, order=order))
    whole, _, light = (call(unet, timesteps[place]) for place in range(3))
    torch.testing.assert_close(light, whole, rtol=1e-5, atol=1e-5)
    remove_patch(unet)
    unet.disable_freeu()
    assert not torch.allclose(call(unet, 900), whole, rtol=1e-3)
