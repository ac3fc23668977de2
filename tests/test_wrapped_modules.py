"""Light steps beside those who wrap modules, too: offloading, LoRA, compilers, other caches."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from DeepCache import DeepCacheSDHelper
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from reversal import check_unchanged, snapshot
from tiny_adapters import add_lora
from tiny_models import (
    build,
    latents,
    patched_layers,
    smallest_unet,
    tiny_pipeline,
    tiny_unet,
    watch,
)
from tiny_pipelines import BLOCKS
from torch import Tensor, nn

from agentsd import PatchError, apply_patch, inspect_patch, patched, remove_patch
from agentsd.patching.light_steps import StandIn
from agentsd.patching.patch import patch_of

pytestmark = pytest.mark.slow

STEPS, EXPECTED = 8, "wwlwlwlw"

FOUR_LEVELS: dict[str, Any] = {
    "block_out_channels": (16, 32, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}
"""The levels of Stable Diffusion 1.5."""


def balanced(pipe: Any, branch: int = 0) -> Any:
    return apply_patch(pipe, "balanced", min_tokens=0, cache_branch=branch)


def run(pipe: Any, seed: int = 1) -> Tensor:
    return latents(pipe, STEPS, seeds=[seed])


def kinds(pipe: Any) -> tuple[str, Tensor]:
    """Whole and light calls of a run, and its latents."""
    unet = getattr(pipe.unet, "_orig_mod", pipe.unet)
    seen = watch(unet)
    found = run(pipe)
    return "".join("wl"[step.forecast is not None] for step in seen), found


def group_offload(pipe: Any, blocks: int = 1, **more: Any) -> None:
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=blocks,
        **more,
    )


def leaf_offload(pipe: Any) -> None:
    pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def sequential_offload(pipe: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(pipe.unet, torch.device("cpu"))


def model_offload(pipe: Any) -> None:
    """As a pipeline does: its hooks are taken away and set anew after each run."""
    pipe.enable_model_cpu_offload(device="cpu")


def device_map(pipe: Any) -> None:
    unet = pipe.unet
    parts = [
        part
        for name, module in unet.named_children()
        for part in (
            [f"{name}.{i}" for i in range(len(module))]
            if isinstance(module, nn.ModuleList)
            else [name]
        )
    ]
    dispatch_model(unet, dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)


OFFLOADS: dict[str, Callable[[Any], None]] = {
    "group offload by blocks": group_offload,
    "group offload by leaves": leaf_offload,
    "sequential offload": sequential_offload,
    "model offload": model_offload,
    "device map": device_map,
}


@pytest.mark.cell("Light steps, before the patch or after it")
@pytest.mark.parametrize("name", OFFLOADS)
def test_offloading(name: str, tmp_path: Path) -> None:
    for branch in (0, -1):
        pipe = balanced(tiny_pipeline(tmp_path), branch)
        expected = run(pipe)
        remove_patch(pipe)
        plain = run(pipe)
        before, after = tiny_pipeline(tmp_path), tiny_pipeline(tmp_path)
        OFFLOADS[name](before)
        balanced(before, branch)
        OFFLOADS[name](balanced(after, branch))
        for pipe in (before, after):
            for _ in range(2):
                found, x = kinds(pipe)
                assert found == EXPECTED
                assert torch.equal(x, expected)
            remove_patch(pipe)
            assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize(("blocks", "preset"), [(2, "balanced"), (4, "balanced"), (2, "turbo")])
def test_groups_whose_leader_is_left_out(tmp_path: Path, blocks: int, preset: str) -> None:
    """It brings in the weights of the others, which are not there before."""
    pipe = tiny_pipeline(tmp_path, tiny_unet(**FOUR_LEVELS))
    with patched(pipe, preset, min_tokens=0):
        expected = latents(pipe, 12)
    group_offload(
        pipe,
        blocks,
        offload_device=torch.device("cpu"),
        offload_to_disk_path=tempfile.mkdtemp(dir=tmp_path),
    )
    apply_patch(pipe, preset, min_tokens=0)
    assert torch.equal(latents(pipe, 12), expected)


def lora_weights() -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        add_lora(unet := tiny_unet())
    return {f"unet.{k}": v for k, v in get_peft_model_state_dict(unet).items()}


LORA: dict[str, Callable[[Any], None]] = {
    "load": lambda pipe: pipe.load_lora_weights(lora_weights(), adapter_name="b"),
    "unload": lambda pipe: pipe.unload_lora_weights(),
    "disable": lambda pipe: pipe.disable_lora(),
    "delete": lambda pipe: pipe.delete_adapters("a"),
}


@pytest.mark.parametrize(
    ("change", "branch", "offload"),
    [
        *((change, 0, group_offload) for change in LORA),
        ("load", 1, group_offload),
        ("load", -1, group_offload),
        ("load", 0, leaf_offload),
    ],
)
def test_lora_beside_offloading(
    tmp_path: Path, change: str, branch: int, offload: Callable[[Any], None]
) -> None:
    """diffusers takes its hooks away for it, and sets them anew."""
    made = []
    for offloaded in (False, True):
        pipe = tiny_pipeline(tmp_path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            pipe.load_lora_weights(lora_weights(), adapter_name="a")
            if offloaded:
                offload(pipe)
            balanced(pipe, branch)
            run(pipe)
            LORA[change](pipe)
        found, x = kinds(pipe)
        assert found == EXPECTED
        made.append(x)
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("offload", "error", "branch"),
    [
        (None, KeyboardInterrupt, 0),
        (None, RuntimeError, -1),
        (group_offload, KeyboardInterrupt, 0),
        (group_offload, RuntimeError, 0),
        (model_offload, KeyboardInterrupt, -1),
    ],
)
def test_stopped_within_a_light_step(
    pipe: Any, offload: Callable[[Any], None] | None, error: type[BaseException], branch: int
) -> None:
    plain, before = run(pipe), snapshot(pipe.unet)
    balanced(pipe, branch)
    expected = run(pipe)
    if offload is not None:
        offload(pipe)
    unet = pipe.unet

    def stop(*_: Any) -> None:
        patch = patch_of(unet)
        step = patch.runtime.step if patch is not None else None
        if step is not None and step.forecast is not None:
            raise error

    hook = unet.conv_out.register_forward_pre_hook(stop)
    with pytest.raises(error):
        run(pipe, 5)
    if error is RuntimeError:
        assert not any(isinstance(vars(m).get("forward"), StandIn) for m in unet.modules())
    hook.remove()
    assert torch.equal(run(pipe), expected), "the next run is as ever"
    hook = unet.conv_out.register_forward_pre_hook(stop)
    with pytest.raises(error):
        run(pipe, 5)
    hook.remove()
    remove_patch(pipe)
    if offload is None:
        check_unchanged(unet, before)
    assert torch.equal(run(pipe), plain)
    assert torch.equal(run(balanced(pipe, branch)), expected)


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def compile_blocks(pipe: Any, *names: tuple[str, int]) -> None:
    for name, number in names:
        blocks = getattr(pipe.unet, name)
        blocks[number] = compiled(blocks[number])


def compile_layers(pipe: Any) -> None:
    last = pipe.unet.up_blocks[-1]
    last.resnets[0] = compiled(last.resnets[0])
    last.attentions[1] = compiled(last.attentions[1])


def compile_mid_block(pipe: Any) -> None:
    pipe.unet.mid_block = compiled(pipe.unet.mid_block)


COMPILED: dict[str, Callable[[Any], None]] = {
    "repeated blocks": lambda pipe: pipe.unet.compile_repeated_blocks(backend="eager"),
    "the last up block": lambda pipe: compile_blocks(pipe, ("up_blocks", -1)),
    "the first down block": lambda pipe: compile_blocks(pipe, ("down_blocks", 0)),
    "all blocks": lambda pipe: compile_blocks(
        pipe, *((name, i) for name in ("down_blocks", "up_blocks") for i in range(2))
    ),
    "the middle": compile_mid_block,
    "layers of the last block": compile_layers,
    "a block in place": lambda pipe: pipe.unet.up_blocks[-1].compile(backend="eager"),
}


@pytest.mark.parametrize(
    ("name", "first", "branch"),
    [
        *((name, "compile", 0) for name in COMPILED),
        ("all blocks", "patch", 0),
        ("the last up block", "patch", -1),
    ],
)
def test_parts_compiled_one_by_one(tmp_path: Path, name: str, first: str, branch: int) -> None:
    torch._dynamo.reset()
    pipe = tiny_pipeline(tmp_path, tiny_unet(**BLOCKS))
    expected = run(balanced(pipe, branch))
    remove_patch(pipe)
    if first == "compile":
        COMPILED[name](pipe)
    balanced(pipe, branch)
    if first == "patch":
        COMPILED[name](pipe)
    found, x = kinds(pipe)
    assert found == EXPECTED
    assert sum(inspect_patch(pipe, num_inference_steps=STEPS).whole_steps) == found.count("w")
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.cell(
    "Light steps, before the patch or after it",
    name="DeepCache",
    verdict="refused",
    note="it leaves out the same layers; enabled after the patch, a warning says that each step is "
    "computed whole",
)
@pytest.mark.parametrize("preset", ["balanced"])
def test_deepcache_is_refused(pipe: Any, preset: str) -> None:
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    alone = run(pipe)
    with pytest.raises(PatchError, match=r"DeepCache skips the same layers; .* disable\(\)"):
        apply_patch(pipe, preset, min_tokens=0)
    assert torch.equal(run(pipe), alone)
    helper.disable()
    apply_patch(pipe, preset, min_tokens=0)
    expected = run(pipe)
    helper.enable()
    with pytest.warns(UserWarning, match="each step in full: DeepCache"):
        found, _ = kinds(pipe)
    assert set(found) == {"w"}
    assert all(inspect_patch(pipe, num_inference_steps=STEPS).whole_steps)
    helper.disable()
    found, x = kinds(pipe)
    assert "l" in found
    assert torch.equal(x, expected)


@pytest.mark.parametrize("wrap", ["PEFT", "data parallel", "compiled", "PEFT, compiled"])
def test_a_wrapper_stands_for_the_unet_in_it(pipe: Any, wrap: str) -> None:
    plain, unet = run(pipe), balanced(pipe).unet
    expected = run(pipe)
    lora = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=True)  # no change at first
    outer = get_peft_model(unet, lora) if wrap.startswith("PEFT") else unet
    if wrap == "data parallel":
        outer = nn.DataParallel(outer)
    if wrap.endswith("compiled"):
        outer = torch.compile(outer, backend="eager")
    assert patched_layers(unet)
    torch.testing.assert_close(run(pipe), expected, rtol=1e-4, atol=1e-4)
    remove_patch(outer)
    assert not patched_layers(unet)
    torch.testing.assert_close(run(pipe), plain, rtol=1e-4, atol=1e-4)
    apply_patch(outer, "balanced", min_tokens=0)
    assert patched_layers(unet)
    remove_patch(outer)


def test_blocks_left_out_of_order(tmp_path: Path) -> None:
    """As in cells of a notebook, or generators that end when they are collected."""
    pipe = tiny_pipeline(tmp_path, smallest_unet())
    unet, before = pipe.unet, snapshot(pipe.unet)
    schedules = [{"method": "keys", "sx": n, "min_tokens": 0} for n in (2, 3, 4)]
    alone = []
    for schedule in schedules:
        with patched(pipe, **schedule):
            alone.append(run(pipe))
    for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1), (0, 2, 1), (2, 1, 0)):
        blocks = [patched(pipe, **schedule) for schedule in schedules]
        for block in blocks:
            block.__enter__()
        inside = {0, 1, 2}
        for number in order:
            blocks[number].__exit__(None, None, None)
            inside.remove(number)
            if inside:
                assert torch.equal(run(pipe), alone[max(inside)]), "that of the innermost left"
        check_unchanged(unet, before)


def test_a_patch_beneath_blocks_comes_back(pipe: Any) -> None:
    apply_patch(pipe, method="keys", sx=4, min_tokens=0)
    expected = run(pipe)
    one, other = patched(pipe, "fast", min_tokens=0), patched(pipe, "paper", min_tokens=0)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    other.__exit__(None, None, None)
    assert torch.equal(run(pipe), expected)


@pytest.mark.parametrize("preset", ["faithful", "balanced"])
def test_a_model_made_of_a_patched_one_is_not_patched_and_says_so(
    tmp_path: Path, preset: str
) -> None:
    """AnimateDiff makes a UNet of its own from that of a pipeline."""
    adapter = build(
        lambda: diffusers.MotionAdapter(
            block_out_channels=(16, 32),
            motion_layers_per_block=1,
            motion_norm_num_groups=2,
            motion_num_attention_heads=2,
            motion_max_seq_length=8,
        )
    )
    pipe = apply_patch(tiny_pipeline(tmp_path, tiny_unet(**BLOCKS)), preset, min_tokens=0)
    with pytest.warns(UserWarning, match="stays on the original. Call apply_patch on the new"):
        other = diffusers.AnimateDiffPipeline.from_pipe(pipe, motion_adapter=adapter)
    assert not any(layer.patched for layer in inspect_patch(other).layers)
    assert patched_layers(apply_patch(other, preset, min_tokens=0).unet)
    remove_patch(pipe)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*apply_patch")
        pipe.unet.state_dict()
        diffusers.AnimateDiffPipeline.from_pipe(pipe, motion_adapter=adapter)


@pytest.mark.sample
def test_hooks_of_a_device_map_taken_away(pipe: Any) -> None:
    expected = run(balanced(pipe))
    remove_patch(pipe)
    device_map(pipe)
    balanced(pipe)
    for _ in range(2):
        found, x = kinds(pipe)
        assert found == EXPECTED
        assert torch.equal(x, expected)
        remove_hook_from_submodules(pipe.unet)
