"""The race of two images: its frames, their times, and the animation that is saved."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from app_jobs import job, settings
from PIL import Image
from tiny_models import tiny_pipeline, tiny_unet

from agentsd.app.jobs.time_estimator import PlannedImage
from agentsd.app.result import race
from agentsd.app.result.race_gif import playback_rate, race_gif

pytestmark = pytest.mark.slow


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return tiny_pipeline(tmp_path, tiny_unet(sample_size=32))


def traced(pipe: Any, schedule: Any) -> tuple[race.Trace, Any]:
    trace = race.Trace()
    planned = PlannedImage(pipe, settings(num_inference_steps=3), schedule)
    made = job(pipe, planned).make_shown(pipe, planned.settings, on_step=trace.add)
    return trace, made


def test_a_race_has_each_step_at_its_time_and_ends_in_the_image(pipe: Any) -> None:
    trace, made = traced(pipe, None)
    first, second = race.lanes(
        [("Original", trace, made.image, made.seconds), ("ours", trace, made.image, 0.5)]
    )
    assert len(first.frames) == len(first.seconds) == 3
    assert first.seconds == sorted(first.seconds)
    assert 0 < first.seconds[0] < first.total == made.seconds
    assert np.array_equal(np.asarray(first.frames[-1]), np.asarray(made.image))
    assert not np.array_equal(np.asarray(first.frames[0]), np.asarray(first.frames[1]))
    assert second.total == 0.5
    sheet = race.sheet(first)
    assert sheet.size == (3 * 64, 64)


def test_the_linear_decoder_is_exact_for_a_linear_image() -> None:
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(4, 16, 16))
    pixels = (latents[:3] * 20 + 128).clip(0, 255).transpose(1, 2, 0).round().astype(np.uint8)
    image = Image.fromarray(pixels)
    found = race.LinearDecoder.fit(latents, image).decode(latents)
    assert np.abs(np.asarray(found, float) - pixels).mean() < 1
    other = race.LinearDecoder.fit(rng.normal(size=latents.shape), image).decode(latents)
    assert np.abs(np.asarray(other, float) - pixels).mean() > 5


def test_the_gif_lasts_as_long_as_the_race(pipe: Any) -> None:
    image = Image.new("RGB", (64, 64), "red")
    fast = race.Lane("agentsd", [0.5, 1.0], [image, image])
    slow = race.Lane("Original", [2.0, 4.0], [image, image])
    with Image.open(BytesIO(race_gif([fast, slow], "a" * 500))) as found:
        times = []
        for frame in range(found.n_frames):
            found.seek(frame)
            times.append(found.info["duration"])
    assert sum(times[:-1]) == pytest.approx(4000, abs=60)
    assert playback_rate(4.0) == 1
    assert playback_rate(60.0) == 8


def test_latents_are_kept_whatever_their_type() -> None:
    trace = race.Trace()
    trace.add(0.1, torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16))
    assert trace.latents[0].dtype == np.float64
