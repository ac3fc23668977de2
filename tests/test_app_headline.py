"""The headline over two images: how much faster, and how close."""

from __future__ import annotations

from typing import Any

import pytest

from agentsd.app.result import headline


def figures(psnr: float | None, slow: float = 44.1, fast: float = 9.5) -> dict[str, Any]:
    names = ("unpatched_nsfw_content_detected", "nsfw_content_detected", "unchanged")
    return {"psnr": psnr, "unpatched_seconds": slow, "seconds": fast} | dict.fromkeys(names)


@pytest.mark.parametrize(
    ("psnr", "says"),
    [
        (None, "exactly the same image"),
        (60.0, "visually identical"),
        (45.0, "differences are hard to see"),
        (35.0, "small differences"),
        (20.0, "visible differences"),
    ],
)
def test_the_headline_says_how_much_faster_and_how_close(psnr: Any, says: str) -> None:
    html = headline.draw([figures(psnr)], "agentsd (<b>)")
    for text in ("4.6× faster", "44.1 s → 9.5 s", says, "agentsd (&lt;b&gt;)"):
        assert text in html


def test_several_seeds_are_as_close_as_the_worst_of_them() -> None:
    html = headline.draw([figures(60.0), figures(35.0, 22.0, 9.5), figures(None)], "fast")
    assert "small differences" in html
    assert "mean of 3 seeds" in html
    assert "35.0 to 60.0 dB" in html
    assert "(2.3 to 4.6)" in html


def test_noise_is_no_speed_up() -> None:
    assert headline.speed(1.04) == headline.speed(0.96) == "about as fast"
    assert headline.speed(0.5) == "2.0× slower"


def test_a_schedule_that_changes_nothing_has_no_speed_up() -> None:
    html = headline.draw([figures(None, 1.0, 1.2) | {"unchanged": True}], "fast")
    assert "changes nothing at this size" in html
    assert "slower" not in html
    assert "slower" in headline.draw([figures(None, 1.0, 1.2)], "fast")
