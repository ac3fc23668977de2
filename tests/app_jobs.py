"""Requests and jobs of the web app on a tiny pipeline, without a server."""

from __future__ import annotations

from typing import Any

from agentsd.app.jobs.job import Job
from agentsd.app.jobs.time_estimator import PlannedImage, TimeEstimator
from agentsd.app.requests.catalog import ModelCatalog, model_catalog
from agentsd.app.requests.limits import Limits
from agentsd.image_settings import ImageSettings
from agentsd.schedule import Schedule

KEYS = Schedule(phases=[{"method": "keys", "sx": 4, "sy": 4, "min_tokens": 0}])


def catalog_of(pipe: Any) -> ModelCatalog:
    """The catalog of a server of one pipeline, with a LoRA whose path is to stay hidden."""
    return model_catalog({"tiny": pipe}, Limits(max_images=6, max_steps=50), {"style": "/secret"})


def settings(**changes: Any) -> ImageSettings:
    given: dict[str, Any] = {"prompt": "a", "num_inference_steps": 4, "height": 64, "width": 64}
    return ImageSettings(**given | changes)


def job(pipe: Any, *images: PlannedImage) -> Job:
    return Job(lambda _: None, images, TimeEstimator(pipe))
