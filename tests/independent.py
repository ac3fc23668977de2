"""torch-fidelity's functions, an implementation of the metrics that shares nothing with ours.

It asks for torchvision, of which there is not a build for every torch, and torchmetrics fails to
import where torch-fidelity is there without it. So the set-up installs it, without what it asks
for, into a folder of its own, and only those of its modules are loaded that do the metrics.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock, patch

FOLDER = Path(sys.prefix) / "independent"


@contextmanager
def torch_fidelity(*modules: str) -> Iterator[list[ModuleType]]:
    """Import modules of torch-fidelity, and forget them afterwards."""
    spec = PathFinder.find_spec("torch_fidelity", [str(FOLDER), *sys.path])
    assert spec, f"make test installs torch-fidelity into {FOLDER}"
    package = ModuleType("torch_fidelity")
    package.__path__ = spec.submodule_search_locations
    # Neither the package's front, which imports all of it, nor its utils, which load images.
    stand_ins = {"torch_fidelity": package, "torch_fidelity.utils": MagicMock()}
    with patch.dict(sys.modules, stand_ins):
        yield [importlib.import_module(f"torch_fidelity.{name}") for name in modules]
