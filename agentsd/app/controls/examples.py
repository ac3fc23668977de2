"""The top of the page: links, a description of the model, and example prompts."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import gradio as gr

LINKS = {
    "Code": "https://github.com/agentsd/agentsd",
    "Paper": "https://arxiv.org/abs/2312.08874",
    "Token merging": "https://arxiv.org/abs/2303.17604",
}

INSTALL = 'pip install ".[app]"'
"""In a clone of the repository."""

POCKET_PROMPTS = (
    "a ring of six yellow stars on a purple background",
    "a 3 by 3 grid of white triangles on a green background",
    "four purple triangles in a row on a white background",
    "a green circle below a white star on a blue background",
    "three red circles in a row on a white background",
    "a yellow star on a black background",
    "an orange triangle to the left of a purple circle on a white background",
    "four green squares in a column on a yellow background",
    "two mirrored black circles above two mirrored red triangles on an orange background",
    "a white square on a red background",
    "two blue stars in a row on an orange background",
    "a ring of six red circles on a white background",
    "a 3 by 3 grid of black squares on a yellow background",
    "a red circle above a blue square on a white background",
    "three orange triangles in a column on a black background",
    "a black square to the right of an orange circle on a green background",
    "two mirrored white stars above two mirrored yellow squares on a blue background",
    "a purple circle on a yellow background",
    "two green triangles in a column on a red background",
    "a ring of six blue squares on an orange background",
)
"""In words that the pocket model knows; the first few are examples to click, all are for tuning."""

PROMPTS = (
    "a photo of an astronaut riding a horse on the moon",
    "a cosy library with a fireplace, oil painting",
    "a red fox in fresh snow, morning light",
    "a bowl of ramen, studio photograph",
    "a portrait of an old fisherman, black and white",
    "a city street at night in the rain, neon signs",
    "a wooden cabin beside a lake, autumn forest",
    "a macro photo of a dragonfly on a leaf",
    "a medieval castle on a cliff, matte painting",
    "a bouquet of tulips in a glass vase, watercolour",
    "a vintage red car on a country road",
    "a snow leopard on a rocky slope",
    "a modern kitchen with large windows",
    "a hot air balloon over green hills at sunrise",
    "a child reading under a tree, children's book illustration",
    "a market stall full of fruit",
    "a lighthouse in a storm, long exposure",
    "a robot watering plants, digital art",
    "a cup of coffee on a wooden table, top view",
    "an elephant crossing a river",
)
"""For other models, likewise."""

CLICKED = 4
"""Prompts at the control of the prompt."""

POCKET_NOTE = (
    "<b>The pocket model</b> draws flat shapes: 26 MB, trained from nothing, to try all of this "
    "offline on a CPU. For real pictures: <code>agentsd app --model "
    "FOLDER_OR_HUB_ID</code>"
)


def header(models: list[str]) -> str:
    """HTML for the top of the page.

    Args:
        models: Names of the models on offer.
    """
    anchors = " ".join(
        f'<a href="{address}" target="_blank" rel="noopener noreferrer">{name}</a>'
        for name, address in LINKS.items()
    )
    note = f'<p class="model-note">{POCKET_NOTE}</p>' if "pocket" in models else ""
    return (
        '<header class="top"><div><h1>agentsd</h1><p>One prompt and seed, twice: '
        "as it is, and with faster self-attention. Nothing is trained.</p></div>"
        f"<nav>{anchors}<code>{INSTALL}</code></nav></header>{note}"
    )


def example_prompts(models: Container[str]) -> tuple[str, ...]:
    """Prompts for the models on offer."""
    return POCKET_PROMPTS if "pocket" in models else PROMPTS


def prompt_examples(prompt: Any, models: list[str]) -> None:
    """Prompts that a click copies into the prompt control."""
    prompts = example_prompts(models)[:CLICKED]
    gr.Examples(
        [[each] for each in prompts],
        inputs=[prompt],
        label="Try one of these",
        examples_per_page=len(prompts),
        api_visibility="private",
        elem_id="examples",
        cache_examples=False,
    )
