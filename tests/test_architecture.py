"""What the import contracts of pyproject.toml (`make lint`) cannot say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "agentsd"
PRIVATE = re.compile(r"^\s*(?:from|import) diffusers\.models", re.MULTILINE)


def test_diffusers_is_private_in_one_place() -> None:
    """Anything private may move with any release."""
    found = [path for path in PACKAGE.rglob("*.py") if PRIVATE.search(path.read_text("utf-8"))]
    assert [path.name for path in found] == ["diffusers_internals.py"]


@pytest.mark.slow
def test_a_diffusers_that_lacks_something_is_reported() -> None:
    code = (
        "import agentsd.patching.patch, diffusers.models.attention_dispatch as d, sys\n"
        "for name in [n for n in sys.modules if n.startswith('agentsd')]: del sys.modules[name]\n"
        "del d.dispatch_attention_fn\n"
        "from agentsd.cli import main\n"
        "main(['inspect'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "lacks names that agentsd needs (cannot import name 'dispatch_attention_fn'" in (
        " ".join(result.stderr.split())
    )
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["utils", "helpers", "common", "misc"])
def test_names_say_what_is_in(name: str) -> None:
    folders = [folder for folder in ("agentsd", "scripts", "tests") if (ROOT / folder).is_dir()]
    assert folders
    assert not [path for folder in folders for path in (ROOT / folder).rglob(f"{name}.py")]


@pytest.mark.parametrize(("name", "folder"), [("agentsd", ""), ("agentsd.cli", "cli")])
def test_importing_the_package_is_cheap(name: str, folder: str) -> None:
    """Neither torch nor diffusers is imported before a name that needs them is used.

    Of the subpackages the command loads its own, and the package none.
    """
    code = f"import {name}, json, sys; print(json.dumps(list(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(result.stdout))
    assert not loaded & {"torch", "diffusers"}
    modules = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in PACKAGE.glob("*/**/*.py")
        if path.stem != "__init__"
    }
    assert modules
    expected = {module for module in modules if folder and module.startswith(f"{folder}.")}
    assert loaded & {f"agentsd.{m}" for m in modules} == {f"agentsd.{m}" for m in expected}


def test_public_names_are_there() -> None:
    import agentsd

    assert set(agentsd.__all__) <= set(dir(agentsd))
    for name in ("apply_patch", "remove_patch", "patched", "inspect_patch", "Keys", "Schedule"):
        assert getattr(agentsd, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        agentsd.nothing  # noqa: B018
