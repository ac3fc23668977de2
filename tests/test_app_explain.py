"""What a place of the image attends to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from app_jobs import catalog_of, job
from sampling import with_samples
from tiny_models import patched_layers, smallest_unet, tiny_pipeline

from agentsd.app.explain import attention_view
from agentsd.app.requests.catalog import ModelCatalog
from agentsd.app.result import compare
from agentsd.schedule import Schedule

pytestmark = pytest.mark.slow


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return tiny_pipeline(tmp_path, smallest_unet(sample_size=32))


@pytest.fixture
def catalog(pipe: Any) -> ModelCatalog:
    return catalog_of(pipe)


@pytest.mark.parametrize("method", with_samples(["keys", "agent", "merge"], "agent"))
def test_what_a_place_listens_to(pipe: Any, catalog: ModelCatalog, method: str) -> None:
    strides = {"sx": 4, "sy": 4} if method != "merge" else {}
    phase = {"method": method, "min_tokens": 0, **strides}
    text = Schedule(phases=[phase | ({"agent_ratio": 0.9375} if method == "agent" else {})])
    request = catalog.request(
        model="tiny", prompt="a", num_inference_steps=4, schedule=text.to_yaml()
    )
    made = attention_view.explain(job(pipe, *compare.planned(pipe, request)), pipe, request)
    assert [seen.step for seen in made.maps] == [1, 2, 3, 4]
    seen = made.maps[0]
    token = seen.token_at(0.99, 0.01)
    assert (token, seen.token_at(1.0, 1.0)) == (31, 32 * 32 - 1)
    weights = seen.weights(token)
    assert weights.sum() == pytest.approx(1, abs=1e-3)
    assert (weights > 0).sum() <= len(set(np.asarray(seen.places).ravel()))
    if method == "agent":
        assert (weights > 0).sum() == 64
    if method == "keys":  # as the layer itself attends
        query = seen.queries[0, token].float()
        scores = (seen.keys[0].float() @ query * seen.scale).softmax(0)
        alone = seen._replace(queries=seen.queries[:1], keys=seen.keys[:1], places=seen.places[:1])
        assert alone.weights(token)[seen.places[0]] == pytest.approx(scores.numpy(), abs=1e-5)
    drawing = attention_view.draw(made.image, seen, token)
    assert drawing.size == attention_view.drawing_size(made.image)
    assert "places" in attention_view.caption(seen, token)
    assert not patched_layers(pipe.unet)
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


def test_an_unpatched_layer_has_nothing_to_explain(pipe: Any, catalog: ModelCatalog) -> None:
    request = catalog.request(
        model="tiny", prompt="a", num_inference_steps=1, schedule="phases: [{method: full}]"
    )
    assert (
        attention_view.explain(job(pipe, *compare.planned(pipe, request)), pipe, request).maps == []
    )
