"""torch-fidelity's functions: an independent implementation of the metrics.

It requires torchvision, which is not built for every torch, and torchmetrics cannot be imported
where torch-fidelity is installed without it. So the set-up installs it into a separate folder,
without its requirements, and only its modules for the metrics are loaded.
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
    """Import modules of torch-fidelity, and remove them from ``sys.modules`` afterwards."""
    spec = PathFinder.find_spec("torch_fidelity", [str(FOLDER), *sys.path])
    assert spec, f"make test installs torch-fidelity into {FOLDER}"
    package = ModuleType("torch_fidelity")
    package.__path__ = spec.submodule_search_locations
    # Skip the package's __init__, which imports all of it, and its utils, which load images.
    stand_ins = {"torch_fidelity": package, "torch_fidelity.utils": MagicMock()}
    with patch.dict(sys.modules, stand_ins):
        yield [importlib.import_module(f"torch_fidelity.{name}") for name in modules]
