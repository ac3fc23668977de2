"""Bootstrap intervals contain the truth as often as their level says."""

from __future__ import annotations

import numpy as np
import pytest

from agentsd.errors import EvaluationError
from agentsd.evaluation import intervals
from agentsd.evaluation.intervals import bootstrap


def coverage(groups: int, each: int, grouped: bool = True) -> float:
    """How often the interval contains the true mean, 0, where each prompt has a random effect."""
    runs = 400
    draw = np.random.default_rng(0)
    effects = draw.normal(size=(groups, 1, runs)) + 0.3 * draw.normal(size=(groups, each, runs))
    labels = np.repeat(np.arange(groups), each) if grouped else None
    found = bootstrap(effects.reshape(-1, runs), labels, resamples=1000)
    return float(np.mean([f.low <= 0 <= f.high for f in found]))


def test_intervals_contain_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    assert coverage(3, 1) > 0.9
    assert 0.92 < coverage(8, 1) < 0.98
    assert 0.92 < coverage(30, 4) < 0.98
    assert coverage(30, 4, grouped=False) < 0.8  # images of one prompt treated as independent
    monkeypatch.setattr(intervals, "_stretch", lambda level, groups: 1)
    assert coverage(8, 1) < 0.92  # the plain percentile interval


def test_pairing_makes_small_differences_significant() -> None:
    """Prompts differ far more than variants; only pairing reveals the small difference."""
    draw = np.random.default_rng(1)
    prompts = draw.normal(size=60) * 5
    a, b = prompts + 0.1 * draw.normal(size=60), prompts + 0.1 * draw.normal(size=60) - 0.2
    [paired] = bootstrap(a - b)
    assert paired.excludes_zero
    assert paired.low < 0.2 < paired.high
    [same] = bootstrap(prompts - a)
    assert not same.excludes_zero
    [alone], [other] = bootstrap(a), bootstrap(b)
    assert alone.low < other.high  # unpaired intervals overlap by far


def test_columns_share_the_resamples() -> None:
    x = np.random.default_rng(0).normal(size=(20, 2))
    first, second = bootstrap(x)
    [difference] = bootstrap(x[:, 0] - x[:, 1])
    assert second == pytest.approx(bootstrap(x[:, 1])[0])
    assert difference.mean == pytest.approx(first.mean - second.mean)
    assert first != pytest.approx(bootstrap(x, seed=1)[0])


def test_one_prompt_has_no_interval() -> None:
    [found] = bootstrap([1.0, 2.0, 3.0], ["a"] * 3)
    assert (found.mean, found.low, found.high) == (2, -np.inf, np.inf)
    assert not found.excludes_zero


@pytest.mark.parametrize(
    ("values", "groups", "says"),
    [([], None, "0 values"), ([1.0], ["a", "b"], "2 groups"), ([1, np.inf], None, "finite")],
)
def test_wrong_values_are_errors(values: list[float], groups: list[str] | None, says: str) -> None:
    with pytest.raises(EvaluationError, match=says):
        bootstrap(values, groups)
