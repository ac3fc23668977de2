"""The page: controls, what they start, and where it is shown."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from math import isqrt
from typing import Any

import gradio as gr

from ..generation.images import HIDDEN
from ..generation.prompt_encoding import warnings_for
from ..models.loading import default_guidance
from ..patching.patch import DEFAULT_SCHEDULE
from ..schedule import Schedule
from ..settings import dump_yaml
from . import editor, markup
from .compare import Compared, Judge, compare, pocket_judge
from .faults import in_place, told
from .history import KEPT, Entry, Restored, keep, restore
from .limits import OWN, Limits, ModelCatalog, Request, model_catalog, read_upload
from .tabs import DEVICE, PRIVATE, plot, see, stopping
from .timeline import Timeline
from .worker import Finished, Progress, Worker

PROMPT = "three red circles in a row on a blue background"


def theme() -> gr.themes.Base:
    """Fonts of the visitor's own system: none is fetched."""
    return gr.themes.Default(
        font=["ui-sans-serif", "system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )


def build(worker: Worker, limits: Limits) -> gr.Blocks:
    """Put the page together.

    Args:
        worker: Runs the jobs.
        limits: What visitors may ask for.
    """
    catalog = model_catalog(worker.pipes, limits)
    judges: dict[str, Judge] = {"pocket": pocket_judge()} if "pocket" in worker.pipes else {}
    timelines = {name: Timeline(pipe) for name, pipe in worker.pipes.items()}
    with gr.Blocks(title="agentsd", delete_cache=(600, 3 * 3600), analytics_enabled=False) as demo:
        gr.Markdown(
            "# agentsd\nThe same prompt and seed twice: as Stable Diffusion is, and with agent "
            "attention. Nothing is trained. Drag the divider to compare."
        )
        entries, last = gr.State([]), gr.State(None)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                controls, buttons = _controls(catalog)
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
                gallery = gr.Gallery(
                    label="Made since the page was opened: a click brings the settings back",
                    format="png",
                    columns=6,
                    fit_columns=False,
                    height="auto",
                    interactive=False,
                    allow_preview=False,
                    elem_id="gallery",
                    visible=False,
                )
                drop = gr.File(
                    label="Drop a PNG that agentsd made, to get its settings back",
                    file_types=[".png"],
                    type="filepath",
                    height=150,
                    elem_id="drop",
                )
        about = [controls[name] for name in ("model", "num_inference_steps", "height", "width")]

        def draw(schedule: Schedule, model: str, steps: int, height: int, width: int) -> str:
            size = {"height": height, "width": width}
            checked = catalog.settings(model, prompt="-", num_inference_steps=steps, **size)
            return timelines[model].draw(
                schedule, checked.num_inference_steps, checked.height or 0, checked.width or 0
            )

        with gr.Tabs():
            with gr.Tab("Schedule"):
                schedule = editor.build(buttons["preset"], about, draw)
            asked = [*controls.values(), schedule.yaml]

            def request(*values: Any) -> Request:
                return catalog.request(**dict(zip([*controls, "schedule"], values, strict=True)))

            with gr.Tab("What it sees"):
                see(worker, last)
            with gr.Tab("X/Y plot"):
                plot(worker, catalog, demo.GRADIO_CACHE, asked, request)

        @in_place(now)
        async def generate(*values: Any) -> AsyncIterator[dict[Any, Any]]:
            """Make both images; outputs by component."""
            *given, kept = values
            wanted = request(*given)
            pipe, judge = worker.pipes[wanted.model], judges.get(wanted.model)
            yield {now: markup.note("Waiting for the device." if worker.waiting else "…")}
            async with worker.follow(lambda job: compare(job, pipe, wanted, judge), 2) as events:
                async for event in events:
                    if isinstance(event, Progress):
                        yield {now: markup.progress(event)}
                    elif isinstance(event, Finished):
                        made = _kept(demo, event.result)
                        kept = [*reversed(made), *kept][:KEPT]
                        notes = _notes(pipe, wanted, event.result)
                        yield {
                            now: markup.note("; ".join(["Done.", *notes])),
                            pair: tuple(one.file for one in made),
                            figures: markup.figures(event.result.figures),
                            entries: kept,
                            last: wanted,
                            gallery: _pictures(kept),
                        }
                    else:
                        yield {now: gr.skip()}

        run = buttons["go"].click(
            generate,
            [*asked, entries],
            [now, pair, figures, entries, last, gallery],
            show_progress="hidden",
            **DEVICE,
            **PRIVATE,
        )
        stopping(buttons["stop"], now, run)
        restorable = [*controls.values(), *schedule.everything, now]

        def listed(model: str, scheduler: str) -> Any:
            """The schedulers of a model, and the one of them that is chosen."""
            choices = _schedulers(catalog, model)
            return gr.update(choices=choices, value=scheduler if scheduler in choices else OWN)

        @in_place(now)
        def switched(model: str) -> dict[Any, Any]:
            """Another model takes its own size, guidance and scheduler, and lists those it knows.

            The scheduler is no input: told twice of a choice, as browsers do now and then, gradio
            would refuse the second time a scheduler that the first took off the list.
            """
            usual = catalog.settings(model, prompt="-")
            names = ("height", "width", "guidance_scale")
            told = {controls[name]: getattr(usual, name) for name in names}
            return told | {controls["scheduler"]: listed(model, OWN)}

        def bring_back(found: Restored, model: str) -> dict[Any, Any]:
            known = found.model or model
            text = dump_yaml(editor.brief(found.schedule)) if found.schedule else DEFAULT_SCHEDULE
            values = found.settings | {"model": known}
            told = {controls[name]: value for name, value in values.items() if value is not None}
            told[controls["scheduler"]] = listed(known, found.scheduler)
            size = (found.settings[name] for name in ("num_inference_steps", "height", "width"))
            shown = schedule.load(text, known, *size)
            what = "" if found.schedule else " It was unpatched; the schedule is the default one."
            if found.model is None:
                what += " Its model is none of those here."
            return told | shown | {now: markup.note(f"Settings restored.{what}")}

        @in_place(now)
        def chosen(kept: list[Entry], model: str, which: gr.SelectData) -> dict[Any, Any]:
            index = which.index if isinstance(which.index, int) else -1
            if not 0 <= index < len(kept):
                return {now: markup.note("That image is no longer here.")}
            record = kept[index].record
            return bring_back(restore(record, list(catalog.sizes), catalog.schedulers), model)

        @in_place(now)
        def dropped(path: str | None, model: str) -> dict[Any, Any]:
            if path is None:
                return {now: gr.skip()}
            found = restore(read_upload(path), list(catalog.sizes), catalog.schedulers)
            return bring_back(found, model)

        quick = {"queue": False, "show_progress": "hidden", **PRIVATE}
        controls["model"].input(switched, controls["model"], [*controls.values(), now], **quick)
        gallery.select(chosen, [entries, controls["model"]], restorable, **quick)
        drop.upload(dropped, [drop, controls["model"]], restorable, **quick)
        buttons["dice"].click(lambda: secrets.randbelow(2**32), None, controls["seed"], **quick)
        gr.api(_compare_api(demo, worker, catalog, judges), api_name="compare", **DEVICE)
    return demo


def _controls(catalog: ModelCatalog) -> tuple[dict[str, Any], dict[str, Any]]:
    """The controls of an image, by the settings they are of, and the buttons and the preset."""
    limits, first = catalog.limits, next(iter(catalog.sizes))
    height, width = catalog.sizes[first]
    longest = min(2 * isqrt(limits.max_pixels) // 8 * 8, 8192)
    found: dict[str, Any] = {}
    buttons: dict[str, Any] = {}
    found["prompt"] = gr.Textbox(PROMPT, label="Prompt", lines=2, max_length=10_000)
    found["negative_prompt"] = gr.Textbox(
        "", label="Negative prompt", info="What to keep away from.", max_length=10_000
    )
    buttons["preset"] = gr.Radio(
        [*Schedule.presets(), editor.CUSTOM],
        value=DEFAULT_SCHEDULE,
        label="Schedule",
        info="faithful: nearest to the unpatched image. fast: a quarter of its keys. paper: as "
        "published. Shape your own below.",
    )
    with gr.Row(elem_id="seed"):
        found["seed"] = gr.Number(
            0, precision=0, minimum=0, label="Seed", info="Of both images' noise.", min_width=160
        )
        buttons["dice"] = gr.Button("Dice", scale=0, min_width=110, elem_id="dice")
    with gr.Row():
        buttons["go"] = gr.Button("Generate", variant="primary", elem_id="generate")
        buttons["stop"] = gr.Button("Stop", variant="stop", elem_id="stop")
    with gr.Accordion("More", open=False):
        found["num_inference_steps"] = gr.Slider(
            1,
            limits.max_steps,
            min(25, limits.max_steps),
            step=1,
            precision=0,
            label="Steps",
            info="More: finer detail, and the time grows in proportion.",
        )
        found["guidance_scale"] = gr.Slider(
            0,
            100,
            default_guidance(first),
            step=0.5,
            label="Guidance",
            info="More: closer to the prompt, less varied. 1 or less: half the time.",
        )
        for name, side in (("height", height), ("width", width)):
            found[name] = gr.Slider(
                64,
                longest,
                side,
                step=8,
                precision=0,
                label=f"{name.capitalize()} in pixels",
                info="Larger: slower, and agentsd gains more. "
                f"At most {limits.max_pixels:,} pixels in all.",
            )
        found["scheduler"] = gr.Dropdown(
            _schedulers(catalog, first),
            value=OWN,
            label="Scheduler",
            info="How noise is taken away. Heun: finer, at twice the time a step.",
        )
        found["model"] = gr.Dropdown(
            list(catalog.sizes), value=first, label="Model", info="Those named at the start."
        )
    return found, buttons


def _schedulers(catalog: ModelCatalog, model: str) -> list[str]:
    return [OWN, *catalog.schedulers[model]]


def _kept(demo: gr.Blocks, made: Compared) -> list[Entry]:
    """The two images as files that carry their settings."""
    ways = ("unpatched", "patched")
    images = (made.unpatched.image, made.ours.image)
    return [
        keep(demo.GRADIO_CACHE, image, record, way)
        for image, record, way in zip(images, made.records, ways, strict=True)
    ]


def _notes(pipe: Any, wanted: Request, found: Compared) -> list[str]:
    """What a visitor should know of the images: whether they are hidden, what of them is missed."""
    ways = {"unpatched": found.unpatched, "patched": found.ours}
    hidden = [f"{way} image: {HIDDEN}" for way, one in ways.items() if one.nsfw_content_detected]
    return hidden + warnings_for(pipe, wanted.settings)


def _pictures(kept: list[Entry]) -> Any:
    return gr.update(value=[(one.file, one.caption) for one in kept], visible=True)


def _compare_api(
    demo: gr.Blocks, worker: Worker, catalog: ModelCatalog, judges: dict[str, Judge]
) -> Any:
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
        schedule: str = DEFAULT_SCHEDULE,
    ) -> AsyncIterator[dict[str, Any]]:
        """Make the unpatched and the patched image of a prompt from one seed.

        Yields how far it is, and at the end both images and figures.
        """
        with told():
            wanted = catalog.request(
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
            pipe, judge = worker.pipes[wanted.model], judges.get(wanted.model)
            async with worker.follow(lambda job: compare(job, pipe, wanted, judge), 2) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        files = {
                            one.caption: gr.FileData(path=one.file).model_dump()
                            for one in _kept(demo, event.result)
                        }
                        notes = _notes(pipe, wanted, event.result)
                        yield files | event.result.figures | {"notes": notes}
                    elif event is not None:
                        yield {"image": event.label, "step": event.step, "steps": event.steps}
                    else:
                        yield {}

    return compare_both
