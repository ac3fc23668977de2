"""Sources of images, their features, and the cache."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import picture_sets
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.multimodal import clip_score as their_clip_score

from agentsd.errors import EvaluationError
from agentsd.evaluation.features import Clip, Extractor, extract, load_clip, load_extractor
from agentsd.evaluation.features.storage import FeatureCache
from agentsd.evaluation.image_sets import read_image_set, with_prompts
from agentsd.evaluation.metrics import clip_score
from agentsd.evaluation.reading import ReadOptions
from agentsd.models.loading import POCKET


class Means(nn.Module):
    """Features that can be computed by hand: the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.seen: list[int] = []

    def forward(self, images: list[Image.Image], device: torch.device) -> Tensor:
        self.seen.append(len(images))
        found = torch.stack([torch.from_numpy(np.array(i)).float().mean((0, 1)) for i in images])
        return found * self.weight


def means() -> tuple[Extractor, Means]:
    network = Means()
    return Extractor(network, "means", "", network.forward), network


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip("pocket")


def test_a_set_is_the_same_from_folder_manifest_and_tar(tmp_path: Path) -> None:
    sources = (
        picture_sets.folder(tmp_path / "plain"),
        picture_sets.manifest(tmp_path / "made"),
        picture_sets.tar(tmp_path / "set.tar"),
    )
    extractor, network = means()
    plain, made, packed = (read_image_set(source) for source in sources)
    values = [extract(p, extractor, folder=tmp_path / "c").values for p in (plain, made, packed)]
    assert (values[0] == values[1]).all()
    assert (values[0] == values[2]).all()
    assert sum(network.seen) == 6  # the same files: the cache knows them by their content
    assert [p.prompt for p in made] == [p.prompt for p in packed]
    assert "red" in str(made[0].prompt)
    assert [p.seed for p in made] == list(range(6))
    assert {p.prompt for p in plain} == {None}
    expected = np.asarray(picture_sets.noise(2), np.float64).mean((0, 1))
    assert values[0][2] == pytest.approx(expected, rel=1e-5)
    assert values[0][3] != pytest.approx(expected, rel=1e-2)


def test_prompts_of_a_plain_folder(tmp_path: Path) -> None:
    folder = picture_sets.folder(tmp_path / "plain", 2)
    (folder / "001.txt").write_text("a blue square\n")
    assert [p.prompt for p in read_image_set(folder)] == [None, "a blue square"]
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    given = with_prompts(read_image_set(folder), tmp_path / "prompts.txt")
    assert [p.prompt for p in given] == ["one", "two"]
    with pytest.raises(EvaluationError, match=r"prompts.txt has 2 prompts for 1 images"):
        with_prompts(given[:1], tmp_path / "prompts.txt")


def test_interrupted_extraction_is_resumed(tmp_path: Path) -> None:
    found = read_image_set(picture_sets.folder(tmp_path / "plain", 7))
    extractor, network = means()

    def stop(done: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(found, extractor, folder=tmp_path / "c", batch_size=2, progress=stop)
    assert network.seen == [2, 2]
    resumed = extract(found, extractor, folder=tmp_path / "c", batch_size=2)
    assert (resumed.computed, network.seen) == (3, [2, 2, 2, 1])
    again = extract(found, extractor, folder=tmp_path / "c")
    assert again.computed == 0
    assert (again.values == extract(found, extractor, folder=tmp_path / "new").values).all()


def test_cache_distinguishes_weights_options_and_files(tmp_path: Path) -> None:
    found = read_image_set(picture_sets.folder(tmp_path / "plain", 3))
    for change in ("none", "weights", "size", "file"):
        extractor, network = means()
        if change == "weights":
            network.weight.data *= 2
            extractor = Extractor(network, "means", "", network.forward)
        if change == "file":
            picture_sets.noise(50).save(tmp_path / "plain" / "001.png")
        reading = ReadOptions(size=16 if change == "size" else None)
        got = extract(found, extractor, reading, folder=tmp_path / "c")
        assert got.computed == (1 if change == "file" else 3), change


def test_damaged_cache_is_recomputed(tmp_path: Path) -> None:
    found = read_image_set(picture_sets.folder(tmp_path / "plain", 3))
    extractor, _ = means()
    first = extract(found, extractor, folder=tmp_path)
    [file] = (tmp_path / extractor.identity).glob("*.npz")
    file.write_bytes(file.read_bytes()[:100])
    assert not FeatureCache(tmp_path / extractor.identity).index
    again = extract(found, extractor, folder=tmp_path)
    assert (again.computed, (again.values == first.values).all()) == (3, True)


def test_clip_score_equals_transformers_and_torchmetrics(clip: Clip, tmp_path: Path) -> None:
    got = extract(read_image_set(picture_sets.folder(tmp_path / "a")), clip, folder=tmp_path / "c")
    captions = [f"a {colour} circle on a {colour} background" for colour in picture_sets.COLOURS]
    # Of all images with all captions the best, since torchmetrics raises a mean below 0 to 0.
    every = [(i, j) for i in range(6) for j in range(8)]
    embedded, _ = clip.embed_texts(captions)
    all_scores = clip_score(got.values[[i for i, _ in every]], embedded[[j for _, j in every]])
    best = np.argsort(all_scores)[-6:]
    scores = all_scores[best]
    images = [picture_sets.noise(every[k][0]) for k in best]
    texts = [captions[every[k][1]] for k in best]
    inputs = clip.processor(text=texts, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = clip.model(**inputs)
    theirs = (out.logits_per_image / clip.model.logit_scale.exp()).diagonal().detach() * 100
    assert scores == pytest.approx(theirs.numpy(), abs=1e-3)
    assert all_scores[:6] != pytest.approx(theirs.numpy(), abs=1)

    class Pooled:
        """What torchmetrics expects of transformers: embeddings, not an object that holds them."""

        config = clip.model.config

        def to(self, device: Any) -> Any:
            return self

        def get_image_features(self, pixels: Tensor) -> Tensor:
            return clip.model.get_image_features(pixels).pooler_output  # type: ignore[no-any-return]

        def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
            return clip.model.get_text_features(ids, mask).pooler_output  # type: ignore[no-any-return]

    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    with torch.no_grad():
        mean = their_clip_score(pixels, texts, lambda: (Pooled(), clip.processor))
    assert scores.mean() == pytest.approx(float(mean), abs=1e-3)
    assert mean > 0


def test_long_prompts_are_counted(clip: Clip) -> None:
    embedded, cut = clip.embed_texts(["a red circle", "a red circle and " * 20, "a blue square"])
    assert cut == [1]
    assert embedded.shape == (3, 96)
    assert not np.allclose(embedded[0], embedded[2])


def test_clip_by_folder_is_the_same(clip: Clip) -> None:
    assert load_extractor(f"clip:{POCKET / 'clip'}").identity == clip.identity


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vgg", "unknown features 'vgg'"),
        ("clip:", "unknown features 'clip:'"),
        ("clip:nowhere/at/all/x", "no CLIP 'nowhere/at/all/x'"),
        ("inception:none.pth", "no Inception weights at none.pth"),
    ],
)
def test_wrong_extractors_are_errors(name: str, says: str) -> None:
    with pytest.raises(EvaluationError, match=says):
        load_extractor(name)
    if name.startswith("inception"):
        with pytest.raises(EvaluationError, match="cannot embed prompts"):
            load_clip(name)


def test_nan_features_name_the_image(tmp_path: Path) -> None:
    found = read_image_set(picture_sets.folder(tmp_path / "plain", 3))

    def embed(images: list[Image.Image], device: torch.device) -> Tensor:
        return torch.tensor([[1.0, np.nan if i == 1 else 1.0] for i in range(len(images))])

    extractor = Extractor(Means(), "nan", "", embed)
    with pytest.raises(EvaluationError, match=r"001\.png: its features contain NaN"):
        extract(found, extractor, folder=tmp_path / "c")
    got = extract(found, extractor, ReadOptions(skip_bad=True), folder=tmp_path / "d")
    assert ([p.name[-7:] for p in got.images], len(got.skipped)) == (["000.png", "002.png"], 1)


def spoil(folder: Path, how: str) -> None:
    """Make ``002.png`` of a folder unusable."""
    file = folder / "002.png"
    image = Image.open(file).convert("RGB")
    if how == "text":
        file.write_text("no image")
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-300])
    elif how == "size":
        image.resize((48, 32)).save(file)
    elif how == "16-bit grey":
        Image.fromarray(np.full((32, 32), 4000, np.uint16)).save(file)
    else:
        image.convert(how).save(file)


BAD = [
    ("text", "not a readable image"),
    ("empty", "not a readable image"),
    ("cut", "damaged or truncated"),
    ("size", "is 48×32, but earlier images are 32×32"),
    ("16-bit grey", "more than 8 bits"),
    ("RGBA", "is RGBA, not RGB; --convert"),
    ("L", "is L, not RGB; --convert"),
    ("P", "is P, not RGB; --convert"),
]


@pytest.mark.parametrize(("how", "says"), BAD)
def test_bad_images_are_named(tmp_path: Path, how: str, says: str) -> None:
    folder = picture_sets.folder(tmp_path / "plain", 4)
    spoil(folder, how)
    found = read_image_set(folder)
    extractor, _ = means()
    with pytest.raises(EvaluationError, match=says) as raised:
        extract(found, extractor, folder=tmp_path / "c")
    assert str(folder / "002.png") in str(raised.value)
    got = extract(found, extractor, ReadOptions(skip_bad=True), folder=tmp_path / "c")
    assert (len(got.values), len(got.skipped)) == (3, 1)
    assert says.split(";")[0] in got.skipped[0]
    taken = ReadOptions(size=16 if how == "size" else None, convert=True)
    if how in ("RGBA", "L", "P", "size"):
        assert len(extract(found, extractor, taken, folder=tmp_path / "c").values) == 4
    else:
        with pytest.raises(EvaluationError, match=says):
            extract(found, extractor, taken, folder=tmp_path / "c")


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    folder = picture_sets.folder(tmp_path / "plain", 3)
    for file in folder.iterdir():
        file.write_text("no image")
    with pytest.raises(EvaluationError, match="none of 3 images can be used"):
        extract(
            read_image_set(folder), means()[0], ReadOptions(skip_bad=True), folder=tmp_path / "c"
        )


def test_sources_without_images_are_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "broken.tar").write_text("x" * 2000)
    for name, says in {
        "empty": "holds no image",
        "file.txt": "neither a folder",
        "broken.tar": "not a complete, uncompressed tar",
        "nowhere": "no such folder",
    }.items():
        with pytest.raises(EvaluationError, match=says) as raised:
            read_image_set(tmp_path / name)
        assert name in str(raised.value)


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": "a"}', '{"file": 3}'])
def test_broken_manifest_names_the_line(tmp_path: Path, line: str) -> None:
    made = picture_sets.manifest(tmp_path / "made", 2)
    with (made / "manifest.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(EvaluationError, match=r"manifest\.jsonl, line 3"):
        read_image_set(made)


def test_changed_or_missing_files_of_a_manifest(tmp_path: Path) -> None:
    made = picture_sets.manifest(tmp_path / "made", 3)
    picture_sets.noise(9).save(made / "images" / "001.png")
    with pytest.raises(EvaluationError, match=r"001\.png has changed since its manifest"):
        extract(read_image_set(made), means()[0], folder=tmp_path / "c")
    (made / "images" / "001.png").unlink()
    with pytest.raises(EvaluationError, match=r"001\.png: cannot be read"):
        extract(read_image_set(made), means()[0], folder=tmp_path / "c")


def test_tar_with_a_broken_caption_names_the_member(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in {"0.png": b"x", "0.json": b"{"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(EvaluationError, match=r"a\.tar:0\.json: not valid JSON"):
        read_image_set(tmp_path / "a.tar")
