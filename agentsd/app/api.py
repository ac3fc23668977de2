"""The public API: ``gradio_client.Client(url).predict(…, api_name="/compare")``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr

from ..patching.patch import DEFAULT_SCHEDULE
from .components.page_errors import api_errors
from .jobs.job import JobProgress
from .jobs.worker import Finished, Queued
from .requests.catalog import OWN_SCHEDULER, ModelCatalog
from .result.comparisons import Comparisons


def compare_endpoint(
    comparisons: Comparisons, catalog: ModelCatalog
) -> Callable[..., AsyncIterator[dict[str, Any]]]:
    """The function behind ``/compare``, whose parameters gradio reads from its signature."""

    async def compare_both(
        prompt: str,
        negative_prompt: str = "",
        seed: int = 0,
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        scheduler: str = OWN_SCHEDULER,
        model: str = next(iter(catalog.sizes)),
        schedule: str = DEFAULT_SCHEDULE,
    ) -> AsyncIterator[dict[str, Any]]:
        """Make the unpatched and the patched image of a prompt from one seed.

        Yields the progress, and at the end both images and the figures.
        """
        with api_errors():
            request = catalog.request(
                prompt=prompt,
                negative_prompt=negative_prompt,
                seed=seed,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
                scheduler=scheduler,
                model=model,
                schedule=schedule,
            )
            async with comparisons.follow(request) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        (made,) = event.result
                        files = {
                            name: gr.FileData(path=entry.file).model_dump()
                            for name, entry in (
                                ("unpatched", made.unpatched),
                                ("patched", made.patched),
                            )
                        }
                        yield files | made.figures | {"notes": made.notes}
                    elif isinstance(event, Queued):
                        yield {"place": event.place, "seconds": event.seconds}
                    elif isinstance(event, JobProgress):
                        yield {"image": event.label, "step": event.step, "steps": event.steps}
                    else:
                        yield {}

    return compare_both
