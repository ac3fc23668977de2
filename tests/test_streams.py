"""UNet calls of several images in turn: no feature of one reaches another, or the call is whole."""

from __future__ import annotations

import copy
import gc
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from sampling import with_samples
from tiny_models import call, latents, smallest_unet, tiny_pipeline, watch
from tiny_pipelines import PICTURE, of, xl
from torch import Tensor

from agentsd import PatchError, apply_patch, cache_context, inspect_patch, patched, summary
from agentsd.patching import step_cache
from agentsd.patching.patch import patch_of

STEPS = 12


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return tiny_pipeline(tmp_path, smallest_unet())


def noise(seed: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def text(seed: int) -> Tensor:
    return torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(100 + seed))


class Image:
    """An image in the making, with guidance, from its ``first`` entry of the list to ``last``."""

    def __init__(self, pipe: Any, seed: int, prompt: Tensor, first: int = 0, last: int = STEPS):
        self.pipe, self.x, self.prompt = pipe, noise(seed), prompt
        self.places = range(first, last)
        self.scheduler = copy.deepcopy(pipe.scheduler)
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, t: Tensor, call: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            out = call(self, t)
            more = {"generator": self.generator}
            self.x = self.scheduler.step(out, t, self.x, **more).prev_sample


def in_one_call(image: Image, t: Tensor) -> Tensor:
    both = torch.cat([image.scheduler.scale_model_input(image.x, t)] * 2)
    u, c = image.pipe.unet(both, t, image.prompt).sample.chunk(2)
    return u + 2 * (c - u)


def in_two_calls(image: Image, t: Tensor, order: Sequence[int] = (0, 1)) -> Tensor:
    """Each with latents and conditioning of its own making."""
    halves = {}
    for half in order:
        x = image.scheduler.scale_model_input(image.x, t).clone()
        halves[half] = image.pipe.unet(x, t, image.prompt[half : half + 1].clone()).sample
    return halves[0] + 2 * (halves[1] - halves[0])


def swapped_calls(image: Image, t: Tensor) -> Tensor:
    """The prompt's first in every other step."""
    order = (0, 1) if int(t) % 2 else (1, 0)
    return in_two_calls(image, t, order)


def run(
    pipe: Any,
    images: Sequence[Image],
    call: Callable[..., Tensor] = in_one_call,
    order: Callable[[list[Image]], list[Image]] = list,
) -> tuple[list[Tensor], str]:
    """Denoise images in turn over one list of timesteps; the latents and the kinds of calls."""
    pipe.scheduler.set_timesteps(STEPS)
    for image in images:
        image.scheduler.set_timesteps(STEPS)
    seen = watch(pipe.unet)
    for place, t in enumerate(pipe.scheduler.timesteps):
        for image in order([image for image in images if place in image.places]):
            image.step(t, call)
    return [image.x for image in images], "".join("wl"[s.forecast is not None] for s in seen)


@pytest.fixture
def balanced(pipe: Any) -> Iterator[Any]:
    with patched(pipe, "balanced", min_tokens=0):
        yield pipe


SAME, OTHER = text(0), text(1)


def shuffling(seed: int = 0) -> Callable[[list[Image]], list[Image]]:
    """Another order at each step."""
    draw = random.Random(seed)
    return lambda images: draw.sample(images, len(images))


@pytest.mark.parametrize(
    ("call", "shuffled", "prompts"),
    [  # each call in order and shuffled, with each kind of prompts
        pytest.param(in_one_call, None, (SAME, SAME, SAME), marks=pytest.mark.slow),
        (in_one_call, 0, (SAME, OTHER, SAME)),
        pytest.param(in_two_calls, None, (SAME, OTHER, SAME), marks=pytest.mark.slow),
        (in_two_calls, 1, (SAME, SAME, SAME)),
        pytest.param(swapped_calls, None, (SAME, SAME, SAME), marks=pytest.mark.slow),
        (swapped_calls, 1, (SAME, OTHER, SAME)),
    ],
)
def test_images_in_turn_are_those_made_alone(
    balanced: Any, call: Any, shuffled: int | None, prompts: Sequence[Tensor]
) -> None:
    def images() -> list[Image]:
        return [Image(balanced, seed, prompt) for seed, prompt in enumerate(prompts)]

    alone = [run(balanced, [image], call) for image in images()]
    found, kinds = run(balanced, images(), call, list if shuffled is None else shuffling(shuffled))
    for ((expected,), _), x in zip(alone, found, strict=True):
        assert torch.equal(x, expected)
    assert kinds.count("l") == sum(one.count("l") for _, one in alone) > 0


def test_the_check_of_turns_can_fail(balanced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cache._Seen, "turn_to", lambda *_: 0.0)
    with pytest.raises(AssertionError):
        test_images_in_turn_are_those_made_alone(balanced, in_one_call, 0, (SAME,) * 3)


@pytest.mark.slow
@pytest.mark.parametrize("first_of_two", with_samples([0, 1], 1))
def test_images_that_join_and_leave(balanced: Any, first_of_two: int) -> None:
    """With the same prompt: only their latents tell them apart."""
    spans = [(0, STEPS), (5, STEPS), (0, 7), (6, 11)]

    def images() -> list[Image]:
        return [Image(balanced, seed, SAME, *span) for seed, span in enumerate(spans)]

    with patched(balanced, "faithful", min_tokens=0):
        whole = [run(balanced, [image])[0][0] for image in images()]
    with patched(balanced, "balanced", min_tokens=0):
        alone = [run(balanced, [image])[0][0] for image in images()]
    order = list if first_of_two else lambda images: images[::-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, kinds = run(balanced, images(), order=order)
    assert "l" in kinds
    for x, expected, exact in zip(found, alone, whole, strict=True):
        # Begun anew it has fewer light steps, and is no further from the whole one than alone.
        assert (x - exact).norm() <= 1.5 * (expected - exact).norm() + 1e-3 * exact.norm()


def test_the_same_noise_with_other_prompts(balanced: Any) -> None:
    def images() -> list[Image]:
        made = [Image(balanced, 0, text(number)) for number in range(3)]
        assert torch.equal(made[0].x, made[1].x)
        return made

    alone = [run(balanced, [image])[0][0] for image in images()]
    found, kinds = run(balanced, images(), order=shuffling())
    assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))
    assert "l" in kinds


def test_what_cannot_be_told_apart_is_whole_and_says_so(balanced: Any) -> None:
    """Latents of which a step leaves nothing, as LCM's do at first."""

    def forgets(image: Image, t: Tensor) -> Tensor:
        out = in_one_call(image, t)
        image.x = torch.randn(image.x.shape, generator=image.generator)
        return 0 * out

    with pytest.warns(UserWarning, match=r"latents do not continue .* agentsd.cache_context"):
        _, kinds = run(balanced, [Image(balanced, seed, SAME) for seed in (1, 2)], forgets)
    assert set(kinds) == {"w"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        run(balanced, [Image(balanced, seed, SAME) for seed in (1, 2)], forgets)


def test_the_caller_tells_images_apart(balanced: Any) -> None:
    """By a key, where nothing else would."""
    balanced.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(
        balanced.scheduler.config
    )

    def keyed(image: Image, t: Tensor) -> Tensor:
        with cache_context(id(image)):
            return in_one_call(image, t)

    def images() -> list[Image]:
        return [Image(balanced, seed, SAME) for seed in (1, 2)]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*adds noise")
        alone = [run(balanced, [image])[0][0] for image in images()]
        found, kinds = run(balanced, images(), keyed, shuffling())
    assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))
    assert kinds.count("l") == 2 * (STEPS - 7)


@pytest.mark.parametrize("key", [None, []])
def test_keys_that_name_no_run_are_refused(key: Any) -> None:
    with pytest.raises(PatchError, match="must be hashable and not None"), cache_context(key):
        pass


def test_buffers_that_are_written_again(balanced: Any) -> None:
    """As those of CUDA graphs: the same tensors for all images."""
    sample, prompt = torch.empty(2, 4, 16, 16), torch.empty(2, 7, 32)

    def buffered(image: Image, t: Tensor) -> Tensor:
        sample.copy_(torch.cat([image.scheduler.scale_model_input(image.x, t)] * 2))
        prompt.copy_(image.prompt)
        u, c = image.pipe.unet(sample, t, prompt).sample.chunk(2)
        return u + 2 * (c - u)

    def images() -> list[Image]:
        return [Image(balanced, 1, SAME), Image(balanced, 2, OTHER)]

    with patched(balanced, "faithful", min_tokens=0):
        expected, _ = run(balanced, images(), buffered, shuffling())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, _ = run(balanced, images(), buffered, shuffling())
    for x, exact in zip(found, expected, strict=True):
        assert (x - exact).norm() < 0.1 * exact.norm()


def test_two_pipelines_of_one_unet_in_turn(balanced: Any) -> None:
    """Each with a scheduler, and so a list, of its own."""
    second = diffusers.StableDiffusionPipeline(**balanced.components)
    second.scheduler = DDIMScheduler.from_config(balanced.scheduler.config)
    second.set_progress_bar_config(disable=True)
    alone = latents(balanced, STEPS), latents(second, STEPS, seeds=[5])
    made = []

    def preview(pipe: Any, step: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 5:
            made.append(latents(second, STEPS, seeds=[5]))
        return values

    found = latents(balanced, STEPS, callback_on_step_end=preview)
    assert torch.equal(made[0], alone[1])
    assert (found - alone[0]).norm() < 0.1 * alone[0].norm()


@pytest.mark.slow
def test_panorama(tmp_path: Path) -> None:
    """Windows over one picture, with the same prompt: each goes on with its own features."""
    pipe = of("StableDiffusionPanoramaPipeline", tmp_path, smallest_unet())

    def made() -> Tensor:
        return pipe(
            "a cat", height=32, width=576, num_inference_steps=8, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    exact = made()
    apply_patch(pipe, "balanced")
    seen = watch(pipe.unet)
    found = made()
    assert "".join("wl"[s.forecast is not None] for s in seen) == "wwwwllwwllwwllww"
    assert (found - exact).norm() < 0.05 * exact.norm()


NOISE_LEVELS = {
    "random": lambda: torch.randint(0, 1000, (32,), generator=torch.Generator().manual_seed(0)),
    "sorted": lambda: torch.linspace(999, 0, 32),
    "with repeats": lambda: torch.tensor([900, 900, 800, 800, 700, 700] * 6),
    "two columns": lambda: torch.linspace(999, 0, 64).view(32, 2)[:, 0],
}


@pytest.mark.slow
@pytest.mark.parametrize("levels", with_samples(NOISE_LEVELS, "random"))
@pytest.mark.parametrize(("what", "inference"), [("pipeline", True), ("unet", False)])
def test_losses_at_noise_levels_are_no_run(
    pipe: Any, levels: str, what: str, inference: bool
) -> None:
    """One image after the other, each with noise of its own."""
    with torch.inference_mode(inference):
        timesteps, prompt = NOISE_LEVELS[levels](), text(0)[:1]
        images = torch.randn(32, 4, 16, 16, generator=torch.Generator().manual_seed(3))

        def predictions() -> list[Tensor]:
            with torch.no_grad():
                return [
                    pipe.unet(x[None], timesteps[i : i + 1], prompt).sample
                    for i, x in enumerate(images)
                ]

        with patched(pipe, "faithful", min_tokens=0, select="grid"):
            expected = predictions()
        apply_patch(
            pipe if what == "pipeline" else pipe.unet, "balanced", min_tokens=0, select="grid"
        )
        with pytest.warns(UserWarning, match="do not identify a run|do not continue|skipped"):
            found = predictions()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_loop_over_a_list_of_its_own_is_a_run(pipe: Any) -> None:
    """As of a UNet alone, whose latents are compared at each call."""
    apply_patch(pipe.unet, "balanced", min_tokens=0)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    for inference in (False, True):
        with torch.inference_mode(inference):
            seen, x, prompt = watch(pipe.unet), noise(0), text(0)[:1]
            with torch.no_grad():
                for t in scheduler.timesteps.clone():
                    x = scheduler.step(pipe.unet(x, t, prompt).sample, t, x).prev_sample
        assert "".join("wl"[s.forecast is not None] for s in seen) == "wwlwlwlwlwlw"


@pytest.mark.parametrize("convert", [int, float, lambda t: t.repeat(1), torch.clone])
@pytest.mark.parametrize("what", ["pipeline", "unet"])
def test_timesteps_that_are_no_entries_of_a_list(pipe: Any, convert: Any, what: str) -> None:
    """They are found by value in the scheduler's; without one, a warning says what to do."""
    apply_patch(pipe if what == "pipeline" else pipe.unet, "balanced", min_tokens=0)
    pipe.scheduler.set_timesteps(STEPS)
    seen, x, prompt = watch(pipe.unet), noise(0), text(0)[:1]
    with warnings.catch_warnings(record=True) as told, torch.no_grad():
        warnings.simplefilter("always")
        for t in pipe.scheduler.timesteps:
            x = x - 0.01 * pipe.unet(x, convert(t), prompt).sample
    kinds = "".join("wl"[s.forecast is not None] for s in seen)
    said = [str(w.message) for w in told if "agentsd" in str(w.message)]
    if what == "pipeline":
        assert (kinds, said) == ("wwlwlwlwlwlw", [])
    else:
        assert kinds == "w" * STEPS
        assert len(said) == 1
        assert "or patch its pipeline" in said[0]


ORDERS = ("PNDMScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "preset"),
    [
        *((name, "balanced") for name in ("DDIMScheduler", *ORDERS)),
        ("PNDMScheduler", "faithful"),
        ("HeunDiscreteScheduler", "paper"),
    ],
)
def test_a_copy_and_a_pipeline_made_from_one_count_alike(pipe: Any, name: str, preset: str) -> None:
    """Schedulers whose lists are longer than their steps."""
    more = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **more)
    apply_patch(pipe, preset, min_tokens=0)
    expected = latents(pipe, STEPS)
    twin = copy.deepcopy(pipe)
    assert torch.equal(latents(twin, STEPS), expected)
    other = diffusers.StableDiffusionPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(latents(other, STEPS), expected)
    del pipe
    gc.collect()
    assert torch.equal(latents(other, STEPS), expected)
    assert torch.equal(latents(twin, STEPS), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "branch", "frozen"),
    [("balanced", 0, True), ("balanced", -1, False), ("turbo", 0, False), ("turbo", -1, True)],
)
def test_guidance_by_a_loss(pipe: Any, preset: str, branch: int, frozen: bool) -> None:
    apply_patch(pipe, preset, min_tokens=0, cache_branch=branch)
    pipe.unet.requires_grad_(not frozen)
    pipe.scheduler.set_timesteps(STEPS)
    seen, x, prompt = watch(pipe.unet), noise(0), text(0)[:1]
    for t in pipe.scheduler.timesteps:
        x = x.detach().requires_grad_()
        out = pipe.unet(x, t, prompt).sample
        alpha = pipe.scheduler.alphas_cumprod[t]
        clean = (x - (1 - alpha) ** 0.5 * out) / alpha**0.5
        clean.mean((2, 3)).pow(2).sum().backward()
        assert x.grad is not None
        assert x.grad.abs().sum() > 0
        with torch.no_grad():
            x = pipe.scheduler.step(out, t, x).prev_sample - 0.1 * x.grad
    assert any(s.forecast is not None for s in seen)


def held(unet: Any) -> int:
    patch = patch_of(unet)
    assert patch is not None
    return len(patch.runtime.policy._cache._streams)


@pytest.mark.parametrize(
    ("steps", "strength", "expected"),
    [(25, 0.12, "www"), (25, 0.2, "wwwww"), (40, 0.2, "wwlwlwlw"), (10, 0.9, "wwlwlwlwlw"[1:])],
)
def test_the_calls_that_a_run_makes_count(
    tmp_path: Path, steps: int, strength: float, expected: str
) -> None:
    """Not the entries of its list: image to image does only the end."""
    pipe = of("StableDiffusionImg2ImgPipeline", tmp_path, smallest_unet())
    apply_patch(pipe, "balanced", min_tokens=0)
    seen = watch(pipe.unet)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            pipe("a cat", image=PICTURE, strength=strength, num_inference_steps=steps,
                 output_type="latent")  # fmt: skip
    kinds = "".join("wl"[s.forecast is not None] for s in seen)
    assert kinds == 2 * expected
    said = [str(w.message) for w in told if "computes each step in full" in str(w.message)]
    assert len(said) == ("l" not in expected)
    assert not held(pipe.unet)


def test_a_run_that_ends_early_leaves_nothing(tmp_path: Path) -> None:
    """The base of SDXL hands over to the refiner, before the end of its list."""
    pipe = xl(tmp_path)
    apply_patch(pipe, "balanced", min_tokens=0)
    seen = watch(pipe.unet)
    for end, expected in ((0.5, "wwlwlwlwlw"), (0.3, "wwwwww")):
        seen.clear()
        pipe("a cat", height=32, width=32, num_inference_steps=20, denoising_end=end,
             output_type="latent")  # fmt: skip
        assert "".join("wl"[s.forecast is not None] for s in seen) == expected
        assert not held(pipe.unet)


@pytest.fixture
def unet() -> Any:
    """The smallest: a summary counts its operations each time."""
    return smallest_unet()


def test_the_summary_tells_what_happened(pipe: Any) -> None:
    with pytest.raises(PatchError, match="call apply_patch"):
        summary(pipe)
    apply_patch(pipe, "balanced", min_tokens=0)
    assert "has not run" in str(summary(pipe))
    for _ in range(2):
        latents(pipe, STEPS)
        told = summary(pipe)
        (run,) = told.runs
        assert [call.step for call in run] == list(range(STEPS))
        assert "".join("wl"[call.is_light] for call in run) == "wwlwlwlwlwlw"
        assert [call.weights for call in run[1:5:3]] == [None, {1: -0.5, 3: 1.5}]
        assert all(call.seconds for call in run[:-1])
        assert "12 UNet calls, 7 whole, 5 light" in str(told)
    described = inspect_patch(pipe, 32, 32, num_inference_steps=STEPS)
    assert told.work == pytest.approx(described.work)
    latents(pipe, 4)
    assert [call.text for run in summary(pipe).runs for call in run] == ["whole"] * 4
    apply_patch(pipe, "faithful", min_tokens=0)
    for steps in (5, 4):
        latents(pipe, steps)
        told = summary(pipe)
        (run,) = told.runs
        assert [call.text for call in run] == ["whole"] * steps
    assert "<td>whole</td>" in told._repr_html_()


@pytest.mark.parametrize("timesteps", [[500] * 7, [500, 400, 300, 200, 100, 50, 25]])
def test_calls_without_end_are_not_all_kept(
    unet: Any, monkeypatch: pytest.MonkeyPatch, timesteps: list[int]
) -> None:
    """A loss at one noise level, say, never begins another run."""
    monkeypatch.setattr("agentsd.patching.run_log.MAX_CALLS", 5)
    apply_patch(unet, "faithful", min_tokens=0)
    patch = patch_of(unet)
    assert patch is not None
    for count, timestep in enumerate(timesteps, start=1):
        call(unet, timestep)
        assert [len(run) for run in patch.runtime.policy.log.runs] == [min(count, 5)]
    assert [len(run) for run in summary(unet).runs] == [5]


def test_the_summary_repeats_no_warning(unet: Any) -> None:
    apply_patch(unet, "faithful", min_tokens=10_000)
    with pytest.warns(UserWarning, match="changes nothing"):
        call(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert summary(unet).work == 1
        assert inspect_patch(unet, num_inference_steps=4).work == 1


def test_the_summary_tells_images_in_turn_apart(unet: Any) -> None:
    apply_patch(unet, "balanced", min_tokens=0)
    timesteps = torch.arange(999, 0, -80)
    assert len(summary(unet).runs) == 0
    for timestep in timesteps:
        for image in range(2):
            with cache_context(image):
                call(unet, timestep)
    runs = summary(unet).runs
    assert len(runs) == 2
    assert runs[0][3].weights == runs[1][3].weights == {0: -0.25, 2: 1.25}
    assert "in 2 interleaved runs" in summary(unet).title


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config", "adds"),
    [
        pytest.param("EulerAncestralDiscreteScheduler", {}, True, marks=pytest.mark.sample),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, True),
        ("LCMScheduler", {}, True),
        ("DDPMScheduler", {}, True),
        ("KDPM2AncestralDiscreteScheduler", {}, True),
        ("DPMSolverMultistepScheduler", {}, False),
        pytest.param("DDIMScheduler", {}, False, marks=pytest.mark.sample),
        ("UniPCMultistepScheduler", {}, False),
    ],
)
def test_schedulers_that_add_noise_are_named_once(
    pipe: Any, name: str, config: dict[str, Any], adds: bool
) -> None:
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **config)
    apply_patch(pipe, "balanced", min_tokens=0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            latents(pipe, STEPS)
    said = [str(w.message) for w in told if "adds noise at each step" in str(w.message)]
    assert len(said) == adds
    assert all(name in message and '"faithful"' in message for message in said)
    apply_patch(pipe, "faithful", min_tokens=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*adds noise")
        latents(pipe, STEPS)
