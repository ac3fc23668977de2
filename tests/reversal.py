"""Checks that a patch changes a model, that the result stays close, and that removal is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agentsd import apply_patch, remove_patch

AGENTS: dict[str, Any] = {
    "method": "agent", "sx": 4, "sy": 4, "ratio": 0.4, "agent_ratio": 0.95, "max_downsample": 2,
    "min_tokens": 0,
}  # fmt: skip


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that hangs on every module, by identity: hooks, processors, weights, flags."""
    return {
        name: {
            "": type(module),
            **{k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()},
        }
        for name, module in model.named_modules()
    }


def check_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """The model has what it had: the same objects, under the same names, in the same order."""
    after = snapshot(model)
    assert list(after) == list(before), "modules differ"
    for name, attributes in before.items():
        assert list(after[name]) == list(attributes), f"attributes of {name or 'the model'} differ"
        for key, value in attributes.items():
            now = after[name][key]
            same = now is value
            if isinstance(value, dict) and isinstance(now, dict):
                ids = [[(k, id(v)) for k, v in part.items()] for part in (value, now)]
                same = ids[0] == ids[1]
            assert same, f"{name}.{key} differs"


ALIKE, UNALIKE = 0.25, 1.0
"""Relative distances to the unpatched model, of random weights, that patched ones stay within; the
second where a test asks much of them. Unrelated outputs of its size are at 1.4."""


def check_likeness(patched: Tensor, plain: Tensor, within: float = ALIKE) -> None:
    """A patched model gives much the same as the unpatched one."""
    distance = float((patched - plain).float().norm() / plain.float().norm())
    assert distance < within, f"{distance:.2f} from the unpatched one"  # NaN fails, too


def check_reversal(
    unet: nn.Module, outputs: Callable[[], Tensor], pipe: Any = None, **settings: Any
) -> None:
    """Patched (by its pipeline, if given) it is another model, and much alike; unpatched it is, bit
    for bit, the one that was there. Layers of few tokens are patched, too."""
    before, base = snapshot(unet), outputs()
    apply_patch(pipe or unet, **{"min_tokens": 0} | (settings or AGENTS))
    with pytest.raises(AssertionError, match="differ"):
        check_unchanged(unet, before)
    patched = outputs()
    assert not torch.equal(patched, base)
    check_likeness(patched, base, UNALIKE)
    assert torch.equal(outputs(), patched)
    remove_patch(unet)
    check_unchanged(unet, before)
    assert torch.equal(outputs(), base)
