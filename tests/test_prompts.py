"""Prompts from every source, what is wrong with them by file and line, and the jobs they become."""

from __future__ import annotations

import io
import json
import os
import sys
import time
import tracemalloc
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from agentsd import Schedule, SettingsError
from agentsd.generation.batch.jobs import Job, batches, jobs
from agentsd.generation.batch.prompts import read_prompts
from agentsd.image_settings import ImageSettings, image_seed

BASE = ImageSettings(prompt="-", seed=7).model_dump(exclude={"prompt"})


def planned(folder: Path, prompts: Any = (), source: Path | str | None = None, **how: Any) -> Any:
    """The jobs of a plan, and what was reported."""
    problems: list[str] = []
    source = None if source is None else str(source)
    plan = read_prompts(prompts, source, BASE, report=problems.append, **how)
    rows = folder / "rows"
    rows.write_bytes(plan.file.read())
    found = list(jobs(rows, BASE, Schedule.preset("faithful")))
    assert plan.images == len(found)
    assert plan.bad == len(problems)
    return found, problems


def written(folder: Path, name: str, text: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def prompts_of(found: list[Job]) -> list[str]:
    return [job.settings.prompt for job in found]


def test_prompts_of_the_command(tmp_path: Path) -> None:
    found, _ = planned(tmp_path, ["a", "b"], count=2)
    assert prompts_of(found) == ["a", "a", "b", "b"]
    assert [job.id for job in found] == ["000000", "000001", "000002", "000003"]
    assert [job.settings.seed for job in found] == [
        image_seed(7, p, i) for p in range(2) for i in range(2)
    ]


def test_txt_with_a_template(tmp_path: Path) -> None:
    file = written(tmp_path, "p.txt", b"\xef\xbb\xbfnaive caf\xc3\xa9\r\n{x} 50%\n")
    found, _ = planned(tmp_path, ["first"], file, template="a photo of a {}.")
    assert prompts_of(found) == [
        "a photo of a first.",
        "a photo of a naive café.",
        "a photo of a {x} 50%.",
    ]


def test_jsonl_rows_override(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "seed": 3, "count": 2, "id": "Cat", "num_inference_steps": 5},
        {"prompt": "b", "height": 64, "schedule": "none", "id": 17, "negative_prompt": "c"},
        {"prompt": "c", "id": "x", "schedule": {"phases": [{"method": "full"}]}},
    ]
    file = written(tmp_path, "p.jsonl", "\n".join(map(json.dumps, rows)))
    found, _ = planned(tmp_path, (), file)
    assert [job.id for job in found] == ["Cat-0", "Cat-1", "17", "x"]
    assert [job.settings.seed for job in found[:2]] == [3, image_seed(3, 0, 1)]
    assert found[0].settings.num_inference_steps == 5
    assert (found[2].settings.height, found[2].schedule) == (64, None)
    assert found[2].settings.seed == image_seed(7, 1, 0)
    assert found[3].schedule == Schedule.from_dict(rows[2]["schedule"])  # type: ignore[arg-type]
    assert found[1].schedule == Schedule.preset("faithful")


def test_partiprompts_and_captions(tmp_path: Path) -> None:
    """The published file has quotation marks as they are; COCO's captions come as CSV."""
    tsv = (
        'Prompt\tCategory\tNote\na sign "Fly"\tArts\t\n"Hi", it says\tArts\tx\n"a ""b"""\tArts\t\n'
    )
    found, _ = planned(tmp_path, (), written(tmp_path, "PartiPrompts.tsv", tsv))
    assert prompts_of(found) == ['a sign "Fly"', '"Hi", it says', 'a "b"']
    coco = 'image_id,id,caption\n9,4,"A man, ""two\nlines"""\n9,5,A dog\n'
    found, _ = planned(tmp_path, (), written(tmp_path, "coco.csv", coco))
    assert prompts_of(found) == ['A man, "two\nlines"', "A dog"]
    assert [job.id for job in found] == ["4", "5"]
    table = "prompt,seed,width\na,5,64\nb,,\n"
    found, _ = planned(tmp_path, (), written(tmp_path, "t.csv", table))
    assert [(j.settings.seed, j.settings.width) for j in found] == [
        (5, 64),
        (image_seed(7, 1, 0), None),
    ]


@pytest.mark.parametrize("text", ["a\nb\n", '{"prompt": "a"}\n{"prompt": "b"}\n'])
def test_standard_input(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert prompts_of(planned(tmp_path, (), "-")[0]) == ["a", "b"]


BAD = {
    b"{broken": "broken JSON",
    b'{"prompt": "a", "sed": 3}': "unknown key 'sed': did you mean 'seed'?",
    b'{"prompt": "a", "seed": "3"}': "seed: input should be a valid integer",
    b'{"prompt": ""}': "prompt: must not be blank",
    b'{"seed": 3}': "prompt: is missing",
    b'{"prompt": "a\\u0000b"}': "control characters",
    b'{"prompt": "a\\ud800"}': "broken Unicode",
    b'{"prompt": "caf\xe9"}': "broken Unicode",
    b'{"prompt": "' + b"x" * 10_001 + b'"}': "at most 10000 characters",
    b'{"prompt": "' + b"x" * 2_000_000 + b'"}': "longer than 1,048,576 characters",
    b'["a"]': "must be a JSON object",
    b'{"prompt": "a", "self": 1}': "unknown key 'self'",
    b"": "empty",
    b"[" * 100_000: "broken JSON",
    b'{"prompt": "a", "guidance_scale": NaN}': "guidance_scale",
    b'{"prompt": "a", "count": 0}': "count",
    b'{"prompt": "a", "id": "../x"}': "letters, digits",
    b'{"prompt": "a", "id": "a/b"}': "letters, digits",
    b'{"prompt": "a", "id": "CAT"}': "ignoring case",
    b'{"prompt": "no id"}': "either all rows have one",
    b'{"prompt": "a", "id": "s", "schedule": "papre"}': "no preset schedule 'papre'",
    b'{"prompt": "a", "id": "s", "schedule": {"phases": []}}': "one or more phases",
}


def test_bad_rows_are_reported_by_file_and_line(tmp_path: Path) -> None:
    good = b'{"prompt": "good", "id": "cat"}\n'
    last = b'{"prompt": "last", "id": "dog"}\n'
    file = written(tmp_path, "p.jsonl", good + b"\n".join(BAD) + b"\n" + last)
    found, problems = planned(tmp_path, (), file, on_error="skip")
    assert [job.id for job in found] == ["cat", "dog"]
    # The seed of a row stays as it is when the bad ones before it are fixed.
    assert found[1].settings.seed == image_seed(7, len(BAD) + 1, 0)
    assert len(problems) == len(BAD)
    for number, (line, says) in enumerate(zip(problems, BAD.values(), strict=True), start=2):
        assert line.startswith(f"{file}:{number}: ")
        assert says in line
    with pytest.raises(
        SettingsError, match=rf"p\.jsonl:2: broken JSON.* \(and {len(BAD) - 5} more"
    ):
        planned(tmp_path, (), file)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.txt", "", "no prompts"),
        ("p.txt", "a\n\nb\n", r"p\.txt:2: empty"),
        ("p.csv", "", r"p\.csv:1: no column prompt, caption or text"),
        ("p.csv", "name\na\n", r"p\.csv:1: no column"),
        ("p.csv", "prompt,a\nx\n", r"p\.csv:2: 1 columns, but the first row names 2"),
        ("p.csv", 'prompt\n"' + "x" * 200_000 + '"\n', r"p\.csv:2: broken row"),
        ("p.csv", 'prompt\n"a\nb\nc\n', r"p\.csv:2: broken row \(unexpected end"),
        ("p.jsonl", '{"prompt": "a", "id": "CON"}', "id: must be letters"),
        ("p.tsv", "prompt\tseed\nx\ty\n", r"p\.tsv:2: seed: input should be a valid integer"),
        ("p.json", "[]", "prompts are read from"),
        ("nul\0.txt", None, "cannot be read"),
        ("nowhere.txt", None, "cannot be read"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str | None, says: str) -> None:
    source = f"{tmp_path}/{name}"
    if text is not None:
        written(tmp_path, name, text)
    with pytest.raises(SettingsError, match=says):
        planned(tmp_path, (), source)


def test_a_large_file_is_read_row_by_row(tmp_path: Path) -> None:
    file = written(tmp_path, "p.txt", b"a red circle\n" * 5_000 + b"x" * 30_000_000)
    tracemalloc.start()
    plan = read_prompts((), str(file), BASE, on_error="skip")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (plan.images, plan.bad) == (5_000, 1)
    assert peak < 12_000_000  # the endless line is 30 MB, and a piece of it 4 MB as characters


def test_batches_hold_what_can_run_together(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "height": 64 if i % 2 else 128} for i in range(11)]
    file = written(tmp_path, "p.jsonl", "\n".join(map(json.dumps, rows)))
    found, _ = planned(tmp_path, (), file)
    groups = list(batches(iter(found), 3))
    assert sorted(job.number for group in groups for job in group) == list(range(11))
    assert max(map(len, groups)) == 3
    assert all(len({job.settings.height for job in group}) == 1 for group in groups)


ENCODINGS = {"utf-8": b"", "utf-8-sig": b"", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}
"""Those that are read, with the byte order mark that Python does not write itself."""

SEPARATORS = "\u2028 \u2029"
"""Lines end at these for ``str.splitlines``, and for no file; a prompt may hold them."""


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv", "p.tsv", "-"])
def test_encodings_and_line_ends(
    tmp_path: Path, encoding: str, end: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [f"café{SEPARATORS}Ω", "b"]
    rows = [json.dumps({"prompt": p}, ensure_ascii=False) for p in wanted]
    lines = rows if name == "p.jsonl" else wanted if name in ("p.txt", "-") else ["prompt", *wanted]
    data = ENCODINGS[encoding] + "".join(line + end for line in lines).encode(encoding)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    source = "-" if name == "-" else written(tmp_path, name, data)
    assert prompts_of(planned(tmp_path, (), source)[0]) == wanted
    assert not sys.stdin.closed


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv"])
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-32"])
def test_other_encodings_are_errors_that_name_the_file(
    tmp_path: Path, name: str, encoding: str
) -> None:
    row = {"p.txt": "café", "p.csv": "prompt\ncafé", "p.jsonl": '{"prompt": "café"}'}[name]
    file = written(tmp_path, name, f"{row}\n".encode(encoding))
    with pytest.raises(SettingsError, match=rf"{name}\S*: .*(UTF-8|no column)"):
        planned(tmp_path, (), file)


def test_a_pipe_may_bring_its_first_bytes_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()

    def bring() -> None:
        with open(write, "wb", buffering=0) as pipe:
            for byte in b"\xff\xfe" + "a\nb\n".encode("utf-16-le"):
                pipe.write(bytes([byte]))
                time.sleep(0.01)

    thread = Thread(target=bring)
    thread.start()
    with open(read, encoding="ascii") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert prompts_of(planned(tmp_path, (), "-")[0]) == ["a", "b"]
    thread.join()


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-32"])
def test_a_table_in_another_encoding_is_an_error(tmp_path: Path, encoding: str) -> None:
    file = written(tmp_path, "a.csv", "prompt,seed\na,3\n".encode(encoding))
    with pytest.raises(SettingsError, match=r"a\.csv: must be UTF-8"):
        planned(tmp_path, source=file)
