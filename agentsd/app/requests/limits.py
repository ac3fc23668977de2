"""How much one visitor may request, enforced on the server whatever a page or program sends."""

from __future__ import annotations

from math import isqrt, sqrt
from typing import Annotated, Any, ClassVar

from pydantic import Field

from ...errors import SettingsError
from ...image_settings import LONGEST_SIDE, SHORTEST_SIDE, ImageSettings
from ...settings import StrictModel, short_repr


class Limits(StrictModel):
    """What one visitor may request, and how many requests may wait.

    Args:
        max_pixels: Width times height of an image.
        max_steps: Denoising steps of an image.
        max_images: Images of one X/Y plot; a comparison makes two.
        max_minutes: Of tuning a schedule; 0 disables tuning.
        queue_size: Requests that may wait; further ones are rejected.

    Raises:
        SettingsError: If one is out of range.
    """

    error: ClassVar = SettingsError

    max_pixels: Annotated[int, Field(ge=64 * 64, le=2**26)] = 1024 * 1024
    max_steps: Annotated[int, Field(ge=1, le=1000)] = 100
    max_images: Annotated[int, Field(ge=2, le=256)] = 16
    max_minutes: Annotated[float, Field(ge=0, le=24 * 60)] = 10
    queue_size: Annotated[int, Field(ge=1, le=10_000)] = 32

    @property
    def longest_side(self) -> int:
        """Of an image, in pixels: twice that of the largest square, a multiple of 8."""
        return min(2 * isqrt(self.max_pixels) // 8 * 8, LONGEST_SIDE)

    def fit(self, settings: ImageSettings) -> tuple[ImageSettings, list[str]]:
        """The nearest settings that are allowed, and what was changed.

        Example:
            >>> settings = ImageSettings(prompt="a", num_inference_steps=300, height=64, width=64)
            >>> Limits(max_steps=50).fit(settings)[1]
            ['Steps: 50, the most here, for 300.']
        """
        changes: dict[str, int] = {}
        notes = []
        if settings.num_inference_steps > self.max_steps:
            changes["num_inference_steps"] = self.max_steps
            notes.append(
                f"Steps: {self.max_steps}, the most here, for {settings.num_inference_steps}."
            )
        height, width = settings.height, settings.width
        if height is not None and width is not None:
            fitted = self._fit_size(height, width)
            if fitted != (height, width):
                changes |= dict(zip(("height", "width"), fitted, strict=True))
                notes.append(
                    f"Size: {fitted[1]} × {fitted[0]}, the most here, for {width} × {height}."
                )
        return settings.model_copy(update=changes), notes

    def _fit_size(self, height: int, width: int) -> tuple[int, int]:
        shrink = min(1.0, sqrt(self.max_pixels / (height * width)))
        shrink = min(shrink, self.longest_side / max(height, width))
        short, long = (
            max(SHORTEST_SIDE, int(side * shrink) // 8 * 8) for side in sorted((height, width))
        )
        long = min(long, self.max_pixels // short // 8 * 8)
        return (short, long) if height <= width else (long, short)

    def check_minutes(self, minutes: Any) -> None:
        """Reject a tuning time above the limit, or of 0.

        Raises:
            SettingsError: Names the limit.
        """
        if not isinstance(minutes, int | float) or not 0 < minutes <= self.max_minutes:
            raise SettingsError(
                f"minutes: must be above 0 and at most {self.max_minutes:g} here "
                f"(got {short_repr(minutes)})"
            )

    def check(self, settings: ImageSettings) -> None:
        """Refuse an image of known size that is too large or takes too many steps.

        Raises:
            SettingsError: Names the limit.
        """
        if settings.num_inference_steps > self.max_steps:
            raise SettingsError(
                f"num_inference_steps: at most {self.max_steps} here "
                f"(got {settings.num_inference_steps})"
            )
        pixels = (settings.height or 0) * (settings.width or 0)
        if pixels > self.max_pixels:
            raise SettingsError(
                f"{settings.width}×{settings.height} is {pixels:,} pixels; "
                f"at most {self.max_pixels:,} here"
            )
