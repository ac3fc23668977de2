"""Measurements of a schedule, and the conditions that it was tuned for."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from .errors import ScheduleError
from .settings import StrictModel


class Measured(StrictModel):
    """One measurement of a schedule's speed and quality.

    Args:
        time: Time of a run, as a share of the unpatched run's time.
        psnr, ssim, lpips: Mean similarity of its images to the unpatched ones (PSNR in dB);
            ``None`` if not measured.
        images: Number of images.
        model: Name of the model.
        scheduler: Name of the scheduler.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance scale.
        source: Where the measurement is described.
    """

    error: ClassVar = ScheduleError

    time: Annotated[float, Field(gt=0)]
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    images: Annotated[int, Field(ge=1)]
    model: str
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    source: str | None = None


class TunedFor(StrictModel):
    """The conditions under which the figures of a tuned schedule were measured.

    Args:
        model: What the pipeline was loaded from.
        weights: Fingerprint of the weights; ``None`` if unknown.
        scheduler: Class name of the scheduler.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance scale.
        height, width: Image size in pixels.
        device: Model of the GPU or CPU.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
    """

    error: ClassVar = ScheduleError

    model: str
    weights: str | None = None
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    device: str
    dtype: str

    def differences(self, now: TunedFor) -> list[str]:
        """What has changed, as ``name value-now instead of value-then``.

        Models with different names may be the same, so fingerprints decide if both are known.
        """
        names = [name for name in type(self).model_fields if name not in ("model", "weights")]
        if None in (self.weights, now.weights):
            names.insert(0, "model")
        changed = [
            f"{name} {getattr(now, name)} instead of {getattr(self, name)}"
            for name in names
            if getattr(self, name) != getattr(now, name)
        ]
        if None not in (self.weights, now.weights) and self.weights != now.weights:
            changed.insert(0, f"model {now.model} instead of {self.model} (different weights)")
        return changed
