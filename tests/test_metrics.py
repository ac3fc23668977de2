"""FID, KID, precision and recall against closed forms and torch-fidelity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from independent import torch_fidelity

from agentsd.errors import EvaluationError
from agentsd.evaluation.features.storage import load_statistics, save_statistics
from agentsd.evaluation.intervals import Interval
from agentsd.evaluation.metrics import (
    Estimate,
    FeatureStatistics,
    clip_score,
    cosine_similarity,
    feature_statistics,
    fid,
    fid_bias_warning,
    fid_infinity,
    kid,
    paired_difference,
    precision_recall,
)
from agentsd.evaluation.metrics.estimates import Array


def normal(n: int, d: int, seed: int = 0, offset: float = 0) -> Array:
    """Correlated features, like those of a network."""
    draw = np.random.default_rng(seed)
    mix = np.random.default_rng(d).normal(size=(d, d)) / np.sqrt(d)
    return draw.normal(size=(n, d)) @ mix + offset


def with_statistics(mean: Array, covariance: Array, n: int, seed: int) -> Array:
    """``n`` features with exactly these sample statistics."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x -= x.mean(0)
    whiten = np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ whiten @ np.linalg.cholesky(covariance).T + mean


def relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def test_fid_of_gaussians_is_the_closed_form() -> None:
    """For diagonal covariances: the squared distance of the means and of the deviations."""
    means, deviations = np.array([[0, 1, 2.0], [1, 1, 0]]), np.array([[1, 2, 0.5], [3, 1, 0.5]])
    x, y = (
        with_statistics(m, np.diag(s**2), 200, i)
        for i, (m, s) in enumerate(zip(means, deviations, strict=True))
    )
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((deviations[0] - deviations[1]) ** 2)
    assert fid(x, y).value == pytest.approx(expected, rel=1e-10)
    without_square_root = expected + 2 * np.sum(deviations[0] * deviations[1])
    assert fid(x, y).value != pytest.approx(without_square_root, rel=1e-3)


def kid_by_loops(x: Array, y: Array) -> float:
    """The estimator of Bińkowski et al. as written, pair by pair."""

    def kernel(a: Array, b: Array) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    ours = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    theirs = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return ours + theirs - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kid_is_the_definition() -> None:
    x, y = normal(9, 5), normal(7, 5, 1, 0.5)
    assert kid(x, y).value == pytest.approx(kid_by_loops(x, y), rel=1e-12)
    assert kid(x, y).value != pytest.approx(kid_by_loops(x, x), rel=1e-3)


def test_kid_of_gaussians_is_the_closed_form() -> None:
    """In one dimension ``E (x·y + 1)³`` is a polynomial in the moments; within 4 errors of it."""

    def expected(a: float, b: float) -> float:  # independent x and y of means a and b, variance 1
        second, third = (1 + a**2) * (1 + b**2), (a**3 + 3 * a) * (b**3 + 3 * b)
        return third + 3 * second + 3 * a * b + 1

    truth = expected(0, 0) + expected(1, 1) - 2 * expected(0, 1)
    draw = np.random.default_rng(3)
    found = kid(draw.normal(size=(3000, 1)), draw.normal(size=(3000, 1)) + 1)
    assert abs(found.value - truth) < 4 * found.error
    assert abs(found.value - 1.5 * truth) > 4 * found.error


@pytest.mark.parametrize(("n", "m", "d"), [(400, 300, 16), (50, 400, 64), (40, 30, 64)])
def test_agrees_with_torch_fidelity(n: int, m: int, d: int, figure: Callable[..., None]) -> None:
    """To 1e-3 (mostly far better), singular covariances included; float32 sums do not."""
    x, y = normal(n, d, 0, 300), normal(m, d, 1, 300.3)
    with torch_fidelity("metric_fid", "metric_kid") as (their_fid, their_kid):
        of_both = [their_fid.fid_features_to_statistics(torch.from_numpy(z)) for z in (x, y)]
        expected = their_fid.fid_statistics_to_metric(*of_both, verbose=False)
        same = min(n, m)
        their_kid.get_kwarg = lambda name, given: given.get(name)
        mmd = their_kid.kernel_mmd(
            x[:same], y[:same], kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_coef0=1
        )
    found = relative(fid(x, y).value, expected["frechet_inception_distance"])
    figure("FID", f"torch-fidelity, {n} and {m} in {d} dimensions", found, "same")
    assert found < 1e-3
    assert relative(fid(coarse(x), coarse(y)).value, fid(x, y).value) > 1e-3
    found = relative(kid(x[:same], y[:same]).value, mmd)
    figure("KID", f"torch-fidelity, {same} in {d} dimensions", found, "same")
    assert found < 1e-3


def coarse(x: Array) -> Array:
    """Features with the covariance that ``E x² − (E x)²``, accumulated in float32, gives."""
    single = x.astype(np.float32)
    mean = single.mean(0)
    covariance = (single.T @ single - len(x) * np.outer(mean, mean)) / np.float32(len(x) - 1)
    values, vectors = np.linalg.eigh(covariance.astype(np.float64))
    root = vectors * np.sqrt(np.clip(values, 1e-12, None))
    return with_statistics(mean.astype(np.float64), root @ root.T, 4 * len(mean), 0)


def test_precision_and_recall_agree_with_torch_fidelity() -> None:
    x, y = normal(120, 6), normal(90, 6, 1, 0.4)
    with torch_fidelity("metric_prc") as (their_prc,):
        theirs = their_prc.calculate_precision_recall_full(*map(torch.from_numpy, (x, y)), 3)
    assert [found.mean() for found in precision_recall(x, y)] == pytest.approx(theirs)
    assert [found.mean() for found in precision_recall(x, y, 1)] != pytest.approx(theirs)
    assert [found.mean() for found in precision_recall(x, x)] == [1, 1]


def test_identical_sets_give_zero_and_shifted_ones_more() -> None:
    for n in (300, 10):
        x = normal(n, 20)
        assert fid(x, x).value == pytest.approx(0, abs=1e-10)
        assert -20 / n < kid(x, x).value <= 0  # unbiased: below 0 by about 1/N
        near, far = (fid(x, x + shift) for shift in (0.1, 0.2))
        assert 0 < near.value < far.value
        assert kid(x, x).value < kid(x, x + 0.1).value < kid(x, x + 0.2).value


def test_order_does_not_matter() -> None:
    x, y = normal(60, 8), normal(50, 8, 1)
    order = np.random.default_rng(0).permutation(60)
    for metric in (fid, kid):
        assert metric(x[order], y).value == pytest.approx(metric(x, y).value, rel=1e-9)
        assert metric(x[order], y).error == pytest.approx(metric(x, y).error, rel=1e-9)
        assert metric(x[order], y).influence == pytest.approx(metric(x, y).influence[order])
        mixed = x.copy()
        mixed[:, 0] = x[order, 0]  # a column out of order is another set
        assert metric(mixed, y).value != pytest.approx(metric(x, y).value, rel=1e-3)


@pytest.mark.parametrize("metric", [fid, kid])
def test_errors_are_those_of_fresh_samples(metric: Callable[..., Estimate]) -> None:
    """The standard error from one pair of sets is the standard deviation over many pairs."""
    found = [metric(normal(150, 4, 2 * i), normal(60, 4, 2 * i + 1, 0.4)) for i in range(150)]
    spread = np.std([f.value for f in found])
    error = np.mean([f.error for f in found])
    assert 0.8 < error / spread < 1.25
    images_only = np.mean([np.sqrt(np.mean(f.influence**2) / 150) for f in found])
    assert images_only / spread < 0.8  # without the reference's part it would be too small


@pytest.mark.parametrize("metric", [fid, kid])
def test_paired_differences_are_those_of_fresh_samples(metric: Callable[..., Estimate]) -> None:
    """Two similar images a prompt; the paired error is the standard deviation over many runs."""
    found = []
    for i in range(150):
        draw = np.random.default_rng(i)
        prompts = np.repeat(draw.normal(size=(60, 4)), 2, axis=0)
        x, y = (prompts + 0.2 * draw.normal(size=(120, 4)) + shift for shift in (0.3, 0.4))
        reference = draw.normal(size=(100, 4))
        of_both = metric(x, reference), metric(y, reference)
        labels = np.repeat(np.arange(60), 2)
        found.append((of_both, paired_difference(*of_both, labels)))
    spread = np.std([paired.mean for _, paired in found])

    def error(interval: Interval) -> float:
        return (interval.high - interval.low) / 3.92

    assert 0.8 < np.mean([error(paired) for _, paired in found]) / spread < 1.25
    unpaired = [np.hypot(a.error, b.error) for (a, b), _ in found]
    assert np.mean(unpaired) / spread > 1.5
    with pytest.raises(EvaluationError, match="60 and 120 images cannot be paired"):
        paired_difference(metric(x[:60], reference), of_both[1], labels)


def test_statistics_are_saved_in_pytorch_fids_format(tmp_path: Path) -> None:
    x, y = normal(50, 6), normal(60, 6, 1, 1)
    save_statistics(tmp_path / "s.npz", feature_statistics(y))
    with np.load(tmp_path / "s.npz") as file:
        assert sorted(file) == ["mu", "sigma"]
    found = fid(x, load_statistics(tmp_path / "s.npz"))
    assert found.value == pytest.approx(fid(x, y).value, rel=1e-12)
    assert found.reference_influence is None
    assert found.error < fid(x, y).error


@pytest.mark.parametrize(
    ("save", "says"),
    [
        ({"mu": np.zeros(3)}, "sigma"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"\(3,\) and \(2, 2\)"),
        ({"mu": np.full(2, np.nan), "sigma": np.zeros((2, 2))}, "NaN"),
        (None, "not an .npz"),
        ("cut", "not an .npz"),
    ],
)
def test_wrong_statistics_name_the_file(
    tmp_path: Path, save: dict[str, Array] | str | None, says: str
) -> None:
    path = tmp_path / "wrong.npz"
    if save is None:
        path.write_text("nothing")
    elif isinstance(save, str):
        np.savez(path, mu=np.zeros(3), sigma=np.zeros((3, 3)))
        path.write_bytes(path.read_bytes()[:200])
    else:
        np.savez(path, **save)
    with pytest.raises(EvaluationError, match=says) as raised:
        load_statistics(path)
    assert "wrong.npz" in str(raised.value)


def test_extrapolated_fid_is_closer_to_the_truth() -> None:
    exact = FeatureStatistics(np.zeros(16), np.eye(16))  # the truth is 0
    draws = [np.random.default_rng(i).normal(size=(600, 16)) for i in range(5)]
    extrapolated = [fid_infinity(x, exact).mean for x in draws]
    plain = [fid(x, exact).value for x in draws]
    assert abs(np.mean(extrapolated)) < 0.2 * np.mean(plain)


@pytest.mark.parametrize("metric", [fid, kid, precision_recall])
@pytest.mark.parametrize(
    ("features", "says"),
    [
        (np.zeros((0, 4)), "images are needed"),
        (np.zeros((1, 4)), "images are needed"),
        (np.zeros(4), r"the shape \(4,\)"),
        (np.array([[0, 1.0]] * 7 + [[0, np.nan]]), "image 7 .*NaN"),
    ],
)
def test_wrong_features_are_errors(
    metric: Callable[..., object], features: Array, says: str
) -> None:
    with pytest.raises(EvaluationError, match=says):
        metric(features, normal(9, 2))
    with pytest.raises(EvaluationError, match=says):
        metric(normal(9, 2), features)


def test_different_dimensions_are_errors() -> None:
    for metric in (fid, kid, precision_recall):
        with pytest.raises(EvaluationError, match="4 dimensions cannot be compared with 5"):
            metric(normal(9, 4), normal(9, 5))
    with pytest.raises(EvaluationError, match="the same shape"):
        cosine_similarity(np.ones((3, 2)), np.ones((2, 2)))


def test_few_images_give_a_warning() -> None:
    assert "2000 images" in str(fid_bias_warning(2000, 2048))
    assert fid_bias_warning(2049, 2048) is None


def test_clip_score_is_100_times_the_cosine_similarity() -> None:
    x, y = normal(5, 7), normal(5, 7, 1)
    expected = 100 * torch.cosine_similarity(torch.from_numpy(x), torch.from_numpy(y))
    assert clip_score(x, y) == pytest.approx(expected.numpy())
    assert clip_score(x, 3 * y) == pytest.approx(clip_score(x, y))
    assert clip_score(x, y[::-1]) != pytest.approx(clip_score(x, y), abs=1)
