"""``agentsd evaluate``: figures on stdout, errors in one line that name what was wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import picture_sets
import pytest
import torch
from PIL import Image

from agentsd.cli import main
from agentsd.evaluation.features import Extractor

Run = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``agentsd evaluate`` with these arguments; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGENTSD_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str) -> tuple[int, str, str]:
        code = 0
        try:
            main(["evaluate", *arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def sets(tmp_path: Path) -> None:
    picture_sets.manifest(tmp_path / "made", 24)
    picture_sets.folder(tmp_path / "real", 30, first=100)
    picture_sets.tar(tmp_path / "set.tar", 24)


@pytest.mark.usefixtures("sets")
def test_fid_and_kid(run: Run) -> None:
    code, out, err = run("score", "--fid", "made", "real", "--json")
    found = json.loads(out)
    assert code == 0, err
    assert "24 images are not more than the 96 dimensions" in err
    assert (found["images"], found["features"]) == (24, "pocket")
    low, high = found["fid_interval"]
    assert low < found["fid"] < high
    same = json.loads(run("score", "--fid", "made", "set.tar", "--json")[1])
    assert same["fid"] == pytest.approx(0, abs=1e-9)
    assert run("score", "--fid", "made", "real")[1].startswith(f"FID {found['fid']:.4g} ± ")
    kid = json.loads(run("score", "--kid", "made", "real", "--json")[1])["kid"]
    assert kid > json.loads(run("score", "--kid", "made", "set.tar", "--json")[1])["kid"]
    assert "at infinitely many" in run("score", "--fid", "made", "real", "--infinity")[1]


@pytest.mark.usefixtures("sets")
@pytest.mark.parametrize("figure", ["fid", "clip-score", "paired"])
def test_hidden_images_are_left_out(run: Run, tmp_path: Path, figure: str) -> None:
    """The figures are those of a set without them, and the output says how many they were."""
    picture_sets.manifest(tmp_path / "some", 24, hidden=(1, 22, 23))
    reference = [] if figure == "clip-score" else ["made"]
    code, out, err = run("score", f"--{figure}", "some", *reference, "--json")
    found = json.loads(out)
    assert (code, found["hidden"]) == (0, 3), err
    assert "left out: 3 replaced with a black image by a safety checker" in err
    assert found.get("pairs", found.get("images")) == 21
    file = tmp_path / "some" / "manifest.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if '"nsfw_content_detected": false' in line))
    if figure != "paired":
        without = json.loads(run("score", f"--{figure}", "some", *reference, "--json")[1])
        assert without == found | {"hidden": 0}
    picture_sets.manifest(tmp_path / "all", 24, hidden=tuple(range(24)))
    code, _, err = run("score", f"--{figure}", "all", *reference)
    assert (code, err.count("\n")) == (2, 1), err
    assert "replaced with a black image" in err


@pytest.mark.sample
@pytest.mark.command("evaluate statistics")
@pytest.mark.usefixtures("sets")
def test_statistics_serve_fid(run: Run) -> None:
    assert run("statistics", "real", "real.npz", "--features", "pocket")[0] == 0
    from_file = json.loads(run("score", "--fid", "made", "real.npz", "--json")[1])
    from_images = json.loads(run("score", "--fid", "made", "real", "--json")[1])
    assert from_file["fid"] == pytest.approx(from_images["fid"], rel=1e-9)
    for flag in ("--kid", "--precision-recall", "--paired"):
        code, out, err = run("score", flag, "made", "real.npz")
        assert (code, out) == (2, "")
        assert "real.npz: statistics can only be used for FID" in err


@pytest.mark.usefixtures("sets")
def test_precision_and_recall(run: Run) -> None:
    found = json.loads(run("score", "--precision-recall", "made", "set.tar", "--json")[1])
    assert (found["precision"], found["recall"]) == (1, 1)
    found = json.loads(run("score", "--precision-recall", "made", "real", "--json")[1])
    assert found["precision"] < 1


@pytest.mark.usefixtures("sets")
def test_clip_score(run: Run, tmp_path: Path) -> None:
    code, out, err = run("score", "--clip-score", "made", "--out", "figures", "--json")
    assert code == 0, err
    written = tmp_path / "figures" / "clip_scores.jsonl"
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(rows) == 24
    found = json.loads(out)
    assert found["clip_score"] == pytest.approx(np.mean([row["clip_score"] for row in rows]))
    low, high = found["clip_score_interval"]
    assert low < found["clip_score"] < high
    packed = json.loads(run("score", "--clip-score", "set.tar", "--clip", "pocket", "--json")[1])
    assert packed["clip_score"] == pytest.approx(found["clip_score"], abs=1e-4)
    Path("prompts.txt").write_text("a red circle and " * 30 + "\n" + "a red circle\n" * 29)
    given = ("real", "--clip", "pocket", "--prompts", "prompts.txt", "--json")
    code, out, err = run("score", "--clip-score", *given)
    assert "1 of 30 prompts are longer than CLIP reads" in err
    assert json.loads(out)["prompts_cut"] == 1


@pytest.mark.usefixtures("sets")
def test_paired(run: Run, tmp_path: Path) -> None:
    picture_sets.folder(tmp_path / "near", 6)
    picture_sets.folder(tmp_path / "exact", 6)
    for i in range(6):
        file = tmp_path / "near" / f"{i:03}.png"
        pixels = np.asarray(Image.open(file)).astype(np.int16)
        moved = (pixels + 5 * (i + 1)).clip(0, 255).astype(np.uint8)
        Image.fromarray(moved).save(file)
    code, out, err = run(
        "score", "--paired", "near", "exact", "--clip", "pocket", "--out", "figures", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    quantiles = found["psnr"]["quantiles"]
    assert quantiles == sorted(quantiles)
    assert quantiles[0] > 20 * np.log10(255 / 30) - 1e-6
    assert found["ssim"]["mean"] < 1
    assert ("LPIPS is left out" in err) == ("lpips" not in found)
    rows = (tmp_path / "figures" / "similarity.jsonl").read_text().splitlines()
    worst = json.loads(rows[-1])
    assert worst["psnr"] == quantiles[0]
    assert Image.open(tmp_path / "figures" / "worst.png").height > 6 * 32
    same = json.loads(run("score", "--paired", "exact", "exact", "--clip", "pocket", "--json")[1])
    assert same["psnr"]["mean"] == pytest.approx(10 * np.log10(255**2 * 3 * 32 * 32))
    assert (same["ssim"]["mean"], same["cosine"]["mean"]) == (pytest.approx(1), pytest.approx(1))
    assert run("score", "--paired", "made", "made")[0] == 0  # by prompt and seed


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images in each call of a network."""
    found: list[int] = []
    real = Extractor.__call__

    def counted(self: Extractor, images: list[Image.Image]) -> Any:
        found.append(len(images))
        return real(self, images)

    monkeypatch.setattr(Extractor, "__call__", counted)
    return found


ALL = ("fid", "kid", "precision-recall", "clip-score", "paired")


@pytest.mark.sample
@pytest.mark.command("evaluate score")
@pytest.mark.usefixtures("sets")
def test_figures_are_the_same_together_from_one_extraction(
    run: Run, tmp_path: Path, seen: list[int]
) -> None:
    picture_sets.manifest(tmp_path / "others", 24)  # the same prompts and seeds, ...
    for file in (tmp_path / "others" / "images").iterdir():
        Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file)  # ... other images
    lines = (tmp_path / "others" / "manifest.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        del entry["sha256"]
    (tmp_path / "others" / "manifest.jsonl").write_text("\n".join(map(json.dumps, entries)))
    flags = [f"--{name}" for name in ALL]
    code, out, err = run("score", "made", "others", *flags, "--infinity", "--json", "--out", "o")
    assert code == 0, err
    found = json.loads(out)
    assert sum(seen) == 24 + 24
    assert err.count("24/24 images") == 2
    assert json.loads(run("score", "made", "others", "--infinity", "--json")[1]) == found
    assert (found["images"], found["pairs"], found["features"]) == (24, 24, "pocket")
    for name in ALL:
        sets = ("made",) if name == "clip-score" else ("made", "others")
        alone = json.loads(run("score", f"--{name}", *sets, "--json")[1])
        assert alone.items() <= found.items()
    files = ["clip_scores.jsonl", "similarity.json", "similarity.jsonl", "worst.png"]
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == files
    text = run("score", "made", "others")[1]
    for start in ("FID", "KID", "precision", "CLIP score", "psnr", "ssim", "cosine"):
        assert re.search(rf"^{start} ", text, re.MULTILINE)


@pytest.mark.usefixtures("sets")
def test_score_without_flags_is_all_that_can_be_measured(run: Run) -> None:
    figures = {"fid", "kid", "precision", "recall", "clip_score", "psnr"}

    def measured(*arguments: str) -> tuple[set[str], str]:
        code, out, err = run("score", *arguments, "--features", "pocket", "--json")
        assert code == 0, err
        return figures & json.loads(out).keys(), err

    assert measured("made")[0] == {"clip_score"}
    found, err = measured("made", "real")
    assert found == figures - {"psnr"}
    assert "note: no similarity of pairs: 24 images and 30 to compare with" in err
    found, err = measured("real", "made")
    assert found == figures - {"psnr", "clip_score"}
    assert "note: no CLIP score: 30 of 30 images have no prompt" in err
    assert run("statistics", "real", "real.npz", "--features", "pocket")[0] == 0
    assert measured("made", "real.npz")[0] == {"fid", "clip_score"}
    assert measured("made", "real", "--kid")[0] == {"kid"}
    for arguments, says in (
        (["real"], "30 of 30 images have no prompt, such as real/000.png; give --prompts"),
        (["made", "--fid"], "made: only the CLIP score needs no reference; give REFERENCE"),
        (["made", "real.npz", "--kid"], "real.npz: statistics can only be used for FID"),
        (["made", "real", "--kid", "--infinity"], "--infinity extrapolates FID"),
    ):
        code, out, err = run("score", *arguments)
        assert (code, out, says in err) == (2, "", True), err


@pytest.mark.usefixtures("sets")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("score --fid empty real", "empty holds no image"),
        ("score --fid one real --features pocket", "at least 2 images are needed (got 1)"),
        ("score --kid one real --features pocket", "at least 3 images are needed (got 1)"),
        ("score --fid nowhere real", "nowhere: there is no such folder"),
        ("score --fid made nowhere.npz", "nowhere.npz: not an .npz of statistics"),
        ("score --fid real real", "get pt_inception-2015-12-05-6726825d.pth from"),
        ("score --fid made real --features inception:w.pth", "w.pth is not the standard"),
        ("score --fid made real --features vgg", "unknown features 'vgg'"),
        ("score --fid made mixed", "001.png: is 48×32, but earlier images are 32×32"),
        ("score --fid made grey", "000.png: is L, not RGB"),
        ("score --fid made real --size 3", "size"),
        ("score --fid made real --device abacus", "no device 'abacus'"),
        ("score --clip-score real --clip pocket", "30 of 30 images have no prompt"),
        ("score --clip-score made --prompts short.txt", "short.txt has 1 prompts for 24"),
        ("score --clip-score made --clip inception", "inception cannot embed prompts"),
        ("score --paired real one", "30 images and 1 to compare with: 29 have no counterpart"),
        ("statistics made s.txt", "s.txt: statistics are written as .npz"),
    ],
)
def test_bad_input_is_an_error_of_one_line(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    says: str,
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "empty").mkdir()
    picture_sets.folder(tmp_path / "one", 1, first=100)
    picture_sets.folder(tmp_path / "mixed", 3)
    picture_sets.noise(1, (48, 32)).save(tmp_path / "mixed" / "001.png")
    picture_sets.folder(tmp_path / "grey", 2)
    picture_sets.noise(1).convert("L").save(tmp_path / "grey" / "000.png")
    (tmp_path / "w.pth").write_text("no weights")
    (tmp_path / "short.txt").write_text("one")
    code, out, err = run(*arguments.split())
    assert (code, out) == (2, "")
    assert says in err
    assert "Traceback" not in err


@pytest.mark.usefixtures("sets")
def test_bad_images_can_be_skipped(run: Run, tmp_path: Path) -> None:
    for name in ("real/003.png", "real/004.png"):
        (tmp_path / name).write_text("no image")
    assert run("score", "--fid", "made", "real")[0] == 2
    code, out, err = run("score", "--fid", "made", "real", "--skip-bad", "--json")
    assert code == 0
    assert len(json.loads(out)["bad"]) == 2
    assert err.count("left out: real/00") == 2
    picture_sets.folder(tmp_path / "there", 30, first=100)
    code, out, _ = run(
        "score", "--paired", "real", "there", "--clip", "pocket", "--skip-bad", "--json"
    )
    assert (code, json.loads(out)["pairs"]) == (0, 28)


@pytest.mark.usefixtures("sets")
@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "--fid", "run", "real"],
        ["score", "--kid", "real", "run"],
        ["score", "--precision-recall", "run", "real"],
        ["statistics", "run", "s.npz"],
        ["score", "--clip-score", "run"],
        ["score", "--paired", "run", "run"],
    ],
)
def test_unfinished_runs_are_refused_unless_asked_for(
    run: Run, tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "made").rename(tmp_path / "run")
    lines = (tmp_path / "run" / "manifest.jsonl").read_text().split("\n")[:-1]
    (tmp_path / "run" / "manifest.jsonl").unlink()
    for name, some in {"0-ab": lines[1::2], "1-cd": lines[:20:2]}.items():
        text = "".join(json.dumps({"number": (e := json.loads(x))["id"], **e}) + "\n" for x in some)
        (tmp_path / "run" / f"manifest.{name}.jsonl").write_text(text)
    (tmp_path / "run" / "run.json").write_text('{"config": {"images": 24}}')
    pocket = ["--features", "pocket", "--clip", "pocket"]
    pocket = pocket[:2] if arguments[0] == "statistics" else pocket
    code, out, err = run(*arguments, *pocket)
    assert (code, out) == (2, "")
    assert "run: the run is unfinished; images missing: 2 of 24" in err
    code, out, err = run(*arguments, *pocket, "--unfinished", "--json")
    assert code == 0, err
    assert "note: run: the run is unfinished; images missing: 2 of 24" in err


@pytest.mark.usefixtures("sets")
def test_progress_is_plain_lines_where_there_is_no_terminal(run: Run) -> None:
    _, out, err = run("score", "--fid", "made", "real")
    assert re.search(r"^24/24 images, [\d.]+/s, 0 s left$", err, re.MULTILINE)
    assert re.search(r"^30/30 images, ", err, re.MULTILINE)
    assert len(out.splitlines()) == 1
    assert re.search(r"^24/24 pairs, ", run("score", "--paired", "made", "made")[2], re.MULTILINE)


@pytest.mark.parametrize("name", ["fid", "clip-score"])
def test_scripts_are_the_commands(name: str) -> None:
    script = f"scripts/evaluate_{name.replace('-', '_')}.py"
    done = subprocess.run(
        [sys.executable, script, "--no-such"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "evaluate score " in done.stderr
