"""Similarity of pairs: metrics against other implementations, and how pairs are matched."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import picture_sets
import pytest
import torch
from tiny_models import build
from torch import nn
from torchmetrics.functional.image import lpips as their_lpips

from agentsd.errors import EvaluationError
from agentsd.evaluation import pairs as module
from agentsd.evaluation.features import load_clip, lpips
from agentsd.evaluation.image_sets import ImageEntry, read_image_set
from agentsd.evaluation.metrics import ssim
from agentsd.evaluation.pairs import compare_pairs, pair_images


def test_ssim_is_the_definition() -> None:
    """By hand for two flat images: only the luminance differs."""
    a, b = np.full((16, 16, 3), 100), np.full((16, 16, 3), 150)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(a, b) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(EvaluationError, match="11 pixels"):
        ssim(a[:8], b[:8])


def test_a_second_run_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (picture_sets.folder(tmp_path / str(n), 2, first=n) for n in (0, 2))
    clip, cache = load_clip("pocket"), tmp_path / "cache"

    def rows() -> list[dict[str, Any]]:
        pairs = pair_images(read_image_set(ours), read_image_set(theirs))
        return compare_pairs(pairs, clip, folder=cache).rows

    first, calls = rows(), []
    monkeypatch.setattr(module, "ssim", lambda a, b: calls.append(1) or ssim(a, b))
    assert rows() == first
    assert not calls
    picture_sets.noise(4).save(ours / "000.png")
    assert rows() != first
    assert len(calls) == 1


@pytest.fixture
def alexnet() -> nn.Sequential:
    """The features of torchvision's AlexNet, with random weights, written out."""
    relu, pool = nn.ReLU, nn.MaxPool2d
    return build(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 64, 11, 4, 2), relu(), pool(3, 2)),
            *(nn.Conv2d(64, 192, 5, 1, 2), relu(), pool(3, 2)),
            *(nn.Conv2d(192, 384, 3, 1, 1), relu(), nn.Conv2d(384, 256, 3, 1, 1), relu()),
            *(nn.Conv2d(256, 256, 3, 1, 1), relu(), pool(3, 2)),
        )
    )  # type: ignore[no-any-return]


def test_lpips_equals_torchmetrics(
    alexnet: nn.Sequential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert lpips.load_if_cached() is None
    lpips.weights_file().parent.mkdir()
    torch.save(
        {f"features.{name}": value for name, value in alexnet.state_dict().items()},
        lpips.weights_file(),
    )
    ours = lpips.load_if_cached()
    assert ours is not None
    monkeypatch.setattr(their_lpips, "_get_tv_model_features", lambda *_: alexnet)
    theirs = their_lpips._LPIPS(net="alex")
    a, b = (torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    with torch.no_grad():
        expected = theirs(2 * a - 1, 2 * b - 1).flatten()
        assert torch.allclose(ours(2 * a - 1, 2 * b - 1), expected, rtol=1e-4)
        assert not torch.allclose(ours(a, b), expected, rtol=1e-2)  # another range
    x, y = (np.asarray(picture_sets.noise(i)) for i in (0, 1))
    assert ours.between(x, x) == 0 < ours.between(x, y)
    lpips.weights_file().write_text("none")
    with pytest.raises(EvaluationError, match="not AlexNet's weights"):
        lpips.load_if_cached()


def test_pairs_by_prompt_and_seed_or_by_name(tmp_path: Path) -> None:
    made = read_image_set(picture_sets.manifest(tmp_path / "a"))
    other = read_image_set(picture_sets.manifest(tmp_path / "b"))[::-1]
    unseeded = [entry._replace(seed=None) for entry in made]
    for found in (pair_images(made, other), pair_images(unseeded, other)):
        assert [p.image.name[-7:] for p in found] == [p.reference.name[-7:] for p in found]
    with pytest.raises(EvaluationError, match="6 images and 5 to compare with: 1 have no counter"):
        pair_images(made, other[1:])
    with pytest.raises(EvaluationError, match="two images have the same prompt and seed"):
        pair_images([*made, made[0]], other)
    nothing = ImageEntry("x/000.png", io.BytesIO().read)
    with pytest.raises(EvaluationError, match="two images have the same file name"):
        pair_images([nothing, nothing], [nothing])
