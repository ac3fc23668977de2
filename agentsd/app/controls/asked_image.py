"""The image that the controls ask for, as far as its time depends on it."""

from __future__ import annotations

from typing import Any

from ..jobs.time_estimator import PlannedImage
from ..jobs.worker import Worker
from ..requests.catalog import ImageRequest, ModelCatalog
from .image_controls import ImageControls


def timed_controls(controls: ImageControls, yaml: Any) -> list[Any]:
    """The components that :func:`asked_image` takes the values of.

    Args:
        controls: The page's controls.
        yaml: The schedule.
    """
    names = ("model", "num_inference_steps", "guidance_scale", "height", "width")
    return [*(controls.by_setting[name] for name in names), yaml]


def asked_image(
    worker: Worker,
    catalog: ModelCatalog,
    model: str,
    steps: int,
    guidance: float,
    height: int,
    width: int,
    text: str,
) -> tuple[ImageRequest, PlannedImage]:
    """The request that the controls stand for, and its patched image.

    Args:
        worker: Has the models.
        catalog: What visitors can ask for.
        model: Its name.
        steps: Denoising steps.
        guidance: Guidance scale.
        height: Of the image, in pixels.
        width: Likewise.
        text: The schedule's YAML.

    Raises:
        AgentSDError: If a value is wrong; its own control says so.
    """
    request = catalog.request(
        model=model,
        prompt="-",
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=height,
        width=width,
        schedule=text,
    )
    return request, PlannedImage(worker.pipes[model], request.settings, request.schedule)
