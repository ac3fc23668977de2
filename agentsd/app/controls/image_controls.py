"""The controls of an image: prompt, seed, schedule, and the collapsed ones below them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from ...image_settings import LONGEST_PROMPT, SHORTEST_SIDE
from ...models.loading import default_guidance
from ...patching.patch import DEFAULT_SCHEDULE
from ..components.events import QUICK, on_choice
from ..components.page_errors import errors_in
from ..requests.catalog import OWN_SCHEDULER, ModelCatalog
from ..requests.request_options import NO_LORA
from ..requests.schedule_library import ScheduleLibrary
from ..requests.schedule_text import CUSTOM

RANDOM_SEED = -1
"""Seed that stands for a random one, as an empty one does."""

SEEDS = (1, 2, 4, 8)
"""How many seeds can be compared at a time."""

PROMPT = "three red circles in a row on a blue background"


def new_seed() -> int:
    """A random seed with as many bits as PyTorch's CPU generator uses."""
    return secrets.randbelow(2**32)


class ImageControls:
    """The controls, and what a change of the model does to them.

    Args:
        catalog: What visitors can ask for.
        library: The schedules to choose from.
        below_prompt: Places what belongs under the prompt, which it is given.
        below_schedule: Places what belongs under the choice of a schedule.
        sizes: Places the choice of a size.
    """

    def __init__(
        self,
        catalog: ModelCatalog,
        library: ScheduleLibrary,
        below_prompt: Callable[[Any], None],
        below_schedule: Callable[[], Any],
        sizes: Callable[[], Any],
    ) -> None:
        self._catalog = catalog
        self.by_setting: dict[str, Any] = {}
        """The controls by the parameters of :meth:`ModelCatalog.request`; no schedule."""
        controls = self.by_setting
        controls["prompt"] = gr.Textbox(PROMPT, label="Prompt", lines=2, max_length=LONGEST_PROMPT)
        below_prompt(controls["prompt"])
        controls["negative_prompt"] = gr.Textbox(
            "", label="Negative prompt", info="What to avoid.", max_length=LONGEST_PROMPT
        )
        self.preset = gr.Radio(
            [*library.names(), CUSTOM],
            value=DEFAULT_SCHEDULE,
            label="Schedule",
            info="From closest to the original to fastest; paper: as published; custom: edit it "
            "below.",
            elem_id="intent",
        )
        below_schedule()
        sizes()
        with gr.Row(elem_id="seed"):
            controls["seed"] = gr.Number(
                0,
                precision=0,
                minimum=RANDOM_SEED,
                label="Seed",
                info="Same for both images. Empty or -1: random.",
                min_width=160,
            )
            random_seed = gr.Button("Random seed", scale=0, min_width=170, elem_id="random-seed")
        counts = [n for n in SEEDS if 2 * n <= catalog.limits.max_images]
        controls["images"] = gr.Radio(
            counts,
            value=1,
            label="How many seeds",
            info="From this one on, compared in turn: a single image proves little.",
            elem_id="images",
        )
        with gr.Row():
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate")
            self.stop = gr.Button("Stop", variant="stop", elem_id="stop")
        with gr.Accordion("Settings: steps, size, model", open=False):
            self._add_more()
            self.message = gr.HTML(elem_id="settings-message")
            """What is wrong with the size or the steps."""
        with gr.Accordion("Image to image and LoRA", open=False):
            self._add_options()
        random_seed.click(new_seed, None, controls["seed"], **QUICK)

    def _add_more(self) -> None:
        limits, model = self._catalog.limits, next(iter(self._catalog.sizes))
        controls = self.by_setting
        controls["num_inference_steps"] = gr.Slider(
            1,
            limits.max_steps,
            min(25, limits.max_steps),
            step=1,
            precision=0,
            label="Steps",
            info="More: finer detail; the time grows in proportion.",
        )
        controls["guidance_scale"] = gr.Slider(
            0,
            100,
            default_guidance(model),
            step=0.5,
            label="Guidance",
            info="Higher: closer to the prompt, less varied. 1 or less: off, in half the time.",
        )
        for name, side in zip(("height", "width"), self._catalog.sizes[model], strict=True):
            controls[name] = gr.Slider(
                SHORTEST_SIDE,
                limits.longest_side,
                side,
                step=8,
                precision=0,
                label=f"{name.capitalize()} in pixels",
                info="Larger: slower, and the patch gains more. "
                f"At most {limits.max_pixels:,} pixels in all.",
            )
        controls["scheduler"] = gr.Dropdown(
            self._schedulers(model),
            value=OWN_SCHEDULER,
            label="Scheduler",
            info="How noise is removed. Heun: finer detail; each step takes twice the time.",
        )
        controls["model"] = gr.Dropdown(
            list(self._catalog.sizes),
            value=model,
            label="Model",
            info="The models that this server loaded.",
        )

    def _add_options(self) -> None:
        controls, loras = self.by_setting, list(self._catalog.loras)
        controls["init_image"] = gr.Image(
            label="Image to start from",
            type="filepath",
            sources=["upload", "clipboard"],
            height=220,
            elem_id="init-image",
        )
        controls["strength"] = gr.Slider(
            0.05,
            1,
            0.8,
            step=0.05,
            label="Strength",
            info="How much of that image to change; also the share of the steps that is run.",
        )
        controls["lora"] = gr.Dropdown(
            [NO_LORA, *loras],
            value=NO_LORA,
            label="LoRA",
            info="Those that the server was started with (--lora).",
            visible=bool(loras),
        )
        controls["lora_weight"] = gr.Slider(
            -2, 2, 1, step=0.05, label="LoRA weight", visible=bool(loras)
        )

    @property
    def all(self) -> list[Any]:
        """The controls, in the order of :attr:`by_setting`."""
        return list(self.by_setting.values())

    @property
    def linked(self) -> dict[str, Any]:
        """The controls whose values a link can carry, by setting."""
        return {name: one for name, one in self.by_setting.items() if name != "init_image"}

    @property
    def timeline(self) -> list[Any]:
        """The controls that a timeline depends on."""
        names = ("model", "num_inference_steps", "height", "width")
        return [self.by_setting[name] for name in names]

    def connect(self, status: Any) -> None:
        """Follow a change of the model; errors show in ``status``."""
        model = self.by_setting["model"]
        change = errors_in(status)(self._change_model)
        on_choice(model, change, [model], [status, *self.all])

    def restore(self, settings: Mapping[str, Any], scheduler: str, model: str) -> dict[Any, Any]:
        """Updates by component that show the settings of an image."""
        updates = {
            self.by_setting[name]: value
            for name, value in {**settings, "model": model}.items()
            if value is not None or name == "init_image"
        }
        return updates | {self.by_setting["scheduler"]: self._scheduler_choice(model, scheduler)}

    def fit_options(self, chosen: dict[str, Any]) -> list[str]:
        """Replace what the controls cannot show by their defaults; returns what was replaced."""
        notes = []
        for name in ("images", "lora", "strength", "lora_weight"):
            control, value = self.by_setting[name], chosen[name]
            if isinstance(control, gr.Slider):
                fits = control.minimum <= value <= control.maximum
            else:
                fits = value in [choice for _, choice in control.choices]
            if not fits:
                chosen[name] = control.value
                notes.append(f"{control.label}: {value} is not available here.")
        return notes

    def _change_model(self, model: str) -> dict[Any, Any]:
        """Set the size, guidance and scheduler of another model, and list its schedulers.

        The chosen scheduler is not an input: browsers sometimes report a choice twice, and gradio
        would then reject a scheduler that the first report removed from the list.
        """
        defaults = self._catalog.settings(model, prompt="-")
        names = ("height", "width", "guidance_scale")
        updates = {self.by_setting[name]: getattr(defaults, name) for name in names}
        choice = self._scheduler_choice(model, OWN_SCHEDULER)
        return updates | {self.by_setting["scheduler"]: choice}

    def _scheduler_choice(self, model: str, scheduler: str) -> Any:
        choices = self._schedulers(model)
        return gr.update(
            choices=choices, value=scheduler if scheduler in choices else OWN_SCHEDULER
        )

    def _schedulers(self, model: str) -> list[str]:
        return [OWN_SCHEDULER, *self._catalog.schedulers[model]]
