"""The paper's vision models: counts, names and results as published, on timm's interface."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from independent import import_timm
from sampling import with_samples
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from vision_golden import filled, images

timm = import_timm()

import agentsd.nn  # noqa: E402
from agentsd.errors import ModelError  # noqa: E402
from agentsd.nn import convert_published, models  # noqa: E402, F401

pytestmark = pytest.mark.slow

GOLDEN = json.loads((Path(__file__).parent / "golden" / "vision.json").read_text("utf-8"))

# Parameters, of them agent biases, and GMAC, counted with the published code.
PUBLISHED = {
    ("agent_deit_tiny", 224): (6_015_640, 275_184, 1.168),
    ("agent_deit_small", 224): (22_647_112, 550_368, 4.427),
    ("agent_deit_base", 224): (87_204_904, 606_528, 17.527),
    ("agent_deit_small", 448): (23_070_472, 747_936, 17.642),
    ("agent_pvt_tiny", 224): (11_570_352, 193_480, 1.986),
    ("agent_pvt_small", 224): (20_635_066, 410_130, 3.955),
    ("agent_pvt_medium", 224): (35_921_746, 862_890, 6.999),
    ("agent_pvt_large", 224): (48_738_180, 1_229_340, 10.339),
    ("agent_swin_tiny", 224): (28_902_964, 601_020, 4.499),
    ("agent_swin_small", 224): (49_666_684, 57_708, 8.701),
    ("agent_swin_base", 224): (88_095_096, 318_416, 15.400),
    ("agent_cswin_tiny", 224): (20_458_672, 65_352, 4.292),
    ("agent_cswin_small", 224): (32_814_100, 98_028, 6.744),
    ("agent_cswin_base", 224): (73_249_696, 196_056, 14.870),
}
NAMES = sorted({name for name, _ in PUBLISHED})

SMALL: dict[str, dict[str, Any]] = {  # few blocks, so that tests are quick
    "agent_deit_tiny": {"depth": 3},
    "agent_pvt_tiny": {"depths": (1, 1, 1, 1)},
    "agent_swin_tiny": {"depths": (1, 1, 1, 1), "agent_blocks": (1, 1, 0, 0)},
    "agent_cswin_tiny": {"depths": (1, 1, 1, 1)},
}


def small(name: str, img_size: int = 64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    made = timm.create_model(name, img_size=img_size, **SMALL[name] | options).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def macs(model: nn.Module, size: int) -> float:
    """Of all matrix products and convolutions, for one image; half of what torch counts."""
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize(("name", "size"), PUBLISHED)
def test_counts_are_those_published(name: str, size: int) -> None:
    parameters, biases, gmac = PUBLISHED[name, size]
    with torch.device("meta"):
        model = timm.create_model(name, img_size=size).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    found = {n: p.numel() for n, p in model.named_parameters() if ".attn.bias." in n}
    assert sum(found.values()) == biases
    assert macs(model, size) == pytest.approx(gmac, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("agent_swin_tiny", {"agent_blocks": (2, 2, 0, 0)}),
        ("agent_deit_base", {"agents": 49}),
        ("agent_pvt_tiny", {"agents": (16, 16, 49, 49)}),
    ],
)
def test_counts_of_other_models_differ(name: str, options: dict[str, Any]) -> None:
    parameters, _, gmac = PUBLISHED[name, 224]
    with torch.device("meta"):
        model = timm.create_model(name, **options).eval()
    assert sum(p.numel() for p in model.parameters()) != parameters
    assert macs(model, 224) != pytest.approx(gmac, rel=1e-3)


def golden_model(name: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """A small model, published weights for it, and what the published code made of them."""
    case = GOLDEN[name]
    model = timm.create_model(name, num_classes=5, **case["options"]).double().eval()
    return model, filled(case["shapes"]), torch.tensor(case["output"], dtype=torch.float64)


@pytest.mark.parametrize("name", with_samples(GOLDEN, "agent_deit_tiny"))
def test_published_weights_give_the_published_result(name: str) -> None:
    """Names, shapes and results, against the published code at a small size, in float64."""
    model, weights, expected = golden_model(name)
    model.load_state_dict(convert_published({"model": weights}, model))
    with torch.no_grad():
        out = model(images(GOLDEN[name]["options"]["img_size"]))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", GOLDEN)
def test_result_depends_on_every_kind_of_weight(name: str) -> None:
    model, weights, expected = golden_model(name)
    image = images(GOLDEN[name]["options"]["img_size"])
    kinds = {key for key in weights if key.endswith(("_bias", "bias_table"))}
    for kind in {key.rpartition(".")[2] for key in kinds} | {"norm1.bias", "proj.bias"}:
        changed = {k: v * (not k.endswith(f".{kind}")) for k, v in weights.items()}
        model.load_state_dict(convert_published(changed, model))
        with torch.no_grad():
            assert (model(image) - expected).abs().max() > 1e-6, kind


@pytest.mark.parametrize("name", SMALL)
def test_checkpoint_for_another_image_size(name: str) -> None:
    """Converted to another size, weights are what changing the size of the model makes of them."""
    source = small(name, 64, num_classes=5)
    target = timm.create_model(name, img_size=96, num_classes=5, **SMALL[name]).eval()
    target.load_state_dict(convert_published(source.state_dict(), target))
    image = torch.randn(1, 3, 96, 96)
    if name == "agent_swin_tiny":
        source.set_input_size((96, 96), window_size=7)
    else:
        source.set_input_size((96, 96))
    with torch.no_grad():
        torch.testing.assert_close(source(image), target(image), rtol=1e-4, atol=1e-4)
        assert (target(image) - target(image.flip(3))).abs().max() > 1e-3


def test_checkpoint_for_other_agents() -> None:
    source = small("agent_pvt_tiny", 64)
    wide = timm.create_model(
        "agent_pvt_tiny", img_size=64, agents=(16, 16, 49, 49), **SMALL["agent_pvt_tiny"]
    )
    wide.load_state_dict(convert_published(source.state_dict(), wide))
    with pytest.raises(RuntimeError, match="size mismatch"):
        wide.load_state_dict(source.state_dict())


def test_timm_loads_a_published_file(tmp_path: Path) -> None:
    _, weights, expected = golden_model("agent_deit_tiny")
    torch.save({"model": weights}, tmp_path / "published.pth")
    overlay = {"file": str(tmp_path / "published.pth"), "num_classes": 5}
    model = timm.create_model(
        "agent_deit_tiny",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        **GOLDEN["agent_deit_tiny"]["options"],
    )
    with torch.no_grad():
        out = model.double().eval()(images(64))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)  # weights became float32


@pytest.mark.parametrize("name", SMALL)
def test_backbone(name: str) -> None:
    backbone = timm.create_model(name, img_size=64, features_only=True, **SMALL[name])
    features = backbone(torch.randn(2, 3, 64, 64))
    assert len(features) == len(backbone.feature_info.channels())
    for feature, channels, reduction in zip(
        features,
        backbone.feature_info.channels(),
        backbone.feature_info.reduction(),
        strict=True,
    ):
        shape = (
            feature.movedim(3, 1).shape if "swin_" in name and "cs" not in name else feature.shape
        )
        assert shape == (2, channels, 64 // reduction, 64 // reduction)


@pytest.mark.parametrize("name", ["agent_pvt_tiny", "agent_cswin_tiny", "agent_swin_tiny"])
def test_backbone_at_any_size(name: str) -> None:
    """As for detection: another size and shape in each call."""
    options = {"strict_img_size": False} if name == "agent_swin_tiny" else {}
    backbone = timm.create_model(name, img_size=64, features_only=True, **SMALL[name] | options)
    for height, width in ((64, 96), (128, 64)):
        last = backbone(torch.randn(1, 3, height, width))[-1]
        assert last.numel() == height // 32 * width // 32 * backbone.feature_info.channels()[-1]


@pytest.mark.parametrize("name", SMALL)
def test_trains(name: str) -> None:
    model = small(name, drop_path_rate=0.1, num_classes=3).train()
    model.set_grad_checkpointing(True)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.get_classifier().out_features == 3
    model.reset_classifier(0)
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, model.num_features)


@pytest.mark.parametrize("name", ["agent_deit_tiny", "agent_swin_tiny", "agent_cswin_tiny"])
def test_exports(name: str) -> None:
    model, image = small(name), torch.randn(1, 3, 64, 64)
    program = torch.export.export(model, (image,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(image), model(image), rtol=1e-4, atol=1e-4)


def test_the_code_on_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[1] / "docs" / "vision.md"
    found = re.findall(r"^```python\n(import timm\n.*?)^```", page.read_text("utf-8"), re.M | re.S)
    assert len(found) == 3
    weights = timm.create_model("agent_deit_tiny").state_dict()
    published = {name.replace(".attn.bias.", ".attn."): w for name, w in weights.items()}
    assert published.keys() != weights.keys()
    torch.save({"model": published}, tmp_path / "agent_deit_t.pth")
    monkeypatch.chdir(tmp_path)
    for code in found:
        # Without weights where none are loaded, which is faster.
        with torch.device("cpu" if "pretrained=True" in code else "meta"):
            exec(code, {})


def test_the_table_on_the_page_is_that_of_the_models() -> None:
    page = (Path(__file__).parents[1] / "docs" / "vision.md").read_text("utf-8")
    for (name, size), (parameters, biases, gmac) in PUBLISHED.items():
        label = f"`{name.removeprefix('agent_')}`" + f" at {size}" * (size != 224)
        assert f"| {label} | {parameters:,} | {biases:,} | {gmac:.3f} |" in page


def test_models_are_registered() -> None:
    assert timm.list_models("agent_*") == NAMES
    for name in NAMES:
        assert timm.get_pretrained_cfg(name).input_size == (3, 224, 224)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        small("agent_pvt_tiny", pretrained=True)


def test_wrong_sizes_are_errors() -> None:
    with pytest.raises(ModelError, match="multiples of 32"):
        timm.create_model("agent_cswin_tiny", img_size=48)(torch.randn(1, 3, 48, 48))
    with pytest.raises(ModelError, match="drop the mask"):
        small("agent_deit_tiny")(torch.randn(1, 3, 64, 64), attn_mask=torch.zeros(17, 17))
    with pytest.raises(ModelError, match="global_pool"):
        small("agent_pvt_tiny", global_pool="max")


def test_the_layer_needs_no_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delattr(agentsd.nn, "models")
    assert not hasattr(importlib.reload(agentsd.nn), "models")


def test_a_timm_that_cannot_be_imported_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "agentsd.nn.models", None)
    monkeypatch.delattr(agentsd.nn, "models")
    with pytest.warns(UserWarning, match="install the torchvision that belongs to"):
        importlib.reload(agentsd.nn)
