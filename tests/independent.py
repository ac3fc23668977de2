"""Packages that require torchvision, which is not built for every torch: torch-fidelity and timm.

torchmetrics cannot be imported where torch-fidelity is installed without torchvision, and
transformers changes its ways where there is torchvision. So the set-up installs both packages into
a separate folder, without their requirements. Of torch-fidelity, an independent implementation of
the metrics, only the modules for the metrics are loaded; timm is loaded whole.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock, patch

import pytest
from torch import nn

FOLDER = Path(sys.prefix) / "independent"


@contextmanager
def torch_fidelity(*modules: str) -> Iterator[list[ModuleType]]:
    """Import modules of torch-fidelity, and remove them from ``sys.modules`` afterwards."""
    spec = PathFinder.find_spec("torch_fidelity", [str(FOLDER), *sys.path])
    assert spec, f"make test installs torch-fidelity into {FOLDER}"
    package = ModuleType("torch_fidelity")
    package.__path__ = spec.submodule_search_locations
    # Skip the package's __init__, which imports all of it, and its utils, which load images.
    stand_ins = {"torch_fidelity": package, "torch_fidelity.utils": MagicMock()}
    with patch.dict(sys.modules, stand_ins):
        yield [importlib.import_module(f"torch_fidelity.{name}") for name in modules]


def import_timm() -> ModuleType:
    """Import timm, with stand-ins for torchvision where that is missing.

    The models need one class of torchvision, to compare others with; the rest of it is for timm's
    preparation of images. Without timm, tests are skipped, but not in CI, which installs it.
    """
    if "timm" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return _timm()
    modules = ("datasets", "models.feature_extraction", "models", "ops")
    modules += ("transforms", "transforms.functional")
    stand_ins = {f"torchvision.{name}": MagicMock() for name in modules}
    batch_norm = type("FrozenBatchNorm2d", (nn.Module,), {})
    stand_ins["torchvision.ops.misc"] = MagicMock(FrozenBatchNorm2d=batch_norm)
    stand_ins["torchvision"] = MagicMock()
    sys.modules.update(stand_ins)
    sys.path.append(str(FOLDER))
    try:
        return _timm()
    finally:
        sys.path.remove(str(FOLDER))
        for name in stand_ins:
            del sys.modules[name]


def _timm() -> ModuleType:
    if "CI" in os.environ:
        return importlib.import_module("timm")
    return pytest.importorskip("timm", reason=f"make test installs timm into {FOLDER}")
