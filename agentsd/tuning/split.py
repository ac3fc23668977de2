"""Split prompts into the images to tune on and the held-out images that judge the winner."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import SettingsError
from ..image_settings import ImageSettings, image_seed

TUNING, HELD_OUT = 9, 10
"""Maximum numbers of images. If all of nine images meet a bound, the next one does so with a
probability of 9 in 10 (unless the schedule was selected for that)."""

MORE = 20
"""Maximum number of further images to confirm the choice on, if time is left."""


class Images(NamedTuple):
    """Settings of the images; tuning and held-out images share no prompts."""

    tuning: list[ImageSettings]
    held_out: list[ImageSettings]
    more: list[ImageSettings]
    """Further tuning images, used if there is time."""


def split_prompts(prompts: Sequence[str], settings: Mapping[str, Any]) -> Images:
    """Split prompts at random, but reproducibly; few prompts are repeated with other seeds.

    Args:
        prompts: Two or more; those beyond the first images confirm the choice.
        settings: Settings of all images other than their prompts; the images' seeds are derived
            from ``seed``.

    Raises:
        SettingsError: If a prompt or a setting is invalid, or there are too few prompts.
    """
    base = ImageSettings(prompt="-", **settings)
    different = list(dict.fromkeys(text.strip() for text in prompts if text.strip()))
    if len(different) < 2:
        raise SettingsError(
            "prompts: at least two different ones are needed, since a schedule is judged on other "
            f"prompts than it was tuned on; 40 are better (got {len(different)})"
        )
    random.Random(base.seed).shuffle(different)
    both = TUNING + HELD_OUT
    cut = TUNING if len(different) >= both else max(1, round(len(different) * TUNING / both))
    tuning, held_out = different[:cut] + different[both:], different[cut:both]
    shares = (tuning, TUNING + MORE), (held_out, HELD_OUT)
    lists = []
    for offset, (share, count) in zip((0, cut), shares, strict=True):
        lists.append(
            [
                ImageSettings(
                    **base.model_dump()
                    | {
                        "prompt": share[number % len(share)],
                        "seed": image_seed(
                            base.seed, 1 + offset + number % len(share), number // len(share)
                        ),
                    }
                )
                for number in range(count)
            ]
        )
    return Images(lists[0][:TUNING], lists[1], lists[0][TUNING:])
