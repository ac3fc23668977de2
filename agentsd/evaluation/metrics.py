"""Features in, figures out: FID, KID, precision and recall, CLIP score; all in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..errors import EvaluationError
from .intervals import Interval, z_value

Array = NDArray[np.float64]
BLOCK = 1024
"""Rows of a kernel or distance matrix held at once, so that 50,000 images fit."""


class Statistics(NamedTuple):
    """What FID needs of a set of images: the Gaussian fitted to its features."""

    mean: Array  # [D]
    covariance: Array  # [D, D]


class Estimate(NamedTuple):
    """A figure of two sets, and how much each image moves it.

    The influences are those of the infinitesimal jackknife (Efron, 1982): their variance over
    their number is the figure's. Two figures of one reference are compared through the
    differences of their influences, image by image.
    """

    value: float
    influence: Array  # [N], of each image, mean 0
    reference_influence: Array | None = None  # [M]; None where the reference counts as exact

    @property
    def error(self) -> float:
        """Standard error, from the sampling of the images and, where known, of the reference."""
        parts = [p for p in (self.influence, self.reference_influence) if p is not None]
        return float(np.sqrt(sum(np.mean(p**2) / len(p) for p in parts)))

    @property
    def interval(self) -> Interval:
        """The figure with its 95 % interval, normal."""
        half = z_value(0.95) * self.error
        return Interval(self.value, self.value - half, self.value + half)


def difference(a: Estimate, b: Estimate, groups: ArrayLike) -> Interval:
    """The difference of two figures of one reference, paired image by image, normal.

    Args:
        a: Of ``N`` images.
        b: Of as many, made from the same prompts and seeds, in the same order.
        groups: ``[N]`` labels, such as prompts, within which images are alike.

    Raises:
        EvaluationError: If the numbers of images differ.
    """
    if a.influence.shape != b.influence.shape:
        raise EvaluationError(
            f"{len(a.influence)} and {len(b.influence)} images cannot be paired; equal numbers can"
        )
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    together = np.bincount(index, a.influence - b.influence)
    spread = np.sum(together**2) / len(index) ** 2
    if a.reference_influence is not None and b.reference_influence is not None:
        shift = a.reference_influence - b.reference_influence
        spread += np.mean(shift**2) / len(shift)
    half = z_value(0.95) * float(np.sqrt(spread))
    value = a.value - b.value
    return Interval(value, value - half, value + half)


def statistics(features: ArrayLike) -> Statistics:
    """Mean and unbiased covariance of features, accumulated in float64.

    Args:
        features: ``[N, D]``, two rows or more, all finite.

    Raises:
        EvaluationError: Names the shape, the count or the first row that is not finite.

    Example:
        >>> statistics([[0, 0], [2, 2]]).covariance.tolist()
        [[2.0, 2.0], [2.0, 2.0]]
    """
    x = checked(features)
    centred = x - x.mean(0)
    return Statistics(x.mean(0), centred.T @ centred / (len(x) - 1))


def checked(features: ArrayLike, least: int = 2) -> Array:
    """Features as float64 ``[N, D]``.

    Raises:
        EvaluationError: If they have another shape, fewer than ``least`` rows, NaN or infinity.
    """
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or not x.shape[1]:
        raise EvaluationError(f"features must be [images, dimensions] (got the shape {x.shape})")
    if len(x) < least:
        raise EvaluationError(f"at least {least} images are needed (got {len(x)})")
    wrong = np.flatnonzero(~np.isfinite(x).all(1))
    if len(wrong):
        raise EvaluationError(
            f"the features of image {wrong[0]} (counted from 0; {len(wrong)} in all) hold NaN or "
            "infinity; run the extractor in float32"
        )
    return x


def load_statistics(path: str | Path) -> Statistics:
    """Read reference statistics in pytorch-fid's format: an ``.npz`` with ``mu`` and ``sigma``.

    Raises:
        EvaluationError: If the file cannot be read or does not hold them.
    """
    try:
        with np.load(path) as file:
            found = Statistics(*(np.asarray(file[k], np.float64) for k in ("mu", "sigma")))
    except (OSError, ValueError, KeyError, EOFError, AttributeError, BadZipFile) as error:
        raise EvaluationError(
            f"{path}: no .npz of statistics with mu and sigma, as pytorch-fid writes ({error})"
        ) from None
    size = found.mean.size
    if found.mean.shape != (size,) or found.covariance.shape != (size, size):
        shapes = f"{found.mean.shape} and {found.covariance.shape}"
        raise EvaluationError(f"{path}: mu and sigma must be [D] and [D, D] (got {shapes})")
    if not all(np.isfinite(part).all() for part in found):
        raise EvaluationError(f"{path}: the statistics hold NaN or infinity")
    return found


def save_statistics(path: str | Path, found: Statistics) -> None:
    """Write statistics so that pytorch-fid, too, can read them."""
    try:
        np.savez_compressed(path, mu=found.mean, sigma=found.covariance)
    except OSError as error:
        raise EvaluationError(f"cannot write {path}: {error.strerror or error}") from error


def fid(features: ArrayLike, reference: ArrayLike | Statistics) -> Estimate:
    """Fréchet inception distance (Heusel et al., 2017, arXiv 1706.08500, equation 6).

    ``|m₁ − m₂|² + Tr C₁ + Tr C₂ − 2 Tr (C₁ C₂)^½``. With ``C = R Rᵀ`` from a symmetric
    eigendecomposition the last trace is the sum of the singular values of ``R₁ᵀ R₂``: stable, and
    exact where covariances are singular, as they are below ``D + 1`` images.

    Args:
        features: ``[N, D]``.
        reference: Features ``[M, D]``, or statistics, which then count as exact.

    Returns:
        The distance (0 or more; 0 for equal sets) with its influences. It is biased upwards by a
        term that shrinks as 1/N: compare only equal N, or see :func:`fid_infinity`.

    Raises:
        EvaluationError: On features that :func:`checked` refuses, or of different dimensions.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(500, 4))
        >>> round(fid(x, x + 3).value, 6)  # moved by 3 in each of four dimensions
        36.0
    """
    x = checked(features)
    y = None if isinstance(reference, Statistics) else checked(reference)
    ours = statistics(x)
    theirs = reference if isinstance(reference, Statistics) else statistics(reference)
    if ours.mean.shape != theirs.mean.shape:
        raise EvaluationError(
            f"features of {ours.mean.size} dimensions cannot be compared with "
            f"{theirs.mean.size}: take the same extractor for both"
        )
    gap = ours.mean - theirs.mean
    root, inverse = _root(ours.covariance)
    their_root, their_inverse = _root(theirs.covariance)
    left, overlap, right = np.linalg.svd(root.T @ their_root, full_matrices=False)
    traces = np.trace(ours.covariance) + np.trace(theirs.covariance)
    value = max(0.0, float(gap @ gap + traces - 2 * overlap.sum()))

    def influence(rows: Array, gap: Array, turn: Array) -> Array:
        # The derivative by a covariance is 1 − T, T the optimal map between the Gaussians; here
        # as a quadratic form of each centred image.
        turned = rows @ turn
        found = 2 * rows @ gap + (rows**2).sum(1) - turned**2 @ overlap
        return np.asarray(found - found.mean())

    of_images = influence(x - ours.mean, gap, inverse @ left)
    if y is None:
        return Estimate(value, of_images)
    return Estimate(value, of_images, influence(y - theirs.mean, -gap, their_inverse @ right.T))


def _root(covariance: Array) -> tuple[Array, Array]:
    """``R`` ``[D, r]`` with ``R Rᵀ`` the covariance, of its rank ``r``, and ``R⁺ᵀ`` ``[D, r]``."""
    values, vectors = np.linalg.eigh(covariance)
    some = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
    scale = np.sqrt(values[some])
    return vectors[:, some] * scale, vectors[:, some] / scale


def fid_infinity(
    features: ArrayLike, reference: ArrayLike | Statistics, *, points: int = 15, seed: int = 0
) -> Interval:
    """FID at infinitely many images (Chong & Forsyth, 2020, arXiv 1911.07023, section 3).

    FIDs of random subsets of N/10 to N images, on a line in 1/N, extrapolated to 1/N = 0.

    Args:
        features: ``[N, D]``, 20 rows or more.
        reference: As for :func:`fid`; its own size still counts.
        points: Subset sizes, 3 or more; more is steadier and takes longer.
        seed: Of the draws.

    Returns:
        The intercept, with the interval of the fit.

    Raises:
        EvaluationError: As for :func:`fid`, or on fewer than 20 images.

    Example:
        >>> x, y = np.random.default_rng(0).normal(size=(2, 4000, 8))
        >>> fid_infinity(x, y).mean < fid(x, y).value
        True
    """
    x = checked(features, least=20)
    exact = reference if isinstance(reference, Statistics) else statistics(reference)
    draw = np.random.default_rng(seed)
    sizes = np.linspace(len(x) / 10, len(x), points).astype(int)
    found = [fid(x[draw.choice(len(x), n, replace=False)], exact).value for n in sizes]
    design = np.stack([np.ones(points), 1 / sizes], 1)
    line, *_ = np.linalg.lstsq(design, np.array(found), rcond=None)
    residual = np.array(found) - design @ line
    spread = residual @ residual / (points - 2) * np.linalg.inv(design.T @ design)[0, 0]
    half = z_value(0.95) * float(np.sqrt(spread))
    return Interval(float(line[0]), float(line[0]) - half, float(line[0]) + half)


def kid(features: ArrayLike, reference: ArrayLike) -> Estimate:
    """Kernel inception distance (Bińkowski et al., 2018, arXiv 1801.01401, section 4).

    The unbiased estimate of the squared maximum mean discrepancy under ``(x·y / D + 1)³``, over
    all images rather than a mean over subsets, so that nothing is drawn; its influences are those
    of leaving one image out.

    Args:
        features: ``[N, D]``, three rows or more.
        reference: ``[M, D]``, likewise.

    Returns:
        The distance, not scaled by 1,000. It is unbiased at any N, and so falls a little below 0
        where the sets are alike: of a set with itself by about 1/N.

    Raises:
        EvaluationError: On features that :func:`checked` refuses, or of different dimensions.

    Example:
        >>> x, y = np.random.default_rng(0).normal(size=(2, 300, 8))
        >>> kid(x, y + 1).value > 1 > kid(x, y).value
        True
    """
    x, y = checked(features, least=3), checked(reference, least=3)
    if x.shape[1] != y.shape[1]:
        raise EvaluationError(
            f"features of {x.shape[1]} dimensions cannot be compared with {y.shape[1]}: "
            "take the same extractor for both"
        )
    n, m = len(x), len(y)
    within, their_within = (_kernel_sums(z, z) - _kernel(z, z) for z in (x, y))
    across, their_across = _kernel_sums(x, y), _kernel_sums(y, x)
    total, their_total, shared = within.sum(), their_within.sum(), across.sum()
    ours, theirs = total / (n * (n - 1)), their_total / (m * (m - 1))
    value = float(ours + theirs - 2 * shared / (n * m))

    def influence(total: float, within: Array, across: Array, others: int) -> Array:
        k = len(within)
        without = (total - 2 * within) / ((k - 1) * (k - 2))
        without -= 2 * (shared - across) / ((k - 1) * others)
        found = (k - 1) * (without.mean() - without)
        return np.asarray(found * np.sqrt(k / (k - 1)))  # so that the error is the jackknife's

    return Estimate(
        value, influence(total, within, across, m), influence(their_total, their_within,
                                                              their_across, n)
    )  # fmt: skip


def _kernel(x: Array, y: Array) -> Array:
    """The kernel of ``x`` and ``y`` ``[N, D]``, row by row: ``[N]``."""
    return np.asarray((np.einsum("nd,nd->n", x, y) / x.shape[1] + 1) ** 3)


def _kernel_sums(x: Array, y: Array) -> Array:
    """For each row of ``x`` the sum of the kernel over the rows of ``y``: ``[N]``."""
    return np.concatenate([((b @ y.T / x.shape[1] + 1) ** 3).sum(1) for b in _blocks(x)])


def _blocks(x: Array) -> Iterator[Array]:
    return (x[i : i + BLOCK] for i in range(0, len(x), BLOCK))


def precision_recall(features: ArrayLike, reference: ArrayLike, k: int = 3) -> tuple[Array, Array]:
    """Improved precision and recall (Kynkäänniemi et al., 2019, arXiv 1904.06991, equation 1).

    Args:
        features: ``[N, D]``, more than ``k`` rows.
        reference: ``[M, D]``, likewise.
        k: An image's ball reaches its k-th neighbour in its own set.

    Returns:
        Per image ``[N]``: 1 if it lies in a ball of the reference, else 0 (their mean is the
        precision); per reference image ``[M]`` the same, in a ball of the images (recall).

    Raises:
        EvaluationError: On features that :func:`checked` refuses.

    Example:
        >>> x, y = np.random.default_rng(0).normal(size=(2, 100, 2))
        >>> precision, recall = precision_recall(x / 9, y)  # all in the middle
        >>> float(precision.mean()), float(recall.mean()) < 0.5
        (1.0, True)
    """
    x, y = (torch.from_numpy(checked(z, least=k + 1)) for z in (features, reference))

    def radii(z: torch.Tensor) -> torch.Tensor:
        found = [torch.cdist(block, z).kthvalue(k + 1).values for block in z.split(BLOCK)]
        return torch.cat(found)  # the first neighbour is the image itself

    def covered(a: torch.Tensor, b: torch.Tensor) -> Array:
        reach = radii(b)
        found = [(torch.cdist(block, b) <= reach).any(1) for block in a.split(BLOCK)]
        return np.asarray(torch.cat(found).double().numpy())

    return covered(x, y), covered(y, x)


def cosine(a: ArrayLike, b: ArrayLike) -> Array:
    """Cosines of the rows of ``a`` and ``b``, both ``[N, D]``: ``[N]`` in [-1, 1].

    Raises:
        EvaluationError: If their shapes differ, or on features that :func:`checked` refuses.

    Example:
        >>> cosine([[1, 0], [1, 1]], [[2, 0], [1, -1]]).tolist()
        [1.0, 0.0]
    """
    x, y = checked(a, least=1), checked(b, least=1)
    if x.shape != y.shape:
        raise EvaluationError(f"as many of both are needed (got the shapes {x.shape}, {y.shape})")
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.asarray(np.einsum("nd,nd->n", x, y) / np.maximum(lengths, 1e-300))


def clip_score(images: ArrayLike, texts: ArrayLike) -> Array:
    """CLIP score of each image with its prompt (Hessel et al., 2021, arXiv 2104.08718).

    As torchmetrics defines it: 100 times the cosine; torchmetrics' figure of a set is the mean,
    raised to 0 if it is below.

    Args:
        images: CLIP's embeddings of the images, ``[N, D]``.
        texts: And of their prompts, ``[N, D]``.

    Returns:
        ``[N]``, in [-100, 100].

    Example:
        >>> clip_score([[3, 4]], [[4, 3]]).round(6).tolist()
        [96.0]
    """
    return 100 * cosine(images, texts)


def fid_bias_warning(images: int, dimensions: int) -> str | None:
    """What to say of an FID from too few images; None where they are enough.

    Example:
        >>> fid_bias_warning(50000, 2048) is None
        True
    """
    if images > dimensions:
        return None
    return (
        f"{images} images are not more than the {dimensions} dimensions of the features: their "
        "covariance is singular and FID is mostly bias; trust KID, and differences at equal N"
    )
