"""Apply and remove: removal is bit-exact whatever happened, and nothing else is touched."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)
from reversal import AGENTS, check_reversal, check_unchanged, snapshot
from tiny_adapters import add_lora, load_ip_adapter
from tiny_models import (
    WIDTH,
    call,
    patched_layers,
    sdxl_unet,
    smallest_unet,
    tiny_pipeline,
    tiny_unet,
    watch,
)
from tiny_models import latents as latents_of_a_run
from torch import Tensor, nn

from agentsd import (
    PatchError,
    ScheduleError,
    apply_patch,
    inspect_patch,
    patched,
    remove_patch,
)
from agentsd.cli.options import DEFAULT_SCHEDULE
from agentsd.methods import Agent, Keys, Merge
from agentsd.patching.processor import LAYER, AgentAttnProcessor, Projections
from agentsd.patching.runtime import Runtime
from agentsd.schedule import Schedule

latents = partial(latents_of_a_run, steps=2)
"""Of as many steps as a preset has phases at most."""


def test_the_check_of_likeness_can_fail(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Projections.output
    monkeypatch.setattr(Projections, "output", lambda self, x: 100 * real(self, x))
    with pytest.raises(AssertionError, match="from the unpatched one"):
        check_reversal(unet, lambda: call(unet))


def with_image(pipe: Any) -> Tensor:
    embedding = torch.ones(2, 1, 8)  # the negative and the positive half of guidance
    return latents(pipe, ip_adapter_image_embeds=[embedding])


class TestReversal:
    @pytest.mark.parametrize(
        "make", [tiny_unet, pytest.param(smallest_unet, marks=pytest.mark.slow), sdxl_unet]
    )
    @pytest.mark.parametrize(
        "settings",
        [
            AGENTS,
            {"method": "merge", "max_downsample": 8},
            {"method": "keys"},
            {"schedule": "paper"},
        ],
        ids=["agent", "merge", "keys", "paper"],
    )
    def test_unet(self, make: Any, settings: dict[str, Any]) -> None:
        unet = make()
        if make is sdxl_unet:
            settings = {k: v for k, v in settings.items() if k != "max_downsample"}
        size = (32, 32) if make is sdxl_unet else (16, 16)
        check_reversal(unet, lambda: call(unet, size=size), **settings)

    @pytest.mark.parametrize("original", [AttnProcessor, AttnProcessor2_0])
    def test_processors_are_the_same_objects(self, unet: Any, original: type) -> None:
        unet.set_attn_processor(original())
        check_reversal(unet, lambda: call(unet))
        assert {type(p) for p in unet.attn_processors.values()} == {original}

    def test_fused_projections(self, unet: Any) -> None:
        unet.fuse_qkv_projections()
        check_reversal(unet, lambda: call(unet))

    def test_lora(self, unet: Any) -> None:
        plain = call(unet)
        add_lora(unet)
        assert not torch.equal(call(unet), plain)
        check_reversal(unet, lambda: call(unet))

    def test_lora_counts_while_patched(self, unet: Any) -> None:
        apply_patch(unet, **AGENTS)
        plain = call(unet)
        add_lora(unet)
        assert not torch.equal(call(unet), plain)
        unet.disable_adapters()
        torch.testing.assert_close(call(unet), plain)

    def test_ip_adapter_before_the_patch(self, pipe: Any) -> None:
        load_ip_adapter(pipe)
        kinds = {type(p) for n, p in pipe.unet.attn_processors.items() if "attn2" in n}
        assert kinds == {IPAdapterAttnProcessor2_0}
        check_reversal(pipe.unet, lambda: with_image(pipe))

    def test_ip_adapter_after_the_patch(self, pipe: Any, tmp_path: Path) -> None:
        """diffusers then makes the processors of self-attention anew from their class."""
        expected = tiny_pipeline(tmp_path)
        load_ip_adapter(expected)
        base = with_image(expected)
        kinds = [type(p) for p in expected.unet.attn_processors.values()]
        apply_patch(pipe, **AGENTS)
        load_ip_adapter(pipe)
        moved = with_image(pipe)
        apply_patch(expected, **AGENTS)
        assert torch.equal(moved, with_image(expected))
        assert not torch.equal(moved, base)
        remove_patch(pipe)
        assert torch.equal(with_image(pipe), base)
        assert not patched_layers(pipe.unet)
        assert [type(p) for p in pipe.unet.attn_processors.values()] == kinds

    def test_ip_adapter_unloaded_while_patched(self, pipe: Any) -> None:
        base = latents(pipe)
        load_ip_adapter(pipe)
        apply_patch(pipe, **AGENTS)
        pipe.unload_ip_adapter()
        assert not torch.equal(latents(pipe), base)
        remove_patch(pipe)
        assert torch.equal(latents(pipe), base)

    def test_processors_that_came_later_stay(self, unet: Any) -> None:
        apply_patch(unet, **AGENTS)
        name, module = patched_layers(unet)[0]
        newer = AttnProcessor()
        module.set_processor(newer)
        call(unet)
        remove_patch(unet)
        assert unet.attn_processors[f"{name}.processor"] is newer

    def test_after_a_run_that_raised(self, pipe: Any) -> None:
        before, base = snapshot(pipe.unet), latents(pipe)
        apply_patch(pipe, **AGENTS)
        with pytest.raises(ZeroDivisionError):
            latents(pipe, callback_on_step_end=lambda *_: 1 / 0)
        with pytest.raises(RuntimeError):
            pipe.unet(torch.zeros(1, 5, 16, 16), 0, torch.zeros(1, 7, WIDTH))
        remove_patch(pipe)
        check_unchanged(pipe.unet, before)
        assert torch.equal(latents(pipe), base)

    def test_removing_nothing(self, unet: Any) -> None:
        before = snapshot(unet)
        assert remove_patch(unet) is unet
        check_unchanged(unet, before)

    def test_removing_by_the_unet_or_the_pipeline(self, pipe: Any) -> None:
        before = snapshot(pipe.unet)
        remove_patch(apply_patch(pipe, **AGENTS).unet)
        check_unchanged(pipe.unet, before)
        apply_patch(pipe.unet, **AGENTS)
        assert remove_patch(pipe) is pipe
        check_unchanged(pipe.unet, before)

    @pytest.mark.cell("The pipeline as a whole")
    @pytest.mark.parametrize(
        "copied",
        [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
        ids=["copy.deepcopy", "pickle"],
    )
    def test_copies_are_patched_and_stand_alone(self, pipe: Any, copied: Any) -> None:
        plain, keys = latents(pipe), latents(apply_patch(pipe, "faithful", min_tokens=0))
        other = copied(pipe)
        assert torch.equal(latents(other), keys)
        remove_patch(other)
        assert torch.equal(latents(other), plain)
        assert torch.equal(latents(pipe), keys)

    @pytest.mark.cell(
        "The pipeline as a whole",
        name="from_pipe",
        note="both share the patch; AnimateDiff makes a UNet of its own, and a warning says that "
        "it is not patched",
    )
    def test_another_pipeline_is_made_from_a_patched_one(self, pipe: Any) -> None:
        expected = latents(apply_patch(pipe, "faithful", min_tokens=0))
        other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        assert other.unet is pipe.unet
        assert inspect_patch(other).layers == inspect_patch(pipe).layers
        again = StableDiffusionPipeline.from_pipe(other)
        again.set_progress_bar_config(disable=True)
        assert torch.equal(latents(again), expected)

    @pytest.mark.slow
    def test_a_unet_compiled_before_is_patched(self, unet: Any) -> None:
        compiled = torch.compile(unet, backend="eager")
        plain = call(compiled)
        keys = call(apply_patch(compiled, "faithful", min_tokens=0))
        assert not torch.allclose(keys, plain, atol=1e-3)
        torch.testing.assert_close(keys, call(unet), rtol=1e-4, atol=1e-4)
        remove_patch(compiled)
        torch.testing.assert_close(call(compiled), plain, rtol=1e-4, atol=1e-4)

    def test_a_processor_put_back_after_removal_does_no_harm(self, unet: Any) -> None:
        plain = call(unet)
        apply_patch(unet, "faithful", min_tokens=0)
        kept = {name: module.processor for name, module in patched_layers(unet)}
        remove_patch(unet)
        for name, theirs in kept.items():
            assert isinstance(theirs, AgentAttnProcessor)
            unet.get_submodule(name).set_processor(theirs)
        assert torch.equal(call(unet), plain)
        keys = call(apply_patch(unet, "faithful", min_tokens=0))
        assert not torch.equal(keys, plain)
        remove_patch(unet)
        assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}

    def test_hooks_of_the_user_stay(self, unet: Any) -> None:
        calls = []
        unet.register_forward_pre_hook(lambda *_: calls.append("user"))
        check_reversal(unet, lambda: call(unet))
        assert len(calls) == 4  # one of each of check_reversal


@pytest.mark.parametrize(
    "spoil",
    [
        lambda unet: setattr(unet.down_blocks[0], "left_behind", 1),
        lambda unet: unet.mid_block.register_forward_hook(lambda *_: None),
        lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
        lambda unet: delattr(unet, "encoder_hid_proj"),
        lambda unet: setattr(unet, "conv_out", nn.Identity()),
    ],
    ids=["attribute", "hook", "processor", "missing", "module"],
)
def test_what_is_left_behind_is_seen(unet: Any, spoil: Callable[[Any], Any]) -> None:
    before = snapshot(unet)
    check_unchanged(unet, before)
    spoil(unet)
    with pytest.raises(AssertionError, match="differ"):
        check_unchanged(unet, before)


class TestApply:
    def test_returns_what_it_was_given(self, pipe: Any, unet: Any) -> None:
        assert apply_patch(pipe) is pipe
        assert apply_patch(unet) is unet

    def test_twice_is_once_with_the_newer(self, unet: Any) -> None:
        before = snapshot(unet)
        once = tiny_unet()
        apply_patch(once, method="merge", ratio=0.3, min_tokens=0)
        apply_patch(unet, max_downsample=4, sx=4, sy=4, min_tokens=0)
        apply_patch(unet, method="merge", ratio=0.3, min_tokens=0)
        assert torch.equal(call(unet), call(once))
        names = [name for name, _ in patched_layers(unet)]
        assert names == [name for name, _ in patched_layers(once)]
        for (_, module), (_, other) in zip(unet.named_modules(), once.named_modules(), strict=True):
            assert list(vars(module)) == list(vars(other))
            assert len(module._forward_pre_hooks) == len(other._forward_pre_hooks)
        remove_patch(unet)
        check_unchanged(unet, before)

    def test_default_is_the_command_s(self, pipe: Any) -> None:
        large = {"size": (64, 64)}  # enough tokens for any patch
        expected = latents(apply_patch(pipe, DEFAULT_SCHEDULE), **large)
        assert torch.equal(latents(apply_patch(pipe), **large), expected)
        assert not torch.equal(latents(apply_patch(pipe, "paper"), **large), expected)

    def test_overrides_change_a_schedule(self, pipe: Any, tmp_path: Path) -> None:
        paper = Schedule.preset("paper")
        changes = {"ratio": 0.2, "min_tokens": 0}
        expected = latents(apply_patch(pipe, paper.override(**changes)))
        assert torch.equal(latents(apply_patch(pipe, "paper", **changes)), expected)
        path = tmp_path / "mine.yaml"
        path.write_text(paper.to_yaml())
        assert torch.equal(latents(apply_patch(pipe, path, **changes)), expected)

    @pytest.mark.parametrize("changes", [{"sx": 4}, {"max_downsample": 2}, {"cache_interval": 2}])
    def test_overrides_alone_change_the_default_schedule(
        self, pipe: Any, changes: dict[str, Any]
    ) -> None:
        changes = changes | {"min_tokens": 0}
        expected = latents(apply_patch(pipe, Schedule.preset(DEFAULT_SCHEDULE).override(**changes)))
        assert torch.equal(latents(apply_patch(pipe, **changes)), expected)

    def test_a_method_makes_one_phase(self, pipe: Any) -> None:
        settings = {"ratio": 0.2, "min_tokens": 0}
        one = latents(apply_patch(pipe, Schedule(phases=[Merge(**settings)])))
        assert torch.equal(latents(apply_patch(pipe, method="merge", **settings)), one)

    def test_parameters_of_another_method_need_it(self, unet: Any) -> None:
        says = r"no phase .* reads 'ratio', a parameter of agent and merge; .* give method= as well"
        with pytest.raises(ScheduleError, match=says):
            apply_patch(unet, ratio=0.2)
        assert not patched_layers(unet)

    def test_touches_self_attention_of_this_unet_alone(self, pipe: Any, unet: Any) -> None:
        before, base = snapshot(unet), call(unet)
        text, vae = snapshot(pipe.text_encoder), snapshot(pipe.vae)
        attn2 = {n: p for n, p in pipe.unet.attn_processors.items() if "attn2" in n}
        apply_patch(pipe, **AGENTS)
        check_unchanged(unet, before)
        check_unchanged(pipe.text_encoder, text)
        check_unchanged(pipe.vae, vae)
        assert torch.equal(call(unet), base)
        assert {n: p for n, p in pipe.unet.attn_processors.items() if "attn2" in n} == attn2
        assert all(name.endswith("attn1") for name, _ in patched_layers(pipe.unet))

    @pytest.mark.parametrize(
        ("reach", "expected"), [(None, {1}), (1, {1}), (2, {1, 2}), (4, {1, 2, 4}), (8, {1, 2, 4})]
    )
    def test_reach(self, unet: Any, reach: int | None, expected: set[int]) -> None:
        apply_patch(unet, max_downsample=reach)
        assert {getattr(m, LAYER).downsample for _, m in patched_layers(unet)} == expected

    @pytest.mark.parametrize("failing", [1, 3])
    @pytest.mark.parametrize("how", [apply_patch, lambda *a, **k: patched(*a, **k).__enter__()])
    def test_half_failed_rolls_back(
        self, unet: Any, how: Any, failing: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before, calls = snapshot(unet), []
        install = Attention.set_processor

        def fail_once(self: Attention, processor: Any) -> None:
            calls.append(processor)
            if len(calls) == failing:
                raise MemoryError("half way")
            install(self, processor)

        monkeypatch.setattr(Attention, "set_processor", fail_once)
        with pytest.raises(MemoryError, match="half way"):
            how(unet, **AGENTS)
        check_unchanged(unet, before)
        expected = call(apply_patch(unet, **AGENTS))
        calls.clear()
        with pytest.raises(MemoryError, match="half way"):
            how(unet, method="keys")
        assert torch.equal(call(unet), expected), "the earlier patch is back"

    @pytest.mark.slow
    def test_compiled_unet_stands_for_what_it_wraps(self, unet: Any) -> None:
        compiled = torch.compile(unet)
        before = snapshot(unet)
        apply_patch(compiled, **AGENTS)
        assert patched_layers(unet)
        remove_patch(compiled)
        check_unchanged(unet, before)

    def test_weights_are_saved_and_loaded_as_ever(self, unet: Any, tmp_path: Path) -> None:
        names = list(unet.state_dict())
        apply_patch(unet, **AGENTS)
        assert list(unet.state_dict()) == names
        unet.save_pretrained(tmp_path)
        loaded = type(unet).from_pretrained(tmp_path)
        assert not patched_layers(loaded)
        assert torch.equal(call(loaded), call(remove_patch(unet)))


class TestPatched:
    @pytest.mark.parametrize("what", ["pipe", "unet"])
    def test_restores_the_unpatched_model(self, what: str, request: pytest.FixtureRequest) -> None:
        x = request.getfixturevalue(what)
        unet = getattr(x, "unet", x)
        before, base = snapshot(unet), call(unet)
        with patched(x, **AGENTS) as inside:
            assert inside is x
            assert not torch.equal(call(unet), base)
        check_unchanged(unet, before)

    @pytest.mark.parametrize("raises", [False, True])
    def test_restores_the_earlier_patch(self, pipe: Any, raises: bool) -> None:
        apply_patch(pipe, Schedule(phases=[Agent(until_step=1, **AGENTS), Keys(min_tokens=0)]))
        expected = latents(pipe)
        names = [name for name, _ in patched_layers(pipe.unet)]
        try:
            with (
                patched(pipe, method="merge", min_tokens=0),
                patched(pipe, method="keys", sx=4, min_tokens=0),
            ):
                assert not torch.equal(latents(pipe), expected)
                if raises:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert raises
        assert torch.equal(latents(pipe), expected)
        assert [name for name, _ in patched_layers(pipe.unet)] == names

    def test_restores_after_an_error_inside(self, unet: Any) -> None:
        before = snapshot(unet)
        with pytest.raises(RuntimeError), patched(unet, **AGENTS):
            call(unet, size=(0, 0))
        check_unchanged(unet, before)

    @pytest.mark.parametrize("wrong", [{"ratio": 2}, {"schedule": "none"}, {"schedule": 3}])
    def test_a_wrong_schedule_changes_nothing(self, unet: Any, wrong: dict[str, Any]) -> None:
        apply_patch(unet, **AGENTS)
        before = snapshot(unet)
        with pytest.raises(ScheduleError), patched(unet, **wrong):
            raise AssertionError("not reached")
        check_unchanged(unet, before)


class TestFallsBack:
    """What the processor was not made for goes to the one before it, bit for bit."""

    @pytest.fixture
    def layer(self, unet: Any) -> Attention:
        apply_patch(unet, **AGENTS)
        call(unet)  # the runtime stands at a step on 16×16 latents
        return patched_layers(unet)[0][1]

    @pytest.mark.parametrize(
        ("tokens", "inputs"),
        [
            (256, {"attention_mask": torch.zeros(2, 1, 256)}),
            (256, {"attention_mask": torch.full((2, 1, 256), -1e4).triu(9)}),
            (256, {"encoder_hidden_states": torch.linspace(-1, 1, 2 * 9 * 16).view(2, 9, 16)}),
            (255, {}),
            (64, {}),
        ],
        ids=["zero mask", "mask", "cross-attention", "odd count", "another resolution"],
    )
    def test_to_the_original(self, layer: Attention, tokens: int, inputs: dict[str, Any]) -> None:
        x = torch.linspace(-2, 2, 2 * tokens * 16).sin().view(2, tokens, 16)
        expected = getattr(layer, LAYER).original(layer, x, **inputs)
        assert torch.equal(layer(x, **inputs), expected)

    def test_grids_of_channels_first(self, unet: Any, layer: Attention) -> None:
        call(unet, size=(4, 4))  # as many tokens as channels
        x = torch.linspace(-2, 2, 16 * 16).sin().view(1, 16, 4, 4)
        assert torch.equal(layer(x), getattr(layer, LAYER).original(layer, x))

    def test_control_the_plain_call_is_patched(self, layer: Attention) -> None:
        x = torch.linspace(-2, 2, 2 * 256 * 16).sin().view(2, 256, 16)
        assert not torch.equal(layer(x), getattr(layer, LAYER).original(layer, x))

    def test_layers_called_before_any_unet_call(self, unet: Any) -> None:
        apply_patch(unet, **AGENTS)
        layer = patched_layers(unet)[0][1]
        x = torch.ones(1, 256, 16)
        assert torch.equal(layer(x), getattr(layer, LAYER).original(layer, x))


def _patched(unet: Any) -> Any:
    return apply_patch(unet, **AGENTS)


def _set_default(unet: Any) -> None:
    unet.set_default_attn_processor()


def _set_one(unet: Any) -> None:
    unet.set_attn_processor(AttnProcessor2_0())


def _set_each(unet: Any) -> None:
    unet.set_attn_processor({name: AttnProcessor() for name in unet.attn_processors})


def _set_as_read(unet: Any) -> None:
    unet.set_attn_processor(unet.attn_processors)


def _fuse(unet: Any) -> None:
    unet.fuse_qkv_projections()


def _slice_and_back(unet: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a patched UNet it gives way, and says so
        unet.set_attention_slice(1)
    unet.set_attention_slice(None)


class Doubled(AttnProcessor2_0):
    """Computes something that agentsd cannot know of."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().__call__(*args, **kwargs)


class TestOthersSetProcessors:
    """The order of the patch and of processors set by others makes no difference."""

    @pytest.mark.parametrize(
        "change", [_set_default, _set_one, _set_each, _set_as_read, _fuse, _slice_and_back]
    )
    def test_the_patch_goes_on_over_those_it_can_stand_in_for(self, change: Any) -> None:
        before, after, plain = tiny_unet(), tiny_unet(), tiny_unet()
        change(plain)
        base = call(plain)
        change(before)
        expected = call(_patched(before))
        assert not torch.allclose(expected, base, atol=1e-4)
        change(_patched(after))
        kinds = [type(p) for p in plain.attn_processors.values()]
        assert [type(p) for p in after.attn_processors.values()] == kinds
        assert torch.equal(call(after), expected)
        assert inspect_patch(after) == inspect_patch(before)
        remove_patch(after)
        assert torch.equal(call(after), base)
        assert [type(p) for p in after.attn_processors.values()] == kinds

    def test_it_gives_way_to_others_and_says_so(self, unet: Any) -> None:
        plain = tiny_unet()
        plain.set_attn_processor(Doubled())
        doubled = Doubled()
        keys = call(apply_patch(unet, "faithful", min_tokens=0))
        with pytest.warns(
            UserWarning, match=r"steps aside for Doubled.*set_default_attn_processor"
        ):
            unet.set_attn_processor(doubled)
        with pytest.warns(
            UserWarning, match="does nothing: its processors were replaced with Doubled"
        ):
            assert torch.equal(call(unet, timestep=999), call(plain, timestep=999))
        layers = inspect_patch(unet).layers
        assert not any(layer.patched for layer in layers)
        unet.set_attn_processor(AttnProcessor2_0())
        assert torch.equal(call(unet), keys)
        with pytest.warns(UserWarning, match="steps aside for Doubled"):
            unet.set_attn_processor(doubled)
        remove_patch(unet)
        assert {id(p) for p in unet.attn_processors.values()} == {id(doubled)}
        assert torch.equal(call(unet), call(plain))

    def test_removal_leaves_what_was_set_and_nothing_else(self, unet: Any) -> None:
        """As if the patch had never been there, attribute for attribute."""
        _patched(unet)
        newer = AttnProcessor()
        unet.set_attn_processor(newer)
        remove_patch(unet)
        assert {id(p) for p in unet.attn_processors.values()} == {id(newer)}
        before = snapshot(unet)
        unet.set_attn_processor(newer)
        check_unchanged(unet, before)
        assert not any("set_processor" in vars(module) for module in unet.modules())

    def test_a_copy_has_its_processors_set_in_the_copy_alone(self, unet: Any) -> None:
        keys = call(apply_patch(unet, "faithful", min_tokens=0))
        for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
            with pytest.warns(UserWarning, match="steps aside"):
                other.set_attn_processor(Doubled())
            assert not torch.equal(call(other), keys)
            assert torch.equal(call(unet), keys)

    def test_guidance_that_borrows_layers_gives_them_back(self, unet: Any) -> None:
        """PAG puts its processors past set_processor and restores those it read."""
        keys = call(apply_patch(unet, "faithful", min_tokens=0))
        kept = unet.attn_processors
        for _, attn in patched_layers(unet):
            attn.processor = Doubled()
        assert not torch.equal(call(unet), keys)
        unet.set_attn_processor(kept)
        assert torch.equal(call(unet), keys)


class _Holder:
    """Has parts, as a pipeline has."""

    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)


class TestErrors:
    @pytest.mark.parametrize(
        ("x", "says"),
        [
            (None, "no UNet to patch in NoneType"),
            ("stable-diffusion", "no UNet to patch in str"),
            (3, "no UNet to patch in int"),
            (nn.Linear(2, 2), "no UNet to patch in Linear"),
            (_Holder(transformer=nn.Linear(2, 2)), "whose model is a transformer (Linear)"),
            (_Holder(unet=nn.Linear(2, 2)), "whose unet is a Linear"),
            (_Holder(unet=None), "no UNet to patch in _Holder"),
            (tiny_unet, "no UNet to patch in function"),
            (type(tiny_unet()), "no UNet to patch in"),
        ],
    )
    @pytest.mark.parametrize("verb", [apply_patch, remove_patch, inspect_patch])
    def test_no_unet(self, verb: Callable[[Any], Any], x: Any, says: str) -> None:
        with pytest.raises(PatchError) as caught:
            verb(x)
        assert says in str(caught.value)
        assert "pass the pipeline or its unet" in str(caught.value)

    def test_a_pipeline_of_another_kind(self) -> None:
        from diffusers import DDIMScheduler, DiTPipeline

        pipe = DiTPipeline(transformer=None, vae=None, scheduler=DDIMScheduler())
        with pytest.raises(PatchError, match="DiTPipeline"):
            apply_patch(pipe)

    def test_processors_of_others(self, unet: Any) -> None:
        class Theirs(AttnProcessor2_0):
            pass

        unet.set_attn_processor(Theirs())
        before = snapshot(unet)
        with pytest.raises(PatchError) as caught:
            apply_patch(unet)
        assert "no self-attention layer to patch" in str(caught.value)
        assert "7 × its processor is not one of diffusers' own (Theirs)" in str(caught.value)
        check_unchanged(unet, before)

    def test_one_processor_of_another_is_left_alone(self, unet: Any) -> None:
        class Theirs(AttnProcessor2_0):
            pass

        theirs = Theirs()
        unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.set_processor(theirs)
        apply_patch(unet)
        assert theirs in unet.attn_processors.values()
        assert len(patched_layers(unet)) == 2

    def test_sdxl_has_nothing_at_downsample_1(self) -> None:
        unet = sdxl_unet()
        before = snapshot(unet)
        with pytest.raises(PatchError, match=r"max_downsample=1 matches no layer.* downsample 2"):
            apply_patch(unet, max_downsample=1)
        check_unchanged(unet, before)
        apply_patch(unet)
        assert {getattr(m, LAYER).downsample for _, m in patched_layers(unet)} == {2}
        assert len(patched_layers(unet)) == 3

    @pytest.mark.parametrize(
        ("schedule", "says"),
        [
            ("papre", "no preset schedule 'papre'"),
            (3, "got int"),
            ({"phases": []}, "got dict"),
            ([Agent()], "got list"),
            ("none/here.yaml", "cannot be read"),
        ],
    )
    def test_wrong_schedule(self, unet: Any, schedule: Any, says: str) -> None:
        apply_patch(unet, **AGENTS)
        before = snapshot(unet)
        with pytest.raises(ScheduleError, match=says):
            apply_patch(unet, schedule)
        check_unchanged(unet, before)

    def test_unknown_setting(self, unet: Any) -> None:
        with pytest.raises(ScheduleError, match="did you mean 'agent_ratio'"):
            apply_patch(unet, agentratio=0.9)
        with pytest.raises(ScheduleError, match="no phase of this schedule reads 'select'"):
            apply_patch(unet, "paper", select="cycle")


def test_processors_can_be_pickled_and_made_anew() -> None:
    assert isinstance(pickle.loads(pickle.dumps(AgentAttnProcessor())), AgentAttnProcessor)


def test_two_pipelines_over_one_process(pipe: Any, tmp_path: Path) -> None:
    """Each with a patch of its own, in turns."""
    other = tiny_pipeline(tmp_path)
    expected = [
        latents(apply_patch(pipe, "paper", min_tokens=0)),
        latents(apply_patch(other, "faithful", min_tokens=0)),
    ]
    for _ in range(2):
        assert torch.equal(latents(pipe), expected[0])
        assert torch.equal(latents(other), expected[1])
    assert isinstance(Runtime, type)
    seen = watch(pipe.unet)
    latents(other)
    assert not seen
