"""docs/quickstart.ipynb runs, and shows the outputs of what it says."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "quickstart.ipynb"


def test_the_notebook_runs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kept = [cell.get("outputs", []) for cell in notebook.cells]
    NotebookClient(notebook, timeout=240).execute()
    for cell, before in zip(notebook.cells, kept, strict=True):
        kinds = [{*out.get("data", {"text": 0})} for out in cell.get("outputs", [])]
        assert kinds == [{*out.get("data", {"text": 0})} for out in before], cell.source
    assert notebook.cells[-1].outputs[0].data["text/plain"] == "True"
    del notebook.cells[2:]
    notebook.cells[-1].source = "import agentsd; agentsd.nothing"
    with pytest.raises(CellExecutionError, match="no attribute 'nothing'"):
        NotebookClient(notebook, timeout=240).execute()
