"""Features on disk: a cache, and statistics in pytorch-fid's format."""

from __future__ import annotations

import hashlib
import os
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ...errors import EvaluationError
from ...generation.image_files import write_whole
from ..metrics import FeatureStatistics

Floats = NDArray[np.floating[Any]]


def cache_folder() -> Path:
    """Where features are cached: ``$AGENTSD_CACHE``, or ``agentsd`` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("AGENTSD_CACHE") or Path(home) / "agentsd") / "features"


class FeatureCache:
    """Features by key in one folder, with one file per batch.

    Args:
        folder: Where the files are; created by the first :meth:`put`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.index: dict[str, tuple[Path, int]] = {}
        self._batch: tuple[Path | None, Floats] = (None, np.zeros((0, 0), np.float32))
        for path in sorted(folder.glob("*.npz")):
            try:
                with np.load(path) as file:
                    self.index |= {key: (path, i) for i, key in enumerate(file["keys"].tolist())}
            except (OSError, ValueError, KeyError, EOFError, BadZipFile):
                path.unlink(missing_ok=True)  # damaged: it is only a cache

    def get(self, key: str) -> Floats | None:
        """The features ``[D]`` of one image, or ``None`` if they are not cached."""
        if key not in self.index:
            return None
        path, row = self.index[key]
        if self._batch[0] != path:
            with np.load(path) as file:
                self._batch = (path, file["features"])
        return np.asarray(self._batch[1][row])

    def put(self, keys: list[str], features: Floats) -> None:
        """Store the features ``[B, D]`` of a batch."""
        data = BytesIO()
        np.savez(data, keys=np.array(keys), features=features)
        name = hashlib.sha256("".join(keys).encode()).hexdigest()[:24]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.npz"
        write_whole(path, data.getvalue())
        self.index |= {key: (path, i) for i, key in enumerate(keys)}


def load_statistics(path: str | Path) -> FeatureStatistics:
    """Load reference statistics from an ``.npz`` with ``mu`` and ``sigma``, as pytorch-fid writes.

    Raises:
        EvaluationError: If the file cannot be read or does not contain them.
    """
    try:
        with np.load(path) as file:
            statistics = FeatureStatistics(
                *(np.asarray(file[key], np.float64) for key in ("mu", "sigma"))
            )
    except (OSError, ValueError, KeyError, EOFError, AttributeError, BadZipFile) as error:
        raise EvaluationError(
            f"{path}: not an .npz of statistics with mu and sigma, as pytorch-fid writes ({error})"
        ) from None
    size = statistics.mean.size
    if statistics.mean.shape != (size,) or statistics.covariance.shape != (size, size):
        shapes = f"{statistics.mean.shape} and {statistics.covariance.shape}"
        raise EvaluationError(f"{path}: mu and sigma must be [D] and [D, D] (got {shapes})")
    if not all(np.isfinite(part).all() for part in statistics):
        raise EvaluationError(f"{path}: the statistics contain NaN or infinity")
    return statistics


def save_statistics(path: str | Path, statistics: FeatureStatistics) -> None:
    """Save statistics in pytorch-fid's format.

    Raises:
        EvaluationError: If the file cannot be written.
    """
    try:
        np.savez_compressed(path, mu=statistics.mean, sigma=statistics.covariance)
    except OSError as error:
        raise EvaluationError(f"cannot write {path}: {error.strerror or error}") from error
