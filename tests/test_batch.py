"""Runs of many images: killed, resumed, shared by processes, out of memory, out of disk."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import socket
import tarfile
import threading
import time
import tracemalloc
from array import array
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from diffusers import AutoPipelineForImage2Image
from PIL import Image
from rich.console import Console
from sampling import with_samples
from tiny_models import smallest_unet, tiny_pipeline, with_safety_checker
from tqdm import tqdm

import agentsd.generation.batch.batch_maker
from agentsd import GenerationError, OutputError, PatchError, Schedule, SettingsError
from agentsd.evaluation.image_sets import read_image_set
from agentsd.generation.batch.batch_maker import largest_batch
from agentsd.generation.batch.engine import Stop
from agentsd.generation.batch.image_writer import ImageWriter
from agentsd.generation.batch.launch import launch
from agentsd.generation.batch.prompts import read_prompts
from agentsd.generation.batch.request import BatchRequest
from agentsd.generation.batch.run_folder import RunFolder
from agentsd.generation.image_files import parameters, read_record
from agentsd.generation.images import RawImage, make_batch
from agentsd.image_settings import ImageSettings
from agentsd.models.options import PipelineOptions

BASE = ImageSettings(prompt="-", seed=3, num_inference_steps=1, height=64, width=64).model_dump(
    exclude={"prompt"}
)
PROMPTS = [f"{a} {b}" for a in "abcde" for b in "fghijklm"]


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    """One whose UNet has one level, as nothing here depends on its depth."""
    return tiny_pipeline(tmp_path, smallest_unet())


@pytest.fixture
def start(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Start a run of the tiny pipeline; returns its summary and whether a signal ended it."""
    monkeypatch.setattr("agentsd.generation.batch.request.load_pipeline", lambda *_, **__: pipe)

    def start(
        name: str = "run", prompts: Any = PROMPTS, source: Path | None = None, **asked: Any
    ) -> tuple[dict[str, Any], Stop]:
        request = BatchRequest(
            out=tmp_path / name,
            schedule=asked.pop("schedule", Schedule.preset("faithful")),
            options=asked.pop("options", PipelineOptions()),
            **{"base": BASE, "model": "tiny", "batch_size": 3, "device": "cpu", "progress": "none"}
            | asked,
        )
        path = None if source is None else str(source)
        console = Console(file=open(os.devnull, "w"))  # noqa: SIM115
        summary, stop = launch(request, lambda: read_prompts(prompts, path, BASE), console)
        assert summary is not None or "RANK" in os.environ
        return summary or {}, stop

    return start


def manifest(folder: Path) -> list[dict[str, Any]]:
    """The manifest, each line of which is true of its file."""
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    for line in lines:
        assert sha256((folder / line["file"]).read_bytes()).hexdigest() == line["sha256"]
    files = {path.name for path in (folder / "images").iterdir()}
    assert files == {Path(line["file"]).name for line in lines}
    return lines


def hashes(folder: Path) -> dict[str, str]:
    lines = manifest(folder)
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line["sha256"] for line in lines}


def test_a_run_writes_images_and_what_made_them(start: Any, tmp_path: Path) -> None:
    summary, _ = start(prompts=["a", "b c"])
    assert (summary["images"], summary["made"], summary["failed"]) == (2, 2, 0)
    lines = manifest(tmp_path / "run")
    assert [line["prompt"] for line in lines] == ["a", "b c"]
    keys = {
        *("id", "prompt", "seed", "file", "sha256", "seconds", "schedule", "schedule_hash"),
        *(*BASE, "model", "revision", "torch", "diffusers", "agentsd", "device", "dtype"),
    }
    assert keys <= set(lines[0])
    assert lines[0]["file"] == "images/000000.png"
    assert lines[0]["schedule"] == Schedule.preset("faithful").to_dict()
    with Image.open(tmp_path / "run" / "images" / "000001.png") as image:
        record = json.loads(image.text["agentsd"])
        assert image.text["parameters"].startswith("b c\n")
    assert record.items() <= lines[1].items()


def test_an_image_that_changes_during_a_run_is_not_followed(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the record of what is made of it would not be true."""
    init = tmp_path / "init.png"
    Image.new("RGB", (64, 64), "teal").save(init)

    def made_and_exchanged(*args: Any) -> Any:
        made = make_batch(*args)
        Image.new("RGB", (64, 64), "pink").save(init)
        return made

    monkeypatch.setattr("agentsd.generation.batch.batch_maker.make_batch", made_and_exchanged)
    summary, _ = start(
        prompts=PROMPTS[:4],
        batch_size=2,
        options=PipelineOptions(init_image=str(init), strength=1.0),
    )
    assert (summary["made"], summary["failed"]) == (2, 2)
    failed = (tmp_path / "run" / "failed.jsonl").read_text().splitlines()
    assert all(f"{init} is not what" in json.loads(line)["error"] for line in failed)


def test_files_are_compared_again_once_the_hub_gave_them(
    pipe: Any, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentsd.models.fingerprints.HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "models--owner--name" / "refs"

    def download(*_: Any, **__: Any) -> Any:
        refs.mkdir(parents=True, exist_ok=True)
        (refs / "main").write_text("1" * 40)
        return pipe

    monkeypatch.setattr("agentsd.generation.batch.request.load_pipeline", download)
    with pytest.raises(SettingsError, match="owner/name is not what"):
        start(prompts=["a"], model="owner/name", known={"owner/name": "2" * 40})
    assert start(prompts=["a"], model="owner/name", known={"owner/name": "1" * 40})


def test_resuming_makes_what_is_missing(start: Any, tmp_path: Path) -> None:
    start("whole", prompts=PROMPTS[:8])
    start(prompts=PROMPTS[:8])
    run, expected = tmp_path / "run", hashes(tmp_path / "whole")
    assert hashes(run) == expected
    assert start(prompts=PROMPTS[:8])[0]["made"] == 0
    # A lost image, a torn last line, a line of nothing, and what a kill leaves of a file.
    (run / "images" / "000001.png").unlink()
    text = (run / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (run / "manifest.jsonl").write_bytes(b"".join(text[:4]) + b"\0\0\n" + text[4][:50])
    (run / "images" / ".000005.png.ab12.part").write_bytes(b"half")
    (run / "images" / "000006.png").write_bytes(b"half")
    summary, _ = start(prompts=PROMPTS[:8])
    assert (summary["there_before"], summary["made"]) == (3, 5)
    assert hashes(run) == expected


def test_another_configuration_is_refused_with_the_difference(start: Any, tmp_path: Path) -> None:
    start(prompts=["a"])
    before = hashes(tmp_path / "run")
    with pytest.raises(SettingsError, match="seed: 3 there, 4 here"):
        start(prompts=["a"], base=BASE | {"seed": 4})
    with pytest.raises(SettingsError, match="images: 1 there, 2 here"):
        start(prompts=["a", "b"])
    with pytest.raises(SettingsError, match=r"schedule: .* there, None here"):
        start(prompts=["a"], schedule=None)
    with pytest.raises(SettingsError, match="no-resume"):
        start(prompts=["a"], resume=False)
    assert hashes(tmp_path / "run") == before
    (tmp_path / "run" / "run.json").unlink()
    for name in ("manifest.jsonl", "prompts.jsonl"):
        with pytest.raises(SettingsError, match="has images or a manifest but no run"):
            start(prompts=["a"])
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(OutputError, match="not JSON"):
        start(prompts=["a"])


def test_two_runs_do_not_share_a_folder(start: Any, tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(OutputError, match="another run"):
        start()


class Child:
    """A run in a process of its own; forked, as starting Python anew takes seconds."""

    def __init__(self, start: Callable[..., Any], **environment: str) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                torch.set_num_threads(1)
                # tqdm's own lock is shared by all forks: one that is killed while it draws a bar
                # would keep it for ever.
                tqdm.set_lock(threading.RLock())
                os.environ.update(environment)
                PartialState._reset_state()
                _, stop = start()
                code = 128 + stop.signal if stop.signal else 0
            finally:
                os._exit(code)

    def wait(self) -> int:
        """Its exit code, or minus the signal that killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self, number: int = signal.SIGKILL) -> int:
        os.kill(self.pid, number)
        return self.wait()


def images(folder: Path) -> int:
    return len(list((folder / "images").glob("[!.]*")))


def wait_for(what: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_twenty_times_it_ends_as_if_never(start: Any, tmp_path: Path) -> None:
    """SIGKILL at random moments: before the first image, between, while files are written."""
    prompts = PROMPTS + PROMPTS[:20]
    start("whole", prompts)
    run, moments = tmp_path / "run", random.Random(0)
    killed_at = []
    for _ in range(20):
        before = images(run)
        # The last few are kept for the run that is not killed.
        goal = min(before + moments.choice([0, 1, 1, 2, 2, 3]), len(prompts) - 12)
        child = Child(lambda: start(prompts=prompts))
        wait_for(lambda goal=goal: images(run) >= goal)
        time.sleep(moments.uniform(0, 0.02))
        assert child.kill() == -signal.SIGKILL
        killed_at.append(images(run))
    assert len(set(killed_at)) > 8
    assert killed_at[-1] < len(prompts)
    summary, _ = start(prompts=prompts)
    assert summary["made"] > 0
    assert summary["there_before"] + summary["made"] == len(prompts)
    assert hashes(run) == hashes(tmp_path / "whole")
    assert not list(run.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("number", with_samples([signal.SIGINT, signal.SIGTERM], signal.SIGTERM))
def test_a_signal_ends_a_run_after_the_batch_in_hand(
    start: Any, tmp_path: Path, number: int
) -> None:
    few, run = PROMPTS[:24], tmp_path / "run"
    child = Child(lambda: start(prompts=few))
    wait_for(lambda: images(run) >= 2)
    assert child.kill(number) == 128 + number
    assert 2 <= len(manifest(run)) < len(few)  # each image has its line, and none is half
    start(prompts=few)
    assert len(manifest(run)) == len(few)


def ranks(start: Any, count: int) -> list[Child]:
    """The processes of one run, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # Else accelerate gives each its share of the cores: other roundings than one thread's, and
    # OpenMP's threads of before the fork are waited for in vain.
    shared["OMP_NUM_THREADS"] = "1"
    return [Child(start, RANK=str(i), LOCAL_RANK=str(i), **shared) for i in range(count)]


@pytest.mark.slow
def test_two_processes_make_what_one_makes(start: Any, tmp_path: Path) -> None:
    few = PROMPTS[:24]
    start("whole", few)
    run = tmp_path / "run"
    children = ranks(lambda: start(prompts=few, stale_after=5, device=None), 2)
    wait_for(lambda: len(list(run.glob("manifest.*.jsonl"))) == 2)  # both had their share
    assert [child.wait() for child in children] == [0, 0]
    assert hashes(run) == hashes(tmp_path / "whole")
    assert sorted(p.name for p in run.glob("*.jsonl")) == ["manifest.jsonl", "prompts.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("dying", [0, 1])
def test_the_work_of_a_process_that_died_is_done(start: Any, tmp_path: Path, dying: int) -> None:
    few = PROMPTS[:24]
    start("whole", few)
    run = tmp_path / "run"
    children = ranks(lambda: start(prompts=few, stale_after=1), 2)
    wait_for(lambda: images(run) >= 4)
    assert children[dying].kill() == -signal.SIGKILL
    assert images(run) < len(few)
    assert children[1 - dying].wait() == 0
    assert hashes(run) == hashes(tmp_path / "whole")


def short_of_memory(pipe: Any, monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let the UNet fit a batch of at most so many images; the batches tried are noted."""
    tried: list[int] = []
    forward = pipe.unet.forward

    def measured(sample: Any, *args: Any, **more: Any) -> Any:
        tried.append(len(sample) // 2)
        if len(sample) // 2 > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(sample, *args, **more)

    monkeypatch.setattr(pipe.unet, "forward", measured)
    return tried


def test_out_of_memory_halves_the_batch(
    start: Any, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = short_of_memory(pipe, monkeypatch, 2)
    summary, _ = start(prompts=PROMPTS[:10], batch_size=8)
    assert (summary["made"], summary["failed"]) == (10, 0)
    assert tried == [8, 4, 2, 2, 2, 2, 2]
    assert {line["batch"][1] for line in manifest(tmp_path / "run")} == {2}


def test_one_that_never_fits_is_reported_and_the_rest_made(
    start: Any, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "height": 128}, {"prompt": "c"}]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    forward = pipe.unet.forward

    def measured(sample: Any, *args: Any, **more: Any) -> Any:
        if sample.shape[-2] > 32:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")
        return forward(sample, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(pipe.unet, "forward", measured)
        summary, _ = start(prompts=(), source=file)
    assert (summary["made"], summary["failed"]) == (2, 1)
    failed = json.loads((tmp_path / "run" / "failed.jsonl").read_text())
    assert failed["id"] == "000001"
    assert "out of memory" in failed["error"]
    assert start(prompts=(), source=file)[0]["made"] == 1  # a second run tries it again
    assert len(manifest(tmp_path / "run")) == 3
    assert not (tmp_path / "run" / "failed.jsonl").exists()


def test_a_row_s_schedule_that_the_model_cannot_take_fails_alone(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = agentsd.generation.batch.batch_maker.patched
    odd = Schedule.from_dict({"phases": [{"method": "full"}]})

    def patched(pipe: Any, schedule: Any) -> Any:
        if schedule == odd:
            raise PatchError("matches no layer")
        return real(pipe, schedule)

    monkeypatch.setattr(agentsd.generation.batch.batch_maker, "patched", patched)
    rows = [{"prompt": "a"}, {"prompt": "b", "schedule": odd.to_dict()}, {"prompt": "c"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summary, _ = start(prompts=(), source=tmp_path / "p.jsonl")
    assert (summary["made"], summary["failed"]) == (2, 1)
    assert "matches no layer" in (tmp_path / "run" / "failed.jsonl").read_text()


def test_an_image_that_overflows_fails_alone(start: Any, pipe: Any, tmp_path: Path) -> None:
    pipe.vae.decoder.register_forward_hook(
        lambda module, args, out: out.index_fill(0, torch.tensor([1]), float("nan"))
    )
    summary, _ = start(prompts=["a", "b", "c"])
    assert (summary["made"], summary["failed"]) == (2, 1)
    assert json.loads((tmp_path / "run" / "failed.jsonl").read_text())["id"] == "000001"
    assert [line["id"] for line in manifest(tmp_path / "run")] == ["000000", "000002"]


def test_a_hidden_image_is_reported_and_not_made_again(
    start: Any, pipe: Any, tmp_path: Path
) -> None:
    with_safety_checker(pipe, lambda number: number == 1)
    for made in (2, 0):  # the run, and one that finds all of it there
        summary, _ = start(prompts=["a", "b", "c"])
        assert (summary["made"], summary["there_before"]) == (made, 2 - made)
        assert (summary["failed"], summary["nsfw_content_detected"]) == (1, 1)
        lines = manifest(tmp_path / "run")
        assert [line["nsfw_content_detected"] for line in lines] == [False, True, False]
        (failed,) = (tmp_path / "run" / "failed.jsonl").read_text().splitlines()
        failure = json.loads(failed)
        assert (failure["id"], failure["prompt"]) == ("000001", "b")
        assert "safety checker replaced it with a black image" in failure["error"]
    assert pipe.safety_checker.seen == 3


def test_a_model_without_a_checker_hides_nothing(start: Any, tmp_path: Path) -> None:
    summary, _ = start(prompts=["a"])
    assert (summary["failed"], summary["nsfw_content_detected"]) == (0, 0)
    assert manifest(tmp_path / "run")[0]["nsfw_content_detected"] is None


def test_the_manifest_has_notes_on_negative_prompts(start: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "negative_prompt": "b " * 20, "guidance_scale": g} for g in (1, 5)]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    start(prompts=(), source=file)
    unused, cut = (line["notes"] for line in manifest(tmp_path / "run"))
    assert "negative prompt is not used" in unused[0]
    assert "negative prompt too long" in cut[0]


def test_a_model_that_cannot_run_ends_the_run_at_once(start: Any, pipe: Any) -> None:
    pipe.unet.conv_in = torch.nn.Conv2d(9, 16, 3, padding=1)
    with pytest.raises(GenerationError, match="failed"):
        start()


@pytest.mark.slow
def test_the_largest_batch(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ImageSettings(prompt="a", height=64, width=64)
    assert largest_batch(pipe, settings, PipelineOptions().call_kwargs) == 1
    tried = short_of_memory(pipe, monkeypatch, 5)
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe), "_execution_device", property(lambda _: Elsewhere("cpu")))
        assert largest_batch(pipe, settings, PipelineOptions().call_kwargs) == 4
    assert sorted(set(tried)) == [2, 4, 8]


@pytest.mark.slow
def test_the_largest_batch_from_an_image(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "init.png")
    options = PipelineOptions(init_image=str(tmp_path / "init.png"), strength=0.1)
    pipe = AutoPipelineForImage2Image.from_pipe(pipe)
    short_of_memory(pipe, monkeypatch, 3)
    monkeypatch.setattr(type(pipe), "_execution_device", property(lambda _: Elsewhere("cpu")))
    settings = ImageSettings(prompt="a", height=64, width=64)
    assert largest_batch(pipe, settings, options.call_kwargs) == 2


class Elsewhere(str):
    """A device that works as the CPU and says that it is another."""

    type = "other"


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_what_was_made_stays(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = PROMPTS[:12]
    start("whole", few)
    real, written = os.fsync, []

    def fsync(file: int) -> None:
        written.append(file)
        if len(written) > 20:
            raise OSError(28, "No space left on device")
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OutputError, match=r"cannot write .*: No space left on device"):
            start(prompts=few)
    run = tmp_path / "run"
    assert 0 < images(run) < len(few)
    assert start(prompts=few)[0]["there_before"] > 0
    assert hashes(run) == hashes(tmp_path / "whole")


@pytest.mark.slow
def test_images_wait_for_their_writer_in_a_bounded_queue(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device goes on while files are written, but never far ahead of them."""
    made, ahead = [], []
    save, make = RunFolder.save, agentsd.generation.batch.batch_maker.make_batch

    def slow(folder: Any, *args: Any) -> None:
        time.sleep(0.02)
        ahead.append(len(made) - len(ahead))
        save(folder, *args)

    def counted(pipe: Any, batch: Any, *args: Any) -> Any:
        made.extend(batch)
        return make(pipe, batch, *args)

    monkeypatch.setattr(RunFolder, "save", slow)
    monkeypatch.setattr(agentsd.generation.batch.batch_maker, "make_batch", counted)
    start(prompts=PROMPTS[:30])
    assert len(ahead) == 30
    assert 1 < max(ahead) <= 8 + 2 + 3 + 3  # queue, writers, and a batch before and after


@pytest.mark.parametrize("form", ["jpg", "webp"])
def test_other_formats_carry_their_record(start: Any, tmp_path: Path, form: str) -> None:
    start(prompts=["ä 赤"], form=form)
    (line,) = manifest(tmp_path / "run")
    record = read_record(tmp_path / "run" / line["file"])
    assert record.to_dict().items() <= line.items()
    with Image.open(tmp_path / "run" / line["file"]) as image:
        assert image.format == {"jpg": "JPEG", "webp": "WEBP"}[form]
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment == b"UNICODE\0" + parameters(image, record).encode("utf-16-be")


@pytest.mark.slow
def test_what_a_format_cannot_hold_fails_alone(start: Any, tmp_path: Path) -> None:
    summary, _ = start(prompts=["a", "赤" * 9_999], form="jpg")
    assert (summary["made"], summary["failed"]) == (1, 1)
    assert "use png" in json.loads((tmp_path / "run" / "failed.jsonl").read_text())["error"]


@pytest.mark.slow
def test_webdataset_reads_the_shards(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    webdataset = pytest.importorskip("webdataset")
    monkeypatch.setattr("agentsd.generation.batch.shards.SHARD", 3)
    start("whole", prompts=PROMPTS[:7])
    start(prompts=PROMPTS[:7], form="webdataset")
    run, loose = tmp_path / "run", manifest(tmp_path / "whole")
    shards = sorted(map(str, (run / "shards").iterdir()))
    assert [Path(shard).name for shard in shards] == [f"00000{i}.tar" for i in range(3)]
    read = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [line["id"] for line in loose]
    for sample, line in zip(read, loose, strict=True):
        assert sha256(sample["png"]).hexdigest() == line["sha256"]
        assert json.loads(sample["json"])["sha256"] == line["sha256"]
        assert sample["txt"].decode() == line["prompt"]
    assert images(run) == 0
    # Evaluation finds the images in the shards, by the manifest and without it.
    for found in (read_image_set(run), [p for shard in shards for p in read_image_set(shard)]):
        assert [(p.prompt, p.model) for p in found] == [(x["prompt"], "tiny") for x in loose]
        assert [p.read_verified()[1] for p in found] == [x["sha256"] for x in loose]
    assert start(prompts=PROMPTS[:7], form="webdataset")[0]["made"] == 0
    # An image whose line is lost is made and packed again; the others stay the bytes they were.
    kept = (run / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (run / "manifest.jsonl").write_bytes(b"".join(kept[:4] + kept[5:]))
    assert start(prompts=PROMPTS[:7], form="webdataset")[0]["made"] == 1
    again = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["png"] for sample in again] == [sample["png"] for sample in read]


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 1000, 12_000])
def test_a_damaged_shard_is_made_again(start: Any, tmp_path: Path, size: int) -> None:
    start(prompts=PROMPTS[:5], form="webdataset")
    shard = tmp_path / "run" / "shards" / "000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:size])
    start(prompts=PROMPTS[:5], form="webdataset")
    with tarfile.open(shard) as tar:
        assert len(tar.getnames()) == 15
    assert start(prompts=PROMPTS[:5], form="webdataset")[0]["made"] == 0


def test_a_manifest_cannot_name_files_elsewhere(start: Any, tmp_path: Path) -> None:
    start(prompts=PROMPTS[:2], form="webdataset")
    victim = tmp_path / "victim.png"
    victim.touch()
    file = tmp_path / "run" / "manifest.jsonl"
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    entries = [line | {"id": "../../victim", "loose": "../victim.png"} for line in entries]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in entries))
    start(prompts=PROMPTS[:2], form="webdataset")
    assert victim.exists()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "[1]\n", '{"prompt": "gre', None])
def test_damaged_prompts_are_written_anew(start: Any, tmp_path: Path, text: str | None) -> None:
    start(prompts=["a", "b"])
    run = tmp_path / "run"
    made = (run / "images" / "000001.png").read_bytes()
    (run / "images" / "000001.png").unlink()
    (run / "prompts.jsonl").unlink() if text is None else (run / "prompts.jsonl").write_text(text)
    assert start(prompts=["a", "b"])[0]["made"] == 1
    assert (run / "images" / "000001.png").read_bytes() == made


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, "abc", [1], -1, 1.5, True])
def test_an_edited_batch_size_is_found_anew(start: Any, tmp_path: Path, size: Any) -> None:
    start(prompts=["a", "b"], batch_size=None)
    run = tmp_path / "run"
    described = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(described | {"batch_size": size}))
    (run / "images" / "000001.png").unlink()
    assert start(prompts=["a", "b"], batch_size=None)[0]["made"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("file", [5, ["x"], "a\0b", "."])
def test_a_line_that_names_no_file_is_made_again(start: Any, tmp_path: Path, file: Any) -> None:
    start(prompts=["a", "b"])
    lines = manifest(tmp_path / "run")
    lines[1]["file"] = file
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (tmp_path / "run" / "manifest.jsonl").write_text(text)
    assert start(prompts=["a", "b"])[0]["made"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("keeps_records", [False, True])
def test_memory_stays_flat(
    start: Any, monkeypatch: pytest.MonkeyPatch, *, keeps_records: bool
) -> None:
    """Nothing that grows with the number of images is kept; a record would be 1 kB for each."""
    batches, kept = 200, []
    held = array("q")  # no object for each batch
    save, put = RunFolder.save, ImageWriter.put

    def put_and_wait(writer: ImageWriter, *image: Any) -> None:
        put(writer, *image)
        writer.drain()  # how many images wait would vary from one moment to the next

    def made(pipe: Any, batch: Any, *_: Any) -> Any:
        if len(held) in (batches // 4, 3 * batches // 4):
            gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        return [RawImage(torch.zeros(8, 8, 3).numpy(), None) for _ in batch]

    def keep(folder: Any, file: str, data: bytes, line: dict[str, Any]) -> None:
        kept.append(json.dumps(line)[:1000])
        save(folder, file, data, line)

    monkeypatch.setattr(agentsd.generation.batch.batch_maker, "make_batch", made)
    monkeypatch.setattr(ImageWriter, "put", put_and_wait)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    if keeps_records:
        monkeypatch.setattr(RunFolder, "save", keep)
    gc.collect()
    gc.freeze()
    tracemalloc.start()
    try:
        start(prompts=[f"a {i % 10}" for i in range(4 * batches)], batch_size=4)
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    assert len(held) == batches
    # Between the middles of the second and the last quarter lie half of the images.
    early, late = (
        min(held[quarter * batches // 4 : (quarter + 1) * batches // 4]) for quarter in (1, 3)
    )
    per_image = (late - early) / (2 * batches)
    assert (per_image > 150) is keeps_records


def test_an_image_that_changes_during_a_run_stops_counting(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "init.png"
    Image.new("RGB", (64, 64)).save(path)
    options = PipelineOptions(init_image=str(path), strength=1)
    before, real = (
        options.recorded()["init_image_sha256"],
        agentsd.generation.batch.batch_maker.make_batch,
    )

    def changing(*args: Any) -> list[RawImage]:
        made = real(*args)
        Image.new("RGB", (64, 64), "white").save(path)
        return made

    monkeypatch.setattr(agentsd.generation.batch.batch_maker, "make_batch", changing)
    summary, _ = start(prompts=["a", "b"], options=options, batch_size=1)
    assert (summary["made"], summary["failed"]) == (1, 1)
    assert [line["init_image_sha256"] for line in manifest(tmp_path / "run")] == [before]
    (failure,) = (tmp_path / "run" / "failed.jsonl").read_text().splitlines()
    assert "init.png is not what" in failure
