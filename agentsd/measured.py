"""What a schedule was measured at, and what it was tuned for."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from .errors import ScheduleError
from .settings import StrictModel


class Measured(StrictModel):
    """What a schedule brought in one measurement.

    Args:
        time: Of a run, as a share of the unpatched run's time.
        psnr, ssim, lpips: Mean likeness of its images to the unpatched ones (PSNR in dB); ``None``
            where it was not measured.
        images: Number of images.
        model: Name of the model.
        scheduler: Name of the scheduler.
        num_inference_steps: Denoising steps.
        guidance_scale: Weight of the prompt.
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
        weights: Their fingerprint; ``None`` where it is not known.
        scheduler: Class name of the scheduler.
        num_inference_steps: Denoising steps.
        guidance_scale: Weight of the prompt.
        height, width: Of an image, in pixels.
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
        """What is different now, as ``name: value now instead of value then``.

        Models of different names may be the same: their fingerprints decide where they are known.
        """
        names = [name for name in type(self).model_fields if name not in ("model", "weights")]
        if None in (self.weights, now.weights):
            names.insert(0, "model")
        found = [
            f"{name} {getattr(now, name)} instead of {getattr(self, name)}"
            for name in names
            if getattr(self, name) != getattr(now, name)
        ]
        if None not in (self.weights, now.weights) and self.weights != now.weights:
            found.insert(0, f"model {now.model} instead of {self.model} (other weights)")
        return found
