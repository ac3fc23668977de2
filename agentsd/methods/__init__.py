"""What a phase of a schedule can do to self-attention: pure PyTorch, one file a method.

A new method is a subclass of :class:`Phase` in a file of its own in this folder.
"""

from importlib import import_module
from pkgutil import iter_modules

from .base import METHODS, Phase, Plan

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
_sorted = sorted(METHODS.items())  # not in the order in which one file imports another
METHODS.clear()
METHODS.update(_sorted)

__all__ = ["METHODS", "Phase", "Plan"]
