"""The page: controls, what they start, and where it is shown."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from html import escape
from math import isqrt
from typing import Any

import gradio as gr

from ..errors import AgentSDError
from ..pipelines import default_guidance
from ..schedule import Schedule
from . import markup
from .compare import Compared, Judge, compare, pocket_judge
from .history import KEPT, keep
from .limits import OWN, Limits, Menu, menu_of
from .worker import Finished, Progress, Worker

log = logging.getLogger(__name__)

DEVICE = {"concurrency_limit": 1, "concurrency_id": "device"}
"""Of all that needs the device: one at a time."""

PROMPT = "three red circles in a row on a blue background"

CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
.told p { margin: 0 0 .4rem; }
.told progress { width: 100%; height: .6rem; accent-color: var(--color-accent); }
.told img { display: block; margin-top: .6rem; border-radius: 6px; image-rendering: auto; }
.wrong p { color: var(--error-text-color); white-space: pre-wrap; }
.figures { display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; margin: .4rem 0; }
.figures dd { margin: 0; font-size: 1.5rem; font-weight: 600; }
.figures dt { font-size: .8rem; opacity: .8; max-width: 16rem; }
.figures div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
@media (max-width: 640px) { .gradio-container { padding: .5rem !important; } }
"""


def theme() -> gr.themes.Base:
    """Fonts of the visitor's own system: none is fetched."""
    return gr.themes.Default(
        font=["ui-sans-serif", "system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )


@contextmanager
def told() -> Iterator[None]:
    """Show errors of ours as their message, and of others that there was one."""
    try:
        yield
    except AgentSDError as error:
        raise gr.Error(escape(str(error), quote=False), print_exception=False) from None
    except gr.Error:
        raise
    except Exception as error:
        log.exception("a visitor's request failed")
        raise gr.Error(
            "something went wrong here; the server's log says what", print_exception=False
        ) from error


def build(worker: Worker, limits: Limits) -> gr.Blocks:
    """Put the page together.

    Args:
        worker: Runs the jobs.
        limits: What visitors may ask for.
    """
    menu = menu_of(worker.pipes, limits)
    judges: dict[str, Judge] = {"pocket": pocket_judge()} if "pocket" in worker.pipes else {}
    first = next(iter(worker.pipes))
    height, width = menu.sizes[first]
    largest = min(2 * isqrt(limits.max_pixels) // 8 * 8, 8192)

    with gr.Blocks(title="agentsd", delete_cache=(600, 3 * 3600), analytics_enabled=False) as demo:
        gr.Markdown(
            "# agentsd\nThe same prompt and seed twice: as Stable Diffusion is, and with agent "
            "attention. Nothing is trained; drag the divider to compare."
        )
        entries = gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                prompt = gr.Textbox(PROMPT, label="Prompt", lines=2, max_length=10_000)
                negative = gr.Textbox(
                    "", label="Negative prompt", info="What to keep away from.", max_length=10_000
                )
                preset = gr.Radio(
                    Schedule.presets(),
                    value="paper",
                    label="Schedule",
                    info="What each step does. keys: closer to the unpatched image, and faster on "
                    "the pocket model; paper: as published.",
                )
                with gr.Row():
                    seed = gr.Number(
                        0, precision=0, minimum=0, label="Seed", info="Of both images' noise."
                    )
                    dice = gr.Button("🎲 Dice", size="sm", min_width=80, elem_id="dice")
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", variant="stop", elem_id="stop")
                with gr.Accordion("More", open=False):
                    steps = gr.Slider(
                        1,
                        limits.max_steps,
                        min(25, limits.max_steps),
                        step=1,
                        precision=0,
                        label="Steps",
                        info="More: finer detail, and the time grows in proportion.",
                    )
                    guidance = gr.Slider(
                        0,
                        20,
                        default_guidance(first),
                        step=0.5,
                        label="Guidance",
                        info="More: closer to the prompt, less varied. 1 or less: half the time.",
                    )
                    with gr.Row():
                        wide, high = (
                            gr.Slider(
                                64,
                                largest,
                                side,
                                step=8,
                                precision=0,
                                label=label,
                                info="Larger: slower; agentsd gains more.",
                            )
                            for label, side in (("Width", width), ("Height", height))
                        )
                    sampler = gr.Dropdown(
                        [OWN, *menu.samplers[first]],
                        value=OWN,
                        label="Scheduler",
                        info="How noise is taken away; Heun takes twice the time a step.",
                    )
                    model = gr.Dropdown(
                        list(menu.sizes), value=first, label="Model", info="Named at the start."
                    )
            with gr.Column(scale=3, min_width=320):
                now = gr.HTML(markup.note("Press Generate."), elem_id="now")
                pair = gr.ImageSlider(
                    label="unpatched | patched",
                    type="filepath",
                    format="png",
                    interactive=False,
                    max_height=640,
                    elem_id="pair",
                )
                figures = gr.HTML(elem_id="figures")
        schedule = gr.Textbox(
            Schedule.preset("paper").to_yaml(), label="Schedule as YAML", elem_id="yaml", lines=8
        )
        gallery = gr.Gallery(
            label="Made since the page was opened; a click brings their settings back",
            format="png",
            columns=6,
            height="auto",
            interactive=False,
            allow_preview=False,
            elem_id="gallery",
        )

        settings = {
            "prompt": prompt,
            "negative_prompt": negative,
            "seed": seed,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "height": high,
            "width": wide,
        }
        asked = [*settings.values(), sampler, model, schedule]

        def request(*values: Any) -> Any:
            *rest, sampler, model, schedule = values
            given = dict(zip(settings, rest, strict=True))
            return menu.request(model=model, schedule=schedule, sampler=sampler, **given)

        async def generate(*values: Any) -> AsyncIterator[dict[Any, Any]]:
            *given, kept = values
            with told():
                wanted = request(*given)
                pipe, judge = worker.pipes[wanted.model], judges.get(wanted.model)
                yield {now: markup.waiting(worker.waiting)}
                job = worker.follow(lambda job: compare(job, pipe, wanted, judge), images=2)
                async for event in job:
                    if isinstance(event, Progress):
                        yield {now: markup.progress(event)}
                    elif isinstance(event, Finished):
                        made: Compared = event.result
                        pictures = [
                            keep(demo.GRADIO_CACHE, one.image, record, way)
                            for one, record, way in zip(
                                (made.unpatched, made.ours),
                                made.records,
                                ("unpatched", "patched"),
                                strict=True,
                            )
                        ]
                        kept = [*reversed(pictures), *kept][:KEPT]
                        yield {
                            now: markup.note("Done."),
                            pair: tuple(one.file for one in pictures),
                            figures: markup.figures(made.figures),
                            entries: kept,
                            gallery: [(one.file, one.caption) for one in kept],
                        }
                    else:
                        yield {now: gr.skip()}

        run = go.click(
            generate,
            [*asked, entries],
            [now, pair, figures, entries, gallery],
            show_progress="hidden",
            api_visibility="private",
            **DEVICE,
        )
        stop.click(
            lambda: markup.note("Stopped."),
            None,
            now,
            cancels=[run],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        dice.click(
            lambda: secrets.randbelow(2**32), None, seed, queue=False, api_visibility="private"
        )

        api = compare_api(demo, worker, menu, judges)
        gr.api(api, api_name="compare", **DEVICE)
    return demo


def compare_api(demo: gr.Blocks, worker: Worker, menu: Menu, judges: dict[str, Judge]) -> Any:
    """The public call: ``gradio_client.Client(url).predict(…, api_name="/compare")``."""

    async def compare_both(
        prompt: str,
        negative_prompt: str = "",
        seed: int = 0,
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        scheduler: str = OWN,
        model: str = next(iter(worker.pipes)),
        schedule: str = "paper",
    ) -> AsyncIterator[dict[str, Any]]:
        """Make the unpatched and the patched image of a prompt from one seed.

        Yields how far it is, and at the end both images and figures.
        """
        with told():
            wanted = menu.request(
                prompt=prompt,
                negative_prompt=negative_prompt,
                seed=seed,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
                sampler=scheduler,
                model=model,
                schedule=schedule,
            )
            pipe, judge = worker.pipes[wanted.model], judges.get(wanted.model)
            async for event in worker.follow(lambda job: compare(job, pipe, wanted, judge), 2):
                if isinstance(event, Finished):
                    made: Compared = event.result
                    pictures = zip((made.unpatched, made.ours), made.records, strict=True)
                    files = [keep(demo.GRADIO_CACHE, one.image, r, "").file for one, r in pictures]
                    yield {
                        "unpatched": gr.FileData(path=files[0]).model_dump(),
                        "patched": gr.FileData(path=files[1]).model_dump(),
                        **made.figures,
                    }
                elif event is not None:
                    yield {"image": event.label, "step": event.step, "steps": event.steps}
                else:
                    yield {}

    return compare_both
