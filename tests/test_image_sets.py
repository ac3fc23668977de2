"""Which images of a set are measured, and errors and warnings for the others."""

from __future__ import annotations

import struct
import tarfile
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import picture_sets
import pytest
from PIL import ExifTags, Image

from agentsd.errors import EvaluationError
from agentsd.evaluation.image_sets import read_image_set, with_prompts
from agentsd.evaluation.protocol import load_protocol
from agentsd.evaluation.reading import ReadOptions, decode_image, open_image
from agentsd.generation.batch.run_folder import RunFolder

SEPARATORS = "\u2028 \u2029 \x85 \x0b \x0c \x1c"
"""Characters at which ``str.splitlines`` splits, though no line of a file ends at them."""


def names(source: Path, **how: Any) -> list[str]:
    return [Path(entry.name).name for entry in read_image_set(source, **how)]


def saved(form: str, image: Image.Image, **how: Any) -> bytes:
    data = BytesIO()
    image.copy().save(data, form, **how)  # Pillow notes on an image how it was saved last
    return data.getvalue()


def run_folder(path: Path, made: dict[str, list[int]], failed: int, total: int) -> Path:
    """A run of ``agentsd generate`` as it is on disk: the images that each process made."""
    (path / "images").mkdir(parents=True)
    for process, numbers in made.items():
        folder = RunFolder(path, process)
        for n in numbers:
            data = saved("PNG", picture_sets.noise(n))
            record = {"number": n, "prompt": f"{n}{SEPARATORS}", "seed": n}
            folder.save(f"images/{n:06}.png", data, record)
        if failed:
            folder.fail({"number": total - failed, "error": "x"})
            failed -= 1
    RunFolder(path).describe({"config": {"images": total}})
    return path


def test_an_unfinished_run_is_an_error_unless_accepted(tmp_path: Path) -> None:
    parts = {"1-cd": [5, 1, 0], "0-ab": [2, 1]}
    run = run_folder(tmp_path / "run", parts, failed=0, total=8)
    with (run / "manifest.0-ab.jsonl").open("a") as torn:
        torn.write('{"number": 6, "file": "ima')
    files = sorted(run.glob("manifest.*"))
    for lost in (0, 1, 2):
        for file in files[:lost]:
            file.rename(tmp_path / file.name)
        with pytest.raises(EvaluationError, match=r"unfinished; images missing: \d of 8") as raised:
            read_image_set(run)
        assert "start agentsd generate again" in str(raised.value)
        for file in files[:lost]:
            (tmp_path / file.name).rename(file)
    with pytest.warns(UserWarning, match="unfinished; images missing: 4 of 8"):
        found = read_image_set(run, unfinished=True)
    assert [p.seed for p in found] == [0, 1, 2, 5]
    assert [p.prompt for p in found] == [f"{n}{SEPARATORS}" for n in (0, 1, 2, 5)]


def test_a_run_of_one_process_that_was_stopped_is_unfinished_too(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", {"": [0, 1]}, failed=1, total=4)
    with (
        pytest.warns(UserWarning, match="could not be made: 1 of 4"),
        pytest.raises(EvaluationError, match="unfinished; images missing: 1 of 4"),
    ):
        read_image_set(run)


def test_the_images_of_a_run_stand_for_the_run(tmp_path: Path) -> None:
    """Its manifest lists hidden images, which look like any others in the folder."""
    run = run_folder(tmp_path / "run", {"": [0]}, failed=0, total=2)
    record = {"number": 1, "nsfw_content_detected": True}
    RunFolder(run).save("images/000001.png", saved("PNG", picture_sets.noise(1)), record)
    assert [entry.hidden for entry in read_image_set(run / "images")] == [False, True]


def test_a_finished_run_is_whole_before_its_parts_are_merged(tmp_path: Path) -> None:
    parts = {"1-cd": [1], "0-ab": [0, 2]}
    run = run_folder(tmp_path / "run", parts, failed=2, total=5)
    with pytest.warns(UserWarning, match="left out because they could not be made: 2 of 5"):
        assert names(run) == ["000000.png", "000001.png", "000002.png"]


@pytest.mark.parametrize("text", ["{", "[]", '{"config": {}}', '{"config": {"images": "x"}}'])
def test_a_broken_run_is_an_error(tmp_path: Path, text: str) -> None:
    run = run_folder(tmp_path / "run", {"": [0]}, failed=0, total=1)
    (run / "run.json").write_text(text)
    with pytest.raises(EvaluationError, match="run: not a run of agentsd generate"):
        read_image_set(run)


def test_all_of_a_folder_is_read_or_counted(tmp_path: Path) -> None:
    folder = picture_sets.folder(tmp_path / "set", 2)
    elsewhere = picture_sets.folder(tmp_path / "elsewhere", 1, first=7)
    picture_sets.noise(3).save(folder / "b.jfif", "JPEG")
    (elsewhere / "000.png").rename(elsewhere / "linked.PNG")
    (folder / "link").symlink_to(elsewhere)
    (folder / "loop").symlink_to(tmp_path)
    (elsewhere / "back").symlink_to(folder)
    (folder / "000.txt").write_text("a caption")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "000.png").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(folder) == ["000.png", "001.png", "b.jfif", "linked.PNG"]
    for name in ("a.heic", "b.HEIC", "c.avif", "README"):
        (folder / name).write_text("")
    with pytest.warns(UserWarning, match=r"files left out: 4 \(1 .avif, 2 .heic, 1 README\)"):
        assert len(read_image_set(folder)) == 4


def test_all_of_a_tar_is_read_or_counted(tmp_path: Path) -> None:
    folder = picture_sets.folder(tmp_path / "set", 2)

    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name in ("a.png", "b.0.png", "c.gif", ".hidden.png"):
            tar.add(folder / "000.png", name)
        link = tarfile.TarInfo("d.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        tar.addfile(link)
    with pytest.warns(UserWarning, match=r"files left out: 2 \(1 .0.png, 1 link\)"):
        assert names(tmp_path / "set.tar") == ["set.tar:a.png", "set.tar:c.gif"]
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(folder / "000.png", "a.png")
    with pytest.raises(EvaluationError, match="not a complete, uncompressed tar"):
        read_image_set(tmp_path / "packed.tar")


@pytest.mark.parametrize(
    ("members", "key"),
    [
        (["0.png", "0.txt", "1.png", "0.png", "0.txt"], "0"),
        (["0.png", "0.png"], "0"),
        (["0.png", "0.jpg"], "0"),
        (["a/0.png", "b/0.png", "b/0.webp"], "b/0"),
        (["0.png", "0.PNG"], "0"),
        (["0.txt", "1.png", "0.txt"], "0"),
        (["0.json", "0.png", "0.json"], "0"),
    ],
)
def test_a_key_that_occurs_twice_in_a_tar_is_an_error(
    tmp_path: Path, members: list[str], key: str
) -> None:
    """As where shards were joined: a sample would be lost, or get the text of another."""
    (tmp_path / "file").write_bytes(b"{}")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name in members:
            tar.add(tmp_path / "file", name)
    with pytest.raises(EvaluationError, match=rf"set\.tar: the key '{key}' occurs twice"):
        read_image_set(tmp_path / "set.tar")


def test_the_same_name_in_two_folders_of_a_tar_is_two_keys(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name in ("a/0.png", "b/0.png", "a/0.txt", "b/0.txt"):
            tar.add(tmp_path / "file", name)
    found = [entry.name.rpartition(":")[2] for entry in read_image_set(tmp_path / "set.tar")]
    assert found == ["a/0.png", "b/0.png"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "utf-16-le"])
@pytest.mark.parametrize("where", ["--prompts", "beside", "protocol", "tar"])
def test_prompts_in_any_encoding(tmp_path: Path, encoding: str, where: str) -> None:
    folder = picture_sets.folder(tmp_path / "set", 2)
    wanted = [f"é{' ' if encoding == 'cp1252' else SEPARATORS}a", "b"]
    if where == "protocol":
        wanted = [text.translate(dict.fromkeys(map(ord, "\x85\x0b\x0c\x1c"))) for text in wanted]
    file = tmp_path / "p.txt"
    file.write_bytes("\r\n".join([*wanted, ""]).encode(encoding))

    def read() -> list[str | None]:
        if where == "--prompts":
            return [p.prompt for p in with_prompts(read_image_set(folder), file)]
        if where == "protocol":
            (tmp_path / "x.yaml").write_text("prompts: p.txt\nvariants: {}")
            return [*load_protocol(tmp_path / "x.yaml").prompts]
        for i, text in enumerate(wanted):
            (folder / f"{i:03}.txt").write_bytes(text.encode(encoding))
        if where == "beside":
            return [p.prompt for p in read_image_set(folder)]

        with tarfile.open(tmp_path / "set.tar", "w") as tar:
            for each in sorted(folder.iterdir()):
                tar.add(each, each.name)
        return [p.prompt for p in read_image_set(tmp_path / "set.tar")]

    if encoding in ("cp1252", "utf-16-le"):
        with pytest.raises(Exception, match=r"\.txt: must be UTF-8, or UTF-16"):
            read()
    else:
        assert read() == wanted


def test_what_is_not_a_list_of_prompts_is_an_error(tmp_path: Path) -> None:
    found = read_image_set(picture_sets.folder(tmp_path / "set", 2))
    for name, text, says in (
        ("p.txt", "a\n \n", r"p\.txt:2: empty"),
        ("p.jsonl", '{"prompt": "a"}\n' * 2, r"p\.jsonl: prompts are read from plain text"),
        ("p.csv", "prompt\na\n", r"p\.csv: prompts are read from plain text"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(EvaluationError, match=says):
            with_prompts(found, tmp_path / name)


def bitmap565() -> bytes:
    header = struct.pack("<IiiHHIIiiII3I", 40, 4, 4, 1, 16, 3, 32, 0, 0, 0, 0, 0xF800, 0x7E0, 0x1F)
    return (
        b"BM"
        + struct.pack("<IHHI", 14 + len(header) + 32, 0, 0, 14 + len(header))
        + header
        + bytes(32)
    )


RED, BLUE = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
SEVERAL: dict[str, Any] = {"save_all": True, "append_images": [BLUE]}
REFUSED = {
    "PPM of 16 bits": (b"P6 4 4 65535\n" + bytes(96), "more than 8 bits", False),
    "PPM of 10 bits": (b"P6 4 4 1023\n" + bytes(96), "more than 8 bits", False),
    "plain PPM of 16 bits": (b"P3 4 4 65535\n" + b"9 " * 48, "more than 8 bits", False),
    "PGM of 16 bits": (b"P5 4 4 65535\n" + bytes(32), "more than 8 bits", False),
    "tRNS": (saved("PNG", RED, transparency=(255, 0, 0)), "a transparent colour", True),
    "APNG": (saved("PNG", RED, **SEVERAL), "several frames", True),
    "TIFF": (saved("TIFF", RED, **SEVERAL), "several frames", True),
    "WebP": (saved("WEBP", RED, lossless=True, **SEVERAL), "several frames", True),
    "GIF": (saved("GIF", RED, **SEVERAL), "several frames", True),
    "GIF of one frame": (saved("GIF", RED), "is P, not RGB", True),
}
TAKEN = {
    "PPM": b"P6 4 4 255\n" + b"\xff\0\0" * 16,
    "PPM of 7 bits": b"P6 4 4 127\n" + b"\x7f\0\0" * 16,
    "MPO": saved("MPO", RED, **SEVERAL),
    "TIFF": saved("TIFF", RED),
    "BMP of 5-6-5 bits": bitmap565(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_silently_is_refused(name: str) -> None:
    data, says, convertible = REFUSED[name]
    with pytest.raises(EvaluationError, match=f"x: .*{says}"):
        open_image("x", data, ReadOptions())
    if convertible:
        image = decode_image(
            "x", open_image("x", data, ReadOptions(convert=True)), ReadOptions(convert=True)
        )
        assert (np.asarray(image)[0, 0] == (255, 0, 0)).all()
    else:
        with pytest.raises(EvaluationError, match=says):
            open_image("x", data, ReadOptions(convert=True))


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_plain_rgb_is_taken(name: str) -> None:
    assert (
        decode_image("x", open_image("x", TAKEN[name], ReadOptions()), ReadOptions()).mode == "RGB"
    )


IEND = saved("PNG", RED)[-12:]
"""The end of each PNG; tools put their EXIF right before it."""


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "PNG, EXIF last", "TIFF", "WEBP"])
def test_images_are_upright(form: str, orientation: int) -> None:
    stored = Image.new("RGB", (16, 8), "red")
    stored.paste("blue", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = saved(form.split(",")[0], stored, exif=exif)
    if form == "PNG, EXIF last":
        start = data.index(b"eXIf") - 4
        chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
        data = data.replace(chunk, b"").removesuffix(IEND) + chunk + IEND
    image = open_image("x", data, ReadOptions())
    turn = {1: 0, 3: 180, 6: 270, 8: 90}[orientation]
    expected = stored.rotate(turn, expand=True)
    assert image.size == expected.size
    found = np.asarray(decode_image("x", image, ReadOptions()), np.int16)
    assert np.abs(found - np.asarray(expected)).mean() < 8
    if turn:
        assert found.shape != np.asarray(stored).shape or np.abs(found - stored).mean() > 50


def test_damage_is_an_error_for_turned_images_too() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = saved("JPEG", picture_sets.noise(0, (64, 64)), exif=exif)
    with pytest.raises(EvaluationError, match="x: is damaged or truncated"):
        open_image("x", data[:-20], ReadOptions())
