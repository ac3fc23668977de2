"""The benchmark: what it times and writes, what an interruption keeps, what it refuses."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from tiny_models import call, smallest_unet, tiny_unet

from agentsd import cli
from agentsd.benchmark import cases, output, stopwatch, timing, variants
from agentsd.benchmark.cases import Case
from agentsd.benchmark.timing import run
from agentsd.benchmark.variants import REFERENCES, floor, variants_of
from agentsd.errors import SettingsError
from agentsd.models.architectures import ARCHITECTURES


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "build", lambda case: smallest_unet())


def command(*arguments: str) -> int:
    """Exit code of ``agentsd benchmark``."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["benchmark", "--model", "pocket", "--size", "64", "--rounds", "1", *arguments])
    return int(stopped.value.code or 0)


@pytest.mark.slow
def test_every_variant_is_timed_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny_unet()
    monkeypatch.setattr(timing, "build", lambda case: unet)
    before = call(unet)
    timed = variants_of(["paper", "faithful"])
    *_, rows = run(Case("pocket", 16, 32), timed, rounds=2)
    assert [row.variant for row in rows] == list(timed)
    assert rows[0].ratio == 1
    assert rows[0].distance == 0
    saved = 1 - rows[1].seconds / rows[0].seconds
    assert rows[1].removed == (1 if saved > timing.LEAST_SAVING else None)
    assert all(row.distance > 0 for row in rows[1:])
    assert all(row.rounds == 2 and row.tokens == 512 and row.seconds > 0 for row in rows)
    assert all(0 < row.attention_seconds < row.seconds for row in rows)
    merging = {row.variant for row in rows if 0 < row.merging_seconds < row.attention_seconds}
    assert merging == {"paper, phase 1", "paper, phase 2"}
    assert torch.equal(call(unet), before)


def test_the_floor_gives_zeros_at_the_top_alone() -> None:
    unet = tiny_unet()
    with floor(unet):
        changed = {
            name.split(".attentions")[0]
            for name, module in unet.named_modules()
            if name.endswith("attn1") and not isinstance(module.processor, AttnProcessor2_0)
        }
        top = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
        assert not top(torch.randn(1, 256, 16)).any()
    assert changed == {"down_blocks.0", "up_blocks.2"}


@pytest.mark.parametrize(
    ("floor", "removed", "shown"), [(0.5, 0.6, "0.60"), (0.98, None, "–"), (1.2, None, "–")]
)
def test_removed_needs_a_floor_that_saves_something(
    floor: float, removed: float | None, shown: str, tmp_path: Path
) -> None:
    """As a share of next to nothing it could be any number."""
    times = {
        name: [stopwatch.Times(seconds, 0.1, 0.0)] * 3
        for name, seconds in {"unpatched": 1.0, "floor": floor, "faithful": 0.7}.items()
    }
    first = timing._FirstCall(1.0, 0.1, 1)
    rows = [timing._measurement(Case(), name, 4096, times, first) for name in times]
    assert rows[2].removed == (removed if removed is None else pytest.approx(removed))
    table = output.table(rows)
    assert list(table.columns[6].cells)[2] == shown
    note = output.removed_note(rows)
    if removed is None:
        assert note is not None
        assert note.startswith("no 'removed' at 4,096 tokens")
    else:
        assert note is None
    output.write_csv(rows, tmp_path / "figures.csv", "agentsd benchmark")
    written = csv.DictReader((tmp_path / "figures.csv").read_text().splitlines()[2:])
    assert [row["removed"] for row in written][2] == (f"{removed}" if removed else "")


@pytest.mark.parametrize(("seconds", "calls"), [(10, 1), (0.1, 5), (1e-4, 64)])
def test_short_calls_are_timed_together(seconds: float, calls: int) -> None:
    assert timing._calls(seconds) == calls


@pytest.mark.slow
def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "build", lambda case: smallest_unet())
    torch._dynamo.reset()
    real, graphs = torch.compile, []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda *a, **k: real(*a, **k | {"backend": backend}))
    compiled, plain = [], stopwatch.Stopwatch._run

    def counted(watch: Any, calls: int) -> float:
        before = len(graphs)
        seconds = plain(watch, calls)
        compiled.append(len(graphs) - before)
        return seconds

    monkeypatch.setattr(stopwatch.Stopwatch, "_run", counted)

    def new_class(unet: Any) -> Any:
        """A new class at each call, which a compiler must treat as new code."""

        class Zeros(variants._Zeros):
            pass

        return variants.replaced_processors(variants.top_attention_layers(unet), lambda _: Zeros())

    timed_variants = REFERENCES | {"new class": new_class}
    *_, rows = run(Case("sd15-top", 16, 16, compiled=True), timed_variants, rounds=2)
    warm, timed = compiled[::2], compiled[1::2]
    assert any(warm)
    assert not any(timed)
    assert all(row.compiled and row.attention_seconds == 0 for row in rows)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_are_those_of_the_real_models(name: str) -> None:
    """As many parameters, in millions, as on their model cards."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**ARCHITECTURES[name])
    count = sum(p.numel() for p in unet.parameters()) / 1e6
    assert count == pytest.approx({"sd15": 860, "sd21": 866, "sdxl": 2567}[name], abs=1)


def test_the_top_block_is_one_of_the_whole() -> None:
    with torch.device("meta"):
        whole, top = (UNet2DConditionModel(**cases.TIMED[name]) for name in ("sd15", "sd15-top"))
    [layer] = variants.top_attention_layers(top)
    assert layer.downsample == 1
    assert str(layer.module) == str(variants.top_attention_layers(whole)[0].module)


class TestCommand:
    @pytest.fixture(autouse=True)
    def soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Time for long enough to write a figure, not to believe it."""
        monkeypatch.setattr(timing, "LEAST_SECONDS", 0.02)

    @pytest.mark.command("benchmark")
    def test_writes_a_table_and_a_plot(self, tmp_path: Path, capsys: Any) -> None:
        out = tmp_path / "new" / "figures.csv"
        assert command("--schedule", "faithful", "--size", "96x64", "--out", str(out)) == 0
        comment, machine, *lines = out.read_text().splitlines()
        assert comment.startswith("# agentsd benchmark")
        assert torch.__version__ in machine
        rows = list(csv.DictReader(lines))
        assert {(row["height"], row["width"]) for row in rows} == {("16", "16"), ("16", "24")}
        assert {"unpatched", "floor", "faithful", "tomesd 0.5"} <= {row["variant"] for row in rows}
        assert out.with_suffix(".png").stat().st_size > 1000
        assert "speed-up" in capsys.readouterr().out

    def test_stopped_it_keeps_what_was_complete(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = timing.run

        def stopped(*arguments: Any) -> Any:
            yield next(real(*arguments))
            raise KeyboardInterrupt

        monkeypatch.setattr(timing, "run", stopped)
        out = tmp_path / "figures.csv"
        assert command("--no-baselines", "--schedule", "faithful", "--out", str(out)) == 130
        assert "faithful" in out.read_text()
        assert out.with_suffix(".png").is_file()

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("--size", "12"), "--size"),
            (("--size", "64x"), "--size"),
            (("--size", "-64"), "--size"),
            (("--schedule", "nosuch"), "nosuch"),
            (("--dtype", "float8"), "dtype"),
            (("--device", "tpu9"), "tpu9"),
            (("--out", "figures.txt"), ".csv"),
            (("--out", "pyproject.toml/figures.csv"), "cannot write into pyproject.toml"),
        ],
    )
    def test_bad_input(self, arguments: tuple[str, str], says: str, capsys: Any) -> None:
        assert command(*arguments) not in (0, 130)
        error = capsys.readouterr().err
        assert says in error
        assert "Traceback" not in error


def test_a_case_out_of_range() -> None:
    with pytest.raises(SettingsError, match="no model"):
        next(run(Case("sd9"), REFERENCES, 1))
    with pytest.raises(SettingsError, match="rounds"):
        next(run(Case("pocket"), REFERENCES, 0))


@pytest.mark.slow
def test_light_steps_are_timed_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After its first call, which computes the feature, each call of the variant is light."""
    unet = tiny_unet()
    monkeypatch.setattr(timing, "build", lambda case: unet)
    ran: list[int] = []
    unet.mid_block.resnets[0].register_forward_hook(lambda *_: ran.append(0))
    before = call(unet)
    schedule = tmp_path / "mine.yaml"
    schedule.write_text("phases:\n- {method: full, cache_interval: 3}\n")
    timed = variants_of([str(schedule)], baselines=False)
    assert list(timed) == ["unpatched", "floor", "mine, whole", "mine, light"]
    *_, rows = run(Case("pocket", 32, 32), timed, rounds=3)
    apart = {row.variant: row.distance for row in rows}
    assert apart["mine, whole"] == apart["mine, light"] == 0  # of the first call
    for name, expected in (("mine, whole", 2), ("mine, light", 0)):
        ran.clear()
        timesteps = torch.arange(64)
        with timed[name](unet):
            for place in (0, 63):  # at 63, a run computes its last step whole
                call(unet, timesteps[place], size=(32, 32))
        assert len(ran) == expected
    assert torch.equal(call(unet), before)
    seconds = {"unpatched": 9.0, "mine, whole": 8.0, "mine, light": 1.0}
    assert variants.run_seconds(str(schedule), seconds, 13) == 5 * 8 + 8 * 1  # wllwllwllwllw
    row = replace(rows[0], seconds=4.5)
    others = [replace(rows[0], variant=name, seconds=s / 2) for name, s in seconds.items()]
    assert output.runs([row, *others], [str(schedule)], 13)[0].endswith(": 2.44x")
