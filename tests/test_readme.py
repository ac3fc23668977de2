"""What the README says to type or write runs as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_extensions import EXTENSIONS
from test_pipelines_of_diffusers import PIPELINES
from test_schedulers import NAMES

from agentsd import Schedule
from agentsd.generation.batch.prompts import read_prompts

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
    assert found, f"the README has no {language} block"
    return found


def commands(*starts: str) -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith(starts)]


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml(text: str) -> None:
    schedule = Schedule.from_yaml(text)
    assert Schedule.from_yaml(schedule.to_yaml()) == schedule


@pytest.mark.parametrize("text", blocks("json"))
def test_rows_of_prompts(text: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    plan = read_prompts((), str(tmp_path / "rows.jsonl"), {})
    assert plan.images == 3


@pytest.mark.parametrize("code", blocks("python"))
def test_python(code: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(blocks("yaml")[0])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert done.returncode == 0


SERVING = "agentsd app"
"""Runs until it is stopped; test_ui_load.py does both."""


@pytest.mark.parametrize("command", [c for c in commands("agentsd ") if c != SERVING])
def test_command(command: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(blocks("yaml")[0])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        shlex.split(command), cwd=tmp_path, env=os.environ | {"PATH": path}, check=False
    )
    assert done.returncode == 0


def test_set_up_commands_are_those_of_the_makefile() -> None:
    """The plain commands beside ``make demo`` and ``make test`` do what these do."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "make demo" in TEXT
    assert "make test" in TEXT
    assert commands("python3 -m venv .venv")
    for options in (".", ".[test]"):
        line = f'.venv/bin/pip install --constraint constraints.txt --editable "{options}"'
        assert commands(line), line
    assert '--constraint constraints.txt --editable ".$(EXTRAS)"' in makefile


def test_local_links_lead_somewhere() -> None:
    links = [x for x in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in x]
    assert links
    assert [x for x in links if not (ROOT / x).exists()] == []


def test_the_page_of_what_works_has_every_row() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    for name in (*PIPELINES, *EXTENSIONS, *NAMES):
        assert f"| {name} |" in page, f"{name}: run make compatibility"
    assert "| fails |" not in page
