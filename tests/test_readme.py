"""What the README and the docs say to type or write runs as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image
from tiny_adapters import controlnet, save_lora
from tiny_models import tiny_pipeline

from agentsd import Schedule
from agentsd.cli import main
from agentsd.evaluation.protocol import load_protocol
from agentsd.generation.batch.prompts import read_prompts

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")

NOT_RUN = {
    "agentsd app": "runs until it is stopped; test_app_load.py does both",
    "from gradio_client import Client": "needs a server; test_app_server.py has one",
    "import timm": "needs timm; test_vision_models.py has it",
    "import agentsd  # tuning takes minutes": "test_tuning.py does it in seconds",
}
"""First lines of what other tests run."""


class Block(NamedTuple):
    page: str
    text: str


def blocks(language: str, page: Path | None = None) -> list[Block]:
    """The code blocks of a language, of all pages by default."""
    found = [
        Block(file.relative_to(ROOT).as_posix(), text)
        for file in ([page] if page else PAGES)
        for text in re.findall(
            rf"^```{language}\n(.*?)^```",
            file.read_text(encoding="utf-8"),
            re.DOTALL | re.MULTILINE,
        )
    ]
    assert found, f"no {language} block"
    return found


def commands(start: str) -> list[Block]:
    return [
        Block(page, line)
        for page, text in blocks("bash")
        for line in text.replace("\\\n", " ").splitlines()
        if line.startswith(start)
    ]


def to_run(found: list[Block]) -> list[object]:
    """Each text once, named after the first page that has it."""
    first = {text: page for page, text in reversed(found)}
    return [
        pytest.param(text, id=f"{page}-{number}")
        for number, (text, page) in enumerate(reversed(first.items()))
        if text.splitlines()[0] not in NOT_RUN
    ]


MINE = blocks("yaml", DOCS / "schedules.md")[0].text
PROTOCOL = blocks("yaml", DOCS / "evaluation.md")[0].text
ROWS = blocks("json", DOCS / "generate.md")[0].text


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny models, by the hub ids that the docs name."""
    folder = tmp_path_factory.mktemp("models")
    pipe = tiny_pipeline(folder)
    net = controlnet(pipe, folder)
    pipe.save_pretrained(folder / "model")
    return {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": str(folder / "model"),
        "lllyasviel/sd-controlnet-canny": net,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds the files that the docs name."""
    (tmp_path / "mine.yaml").write_text(MINE)
    (tmp_path / "prompts.jsonl").write_text(ROWS)
    for name in ("photo.png", "edges.png"):
        Image.new("RGB", (64, 48), "teal").save(tmp_path / name)
    return tmp_path


def with_models(text: str, models: dict[str, str]) -> str:
    for name, path in models.items():
        text = text.replace(name, path)
    return text


def test_schedule() -> None:
    schedule = Schedule.from_yaml(MINE)
    assert Schedule.from_yaml(schedule.to_yaml()) == schedule


def test_protocol(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(PROTOCOL)
    protocol = load_protocol(tmp_path / "mine.yaml", quick=True)
    assert protocol.num_inference_steps == 8


def test_rows_of_prompts(folder: Path) -> None:
    assert read_prompts((), str(folder / "prompts.jsonl"), {}).images == 3


@pytest.mark.slow
@pytest.mark.parametrize("code", to_run(blocks("python")))
def test_python(
    code: str, folder: Path, models: dict[str, str], small_pocket: dict[str, str]
) -> None:
    code = with_models(code, models)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=small_pocket, check=False)
    assert done.returncode == 0


def in_folder(command: str, folder: Path, models: dict[str, str]) -> list[str]:
    """The words of a command, with tiny models, and the LoRA that it names."""
    if "--lora" in command:
        save_lora(tiny_pipeline(folder), folder, "pixels.safetensors")
    return shlex.split(with_models(command, models))


def test_a_command_of_each_kind_of_input(
    folder: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, and with tiny models, as starting another takes most of the time."""
    monkeypatch.chdir(folder)
    lines = [text for _, text in commands("agentsd ") if any(name in text for name in models)]
    assert len(lines) == 3
    for line in lines:
        program, *words = in_folder(line, folder, models)
        with pytest.raises(SystemExit, match="0"):
            main(words)
        assert program == "agentsd"


@pytest.mark.slow
@pytest.mark.parametrize("command", to_run(commands("agentsd ")))
def test_command(
    command: str, folder: Path, models: dict[str, str], small_pocket: dict[str, str]
) -> None:
    words = in_folder(command, folder, models)
    done = subprocess.run(words, cwd=folder, env=small_pocket, check=False)
    assert done.returncode == 0


def test_set_up_commands_are_those_of_the_makefile() -> None:
    """The plain commands beside ``make demo`` and ``make test`` do what these do."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "make demo" in README
    assert "make test" in README
    assert commands("python3 -m venv .venv")
    for extras in (".", ".[test]"):
        assert commands(f'.venv/bin/pip install --constraint constraints.txt --editable "{extras}"')
    assert '--constraint constraints.txt --editable ".$(EXTRAS)"' in makefile


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_local_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8"))
    for path, anchor in links:
        if "://" in path:
            continue
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, f"{path}#{anchor}"
