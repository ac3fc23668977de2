"""The budget of a tuned schedule: a minimum similarity to unpatched images, or a speed-up."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import SettingsError
from ..evaluation.features.lpips import load_if_cached, weights_file
from ..evaluation.metrics import ssim
from ..settings import short_repr
from ..similarity import psnr

SPEED = "speed"
SHARE = 0.9
"""Share of images that must meet a similarity budget."""

SIGNS = {"psnr": ">=", "ssim": ">=", "lpips": "<=", SPEED: ">="}
UNITS = {"psnr": " dB", SPEED: "×"}


class Budget(NamedTuple):
    """A bound on a metric: ``psnr``, ``ssim``, ``lpips``, or ``speed``.

    A similarity bound applies to single images: 9 of 10 must meet it.
    """

    metric: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a budget, such as ``psnr>=40``, ``ssim>=0.98``, ``lpips<=0.1`` or ``speed>=3``.

        Raises:
            SettingsError: If the text is not a budget; says what is allowed.
        """
        match = re.fullmatch(r"\s*(\w+)\s*([<>]=?|=)\s*([\d.]+)\s*", text)
        metric = match[1].lower() if match else ""
        try:
            bound = float(match[3]) if match else math.nan
        except ValueError:
            bound = math.nan
        if match is None or SIGNS.get(metric) != match[2] or not _is_possible(metric, bound):
            raise SettingsError(
                "budget: must be psnr>=DB (above 0), ssim>=SHARE or lpips<=DISTANCE (both between "
                f"0 and 1), or speed>=FACTOR (above 1) (got {short_repr(text)})"
            )
        return cls(metric, bound)

    def __str__(self) -> str:
        return f"{self.metric}{SIGNS[self.metric]}{self.bound:g}"

    @property
    def similarity(self) -> str:
        """The similarity metric that is measured: PSNR for a speed budget."""
        return "psnr" if self.metric == SPEED else self.metric

    def is_met(self, value: float) -> bool:
        """Whether an image's similarity, or a speed-up, meets the bound."""
        return value <= self.bound if SIGNS[self.metric] == "<=" else value >= self.bound

    def shown(self, value: float) -> str:
        """Format a value of the similarity metric, with its unit."""
        return f"{value:.4g}{UNITS.get(self.similarity, '')}"


def _is_possible(metric: str, bound: float) -> bool:
    if metric in ("ssim", "lpips"):
        return 0 < bound < 1
    return bound > (1 if metric == SPEED else 0)


def decibels(metric: str, value: float) -> float:
    """A similarity in decibels: higher is closer, and multiplied errors become sums.

    PSNR already is in decibels; 1 − SSIM and LPIPS also grow with the squared error.

    Example:
        >>> decibels("psnr", 40.0), round(decibels("ssim", 0.99), 6)
        (40.0, 20.0)
    """
    if metric == "psnr":
        return value
    return -10 * math.log10(max(1 - value if metric == "ssim" else value, 1e-9))


Measure = Callable[[Image.Image, Image.Image], float]


def measures_for(budget: Budget) -> dict[str, Measure]:
    """The similarity metrics to measure, by name: PSNR, and the budget's metric.

    Raises:
        MissingPackageError: If torchmetrics is not installed.
        SettingsError: If the weights of LPIPS are missing.
    """
    measures: dict[str, Measure] = {"psnr": lambda a, b: psnr(np.asarray(a), np.asarray(b))}
    if budget.metric == "ssim":
        measures["ssim"] = lambda a, b: ssim(np.asarray(a), np.asarray(b))
        blank = Image.new("RGB", (16, 16))
        measures["ssim"](blank, blank)  # fails before hours of work
    if budget.metric == "lpips":
        network = load_if_cached()
        if network is None:
            raise SettingsError(
                f"lpips requires AlexNet's weights at {weights_file()}; put them there, or give a "
                "budget of psnr or ssim"
            )
        measures["lpips"] = lambda a, b: network.between(np.asarray(a), np.asarray(b))
    return measures
