"""docs/quickstart.ipynb runs, and its stored outputs are of the kinds that it produces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "quickstart.ipynb"


def shown(cell: Any) -> list[set[str]]:
    """The kinds of a cell's outputs, without what libraries print to stderr."""
    outputs = [out for out in cell.get("outputs", []) if out.get("name") != "stderr"]
    return [{*out.get("data", {"text": 0})} for out in outputs]


def test_the_notebook_runs(small_pocket: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", small_pocket["PYTHONPATH"])
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    before = [shown(cell) for cell in notebook.cells]
    assert sum(map(len, before)) >= 8
    NotebookClient(notebook, timeout=240).execute()
    assert [shown(cell) for cell in notebook.cells] == before
    assert notebook.cells[-1].outputs[0].data["text/plain"] == "True"
    del notebook.cells[2:]
    notebook.cells[-1].source = "import agentsd; agentsd.nothing"
    with pytest.raises(CellExecutionError, match="no attribute 'nothing'"):
        NotebookClient(notebook, timeout=240).execute()
