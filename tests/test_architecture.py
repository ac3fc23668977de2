"""The shape of the package: imports run one way, maths knows torch alone, names say what is in."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "agentsd"
CORE = (
    *("errors", "validation", "attention", "merging", "sampling", "schedule", "runtime"),
    *("processor", "sites", "inspection", "patch"),
)
"""The core, in the order in which each module may import those before it."""
APPLICATION = (
    *("output", "pipelines", "generation", "comparison", "prompts", "run_folder", "shards"),
    *("claims", "progress", "extras", "batch", "launch"),
    *("peers", "benchmark", "cli_benchmark"),
    *("intervals", "metrics", "inception", "pictures", "features", "lpips", "likeness"),
    *("protocol", "scoring", "evaluation", "report", "cli_evaluate", "cli"),
)
"""What stands on the core, in the same way."""
ORDER = (*CORE, *APPLICATION)
MATHS = ("attention", "merging", "sampling")
LIGHT = (*MATHS, "errors", "validation", "schedule", "runtime")
"""Modules that work without diffusers."""


def imports(source: str) -> set[str]:
    """What a module imports; modules of the package with a leading dot."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {"." + name.partition(".")[0] for name in names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    own = {name for name in found if name.partition(".")[0] == "agentsd"}
    return found - own | {f".{(name + '.__init__').split('.')[1]}" for name in own}


def check_direction(module: str, source: str) -> None:
    """``module`` imports of the package only what comes before it."""
    own = {name[1:] for name in imports(source) if name.startswith(".")}
    if module in CORE:
        allowed = set(CORE[: CORE.index(module)])
        assert own <= allowed, f"{module} imports {sorted(own - allowed)}"
    later = set(ORDER[ORDER.index(module) :]) & own
    assert not later, f"{module} imports {sorted(later)}"


def check_packages(module: str, source: str, allowed: set[str]) -> None:
    """``module`` imports nothing from outside but ``allowed`` and the standard library."""
    others = {name.partition(".")[0] for name in imports(source) if not name.startswith(".")}
    extra = others - allowed - sys.stdlib_module_names
    assert not extra, f"{module} imports {sorted(extra)}"


def read(module: str) -> str:
    return (PACKAGE / f"{module}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", [m for m in ORDER if (PACKAGE / f"{m}.py").exists()])
def test_imports_run_one_way(module: str) -> None:
    check_direction(module, read(module))
    with pytest.raises(AssertionError, match="imports"):
        check_direction(module, read(module) + f"\nfrom .{module} import itself\n")


def test_the_core_is_all_there() -> None:
    assert all((PACKAGE / f"{module}.py").is_file() for module in CORE)


@pytest.mark.parametrize("module", MATHS)
def test_maths_imports_torch_alone(module: str) -> None:
    check_packages(module, read(module), {"torch"})
    assert not {name for name in imports(read(module)) if name.startswith(".")}
    with pytest.raises(AssertionError, match="diffusers"):
        check_packages(module, "import diffusers.models\n" + read(module), {"torch"})


@pytest.mark.parametrize("module", LIGHT)
def test_what_needs_no_diffusers_imports_none(module: str) -> None:
    check_packages(module, read(module), {"torch", "pydantic", "ruamel"})


def test_metrics_do_not_know_the_patch() -> None:
    for path in PACKAGE.rglob("metrics*.py"):
        assert not imports(path.read_text(encoding="utf-8")) & {".patch", ".processor", ".runtime"}
    for module in CORE:
        assert ".metrics" not in imports(read(module))


def test_nothing_imports_the_callers() -> None:
    for path in PACKAGE.rglob("*.py"):
        names = {name.partition(".")[0] for name in imports(path.read_text(encoding="utf-8"))}
        assert not names & {"scripts", "app", "tests"}, path


@pytest.mark.parametrize("name", ["utils", "helpers", "common", "misc"])
def test_names_say_what_is_in(name: str) -> None:
    folders = [folder for folder in ("agentsd", "scripts", "tests") if (ROOT / folder).is_dir()]
    assert folders
    assert not [path for folder in folders for path in (ROOT / folder).rglob(f"{name}.py")]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from .a import b", {".a"}),
        ("from . import a", {".a"}),
        ("from .a.b import c", {".a"}),
        ("import agentsd.a", {".a"}),
        ("from agentsd.a import b", {".a"}),
        ("import agentsd", {".__init__"}),
        ("def f():\n    import torch.nn", {"torch.nn"}),
    ],
)
def test_imports_are_seen_in_every_form(source: str, expected: set[str]) -> None:
    assert imports(source) == expected


def test_importing_the_package_is_cheap() -> None:
    """Neither torch nor diffusers before a name that needs them is asked for."""
    code = "import agentsd, sys; print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_public_names_are_there() -> None:
    import agentsd

    assert set(agentsd.__all__) <= set(dir(agentsd))
    for name in ("apply_patch", "remove_patch", "patched", "inspect_patch", "Phase", "Schedule"):
        assert getattr(agentsd, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        agentsd.nothing  # noqa: B018
