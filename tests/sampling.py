"""Which cases of a slow test run in the quick run, too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sample_if(chosen: bool) -> tuple[pytest.MarkDecorator, ...]:
    """Marks of a case that is a sample if it is ``chosen``."""
    return (pytest.mark.sample,) if chosen else ()


def with_samples(cases: Iterable[Any], *samples: Any) -> list[Any]:
    """Parameters for a test, of which ``samples`` are marked so."""
    cases = [*cases]
    assert all(sample in cases for sample in samples)
    return [pytest.param(case, marks=sample_if(case in samples)) for case in cases]
