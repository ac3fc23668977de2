"""The command: its help, its results on stdout, its errors in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import smallest_unet, tiny_pipeline, with_safety_checker
from typer.main import get_command

from agentsd import __version__
from agentsd.cli import agentsd, main
from agentsd.generation.image_files import read_record
from agentsd.image_settings import image_seed


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    """One whose UNet has one level: most of what a command takes is the model's time."""
    return tiny_pipeline(tmp_path, smallest_unet())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline(folder, smallest_unet()).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> str:
    """A folder that a test may change."""
    shutil.copytree(saved, tmp_path / "model")
    return str(tmp_path / "model")


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command with a tiny model and more arguments; returns exit code, stdout and stderr."""

    def run(name: str, *more: str) -> tuple[int, str, str]:
        given = ["--model", model, "--prompt", "red", "--out", str(tmp_path / "out")]
        code = 0
        try:
            main([name, *given, "--num-inference-steps", "2", "--device", "cpu", *more])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def run(command: Run) -> Run:
    return partial(command, "generate")


@pytest.fixture
def compare(command: Run) -> Run:
    return partial(command, "compare")


def test_compare(compare: Run, tmp_path: Path) -> None:
    code, out, err = compare("--seed", "3", "--height", "64", "--width", "96")
    assert (code, "× as fast" in out) == (0, True), err
    with Image.open(tmp_path / "out" / "00000.png") as image:
        assert image.size == (96, 64)
        assert "Seed: 3" in image.text["parameters"]
    assert (tmp_path / "out" / "00000-compare.png").is_file()


@pytest.mark.parametrize(
    ("name", "says"), [("compare", "not measured"), ("generate", "0 images made, of 1")]
)
def test_hidden_images_do_not_count_as_made(
    command: Run, pipe: Any, monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    """All are black: these are not images that were made, nor two equal ones."""
    with_safety_checker(pipe)
    for module in ("models.loading", "generation.batch.request"):
        monkeypatch.setattr(f"agentsd.{module}.load_pipeline", lambda *_, **__: pipe)
    code, out, _ = command(name)
    assert code == 1
    assert "safety checker returned a black image" in out
    assert says in out
    assert "the same image" not in out


@pytest.mark.parametrize(
    "name", [("compare",), ("generate",), ("generate", "--batch-size", "auto")]
)
def test_a_run_that_leaves_no_step_is_refused_before_loading(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: tuple[str, ...]
) -> None:
    for module in ("models.loading", "generation.batch.request"):
        monkeypatch.setattr(f"agentsd.{module}.load_pipeline", None)
    Image.new("RGB", (8, 8)).save(tmp_path / "init.png")
    given = ("--init-image", str(tmp_path / "init.png"), "--strength", "0.01")
    code, _, err = command(*name, *given)
    assert (code, err.count("\n")) == (2, 1), err
    assert "num_inference_steps: 2 at strength 0.01 leaves no denoising step" in err
    assert "at least 100 steps" in err
    assert not (tmp_path / "out").exists()


def test_a_row_that_leaves_no_step_is_invalid(run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "init.png")
    rows = [{"prompt": "a", "num_inference_steps": 1}, {"prompt": "b", "num_inference_steps": 5}]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    begin = ("--init-image", str(tmp_path / "init.png"), "--strength", "0.5")
    code, _, err = run("--prompts", str(file), *begin)
    assert (code, f"{file}:1: num_inference_steps: 1 at strength 0.5 leaves no" in err) == (2, True)
    code, out, _ = run("--prompts", str(file), *begin, "--on-error", "skip", "--json")
    assert (code, json.loads(out)["made"], json.loads(out)["bad_rows"]) == (0, 2, 1)


def test_compare_from_an_image(compare: Run, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "init.png")
    begin = ("--init-image", str(tmp_path / "init.png"), "--strength", "0.4")
    code, out, err = compare(*begin, "--num-inference-steps", "5")
    assert (code, "× as fast" in out) == (0, True), err


def test_an_unexpected_error_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("of\nsomething")

    monkeypatch.setattr("agentsd.generation.batch.request.load_pipeline", load)
    code, _, err = run()
    assert (code, err.count("\n")) == (1, 1), err
    assert err.startswith("error: ZeroDivisionError: of something (unexpected error")
    monkeypatch.setenv("AGENTSD_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        run()


@pytest.mark.command("generate")
def test_json_on_stdout_is_the_summary(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("--json", "--num-images", "2", "--schedule", "fast", "--dtype", "bfloat16")
    summary = json.loads(out)
    assert code == 0
    assert (summary["images"], summary["made"], summary["failed"]) == (2, 2, 0)
    lines = [json.loads(line) for line in Path(summary["manifest"]).read_text().splitlines()]
    assert [(line["seed"], line["dtype"], line["device"]) for line in lines] == [
        (0, "bfloat16", "cpu"),
        (image_seed(0, 0, 1), "bfloat16", "cpu"),
    ]


@pytest.mark.command("compare")
def test_json_of_compare_is_its_summary(compare: Run, tmp_path: Path) -> None:
    summary = json.loads(compare("--json", "--num-images", "2", "--schedule", "fast")[1])
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [image["seed"] for image in summary["images"]] == [0, 1]


def test_what_compare_refuses(compare: Run, tmp_path: Path) -> None:
    for wrong, says in (
        (["--schedule", "none"], "a comparison requires a schedule"),
        (["--prompt", "blue"], "takes one --prompt"),
        (["--height", "70"], "multiples of 8"),
    ):
        code, _, err = compare(*wrong)
        assert (code, says in err) == (2, True), err
    assert not (tmp_path / "out").exists()


def pixels(file: Path) -> bytes:
    with Image.open(file) as image:
        return image.tobytes()


def test_schedule_none_is_the_unpatched_image(run: Run, compare: Run, tmp_path: Path) -> None:
    size = ("--height", "64", "--width", "64")  # enough tokens for any patch
    for schedule in ("none", "fast"):
        out = str(tmp_path / schedule)
        assert run("--schedule", schedule, "--out", out, *size)[0] == 0
    none, fast = (pixels(tmp_path / s / "images" / "000000.png") for s in ("none", "fast"))
    assert none != fast
    assert compare(*size)[0] == 0
    assert none == pixels(tmp_path / "out" / "00000-unpatched.png")


def test_negative_prompt_and_guidance_change_the_image(run: Run, tmp_path: Path) -> None:
    for i, more in enumerate([(), ("--negative-prompt", "blue"), ("--guidance-scale", "1")]):
        assert run(*more, "--out", str(tmp_path / str(i)))[0] == 0
    assert len({pixels(tmp_path / str(i) / "images" / "000000.png") for i in range(3)}) == 3


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--schedule", "papre"], 2, "no preset schedule 'papre'"),
        (["--schedule", "nowhere/a.yaml"], 2, "cannot be read"),
        (["--guidance-scale", "-3"], 2, "guidance_scale"),
        (["--guidance-scale", "much"], 2, "guidance-scale"),
        (["--num-inference-steps", "0"], 2, "num_inference_steps"),
        (["--height", "70"], 2, "multiples of 8"),
        (["--seed", "-1"], 2, "seed"),
        (["--num-images", "0"], 2, "num-images"),
        (["--prompt", ""], 2, "prompt"),
        (["--prompt", "x" * 10_001], 2, "at most 10000 characters"),
        (["--prompts", "nowhere.txt"], 2, "nowhere.txt: cannot be read"),
        (["--prompts", "pyproject.toml"], 2, ".txt, .jsonl, .csv, .tsv"),
        (["--template", "no place"], 2, "must hold {} once"),
        (["--batch-size", "0"], 2, "1 to 1024, or auto"),
        (["--batch-size", "many"], 2, "1 to 1024, or auto"),
        (["--init-image", "pyproject.toml"], 2, "not an image"),
        (["--init-image", "nowhere.png"], 2, "No such file"),
        (["--strength", "0.5"], 2, "strength requires init_image"),
        (["--controlnet", "x"], 2, "each needs the other"),
        (["--controlnet", "docs", "--control-image", "docs/images/demo.png"], 2, "ControlNet"),
        (["--scheduler", "Ddmi"], 2, "no 'Ddmi' for this model; choose one of"),
        (["--lora", "docs:0.5"], 2, "the LoRA 'docs' cannot be loaded"),
        (["--ip-adapter", "x.bin", "--ip-image", "docs/images/demo.png"], 2, "--allow-pickle"),
        (["--attention-backend", "none"], 2, "attention_backend"),
        (["--cpu-offload", "model"], 2, "on the CPU already"),
        (["--from-image", "docs/images/demo.png"], 2, "drop --model, --num-inference-steps, --pro"),
        (["--dtype", "int8"], 2, "int8"),
        (["--device", "abacus"], 2, "no device 'abacus'"),
        (["--model", "nowhere/at/all"], 2, "neither a local folder or file"),
        (["--model", "nowhere"], 2, "'nowhere' is neither a local folder or file nor a"),
        (["--out", "pyproject.toml"], 2, "is a file"),
        (["--no-such-option"], 2, "no-such-option"),
    ],
)
def test_bad_input_is_an_error_of_one_line(
    run: Run,
    tmp_path: Path,
    more: list[str],
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    got, out, err = run(*more)
    assert (got, out) == (code, "")
    assert says in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_from_image_regenerates_it(run: Run, tmp_path: Path, model: str) -> None:
    """Bit for bit from its file alone, even if it was made in a batch."""
    size = ("--height", "64", "--width", "96")
    how = ("--schedule", "faithful", "--scheduler", "Euler a", "--negative-prompt", "c", *size)
    assert run("--prompt", "b", "--num-images", "3", "--batch-size", "4", *how)[0] == 0
    for number in (0, 2, 5):
        first = tmp_path / "out" / "images" / f"{number:06d}.png"
        again = tmp_path / f"again{number}"
        with pytest.raises(SystemExit, match="0"):
            main(["generate", "--from-image", str(first), "--out", str(again)])
        assert (again / "images" / "000000.png").read_bytes() == first.read_bytes()


def again(image: Path, out: Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--from-image", str(image), "--out", str(out), "--device", "cpu"])
    return int(stop.value.code or 0)


@pytest.mark.parametrize("what", ["model", "lora", "init_image"])
def test_inputs_that_changed_are_named(
    run: Run, tmp_path: Path, model: str, pipe: Any, capsys: Any, what: str
) -> None:
    """A run resumes, and an image is regenerated, only from the same files."""
    files = {
        "model": Path(model, "unet", "diffusion_pytorch_model.safetensors"),
        "lora": save_lora(pipe, tmp_path / "lora", seed=0),
        "init_image": tmp_path / "init.png",
    }
    Image.new("RGB", (64, 64), "teal").save(files["init_image"])
    how = {"model": (), "lora": ("--lora", str(files["lora"]))}
    more = how.get(what, ("--init-image", str(files["init_image"]), "--strength", "0.9"))
    made = tmp_path / "out" / "images" / "000000.png"
    assert run(*more)[0] == 0
    before = made.read_bytes()
    assert run(*more)[0] == again(made, tmp_path / "same") == 0
    assert (tmp_path / "same" / "images" / "000000.png").read_bytes() == before
    if what == "model":
        weights = load_file(files["model"])
        save_file({name: value + 0.01 for name, value in weights.items()}, files["model"])
    elif what == "lora":
        save_lora(pipe, tmp_path / "lora", seed=1)
    else:
        Image.new("RGB", (64, 64), "pink").save(files["init_image"])
    code, _, err = run(*more, "--num-images", "2")
    assert (code, "another configuration" in err) == (2, True), err
    name = model if what == "model" else str(files[what])
    assert f"{name} is not what the image was made with" in err
    assert again(made, tmp_path / "other") == 2
    assert f"{name} is not what the image was made with" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def save_lora(pipe: Any, folder: Path, seed: int) -> Path:
    unet = smallest_unet()
    config = LoraConfig(r=2, target_modules=["attn2.to_q"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(config)
    pipe.save_lora_weights(str(folder), unet_lora_layers=get_peft_model_state_dict(unet))
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.slow
def test_images_of_any_size_are_regenerated(run: Run, tmp_path: Path) -> None:
    """The size of a model or of an init image may be one that --height and --width refuse."""
    Image.new("RGB", (75, 49), "teal").save(tmp_path / "init.png")
    follow = ("--init-image", str(tmp_path / "init.png"), "--strength", "1")
    for number, (more, size) in enumerate(
        (
            ((), (32, 32)),
            (follow, (72, 48)),
            ((*follow, "--width", "64"), (64, 40)),
            ((*follow, "--height", "64"), (96, 64)),
        )
    ):
        out = tmp_path / f"sizes{number}"
        assert run("--out", str(out), *more)[0] == 0
        made = out / "images" / "000000.png"
        with Image.open(made) as image:
            assert image.size == size
        assert again(made, tmp_path / f"again{number}") == 0
        other = tmp_path / f"again{number}" / "images" / "000000.png"
        assert other.read_bytes() == made.read_bytes()


def test_spellings_of_a_scheduler_are_one_run(run: Run) -> None:
    spellings = ("dpm++ 2m", "DPM++ 2M", "DPMSolverMultistepScheduler", "dpmsolvermultistep")
    summaries = [run("--scheduler", spelled, "--json") for spelled in spellings]
    assert [json.loads(out)["there_before"] for _, out, _ in summaries] == [0, 1, 1, 1]
    assert run("--scheduler", "DDIM")[0] == 2


def test_a_variant_found_by_itself_is_on_record(
    run: Run, compare: Run, model: str, tmp_path: Path
) -> None:
    for plain in Path(model).glob("*/*.safetensors"):
        plain.rename(plain.with_name(plain.name.replace(".", ".fp16.", 1)))
    made = tmp_path / "out" / "images" / "000000.png"
    assert run()[0] == 0
    assert read_record(made).variant == "fp16"
    code, out, _ = run("--variant", "fp16", "--json")
    assert (code, json.loads(out)["there_before"]) == (0, 1)
    assert again(made, tmp_path / "again") == 0
    assert compare("--out", str(tmp_path / "both"))[0] == 0
    assert read_record(tmp_path / "both" / "00000.png").variant == "fp16"


def test_words_a_model_does_not_know_are_noted_once_each(run: Run) -> None:
    code, _, err = run("--prompt", "blue", "--prompt", "a blue", "--prompt", "green")
    assert code == 0
    assert err.count("does not know the words: blue") == 1
    assert err.count("does not know the words: green") == 1


def test_from_image_refuses_other_settings(tmp_path: Path, capsys: Any) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    for image, more, says in (
        ("pyproject.toml", [], "cannot be read (not an image)"),
        ("nowhere.png", [], "cannot be read (No such file"),
        (str(tmp_path / "plain.png"), [], "has no agentsd metadata"),
        ("nowhere.png", ["--seed", "3"], "drop --seed"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["generate", "--from-image", image, "--out", str(tmp_path / "o"), *more])
        out, err = capsys.readouterr()
        assert (out, says in err, len(err.splitlines())) == ("", True, 1), err


def test_invalid_rows_stop_the_run_or_are_skipped(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "sed": 1}\n{"prompt": "\\u001b[31m"}\n')
    code, out, err = run("--prompts", str(file))
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {file}:2: unknown key 'sed'")
    assert f"; {file}:3: a prompt must not contain control characters" in err
    assert not (tmp_path / "out").exists()
    code, out, err = run("--prompts", str(file), "--on-error", "skip", "--json")
    assert (code, json.loads(out)["made"], json.loads(out)["bad_rows"]) == (0, 2, 2)
    assert f"{file}:3: a prompt must not contain control characters" in err
    assert "\x1b" not in err


def test_a_failed_image_changes_the_exit_code(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "num_inference_steps": 1000, "count": 2}\n')
    monkeypatch.setattr(DDIMScheduler, "set_timesteps", refusing(DDIMScheduler.set_timesteps))
    code, out, err = run("--prompts", str(file), "--schedule", "none")
    assert code == 1
    assert "2 images made, of 4" in out
    assert "2 failed" in out
    assert "image 000002 failed: StableDiffusionPipeline refused the settings" in err


def refusing(real: Any) -> Any:
    def set_timesteps(self: Any, steps: int, *args: Any, **more: Any) -> None:
        if steps == 1000:
            raise ValueError("not so many")
        real(self, steps, *args, **more)

    return set_timesteps


def test_bad_yaml_names_file_and_key(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("phases:\n  - method: keys\n    strid: 4\n")
    code, _, err = run("--schedule", str(file))
    assert code == 2
    assert "mine.yaml" in err
    assert "phase 1: method 'keys' does not read 'strid'" in err


@pytest.mark.slow
@pytest.mark.parametrize("command", [["-m", "agentsd"], ["scripts/generate.py"]])
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


def test_errors_of_the_app_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "auth").write_text("nobody")
    for more, says in (
        (["--max-steps", "0"], "max_steps: input should be greater than or equal to 1"),
        (["--max-pixels", "1"], "max_pixels"),
        (["--auth-file", str(tmp_path / "auth")], "line 1 is not user:password"),
        (["--auth-file", str(tmp_path / "none")], "cannot be read"),
        (["--model", "nowhere/at/all"], "neither a local folder or file"),
    ):
        with pytest.raises(SystemExit):
            main(["app", *more])
        err = capsys.readouterr().err
        assert (says in err, len(err.splitlines())) == (True, 1), err
    monkeypatch.setattr("agentsd.cli.app.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(["app"])
    error = 'error: the app needs gradio: pip install "agentsd[app]"\n'
    assert capsys.readouterr().err == error


COMMANDS = [
    *("generate", "compare", "inspect", "tune", "benchmark", "app"),
    *(f"evaluate {name}" for name in (*("score", "statistics", "run", "report"),)),
]


def test_help_lists_every_command_and_the_exit_codes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    top: Any = get_command(agentsd)
    nested = [f"evaluate {name}" for name in top.commands["evaluate"].commands]
    assert {*top.commands, *nested} == {*COMMANDS, "evaluate"}
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    for name in top.commands:
        assert f"│ {name} " in out
    assert "Exit codes: 0 success; 1 the work failed" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_every_option(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    found: Any = get_command(agentsd)
    for name in command.split():
        found = found.commands[name]
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert found.help.partition(".")[0].split(";")[0] in out
    assert found.params
    for param in found.params:
        assert param.help, param.name
        assert f" {param.opts[0]} " in out
        assert " ".join(param.help.split()[:3]) in out


def test_help_of_sizes_mentions_the_init_image(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("generate", "compare"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        height = capsys.readouterr().out.partition("--height")[2].partition("--width")[0]
        assert "--init-image" in height


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--version"], ["--help"], ["generate", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"agentsd {__version__}" in out
    assert "--num-inference-steps" in out
