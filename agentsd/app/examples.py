"""What stands at the top of the page: links, what the model is, and prompts to begin with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, metadata
from typing import Any

import gradio as gr

PAPERS = {
    "Paper": "https://arxiv.org/abs/2312.08874",
    "Token merging": "https://arxiv.org/abs/2303.17604",
}

INSTALL = 'pip install ".[app]"'
"""In a clone of the repository."""

POCKET_PROMPTS = (
    "a ring of six yellow stars on a purple background",
    "a 3 by 3 grid of white triangles on a green background",
    "two mirrored black circles above two mirrored red triangles on an orange background",
    "a red circle above a blue square on a white background",
    "four purple triangles in a row on a white background",
    "a green circle below a white star on a blue background",
)
"""In the words that the pocket model knows."""

PROMPTS = (
    "a photo of an astronaut riding a horse on the moon",
    "a cosy library with a fireplace, oil painting",
    "a red fox in fresh snow, morning light",
    "a bowl of ramen, studio photograph",
)
"""For other models."""

POCKET_NOTE = (
    "<b>This is the pocket model</b>: 30 MB, trained from nothing on flat shapes, so that all of "
    "this runs offline on a CPU. It knows eight colours, four shapes and a few layouts. For real "
    "pictures, start the page with a Stable Diffusion model: "
    "<code>agentsd app --model stable-diffusion-v1-5/stable-diffusion-v1-5</code>"
)


def repository() -> str | None:
    """The project's address, as its package states it."""
    try:
        links = metadata("agentsd").get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    named = dict(link.split(", ", 1) for link in links if ", " in link)
    return named.get("Homepage")


def header(models: list[str]) -> str:
    """HTML of the top of the page.

    Args:
        models: Names of the models on offer.
    """
    links = PAPERS if (code := repository()) is None else {"Code": code, **PAPERS}
    anchors = " ".join(
        f'<a href="{address}" target="_blank" rel="noopener noreferrer">{name}</a>'
        for name, address in links.items()
    )
    note = f'<p class="model-note">{POCKET_NOTE}</p>' if "pocket" in models else ""
    return (
        '<header class="top"><div><h1>agentsd</h1><p>The same prompt and seed, twice: by Stable '
        "Diffusion as it is, and with faster self-attention. Nothing is trained.</p></div>"
        f"<nav>{anchors}<code>{INSTALL}</code></nav></header>{note}"
    )


def prompt_examples(prompt: Any, models: list[str]) -> None:
    """Prompts that a click puts into the control of the prompt."""
    prompts = POCKET_PROMPTS if "pocket" in models else PROMPTS
    gr.Examples(
        [[each] for each in prompts],
        inputs=[prompt],
        label="Try one of these",
        examples_per_page=len(prompts),
        api_visibility="private",
        elem_id="examples",
        cache_examples=False,
    )
