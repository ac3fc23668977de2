"""Load models without the progress bars and notices of other packages."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import diffusers
import transformers

from ..attributes import replaced_attribute


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide loading bars, and the notice that transformers falls back from torchvision to Pillow.

    Download bars and warnings about the model are still shown. At the end of the ``with`` block,
    the user's own logging settings of diffusers and transformers are as they were.
    """
    logger = logging.getLogger("transformers.utils.import_utils")
    with (
        replaced_attribute(diffusers.utils.logging, "_tqdm_active", False),
        # transformers' own switch, disable_progress_bar, would also hide download bars.
        replaced_attribute(transformers.utils.logging, "_tqdm_active", False),
    ):
        logger.addFilter(_is_worth_showing)
        try:
            yield
        finally:
            logger.removeFilter(_is_worth_showing)


def _is_worth_showing(record: logging.LogRecord) -> bool:
    return "requires torchvision (not installed); falling back" not in record.getMessage()
