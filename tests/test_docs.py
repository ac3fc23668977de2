"""The pages agree with the code: the API page, the methods, versions, names of extras."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import agentsd
from agentsd.app.controls import examples
from agentsd.methods import METHODS, Phase

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_api_page_is_the_public_api() -> None:
    names = re.findall(r"^::: agentsd\.(\w+)$", read("docs/api.md"), re.MULTILINE)
    assert sorted(names) == sorted(agentsd.__all__)


def test_public_functions_say_what_they_take_and_show_an_example() -> None:
    for name in agentsd.__all__:
        public = getattr(agentsd, name)
        doc = inspect.getdoc(public) or ""
        assert doc.splitlines()[0].endswith("."), name
        if isinstance(public, type) and issubclass(public, (Exception, dict)):
            continue
        for section in ("Args:", "Raises:", "Example:"):
            assert f"\n{section}\n" in doc, f"{name} has no {section}"


def test_every_method_and_parameter_is_described() -> None:
    page = read("docs/schedules.md").partition("## Methods")[2]
    methods, _, parameters = page.partition("| parameter |")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*)\|$", methods, re.MULTILINE)
    listed = {name: sorted(re.findall(r"`(\w+)`", last)) for name, last in rows}
    own = {
        name: sorted(method.model_fields.keys() - Phase.model_fields.keys())
        for name, method in METHODS.items()
    }
    assert listed == own
    cells = re.findall(r"^\| (`.*?) \|", parameters, re.MULTILINE)
    described = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert described == {name for method in METHODS.values() for name in method.parameters()}


def test_presets_are_described() -> None:
    for page in ("README.md", "docs/schedules.md"):
        for preset in agentsd.Schedule.presets():
            assert re.search(rf"^\| \[?`{preset}`", read(page), re.MULTILINE), (page, preset)


def test_extras_in_the_docs_exist() -> None:
    extras = read("pyproject.toml").partition("[project.optional-dependencies]")[2]
    existing = set(re.findall(r"^(\w+) = \[", extras.partition("\n[")[0], re.MULTILINE))
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        named = re.findall(r"\"\.\[([\w,]+)\]\"", page.read_text(encoding="utf-8"))
        assert {name for names in named for name in names.split(",")} <= existing, page
    documented = set(re.findall(r"\"\.\[(\w+)\]\"", read("docs/configuration.md")))
    assert documented == existing


def test_pre_commit_runs_the_pinned_ruff() -> None:
    (pinned,) = re.findall(r"^ruff==(\S+)$", read("constraints.txt"), re.MULTILINE)
    assert f"rev: v{pinned} " in read(".pre-commit-config.yaml")


@pytest.mark.parametrize("name", ["pyproject.toml", "mkdocs.yml", "CITATION.cff"])
def test_one_address_of_the_repository(name: str) -> None:
    found = set(re.findall(r"https://github\.com/[\w-]+/agentsd", read(name)))
    assert found == {"https://github.com/agentsd/agentsd"}


def test_the_quick_start_imports_public_names_only() -> None:
    for page in ("README.md", "docs/index.md", "docs/python.md", "docs/quickstart.ipynb"):
        text = read(page)
        assert not re.search(r"(from|import) agentsd\.", text), page
        used = set(re.findall(r"\bagentsd\.(\w+)(?=[(.\]`,])", text)) - {"__all__"}
        assert used <= set(agentsd.__all__), page


def test_the_web_app_links_to_the_repository() -> None:
    assert f'Homepage = "{examples.LINKS["Code"]}"' in read("pyproject.toml")
