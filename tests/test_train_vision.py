"""The training scripts of the vision models: the recipe, and the comparison on pocket scenes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from independent import import_timm

timm = import_timm()
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from pocket.scenes import LABEL_CLASSES  # noqa: E402
from vision.recipe import RECIPES, train_arguments  # noqa: E402
from vision.scenes import VARIANTS, Run, build, compare, judge, scenes, train  # noqa: E402

pytestmark = pytest.mark.slow

SMALL = Run("agent", side=2, agents=4, width=16, depth=1, steps=4, batch=2)


def options(arguments: list[str]) -> dict[str, str]:
    return dict(pairwise(arguments))


def test_recipe_is_the_published_one() -> None:
    assert sorted(RECIPES) == timm.list_models("agent_*")
    found = options(train_arguments("agent_swin_tiny", batch_size=128, processes=8))
    wanted = {"lr": 1e-3, "weight-decay": 0.05, "drop-path": 0.2, "epochs": 300, "mixup": 0.8}
    wanted |= {"cutmix": 1, "reprob": 0.25, "smoothing": 0.1, "clip-grad": 5, "warmup-epochs": 20}
    assert {name: float(found[f"--{name}"]) for name in wanted} == wanted
    assert "--model-ema" not in found
    large = options(train_arguments("agent_cswin_base", batch_size=64, processes=8))
    assert float(large["--lr"]) == 5e-4
    assert float(large["--weight-decay"]) == 0.1
    assert large["--model-ema-decay"] == "0.99992"
    assert "--clip-grad" not in large


def test_command(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "train_vision.py"), "imagenet", "agent_pvt_medium"]
    command += ["--timm-train", str(tmp_path / "missing.py"), "--data-dir", "/data"]
    shown = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
    assert shown.stdout.endswith("--data-dir /data\n")
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "clone timm's repository" in refused.stderr


def test_variants_differ_in_attention_alone() -> None:
    agent, softmax = (build(replace(SMALL, variant=variant)) for variant in VARIANTS)
    own = {name for name, _ in agent.named_parameters() if ".bias." in name or ".dwc." in name}
    assert {name for name, _ in softmax.named_parameters()} == (
        {name for name, _ in agent.named_parameters()} - own
    )


def test_comparison(tmp_path: Path) -> None:
    runs = [replace(SMALL, variant=variant) for variant in VARIANTS]
    rows = compare(runs, tmp_path, count=6)
    assert [row["variant"] for row in rows] == ["constant", *VARIANTS]
    for row in rows:
        mean, low, high = row["all"]
        assert low <= mean <= high


@pytest.mark.sample
def test_judgement() -> None:
    """A model that says what is there is right everywhere, and one that says nothing is not."""
    _, named = scenes(10**7, 6, SMALL.side)
    classes = zip(named.T, LABEL_CLASSES, strict=True)
    right = torch.cat([torch.nn.functional.one_hot(y, n) for y, n in classes], dim=1)
    assert judge(lambda pictures: right, SMALL, 6).min() == 1
    assert judge(lambda pictures: right.flip(0), SMALL, 6).mean() < 0.8


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = train(SMALL, tmp_path / "whole")
    parts = tmp_path / "parts"

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vision.scenes.print", stop, raising=False)  # which follows a checkpoint
        with pytest.raises(KeyboardInterrupt):
            train(SMALL, parts, save_every=2)
    resumed = train(SMALL, parts, save_every=2)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(SystemExit, match="give another --work"):
        train(replace(SMALL, rate=1e-4), parts)
