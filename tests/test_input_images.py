"""Images of users are read as a person sees them, or refused with the reason."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agentsd import SettingsError
from agentsd.image_settings import ImageSettings, is_size
from agentsd.models.fingerprints import file_sha256
from agentsd.models.input_images import read_input_image
from agentsd.models.options import PipelineOptions

ORIENTATION = 0x0112
HALVES = np.zeros((6, 10, 3), np.uint8)
HALVES[:3] = 255
"""White above black, 10 × 6 pixels."""


def save(folder: Path, image: Image.Image, name: str = "a.png", **how: Any) -> Path:
    image.save(folder / name, **how)
    return folder / name


def png(folder: Path, depth: int, colours: int, pixels: bytes, transparent: bytes) -> Path:
    """A PNG of 2 × 1 pixels with a transparent value, as Pillow does not write them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    (folder / "raw.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, colours, 0, 0, 0))
        + chunk(b"tRNS", transparent)
        + chunk(b"IDAT", zlib.compress(b"\0" + pixels))
        + chunk(b"IEND", b"")
    )
    return folder / "raw.png"


def tiff(folder: Path, bits: int, photometric: int, data: bytes, signed: bool = False) -> Path:
    """A grey TIFF of 2 × 1 pixels; ``photometric`` 0 says that 0 is white."""
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    tags += [(278, 1), (279, len(data)), (339, 2 if signed else 1)]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    (folder / "raw.tif").write_bytes(
        b"II*\0" + struct.pack("<I", 12) + data[:4].ljust(4, b"\0") + directory
    )
    return folder / "raw.tif"


def grey(path: Path) -> list[list[int]]:
    return np.asarray(read_input_image(path))[..., 0].tolist()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_a_camera_on_its_side(tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was turned by 90° to the right
    image = read_input_image(save(tmp_path, Image.fromarray(HALVES), name, exif=exif))
    assert (image.mode, image.size) == ("RGB", (6, 10))
    left, right = np.asarray(image)[5, [0, -1], 0]
    assert (left < 20, right > 235) == (True, True)
    plain = read_input_image(save(tmp_path, Image.fromarray(HALVES), f"plain-{name}"))
    assert plain.size == (10, 6)


def test_a_deep_grey_is_scaled(tmp_path: Path) -> None:
    depth = np.array([[0, 257, 32_896, 65_535]], np.uint16)
    assert grey(save(tmp_path, Image.fromarray(depth))) == [[0, 1, 128, 255]]
    assert grey(save(tmp_path, Image.fromarray(depth), "a.tif")) == [[0, 1, 128, 255]]


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    hidden = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    hidden.putpixel((1, 0), (0, 0, 0, 255))
    palette = hidden.convert("RGB").quantize(2)
    corner = palette.getpixel((0, 0))
    for image, how in (
        (hidden, {}),
        (hidden.convert("LA"), {}),
        (palette, {"transparency": corner}),
        (hidden.convert("RGB"), {"transparency": (200, 0, 0)}),
    ):
        assert grey(save(tmp_path, image, **how)) == [[255, 0]], image.mode
    assert grey(save(tmp_path, hidden.convert("RGB"))) == [[200, 0]]  # the control


@pytest.mark.parametrize(
    ("depth", "pixels", "value", "shows"),
    [
        (1, b"\x40", 0, [255, 255]),
        (1, b"\x40", 1, [0, 255]),
        (2, b"\x70", 1, [255, 255]),
        (4, b"\x3a", 3, [255, 170]),
        (4, b"\x3a", 9, [51, 170]),
        (8, b"\x03\xc8", 3, [255, 200]),
        (16, struct.pack(">HH", 1000, 30_000), 1000, [255, 117]),
        (16, struct.pack(">HH", 1000, 30_000), 1001, [4, 117]),
    ],
)
def test_a_transparent_grey_of_any_depth_is_white(
    tmp_path: Path, depth: int, pixels: bytes, value: int, shows: list[int]
) -> None:
    assert grey(png(tmp_path, depth, 0, pixels, struct.pack(">H", value))) == [shows]


def test_tiffs_whose_greys_pillow_does_not_scale_are_refused(tmp_path: Path) -> None:
    words = struct.pack("<HH", 0, 65_535)
    assert grey(tiff(tmp_path, 16, 1, words)) == [[0, 255]]
    for bits, photometric, data, signed in (
        (12, 1, b"\xff\xf0\x00", False),
        (16, 0, words, False),
        (16, 1, words, True),
    ):
        with pytest.raises(SettingsError, match=r"signed, inverted or 12-bit values.* as PNG"):
            read_input_image(tiff(tmp_path, bits, photometric, data, signed))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGB"])
def test_any_other_mode_is_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (2, 2), "white").convert(mode)
    assert grey(save(tmp_path, image, "a.tif")) == [[255, 255]] * 2


def test_what_is_refused(tmp_path: Path) -> None:
    frames = [Image.new("L", (2, 2), i) for i in (0, 255)]
    deep = Image.fromarray(np.array([[0, 1 << 20]], np.int32))
    (tmp_path / "text.png").write_text("no image")
    for path, says in (
        (save(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:]), "2 frames"),
        (save(tmp_path, deep, "deep.tif"), "more than 16 bits"),
        (save(tmp_path, Image.new("F", (2, 2)), "f.tif"), "floating-point"),
        (tmp_path / "text.png", "not an image that Pillow can read, such as PNG, JPEG"),
        (png(tmp_path, 16, 2, bytes(12), b"\x9c\x40\0\0\0\0"), "save it with an alpha channel"),
        (tmp_path / "none.png", "No such file"),
        (tmp_path, "Is a directory"),
        (Path("x" * 5000), "name too long"),
    ):
        with pytest.raises(SettingsError, match=says):
            read_input_image(path)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = save(tmp_path, Image.new("RGB", (8, 8), "red"))
    options = PipelineOptions(init_image=str(path))
    first, known = options.call_kwargs(8, 8)["image"], options.recorded()
    assert options.call_kwargs(8, 8)["image"].tobytes() == first.tobytes()
    save(tmp_path, Image.new("RGB", (8, 8), "blue"))
    assert options.call_kwargs(8, 8)["image"].tobytes() != first.tobytes()
    assert options.recorded()["init_image_sha256"] != known["init_image_sha256"]


def test_a_file_exchanged_for_one_of_its_size_and_time(tmp_path: Path) -> None:
    """As copies that keep the time, and adapters of one shape, are."""
    path = save(tmp_path, Image.new("RGB", (8, 8), "red"), "a.bmp")
    other = save(tmp_path, Image.new("RGB", (8, 8), "blue"), "b.bmp")
    first, known = read_input_image(path).tobytes(), file_sha256(path)
    before = path.stat()
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)
    now = path.stat()
    assert (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert read_input_image(path).tobytes() != first
    assert file_sha256(path) != known


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        ((None, None), (248, 88)),
        ((48, None), (128, 48)),
        ((None, 128), (128, 48)),
        ((64, 96), (96, 64)),
    ],
)
def test_sizes_beside_an_image(
    tmp_path: Path, given: tuple[int | None, int | None], becomes: tuple[int, int]
) -> None:
    """One side keeps the proportions; images to follow are of one size, whatever theirs is."""
    init = str(save(tmp_path, Image.new("RGB", (251, 93))))
    control = str(save(tmp_path, Image.new("RGB", (40, 40)), "b.png"))
    both = PipelineOptions(init_image=init, controlnet="net", control_image=control).call_kwargs(
        *given
    )
    assert both["image"].size == both["control_image"].size == becomes
    assert PipelineOptions(init_image=init).call_kwargs(*given)["image"].size == becomes


def test_a_deep_grey_that_is_transparent_shows_white(tmp_path: Path) -> None:
    deep = Image.fromarray(np.array([[0, 257], [65535, 0]], np.uint16))
    assert grey(save(tmp_path, deep)) == [[0, 1], [255, 0]]
    path = tmp_path / "a.png"
    data = path.read_bytes()
    chunk = b"tRNS" + bytes(2)  # black is transparent
    at = data.index(b"IDAT") - 4
    whole = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(data[:at] + whole + data[at:])
    assert grey(path) == [[255, 1], [255, 255]]


def test_a_change_that_keeps_size_and_time(tmp_path: Path) -> None:
    """As ``cp -p`` and unpacking an archive do."""
    path = save(tmp_path, Image.new("RGB", (2, 1)), "a.bmp")
    assert grey(path) == [[0, 0]]
    read_input_image(path).putpixel((0, 0), (9, 9, 9))
    assert grey(path) == [[0, 0]]  # a caller's change is its own
    hash_before, time = file_sha256(path), path.stat().st_mtime_ns
    save(tmp_path, Image.new("RGB", (2, 1), "white"), "a.bmp")
    os.utime(path, ns=(time, time))
    assert grey(path) == [[255, 255]]
    assert file_sha256(path) != hash_before


@pytest.mark.parametrize("given", [(None, None), (64, None), (None, 96), (64, 96)])
@pytest.mark.parametrize("of", [(128, 300), (300, 128), (55, 65), (251, 93)])
def test_an_image_of_any_size_is_made_again(
    tmp_path: Path, of: tuple[int, int], given: tuple[int | None, int | None]
) -> None:
    """Its record tells the size that it has, which may be smaller than what can be asked for."""
    options = PipelineOptions(init_image=str(save(tmp_path, Image.new("RGB", of))))
    width, height = options.call_kwargs(*given)["image"].size
    again = PipelineOptions.from_record(options.recorded() | {"width": width, "height": height})
    sides = {"width": width, "height": height} if is_size(height, width) else {}
    made = again.call_kwargs(sides.get("height"), sides.get("width"))
    assert made["image"].size == (width, height)


def test_a_side_that_would_be_too_long(tmp_path: Path) -> None:
    options = PipelineOptions(init_image=str(save(tmp_path, Image.new("RGB", (3000, 1)))))
    with pytest.raises(SettingsError, match=r"1536000 × 512 pixels.* at most 8192"):
        options.check(ImageSettings(prompt="a", height=512))
    options.check(ImageSettings(prompt="a", height=512, width=512))


def test_the_size_on_record_is_made_again(tmp_path: Path) -> None:
    init = str(save(tmp_path, Image.new("RGB", (251, 93))))
    for size in ((251, 93), (248, 92), (48, 48)):
        record = PipelineOptions(init_image=init).recorded() | {"width": size[0], "height": size[1]}
        again = PipelineOptions.from_record(record)
        assert again.call_kwargs(None, None)["image"].size == size
        assert again.call_kwargs(64, 72)["image"].size == (72, 64)


def test_a_side_that_would_be_too_long_is_refused(tmp_path: Path) -> None:
    options = PipelineOptions(init_image=str(save(tmp_path, Image.new("RGB", (2000, 8)))))
    with pytest.raises(SettingsError, match=r"16000 × 64 pixels.* at most 8192"):
        options.call_kwargs(64, None)
    assert options.call_kwargs(64, 2000)["image"].size == (2000, 64)
