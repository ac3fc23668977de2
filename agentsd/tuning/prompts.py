"""The images that schedules are tuned on, and those that judge the winner."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import SettingsError
from ..image_settings import ImageSettings, image_seed

TUNING, HELD_OUT = 9, 10
"""Most images. That a schedule's worst of nine images meets a bound makes it nine in ten that the
next one does (if it was not chosen among many for that)."""

MORE = 20
"""Most images to confirm the choice on, where time is left."""


class Images(NamedTuple):
    """Settings of images whose prompts do not overlap."""

    tuning: list[ImageSettings]
    held_out: list[ImageSettings]
    more: list[ImageSettings]
    """To tune on as well, while there is time."""


def split_prompts(prompts: Sequence[str], settings: Mapping[str, Any]) -> Images:
    """Share out prompts, at random but always alike; few prompts come again with other seeds.

    Args:
        prompts: Two or more; those beyond the first images confirm the choice.
        settings: Of all images, besides their prompt; the seeds follow from the one given.

    Raises:
        SettingsError: If a prompt or a setting is not valid, or there are too few prompts.
    """
    base = ImageSettings(prompt="-", **settings)
    different = list(dict.fromkeys(text.strip() for text in prompts if text.strip()))
    if len(different) < 2:
        raise SettingsError(
            "prompts: at least two different ones, as those that judge a schedule must not be "
            f"those it was tuned on; 40 are better (got {len(different)})"
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
