"""An optional package that is missing: one kind of error, which names the extra to install."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentsd import MissingPackageError
from agentsd.baselines import BASELINES
from agentsd.benchmark import output
from agentsd.evaluation.metrics import ssim
from agentsd.evaluation.report import require_packages

EXTRAS = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")

USES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "torchmetrics": ("evaluate", lambda _: ssim(np.zeros((16, 16, 3)), np.zeros((16, 16, 3)))),
    "jinja2": ("evaluate", lambda _: require_packages("a report", "jinja2")),
    "matplotlib": ("benchmark", lambda _: output.plot([], Path("plot.png"))),
    "tomesd": ("benchmark", lambda pipe: BASELINES["tomesd"](pipe).__enter__()),
    "DeepCache": ("benchmark", lambda pipe: BASELINES["deepcache"](pipe).__enter__()),
}


@pytest.mark.parametrize("package", USES)
def test_the_error_names_the_package_and_the_extra(
    package: str, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra, use = USES[package]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError) as raised:
        use(pipe)
    assert isinstance(raised.value, ImportError)
    assert str(raised.value).endswith(f'needs {package}: pip install "agentsd[{extra}]"')
    assert f"\n{extra} = [" in EXTRAS
