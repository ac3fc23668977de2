"""Settings that other programs write into their images."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from agentsd.app.requests.uploads import read_uploaded_image
from agentsd.errors import SettingsError
from agentsd.generation.a1111 import read_parameters
from agentsd.image_settings import ImageSettings

PARAMETERS = (
    "a fox, (masterpiece:1.2)\nsecond line\nNegative prompt: blurry, low\n"
    'Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 965400086, Size: 512x768, Model: "a, b", '
    'Lora hashes: "x: 1", Version: v1.9.0'
)


def test_parameters_of_other_programs_are_read(tmp_path: Path) -> None:
    found = read_parameters(PARAMETERS)
    assert found.settings == ImageSettings(
        prompt="a fox, (masterpiece:1.2)\nsecond line",
        negative_prompt="blurry, low",
        seed=965400086,
        num_inference_steps=20,
        guidance_scale=7.5,
        height=768,
        width=512,
    )
    assert (found.scheduler, found.model) == ("DPMSolverMultistepScheduler", "a, b")
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", PARAMETERS)
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png", pnginfo=info)
    assert read_uploaded_image(tmp_path / "other.png") == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a fox", "no line with Steps"),
        ("a fox\nSteps: x", "Steps: is not a number"),
        ("a fox\nSteps: 20, Seed: -1", "seed"),
        ("Steps: 20", "must not be blank"),
    ],
)
def test_other_texts_are_refused(text: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        read_parameters(text)


@pytest.mark.parametrize(
    ("field", "found"),
    [
        ('Model: "a, \\"b\\", c"', 'a, "b", c'),
        ("Model: 5 inch, VAE: x", "5 inch"),
        ('Model: 5" disk, VAE: "y"', '5" disk'),
        ('Model: "never closed, VAE: z', "never closed"),
        ("Model:, VAE: z", ""),
        ("nothing, Model: b", "b"),
    ],
)
def test_commas_and_quotes_of_parameters(field: str, found: str) -> None:
    assert read_parameters(f"a fox\nSteps: 20, {field}").model == found


@pytest.mark.parametrize("piece", [" ", '"', '\\"', 'a: "', ":", ",", ", ", '"\\'])
def test_parameters_are_read_in_linear_time(piece: str) -> None:
    """As a picture of a few bytes must not keep a server busy."""

    def seconds(length: int) -> float:
        text = "a fox\nSteps: 20, Seed: a" + piece * (length // len(piece)) + "b"
        times = []
        for _ in range(3):
            start = time.perf_counter()
            with contextlib.suppress(SettingsError):
                read_parameters(text)
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(60_000) < 20 * seconds(6_000) + 0.05
