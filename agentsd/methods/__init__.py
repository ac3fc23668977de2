"""What a phase of a schedule can do to self-attention: pure PyTorch, one file per method.

To add a method, add a file with a subclass of :class:`Phase` to this folder.
"""

from importlib import import_module
from pkgutil import iter_modules

from .base import METHODS, Phase, Plan

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
_sorted = sorted(METHODS.items())  # imports register them in another order
METHODS.clear()
METHODS.update(_sorted)

__all__ = ["METHODS", "Phase", "Plan"]
