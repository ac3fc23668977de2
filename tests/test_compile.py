"""Under ``torch.compile``: no graph breaks, one compilation a phase, the images of eager mode.

The backend runs the traced graph as it is: what is tested is the tracing, not a code generator.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import RecordingBackend, for_tiny, latents, smallest_unet, tiny_pipeline

from agentsd import Schedule, apply_patch

pytestmark = pytest.mark.slow

SCHEDULE = Schedule.from_dict(
    {
        "phases": [
            {"until": 0.3, "method": "agent", "sx": 4, "sy": 4, "ratio": 0.4, "agent_ratio": 0.95},
            {"until": 0.5, "method": "full"},
            {"until": 0.7, "method": "merge"},
            {"method": "keys"},
        ]
    }
)


@pytest.mark.parametrize("how", ["method", "function"])
def test_whole_graph_and_one_compilation_a_phase(how: str, tmp_path: Any) -> None:
    torch._dynamo.reset()
    pipe = tiny_pipeline(tmp_path, unet=smallest_unet())
    apply_patch(pipe, for_tiny(SCHEDULE))
    eager = latents(pipe, steps=10)
    backend = RecordingBackend()
    if how == "method":
        pipe.unet.compile(fullgraph=True, backend=backend)
    else:
        pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend=backend)
    first, again = latents(pipe, steps=10), latents(pipe, steps=10)
    assert torch.equal(first, again)
    torch.testing.assert_close(first, eager, rtol=1e-4, atol=1e-4)
    assert len(backend.graphs) == len(SCHEDULE.phases)


@pytest.mark.parametrize(
    "phase",
    [
        {"method": "merge", "merge_mlp": True},
        {"method": "merge", "merge_crossattn": True},
        {"method": "agent", "agents": 16, "ratio": 0.4, "merge_mlp": True},
        pytest.param({"method": "keys", "keys": 16}, marks=pytest.mark.sample),
    ],
    ids=lambda phase: "-".join(map(str, phase.values())),
)
def test_whole_graph_of_each_kind_of_phase(phase: dict[str, Any], tmp_path: Any) -> None:
    torch._dynamo.reset()
    pipe = tiny_pipeline(tmp_path, unet=smallest_unet())
    apply_patch(pipe, Schedule.from_dict({"phases": [phase | {"min_tokens": 0}]}))
    eager = latents(pipe, steps=6)
    backend = RecordingBackend()
    pipe.unet.compile(fullgraph=True, backend=backend)
    torch.testing.assert_close(latents(pipe, steps=6), eager, rtol=1e-4, atol=1e-4)
    assert len(backend.graphs) == 1
