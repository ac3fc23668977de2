"""Experiments: a protocol in, images, figures and a report out; interrupted, they go on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import picture_sets
import pytest
from PIL import Image
from tiny_models import smallest_unet, tiny_pipeline, with_safety_checker

from agentsd import progress
from agentsd.cli import main
from agentsd.errors import EvaluationError, ProtocolError, SettingsError
from agentsd.evaluation import experiment, report
from agentsd.evaluation.protocol import UNPATCHED, load_protocol
from agentsd.similarity import psnr

pytestmark = pytest.mark.slow

KEYS = {"schedule": {"phases": [{"method": "keys", "min_tokens": 0}]}}
SMALL = f"""
prompts: [a, b, c]
num_inference_steps: 3
seed: 7
variants:
  keys: {json.dumps(KEYS)}
  mine: {{schedule: {{phases: [{{method: keys, sx: 4, sy: 4, select: grid, min_tokens: 0}}]}}}}
  todo: {{baseline: todo, stride: 4}}
quick: {{num_inference_steps: 2}}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path / "small.yaml"


@pytest.fixture
def small_pipe(tmp_path: Path) -> Any:
    return tiny_pipeline(tmp_path, smallest_unet())


@pytest.fixture
def run(small_pipe: Any, small: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the small experiment, or one that differs from it in some keys."""

    def run(out: str = "out", progress: Any = lambda *_: None, **changes: Any) -> dict[str, Any]:
        protocol = load_protocol(small, **changes)
        return experiment.run(
            protocol, tmp_path / out, small_pipe, cache=tmp_path / "cache", progress=progress
        )

    return run


def images(out: Path) -> dict[str, bytes]:
    return {str(f.relative_to(out)): Image.open(f).tobytes() for f in out.rglob("*.png")}


def test_quick_pocket_protocol_on_a_tiny_model(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("AGENTSD_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    command = ["run", "configs/eval/pocket.yaml", "--quick", "--out", str(out), "--json"]
    command += ["--model", str(tmp_path / "model"), "--device", "cpu"]

    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", *arguments])
        assert stop.value.code == 0
        out, err = capsys.readouterr()
        log.append(err)
        return out

    log: list[str] = []
    monkeypatch.setattr(progress, "PLAIN_EVERY", 0.0)
    first = json.loads(call(*command))
    total = len(first["variants"]) * first["images_per_variant"]
    for what in ("images", "images measured"):  # a line each, to a log that is no terminal
        counts = re.findall(
            rf"^(\d+)/{total} {what}, [\d.]+/s, (?:\d+ (?:s|min)|unknown time) left$", log[0], re.M
        )
        assert [int(done) for done in counts][-3:] == [total - 2, total - 1, total]
    assert {UNPATCHED, "paper", "faithful", "tomesd-0.5", "deepcache-3"} <= first["variants"].keys()
    page = (out / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for name in first["variants"]:
        assert f"<td>{name}</td>" in page
    for name in ("psnr.png", "clip_score.png", "table.md", "report.json"):
        assert (out / name).is_file()
    monkeypatch.setattr("agentsd.generation.images.make_batch", None)  # nothing may be made
    second = json.loads(call(*command))
    assert second["variants"] == first["variants"]
    (out / "report.html").unlink()
    assert f"| {UNPATCHED} |" in call("report", str(out))
    assert "only 3 prompts: the intervals are wide" in page
    assert (out / "report.html").read_text() == page


@pytest.mark.sample
@pytest.mark.command("evaluate run")
@pytest.mark.command("evaluate report")
def test_the_commands(
    small: Path, small_pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_pipe.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    given = ["--model", str(tmp_path / "model"), "--device", "cpu", "--quick", "--json"]
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "run", str(small), "--out", str(out), *given])
    found = json.loads(capsys.readouterr().out)
    assert found["variants"].keys() == {UNPATCHED, "keys", "mine", "todo"}
    page = (out / "report.html").read_text()
    (out / "report.html").unlink()
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "report", str(out)])
    assert f"| {UNPATCHED} |" in capsys.readouterr().out
    assert (out / "report.html").read_text() == page


def test_a_hidden_image_is_left_out_of_all_variants(run: Any, small_pipe: Any) -> None:
    """They are compared in pairs, so that an image hidden in one is missed in all."""
    whole = run("whole")
    with_safety_checker(small_pipe, lambda number: number == 5)  # a variant's first, after warm-ups
    found = run()
    assert found["images_per_variant"] == len(found["prompts"]) == 2
    (note,) = (note for note in found["notes"] if "black" in note)
    assert note.startswith("1 of 3 images are left out")
    assert not any("black" in note for note in whole["notes"])
    assert [p for p in "abc" if p not in found["prompts"]] == ["a"]
    assert found["values"]["keys"]["psnr"] == whole["values"]["keys"]["psnr"][1:]
    assert run()["values"] == found["values"]


def test_figures_are_those_of_the_images(run: Any, tmp_path: Path) -> None:
    found = run()
    a, b = (
        Image.open(tmp_path / "out" / "images" / name / "images" / "000001.png")
        for name in ("keys", UNPATCHED)
    )
    assert found["values"]["keys"]["psnr"][1] == psnr(np.asarray(a), np.asarray(b))
    table = found["variants"]
    for name, row in table.items():
        assert row["psnr"]["mean"] == pytest.approx(np.mean(found["values"][name]["psnr"]))
        assert row["psnr"]["low"] <= row["psnr"]["mean"] <= row["psnr"]["high"]
    assert table[UNPATCHED]["time"] == {"mean": 1, "low": 1, "high": 1}
    assert "fid" not in table["keys"]
    assert (
        "3 images per variant are too few for FID and KID; at least 20 are needed" in found["notes"]
    )
    # ToDo is a fixed grid of keys: no difference is called one, but to another select it is.
    differences = found["differences"]["psnr"]
    assert table["todo"]["psnr"]["mean"] == pytest.approx(table["mine"]["psnr"]["mean"], abs=0.1)
    assert differences["todo"]["keys"]["mean"] == pytest.approx(
        -differences["keys"]["todo"]["mean"]
    )
    assert UNPATCHED not in differences
    assert set(found["front"]) <= {"keys", "mine", "todo"}
    assert report.plot(found, "psnr") != report.plot(found | {"front": []}, "psnr")


def test_the_manifest_describes_each_image(run: Any, tmp_path: Path) -> None:
    run(images_per_prompt=2, num_inference_steps=2)
    lines = (tmp_path / "out" / "images" / "keys" / "manifest.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [e["id"] for e in entries] == list(range(6))
    assert [e["seed"] for e in entries] == list(range(7, 13))
    assert [e["prompt"] for e in entries] == list("abcabc")
    assert entries[0]["schedule"]["phases"][0]["method"] == "keys"
    assert len(entries[0]["schedule_hash"]) == 16
    plain = (tmp_path / "out" / "images" / UNPATCHED / "manifest.jsonl").read_text()
    assert json.loads(plain.splitlines()[0])["schedule_hash"] is None


def test_interrupted_runs_end_with_the_same_images(run: Any, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", stop)
    file = next((tmp_path / "parts" / "images").glob("*/manifest.jsonl"))
    with file.open("a") as torn:
        torn.write('{"id": 2, "prom')
    started = []
    run("parts", lambda what, done, total: started.append((what, done)))
    assert started[0] == ("images", 5)
    assert images(tmp_path / "parts") == images(tmp_path / "whole")


def test_an_experiment_of_an_earlier_version_is_resumed(run: Any, tmp_path: Path) -> None:
    """Its manifests have the number as the id alone, no size of the file, and fewer keys."""
    run(num_inference_steps=2)
    before = images(tmp_path / "out")
    for file in (tmp_path / "out" / "images").glob("*/manifest.jsonl"):
        entries = [json.loads(line) for line in file.read_text().splitlines()]
        for entry in entries:
            del entry["number"], entry["bytes"], entry["revision"]
        file.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    (tmp_path / "out" / "images" / "keys" / "images" / "000001.png").unlink()
    done: list[int] = []
    run(
        progress=lambda what, n, _: done.append(n) if what == "images" else 0, num_inference_steps=2
    )
    assert done == [11, 12]
    assert images(tmp_path / "out") == before


def test_more_images_extend_fewer(run: Any, tmp_path: Path) -> None:
    one: dict[str, Any] = {"variants": {"keys": KEYS}, "num_inference_steps": 2}
    run("grown", **one)
    found = run("grown", images_per_prompt=2, replicates=2, **one)
    run("whole", images_per_prompt=2, replicates=2, **one)
    assert images(tmp_path / "grown") == images(tmp_path / "whole")
    assert found["images_per_variant"] == 12
    replicates = found["variants"]["keys"]["replicates"]["psnr"]
    assert np.mean(replicates) == pytest.approx(found["variants"]["keys"]["psnr"]["mean"])
    assert replicates[0] != replicates[1]


def test_another_experiment_does_not_mix(run: Any, tmp_path: Path) -> None:
    run()
    for changes, key in (
        ({"num_inference_steps": 2}, "num_inference_steps"),
        ({"prompts": ["a", "x", "c"]}, "prompt"),
        ({"variants": {"keys": {"schedule": "paper"}}}, "schedule"),
        ({"scheduler": "EulerDiscreteScheduler"}, "scheduler"),
    ):
        with pytest.raises(EvaluationError, match=f"made with another {key} ") as error:
            run(**changes)
        assert "use another --out" in str(error.value)
    run(variants={"keys": KEYS, "paper": {"schedule": "paper"}})  # but more may be


def test_a_model_exchanged_under_its_name_does_not_mix(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def now(commit: str) -> None:
        monkeypatch.setattr(experiment, "model_fingerprint", lambda _: commit)

    now("1" * 40)
    run()
    run()
    now("2" * 40)
    with pytest.raises(SettingsError, match=r"is not what the image was made with .*1 then"):
        run()


def test_reference_of_real_images(run: Any, tmp_path: Path) -> None:
    reference = picture_sets.folder(tmp_path / "real", 12)
    one: dict[str, Any] = {"variants": {"keys": {"schedule": "faithful"}}, "num_inference_steps": 1}
    table = run(reference=str(reference), images_per_prompt=7, **one)["variants"]
    plain, other = table[UNPATCHED], table["keys"]
    assert other["kid"]["mean"] - plain["kid"]["mean"] == pytest.approx(
        other["kid_difference"]["mean"]
    )
    assert plain["fid"]["mean"] > 0.01
    assert "kid_difference" not in plain


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reference": "nowhere"}, "nowhere: there is no such folder"),
        ({"features": "inception:none.pth"}, "no Inception weights at none.pth"),
        ({"clip": "clip:no/such/clip/x"}, "no CLIP"),
    ],
)
def test_what_it_takes_to_measure_is_asked_for_first(
    run: Any, tmp_path: Path, changes: Any, says: str
) -> None:
    with pytest.raises(EvaluationError, match=says):
        run(**changes)
    assert not (tmp_path / "out" / "images").exists()


def test_a_variant_that_fails_stops_the_experiment(run: Any) -> None:
    with pytest.raises(Exception, match="ratio must be in"):
        run(variants={"x": {"baseline": "tomesd", "ratio": 2.0}})


def test_published_protocol() -> None:
    plan = load_protocol("imagenet2k")
    assert (len(plan.prompts), len(plan.images()), len(plan.all_variants())) == (1000, 2000, 11)
    assert plan.images()[0].prompt == "A high quality photograph of a tench."
    assert (plan.scheduler, plan.num_inference_steps) == ("PNDMScheduler", 50)
    assert len({settings.seed for settings in plan.images()}) == 2000
    assert len(load_protocol("imagenet2k", quick=True).images()) == 3


def test_pocket_protocol() -> None:
    plan = load_protocol("configs/eval/pocket.yaml")
    assert len(plan.all_variants()) == 26
    assert plan.images()[0].guidance_scale == 2


def test_scheduler_is_changed_for_the_run(run: Any, small_pipe: Any, tmp_path: Path) -> None:
    before = small_pipe.scheduler
    run(scheduler="EulerDiscreteScheduler", variants={})
    assert small_pipe.scheduler is before
    manifest = tmp_path / "out" / "images" / UNPATCHED / "manifest.jsonl"
    assert '"scheduler": "EulerDiscreteScheduler"' in manifest.read_text()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prompts: [a", r"line 1: not valid YAML"),
        ("- a", "expected a mapping of names"),
        ("prompts: [a]", "variants: is missing"),
        ("prompts: [a]\nvariant: {}", "unknown key 'variant': did you mean 'variants'"),
        ("prompts: []\nvariants: {}", "prompts: must be a list of at least one"),
        ("prompts: none.txt\nvariants: {}", r"none\.txt: cannot be read"),
        ("prompts: [' ']\nvariants: {}", "prompt: must not be blank"),
        ("prompts: [a]\nvariants: {}\nheight: 65", "height"),
        ("prompts: [a]\nvariants: {}\ntemplate: a", "template: must contain {}"),
        ("prompts: [a]\nvariants: {}\nscheduler: Nope", "scheduler: must be one of DDIM"),
        ("prompts: [a]\nvariants: {}\nquick: 3", "quick: must be a mapping"),
        ("prompts: [a]\nvariants: {}\nreplicates: 0", "replicates"),
        ("prompts: [a, b]\nvariants: {}\nreplicates: 50001", r"at most 100,000 \(got 100,002\)"),
        ("prompts: [a]\nvariants: {'..': {baseline: todo}}", r"'\.\.' must consist of letters"),
        (
            "prompts: [a]\nvariants: {a: {baseline: todo}, A: {baseline: todo}}",
            "differ only in case",
        ),
        ("prompts: [a]\nvariants: {a: {baseline: [todo]}}", "baseline must be one of"),
        ("prompts: [a]\nvariants: {a: {baseline: tiles, size: 2}}", "unexpected keyword argument"),
        ("prompts: [a]\nvariants: {a: {baseline: tiles, side: x}}", "side must be a number"),
        ("prompts: [a]\nvariants: {x: }", r"variants\.x: needs a schedule or a baseline"),
        (
            "prompts: [a]\nvariants: {x: {baseline: magic}}",
            r"variants\.x: baseline must be one of tomesd",
        ),
        ("prompts: [a]\nvariants: {x: {schedule: papre}}", r"variants\.x: no preset schedule"),
        (
            "prompts: [a]\nvariants: {x: {schedule: fast, ratio: 1}}",
            r"cannot be combined with other keys \(got ratio",
        ),
        ("prompts: [a]\nvariants: {a/b: {schedule: faithful}}", "'a/b' must consist of letters"),
        (
            "prompts: [a]\nvariants: {x: {schedule: {phases: [{method: keys, strid: 2}]}}}",
            r"variants\.x: phase 1: method 'keys' does not read 'strid'",
        ),
    ],
)
def test_wrong_protocols_name_file_and_key(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ProtocolError, match=says) as error:
        load_protocol(tmp_path / "wrong.yaml")
    assert "wrong.yaml" in str(error.value)


def test_wrong_use_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain.yaml").write_text("prompts: [a]\nvariants: {}")
    for command, code, says in (
        (["run", "nowhere.yaml"], 2, "nowhere.yaml: cannot be read"),
        (["run", str(tmp_path / "plain.yaml"), "--quick"], 2, "it has no quick version"),
        (["report", str(tmp_path)], 2, "report.json does not exist"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", *command, *(["--out", str(tmp_path)] if command[0] == "run" else [])])
        output = capsys.readouterr()
        assert (stop.value.code, output.out, len(output.err.splitlines())) == (code, "", 1)
        assert says in output.err
