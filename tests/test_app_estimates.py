"""Times that the page expects, by size, and the chart of those that it measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from app_jobs import KEYS, settings
from tiny_models import tiny_pipeline, tiny_unet

from agentsd.app.jobs.time_estimator import PlannedImage, TimeEstimator, fit_rates
from agentsd.app.result import size_chart
from agentsd.app.result.sizes import offered_sizes, size_estimates
from agentsd.patching.flops import Flops
from agentsd.schedule import Schedule

pytestmark = pytest.mark.slow


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return tiny_pipeline(tmp_path, tiny_unet(sample_size=32))


def test_rates_come_from_one_comparison_and_predict_other_sizes(pipe: Any) -> None:
    estimator = TimeEstimator(pipe)

    def image(schedule: Schedule | None, scheduler: Any = None, **changes: Any) -> PlannedImage:
        return PlannedImage(pipe, settings(**changes), schedule, scheduler)

    def true(image: PlannedImage) -> float:
        count = estimator._operations(image)
        assert count is not None
        return 3e-9 * count.attention + 1e-9 * count.other

    assert estimator.seconds([image(None)]) is None
    before = estimator.speedup(image(KEYS))
    assert before is not None
    assert before > 1  # of operations, as nothing is measured yet
    for schedule in (None, KEYS):
        estimator.learn(image(schedule), true(image(schedule)) / 2, share=0.5)
    found = size_estimates(estimator, image(KEYS), [(128, 128)])[0]
    side = {"height": 128, "width": 128}
    unpatched, patched = (true(image(schedule, **side)) for schedule in (None, KEYS))
    assert found.unpatched == pytest.approx(unpatched)
    assert found.patched == pytest.approx(patched)
    assert found.speedup == pytest.approx(unpatched / patched)
    once = true(image(None))
    assert estimator.seconds([image(None, guidance_scale=1)]) == pytest.approx(once / 2)
    assert estimator.seconds([image(None), image(None)]) == pytest.approx(2 * once)
    heun = estimator.seconds([image(None, "Heun")])  # calls the UNet twice a step, but for the last
    assert heun == pytest.approx(once * 7 / 4)


def test_a_kind_of_image_that_was_made_takes_as_long_again(pipe: Any) -> None:
    estimator, small = TimeEstimator(pipe), PlannedImage(pipe, settings(), None)
    large = small._replace(settings=settings(height=128, width=128))
    estimator.learn(small, 1.0)
    guess = estimator.seconds([large])
    estimator.learn(large, 100.0)
    assert guess is not None
    assert guess < 50
    assert estimator.seconds([large]) == 100.0
    assert estimator.seconds([small]) == 1.0
    assert estimator.is_warm(large)
    assert not estimator.is_warm(large._replace(schedule=KEYS))


def test_rates_are_never_negative() -> None:
    odd = [(Flops(2e9, 1e9), 1.0), (Flops(1e9, 1e9), 2.0)]  # more work in less time
    rates = fit_rates(odd)
    assert rates is not None
    assert min(rates) > 0
    assert fit_rates([]) is None


def test_sizes_stay_within_the_limit() -> None:
    assert offered_sizes(256, 256, 2**18) == [(128, 128), (256, 256), (384, 384), (512, 512)]
    assert offered_sizes(512, 768, 2**19) == [(256, 384), (512, 768)]


def test_the_chart_has_a_dot_for_each_measured_image(pipe: Any) -> None:
    assert "<svg" not in size_chart.draw([], [])
    done = [size_chart.Measured("tiny", 64, 64, "", 4, 2.0, 1.0)]
    image = PlannedImage(pipe, settings(), KEYS)
    html = size_chart.draw(size_estimates(TimeEstimator(pipe), image, [(64, 64)]), done)
    assert html.count("<circle") == 2
    assert "64 × 64: 2.0×" in html
    assert html.count(",") < 40  # no lines without estimates
