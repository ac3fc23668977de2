"""What is written: whole files, the parameters convention, the comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agentsd.errors import OutputError
from agentsd.generation.image_files import (
    next_number,
    parameters,
    save_image,
    side_by_side,
    write_whole,
)
from agentsd.generation.records import ImageRecord

RECORD = {
    "prompt": "a red circle, naïve",
    "negative_prompt": "blur",
    "seed": 7,
    "num_inference_steps": 25,
    "guidance_scale": 5.0,
    "model": "models/tiny.safetensors",
    "scheduler": "PNDMScheduler",
    "schedule": {"phases": [{"until": 0.5, "method": "agent"}, {"method": "merge"}]},
    "agentsd": "0.1.0",
}
IMAGE = Image.new("RGB", (96, 64), "teal")


def record(**changes: Any) -> ImageRecord:
    return ImageRecord.from_dict(RECORD | changes)


def test_parameters_follow_the_convention() -> None:
    assert parameters(IMAGE, record()) == (
        "a red circle, naïve\n"
        "Negative prompt: blur\n"
        "Steps: 25, Sampler: PLMS, CFG scale: 5.0, Seed: 7, Size: 96x64, Model: tiny, "
        'Version: agentsd 0.1.0, Agent attention: "agent, merge"'
    )
    hub = parameters(IMAGE, record(model="stabilityai/stable-diffusion-xl-base-1.0"))
    assert "Model: stable-diffusion-xl-base-1.0, " in hub
    bare = record(negative_prompt="", schedule=None, scheduler="DEISMultistepScheduler")
    text = parameters(IMAGE, bare)
    assert "Negative" not in text
    assert "Agent" not in text
    assert "Sampler: DEISMultistep" in text


@pytest.mark.parametrize("prompt", ["red", "naïve", "赤い円 🔴", "two\nlines"])
def test_png_carries_its_record(tmp_path: Path, prompt: str) -> None:
    save_image(IMAGE, tmp_path / "a.png", record(prompt=prompt))
    with Image.open(tmp_path / "a.png") as image:
        assert image.text["parameters"].startswith(prompt)
        assert json.loads(image.text["agentsd"])["prompt"] == prompt
        assert image.tobytes() == IMAGE.tobytes()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    with pytest.raises(TypeError):
        write_whole(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    write_whole(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"new"


def test_the_error_names_an_unwritable_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*file/a\.png"):
        save_image(IMAGE, tmp_path / "file" / "a.png")


def test_numbering_continues(tmp_path: Path) -> None:
    assert next_number(tmp_path) == 0
    for name in (
        "00000.png",
        "00011-compare.png",
        "cat.png",
        "00099.txt",
        "20240131-at sea.png",
    ):
        (tmp_path / name).touch()
    assert next_number(tmp_path) == 12


def test_side_by_side_holds_both_images() -> None:
    sheet = side_by_side({"left": IMAGE, "right": Image.new("RGB", IMAGE.size, "red")})
    top = sheet.height - IMAGE.height - 8
    assert sheet.width == 2 * IMAGE.width + 24
    assert sheet.crop((8, top, 8 + 96, top + 64)).tobytes() == IMAGE.tobytes()
    assert sheet.getpixel((8 + 96 + 8 + 5, top + 5)) == (255, 0, 0)
    assert sheet.crop((0, 0, sheet.width, top)).getcolors() != [(sheet.width * top, (255,) * 3)]
