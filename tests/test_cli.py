"""The command: its help, its results on stdout, its errors in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agentsd import __version__
from agentsd.cli import main


@pytest.fixture
def model(pipe: Any, tmp_path: Path) -> str:
    pipe.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def run(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run ``agentsd generate`` with more arguments; returns exit code, stdout and stderr."""

    def run(*more: str) -> tuple[int, str, str]:
        given = ["--model", model, "--prompt", "red", "--out", str(tmp_path / "out")]
        code = 0
        try:
            main(["generate", *given, "--num-inference-steps", "2", "--device", "cpu", *more])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


def test_compare(run: Any, tmp_path: Path) -> None:
    code, out, err = run("--compare", "--seed", "3", "--height", "64", "--width", "96")
    assert (code, "× as fast" in out) == (0, True), err
    with Image.open(tmp_path / "out" / "00000.png") as image:
        assert image.size == (96, 64)
        assert "Seed: 3" in image.text["parameters"]
    assert (tmp_path / "out" / "00000-compare.png").is_file()


def test_json_on_stdout_is_the_summary(run: Any, tmp_path: Path) -> None:
    code, out, _ = run("--json", "--num-images", "2", "--schedule", "keys", "--dtype", "bfloat16")
    summary = json.loads(out)
    assert code == 0
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [image["seed"] for image in summary["images"]] == [0, 1]
    assert (summary["dtype"], summary["device"]) == ("bfloat16", "cpu")


def test_schedule_none_is_the_unpatched_image(run: Any, tmp_path: Path) -> None:
    for schedule in ("none", "keys"):
        assert run("--schedule", schedule)[0] == 0
    none, keys = (Image.open(tmp_path / "out" / f"0000{i}.png") for i in range(2))
    assert none.tobytes() != keys.tobytes()
    assert run("--compare")[0] == 0
    unpatched = Image.open(tmp_path / "out" / "00002-unpatched.png")
    assert none.tobytes() == unpatched.tobytes()


def test_negative_prompt_and_guidance_change_the_image(run: Any, tmp_path: Path) -> None:
    for more in ((), ("--negative-prompt", "blue"), ("--guidance-scale", "1")):
        assert run(*more)[0] == 0
    images = {Image.open(tmp_path / "out" / f"0000{i}.png").tobytes() for i in range(3)}
    assert len(images) == 3


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--schedule", "papre"], 2, "no preset schedule 'papre'"),
        (["--schedule", "nowhere/a.yaml"], 2, "cannot be read"),
        (["--schedule", "none", "--compare"], 2, "--compare needs a schedule"),
        (["--guidance-scale", "-3"], 2, "guidance_scale"),
        (["--guidance-scale", "much"], 2, "guidance-scale"),
        (["--num-inference-steps", "0"], 2, "num_inference_steps"),
        (["--height", "70"], 2, "multiples of 8"),
        (["--seed", "-1"], 2, "seed"),
        (["--num-images", "0"], 2, "num-images"),
        (["--prompt", ""], 2, "prompt"),
        (["--dtype", "int8"], 2, "int8"),
        (["--device", "abacus"], 1, "no device 'abacus'"),
        (["--model", "nowhere/at/all"], 1, "neither a folder nor a file"),
        (["--out", "pyproject.toml"], 1, "is a file"),
        (["--no-such-option"], 2, "no-such-option"),
    ],
)
def test_bad_input_is_an_error_of_one_line(
    run: Any, tmp_path: Path, more: list[str], code: int, says: str
) -> None:
    got, out, err = run(*more)
    assert (got, out) == (code, "")
    assert says in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_bad_yaml_names_file_and_key(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("phases:\n  - method: keys\n    strid: 4\n")
    code, _, err = run("--schedule", str(file))
    assert code == 2
    assert "mine.yaml" in err
    assert "phase 1: unknown key 'strid'" in err


@pytest.mark.parametrize("command", [["-m", "agentsd.cli"], ["scripts/generate.py"]])
def test_as_a_program(command: list[str]) -> None:
    more = ["generate"] if command[0] == "-m" else []
    done = subprocess.run(
        [sys.executable, *command, *more, "--prompt", "red", "--out", "o", "--schedule", "x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no preset schedule 'x'")
    assert len(done.stderr.splitlines()) == 1


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--version"], ["--help"], ["generate", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"agentsd {__version__}" in out
    assert "--num-inference-steps" in out
