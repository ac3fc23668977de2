"""The pages agree with the code: the API page, the methods, options, counts, names of extras."""

from __future__ import annotations

import dataclasses
import inspect
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer

import agentsd
from agentsd.app.controls import examples
from agentsd.cli import agentsd as command_line
from agentsd.evaluation.protocol import load_protocol
from agentsd.methods import METHODS, BasePhase, Cache

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]

WORDS = {"eight": 8, "fifteen": 15}
"""Numbers that pages spell out."""

PAGES_OF_COMMANDS = {"app": "app", "benchmark": "benchmark", "tuning": "tune"}
"""Pages about a single command, by their names."""

OTHER_PROGRAMS = {"--constraint", "--dry-run"}
"""Options of pip and of ``scripts/train_vision.py``."""


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_api_page_is_the_public_api() -> None:
    names = re.findall(r"^::: agentsd\.(\w+)$", read("docs/api.md"), re.MULTILINE)
    assert sorted(names) == sorted(agentsd.__all__)


def test_public_functions_say_what_they_take_and_show_an_example() -> None:
    for name in agentsd.__all__:
        public = getattr(agentsd, name)
        if public is agentsd.Phase:  # a union of types
            continue
        doc = inspect.getdoc(public) or ""
        assert doc.splitlines()[0].endswith("."), name
        is_error = isinstance(public, type) and issubclass(public, Exception)
        if is_error or hasattr(public, "_fields") or dataclasses.is_dataclass(public):
            continue  # results are made by calls, and described field by field
        for section in ("Args:", "Raises:", "Example:"):
            assert f"\n{section}\n" in doc, f"{name} has no {section}"


def test_every_method_and_parameter_is_described() -> None:
    page = read("docs/schedules.md").partition("## Methods")[2]
    methods, _, parameters = page.partition("| parameter |")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*)\|$", methods, re.MULTILINE)
    listed = {name: sorted(re.findall(r"`(\w+)`", last)) for name, last in rows}
    own = {
        name: sorted(method.model_fields.keys() - BasePhase.model_fields.keys())
        for name, method in METHODS.items()
    }
    assert listed == own
    parameters, _, of_caches = parameters.partition("| parameter |")
    for table, known in (
        (parameters, {name for method in METHODS.values() for name in method.parameters()}),
        (of_caches, set(Cache.model_fields)),
    ):
        cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == known


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


def commands(command: Any, name: str = "") -> Iterator[tuple[str, click.Command]]:
    """All commands by name, such as ``evaluate run``."""
    yield name, command
    for part, child in getattr(command, "commands", {}).items():
        yield from commands(child, f"{name} {part}".strip())


COMMANDS = dict(commands(typer.main.get_command(command_line)))


def options_of(name: str) -> set[str]:
    params = COMMANDS[name].params
    return {"--help"} | {text for param in params for text in param.opts + param.secondary_opts}


def wrong_options(text: str, command: str | None = None) -> set[str]:
    """Options of agentsd that a page names and no command has.

    Args:
        text: Of the page.
        command: The only command whose options the prose may name; any by default.
    """
    known = set().union(*map(options_of, [command] if command else COMMANDS))
    wrong = set()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = line.partition("#")[0].split()
        if words[:1] == ["agentsd"]:
            name = max((" ".join(words[1:n]) for n in (2, 3)), key=lambda n: (n in COMMANDS, n))
            wrong |= {word for word in words if word.startswith("--")} - options_of(name)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    named = {
        option
        for code in re.findall(r"`([^`]+)`", prose)
        if re.match(r"--|agentsd ", code)
        for option in re.findall(r"(?<!\S)--[a-z][\w-]*", code)
    }
    return wrong | named - known - OTHER_PROGRAMS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_options_in_the_docs_exist(page: Path) -> None:
    assert wrong_options(page.read_text(encoding="utf-8")) == set()


def test_options_that_do_not_exist_are_found() -> None:
    assert wrong_options("`--no-such-option`") == {"--no-such-option"}
    assert wrong_options("```bash\nagentsd compare --out x --rounds 3\n```") == {"--rounds"}
    assert wrong_options("`--steps`", "tune") == {"--steps"}


@pytest.mark.parametrize(("page", "command"), PAGES_OF_COMMANDS.items())
def test_a_page_about_one_command_names_its_options(page: str, command: str) -> None:
    text = read(f"docs/{page}.md")
    assert len(re.findall(r"`--[a-z]", text)) > 3
    assert wrong_options(text, command) == set()


def test_the_limits_of_the_app_have_their_defaults() -> None:
    table = r"^\| `(--[\w-]+)` \|.*\| ([\d,]+) \|$"
    rows = re.findall(table, read("docs/app.md"), re.MULTILINE)
    defaults = {param.opts[0]: param.default for param in COMMANDS["app"].params}
    assert len(rows) == 5
    assert {name: int(value.replace(",", "")) for name, value in rows} == {
        name: defaults[name] for name, _ in rows
    }


def number(pattern: str, page: str) -> int:
    """The number that a page gives where a pattern matches, which it must exactly once."""
    (text,) = re.findall(pattern, read(page))
    return WORDS[text] if text in WORDS else int(text)


def test_the_number_of_test_cases() -> None:
    page = read("docs/compatibility.md")
    ((total, works, refused),) = re.findall(r"Of (\d+): (\d+) work, (\d+) are refused", page)
    verdicts = re.findall(r"^\| .* \| (works|refused|fails) \|", page, re.MULTILINE)
    assert len(verdicts) == int(total)
    assert verdicts.count("works") == int(works)
    assert verdicts.count("refused") == int(refused)
    assert number(r"All (\d+) test cases", "docs/support.md") == int(total)
    schedulers = page.partition("## Schedulers\n")[2].partition("\n## ")[0].count("Scheduler |")
    for name in ("README.md", "docs/support.md"):
        assert number(r"(fifteen)(?: schedulers|, from DDIM)", name) == schedulers


def test_the_number_of_prompts_and_variants() -> None:
    protocol = load_protocol(str(ROOT / "configs/eval/pocket.yaml"))
    prompts = len(protocol.prompts)
    assert number(r"below\]\(#results\) averages (\w+)", "README.md") == prompts
    assert number(r"one CPU thread; (\d+) prompts", "README.md") == prompts
    assert number(r"averages over (\w+) prompts", "docs/index.md") == prompts
    assert number(r"variants, (\d+) prompts", "docs/evaluation/README.md") == prompts
    assert number(r"(\d+) variants,", "docs/evaluation/README.md") == len(protocol.variants)
    cache = load_protocol(str(ROOT / "configs/eval/cache.yaml"))
    assert number(r"CPU thread; (\d+) prompts", "docs/evaluation/cache.md") == len(cache.prompts)
    tuning = read("docs/evaluation/tuning-prompts.txt").splitlines()
    assert number(r"with (\d+) \[prompts\]", "docs/tuning.md") == len(tuning)


def test_the_model_card_gives_the_shares_of_the_training_scenes() -> None:
    (shares,) = re.findall(r"Shares: (.*?)\.", read("agentsd/pocket/README.md"))
    given = {name: int(share) / 100 for name, share in re.findall(r"(\w+) (\d+) %", shares)}
    layouts = runpy.run_path(str(ROOT / "scripts/pocket/scenes.py"))["LAYOUTS"]
    assert given == {"column" if name == "line" else name: share for name, share in layouts.items()}


def test_the_map_of_the_code_has_every_folder() -> None:
    described = set(re.findall(r"^  (\w+)(?:/|\.py| )", read("CONTRIBUTING.md"), re.MULTILINE))
    folders = {path.parent.name for path in (ROOT / "agentsd").glob("*/__init__.py")}
    assert folders <= described


def test_the_web_app_links_to_the_repository() -> None:
    assert f'Homepage = "{examples.LINKS["Code"]}"' in read("pyproject.toml")
