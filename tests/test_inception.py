"""The Inception network against torch-fidelity's, and errors for wrong weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from independent import torch_fidelity
from tiny_models import build

from agentsd.errors import EvaluationError
from agentsd.evaluation.features import inception
from agentsd.evaluation.features.inception import FILES, Inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the format of the standard file."""
    network = build(Inception)
    state = dict(network.state_dict())
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            state[name] = 0.1 * torch.randn(tensor.shape, generator=generator)
    state |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    path = tmp_path_factory.mktemp("weights") / FILES[0]
    torch.save(state, path)
    return path


@pytest.mark.slow
def test_network_is_torch_fidelitys(weights: Path) -> None:
    images = torch.randint(0, 256, (1, 3, 299, 299), generator=torch.Generator().manual_seed(1))
    with torch_fidelity("feature_extractor_inceptionv3") as (theirs,):
        network = theirs.FeatureExtractorInceptionV3("i", ["2048"], str(weights))
        [expected] = network(images.to(torch.uint8))
    ours = inception.load(weights)
    found = ours.features((images.float() - 128) / 128)  # as torch-fidelity scales
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
    ours.Mixed_7c.pool = "average"
    assert not torch.allclose(ours.features((images.float() - 128) / 128), expected, rtol=1e-3)


def test_images_are_scaled_as_pytorch_fid_does(weights: Path) -> None:
    """Black is -1, white is 1, and images of 299 pixels are not resized."""
    network = inception.load(weights)
    seen: list[torch.Tensor] = []
    network.features = seen.append
    network(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 299, 299))
    network(torch.zeros(1, 3, 64, 80, dtype=torch.uint8))
    assert (seen[0].amin((1, 2, 3)).tolist(), seen[0].amax((1, 2, 3)).tolist()) == ([-1, 1],) * 2
    assert seen[1].shape == (1, 3, 299, 299)


def test_missing_weights_say_where_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for path in (None, tmp_path / "none.pth"):
        with pytest.raises(EvaluationError, match="mseitzer/pytorch-fid") as raised:
            inception.weights_file(path)
        assert str(path or tmp_path / "checkpoints" / FILES[0]) in str(raised.value)


def test_wrong_weights_name_the_file(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"pt_inception.* is not the standard weights file"):
        inception.weights_file(weights)
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(EvaluationError, match=r"a\.pth lacks Conv2d_1a_3x3\.bn\.bias and"):
        inception.load(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_text("no weights")
    with pytest.raises(EvaluationError, match=r"b\.pth: not the weights"):
        inception.load(tmp_path / "b.pth")
