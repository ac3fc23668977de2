"""The shape of the package: imports run one way, maths knows torch alone, names say what is in."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "agentsd"
CORE = (
    *(
        "errors",
        "text_files",
        "validation",
        "attention",
        "merging",
        "sampling",
        "schedule",
        "runtime",
    ),
    *("internals", "processor", "sites", "inspection", "patch"),
)
"""The core, in the order in which each module may import those before it."""
ON_THE_CORE = (
    "progress",
    "fingerprints",
    "input_images",
    "output",
    "pipelines",
    "shapes",
    "generation",
    "comparison",
    "extras",
    "peers",
)
"""What stands right on the core, in the same way."""
GROUPS = {
    "batch": ("prompts", "run_folder", "shards", "claims", "engine", "launch"),
    "benchmark": ("timing", "command"),
    "evaluation": (
        *(
            "intervals",
            "metrics",
            "inception",
            "pictures",
            "reading",
            "features",
            "lpips",
            "likeness",
        ),
        *("protocol", "scoring", "experiment", "report", "command"),
    ),
    "ui": (
        *("limits", "worker", "compare", "history", "timeline", "markup", "faults", "editor"),
        *("sight", "grid", "tabs", "page", "server"),
    ),
}
"""The subpackages and, in the same way, their modules; none imports another's, but for these."""
LENT = {"ui": ("evaluation.features", "evaluation.metrics")}
"""What a subpackage may import of others."""
GROUPED = tuple(f"{group}.{name}" for group, names in GROUPS.items() for name in names)
ORDER = (*CORE, *ON_THE_CORE, *GROUPED, "cli", "__main__")
MATHS = ("attention", "merging", "sampling")
LIGHT = (*MATHS, "errors", "text_files", "validation", "schedule", "runtime")
"""Modules that work without diffusers."""


def imports(source: str, module: str = "") -> set[str]:
    """What ``module`` imports, by its source; modules of the package with a leading dot."""
    above = ["agentsd", *module.split(".")[:-1]]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {f"{a.name}.__init__" if is_package(a.name) else a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            place = above[: len(above) + 1 - node.level] if node.level else []
            name = ".".join([*place, *filter(None, [node.module])])
            names = {f"{name}.{alias.name}" for alias in node.names}
            found |= names if is_package(name) else {name}
    return {name.removeprefix("agentsd") if own(name) else name for name in found}


def is_package(name: str) -> bool:
    return name in {"agentsd", *(f"agentsd.{group}" for group in GROUPS)}


def own(name: str) -> bool:
    return name.partition(".")[0] == "agentsd"


def check_direction(module: str, source: str) -> None:
    """``module`` imports of the package only what comes before it, and of no other subpackage."""
    found = {name[1:] for name in imports(source, module) if name.startswith(".")}
    if module in CORE:
        allowed = set(CORE[: CORE.index(module)])
    else:
        allowed = {*ORDER[: ORDER.index(module)], "__version__"}
    group = module.partition(".")[0]
    if group in GROUPS:
        others = {name for name in GROUPED if name.partition(".")[0] != group}
        allowed -= others - set(LENT.get(group, ()))
    assert found <= allowed, f"{module} imports {sorted(found - allowed)}"


def check_packages(module: str, source: str, allowed: set[str]) -> None:
    """``module`` imports nothing from outside but ``allowed`` and the standard library."""
    others = {name.partition(".")[0] for name in imports(source) if not name.startswith(".")}
    extra = others - allowed - sys.stdlib_module_names
    assert not extra, f"{module} imports {sorted(extra)}"


def read(module: str) -> str:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", ORDER)
def test_imports_run_one_way(module: str) -> None:
    check_direction(module, read(module))
    with pytest.raises(AssertionError, match="imports"):
        check_direction(module, read(module) + f"\nfrom agentsd.{module} import itself\n")


def test_subpackages_do_not_know_each_other() -> None:
    with pytest.raises(AssertionError, match=r"evaluation.report imports \['batch.prompts'\]"):
        check_direction("evaluation.report", "from ..batch.prompts import read_prompts")
    with pytest.raises(AssertionError, match=r"imports \['evaluation.report'\]"):
        check_direction("ui.page", "from ..evaluation.report import write")


def test_only_the_command_knows_the_page() -> None:
    for module in ORDER:
        if module not in ("cli", "__main__") and not module.startswith("ui."):
            assert not {name for name in imports(read(module), module) if name.startswith(".ui")}


def test_every_module_has_its_place() -> None:
    paths = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    there = [".".join(path.with_suffix("").parts) for path in paths if path.stem != "__init__"]
    assert sorted(there) == sorted(ORDER)


@pytest.mark.parametrize("module", MATHS)
def test_maths_imports_torch_alone(module: str) -> None:
    check_packages(module, read(module), {"torch"})
    assert not {name for name in imports(read(module)) if name.startswith(".")}
    with pytest.raises(AssertionError, match="diffusers"):
        check_packages(module, "import diffusers.models\n" + read(module), {"torch"})


@pytest.mark.parametrize("module", LIGHT)
def test_what_needs_no_diffusers_imports_none(module: str) -> None:
    check_packages(module, read(module), {"torch", "pydantic", "ruamel"})


def test_diffusers_is_private_in_one_place() -> None:
    """Whatever is not public there may move with any release."""
    for module in ORDER:
        private = {name for name in imports(read(module)) if name.startswith("diffusers.models")}
        assert bool(private) == (module == "internals"), module


def test_a_diffusers_that_lacks_something_is_told_of() -> None:
    code = (
        "import agentsd.patch, diffusers.models.attention_dispatch as d, sys\n"
        "for name in [n for n in sys.modules if n.startswith('agentsd')]: del sys.modules[name]\n"
        "del d.dispatch_attention_fn\n"
        "from agentsd.cli import main\n"
        "main(['inspect'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "lacks what agentsd builds on (cannot import name 'dispatch_attention_fn'" in (
        " ".join(result.stderr.split())
    )
    assert "Traceback" not in result.stderr


def test_metrics_do_not_know_the_patch() -> None:
    for module in ("evaluation.metrics", "evaluation.intervals"):
        assert not imports(read(module), module) & {".patch", ".processor", ".runtime"}
    for module in CORE:
        assert ".evaluation.metrics" not in imports(read(module), module)


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
    ("module", "source", "expected"),
    [
        ("b", "from .a import b", {".a"}),
        ("b", "from . import a", {".a"}),
        ("b", "from .a.b import c", {".a.b"}),
        ("b", "import agentsd.a", {".a"}),
        ("b", "from agentsd.a import b", {".a"}),
        ("b", "from agentsd import a", {".a"}),
        ("b", "import agentsd", {".__init__"}),
        ("b", "from .batch import engine", {".batch.engine"}),
        ("b", "from agentsd.batch import engine", {".batch.engine"}),
        ("b", "import agentsd.batch", {".batch.__init__"}),
        ("batch.b", "from .engine import run", {".batch.engine"}),
        ("batch.b", "from . import engine", {".batch.engine"}),
        ("batch.b", "from ..a import b", {".a"}),
        ("batch.b", "from .. import a", {".a"}),
        ("batch.b", "from ..benchmark import timing", {".benchmark.timing"}),
        ("b", "def f():\n    import torch.nn", {"torch.nn"}),
        ("b", "from torch import nn", {"torch"}),
    ],
)
def test_imports_are_seen_in_every_form(module: str, source: str, expected: set[str]) -> None:
    assert imports(source, module) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("agentsd", set()), ("agentsd.cli", {"benchmark.command", "evaluation.command"})],
)
def test_importing_the_package_is_cheap(name: str, expected: set[str]) -> None:
    """Neither torch nor diffusers before a name that needs them is asked for.

    Of the subpackages the command loads what says their options, and the package nothing.
    """
    code = f"import {name}, json, sys; print(json.dumps(list(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(result.stdout))
    assert not loaded & {"torch", "diffusers"}
    assert loaded & {f"agentsd.{module}" for module in GROUPED} == {
        f"agentsd.{module}" for module in expected
    }


def test_public_names_are_there() -> None:
    import agentsd

    assert set(agentsd.__all__) <= set(dir(agentsd))
    for name in ("apply_patch", "remove_patch", "patched", "inspect_patch", "Phase", "Schedule"):
        assert getattr(agentsd, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        agentsd.nothing  # noqa: B018
