"""PSNR against torchmetrics."""

from __future__ import annotations

import numpy as np
import picture_sets
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from agentsd.similarity import psnr


def test_psnr_equals_torchmetrics() -> None:
    a, b = (np.asarray(picture_sets.noise(i)) for i in (0, 8))
    x, y = (torch.from_numpy(z.astype(np.float64)) for z in (a, b))
    theirs = float(peak_signal_noise_ratio(x, y, data_range=255.0))
    assert psnr(a, b) == pytest.approx(theirs)
    assert psnr(a, b // 2) != pytest.approx(theirs, rel=1e-2)


def test_unsigned_values_do_not_wrap() -> None:
    assert psnr(np.uint8([[1]]), np.uint8([[2]])) == psnr(np.uint8([[2]]), np.uint8([[1]]))
