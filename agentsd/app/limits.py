"""How much one visitor may ask for, checked on the server whatever a page or program sends."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from ..errors import SettingsError
from ..image_settings import ImageSettings
from ..settings import StrictModel


class Limits(StrictModel):
    """What one visitor may ask of the device, and how many may wait.

    Args:
        max_pixels: Width times height of an image.
        max_steps: Denoising steps of an image.
        max_images: Images of one X/Y plot; a comparison makes two.
        queue_size: Requests that may wait; further ones are turned away.

    Raises:
        SettingsError: If one is out of range.
    """

    error: ClassVar = SettingsError

    max_pixels: Annotated[int, Field(ge=64 * 64, le=2**26)] = 1024 * 1024
    max_steps: Annotated[int, Field(ge=1, le=1000)] = 100
    max_images: Annotated[int, Field(ge=2, le=256)] = 16
    queue_size: Annotated[int, Field(ge=1, le=10_000)] = 32

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
