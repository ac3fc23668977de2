"""Images to features: Inception, any CLIP, or the pocket model's CLIP; cached on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ..errors import EvaluationError
from ..generation.image_files import write_whole
from ..models.loading import POCKET
from ..settings import short_repr
from . import inception
from .pictures import Picture, digest_of
from .reading import Reading, decoded, opened

Floats = NDArray[np.floating[Any]]


def cache_folder() -> Path:
    """Where features are kept: ``$AGENTSD_CACHE``, or ``agentsd`` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("AGENTSD_CACHE") or Path(home) / "agentsd") / "features"


class Extractor:
    """A network that turns images to features.

    Args:
        network: Holds the weights; moved to ``device``.
        kind: What it is called in the cache.
        settings: All that it does with an image besides the weights, as text.
        embed: Images (RGB, of one size) to features ``[B, D]``, given the device.
    """

    def __init__(
        self,
        network: nn.Module,
        kind: str,
        settings: str,
        embed: Callable[[list[Image.Image], torch.device], Tensor],
        device: str | torch.device = "cpu",
    ):
        self.device = torch.device(device)
        self.network = network.to(self.device)
        self.embed = embed
        self.identity = f"{kind}-{_fingerprint(network, settings)}"

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> Floats:
        """RGB images of one size to features ``[B, D]``."""
        return np.asarray(self.embed(images, self.device).float().cpu().numpy())


class Clip(Extractor):
    """A CLIP of transformers; embeds prompts as well.

    Raises:
        EvaluationError: If there is no such CLIP.
    """

    def __init__(self, model: str | Path, device: str | torch.device = "cpu"):
        from transformers import CLIPModel, CLIPProcessor

        try:
            network = CLIPModel.from_pretrained(model).float().eval()
            self.processor = CLIPProcessor.from_pretrained(model)
        except Exception as error:  # transformers and the hub raise kinds of their own
            said = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise EvaluationError(
                f"no CLIP {short_repr(str(model))}: give a folder or a hub id ({short_repr(said)})"
            ) from error
        self.model: Any = network
        settings = self.processor.image_processor.to_json_string()
        super().__init__(network, "clip", settings, self._images, device)

    def _images(self, images: list[Image.Image], device: torch.device) -> Tensor:
        inputs = self.processor.image_processor(images=images, return_tensors="pt")
        pixels = inputs["pixel_values"].to(device)
        found: Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
        return found

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> tuple[Floats, list[int]]:
        """Prompts to features ``[N, D]``, and the places of those too long to be read whole."""
        tokenizer: Any = self.processor.tokenizer
        limit: int = self.model.config.text_config.max_position_embeddings
        lengths = [len(tokenizer(prompt).input_ids) for prompt in prompts]
        found = []
        for start in range(0, len(prompts), 64):
            inputs = tokenizer(
                prompts[start : start + 64],
                padding=True,
                truncation=True,
                max_length=limit,
                return_tensors="pt",
            ).to(self.device)
            embedded = self.model.get_text_features(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).pooler_output
            found.append(embedded.float().cpu().numpy())
        return np.concatenate(found), [i for i, length in enumerate(lengths) if length > limit]


def extractor(name: str, device: str | torch.device = "cpu") -> Extractor:
    """Load an extractor by name.

    Args:
        name: ``inception`` (weights from the cache of torch's hub) or ``inception:FILE``;
            ``clip:MODEL``, a folder or a hub id; ``pocket``, the CLIP of the pocket model.
        device: Where to run it.

    Raises:
        EvaluationError: If there is none of that name, or its weights are missing or wrong.
    """
    kind, _, rest = name.partition(":")
    if name == "pocket":
        return Clip(POCKET / "clip", device)
    if kind == "clip" and rest:
        return Clip(rest, device)
    if kind == "inception":
        network = inception.load(inception.weights_file(Path(rest) if rest else None))

        def embed(images: list[Image.Image], device: torch.device) -> Tensor:
            pixels = np.stack([np.asarray(image) for image in images])
            found: Tensor = network(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device))
            return found

        return Extractor(network, "inception", "pytorch-fid", embed, device)
    raise EvaluationError(
        f"unknown features {short_repr(name)}: choose inception, inception:FILE, clip:MODEL or "
        "pocket"
    )


def clip(name: str, device: str | torch.device = "cpu") -> Clip:
    """Load an extractor that must be a CLIP.

    Raises:
        EvaluationError: If it is none.
    """
    if name.startswith("inception"):
        raise EvaluationError(f"{name} reads no prompts; give clip:MODEL or pocket")
    found = extractor(name, device)
    assert isinstance(found, Clip)
    return found


def _fingerprint(network: nn.Module, settings: str) -> str:
    """Of a sample of every weight: another model, or another revision, is another key."""
    found = hashlib.sha256(settings.encode())
    for name, tensor in sorted(network.state_dict().items()):
        flat = tensor.flatten()
        sample = flat[:: max(1, len(flat) // 64)].double().cpu()
        found.update(f"{name}{tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return found.hexdigest()[:16]


class Cache:
    """Features by key in one folder: a file for each batch that was computed.

    Args:
        folder: TimedImage when the first features come.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.place: dict[str, tuple[Path, int]] = {}
        self.batch: tuple[Path | None, Floats] = (None, np.zeros((0, 0), np.float32))
        for path in sorted(folder.glob("*.npz")):
            try:
                with np.load(path) as file:
                    self.place |= {key: (path, i) for i, key in enumerate(file["keys"].tolist())}
            except (OSError, ValueError, KeyError, EOFError, BadZipFile):
                path.unlink(missing_ok=True)  # damaged: it is only a cache

    def get(self, key: str) -> Floats | None:
        """The features of one image ``[D]``, if they are there."""
        if key not in self.place:
            return None
        path, row = self.place[key]
        if self.batch[0] != path:
            with np.load(path) as file:
                self.batch = (path, file["features"])
        return np.asarray(self.batch[1][row])

    def put(self, keys: list[str], features: Floats) -> None:
        """Keep the features ``[B, D]`` of a batch."""
        data = BytesIO()
        np.savez(data, keys=np.array(keys), features=features)
        name = hashlib.sha256("".join(keys).encode()).hexdigest()[:24]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.npz"
        write_whole(path, data.getvalue())
        self.place |= {key: (path, i) for i, key in enumerate(keys)}


class Features(NamedTuple):
    """What was extracted, and what was left out."""

    values: Floats  # [N, D]
    pictures: list[Picture]  # those N
    bad: list[str]
    """What was wrong with the pictures that were skipped, each with its name."""
    computed: int
    """How many were not in the cache."""


def extract(
    found: list[Picture],
    extractor: Extractor,
    reading: Reading | None = None,
    *,
    folder: Path | None = None,
    batch_size: int = 32,
    progress: Callable[[int], object] = lambda done: None,
) -> Features:
    """Features of images, from the cache where they are there; interrupted, it goes on there.

    Args:
        found: The images.
        extractor: What to run.
        reading: How to read them.
        folder: Of the cache; by default :func:`cache_folder`.
        batch_size: Images at a time; more is faster on a GPU and takes more memory.
        progress: Called with the number of images that are done.

    Raises:
        EvaluationError: Names the first image that cannot be used, unless bad ones are skipped;
            or if none is left.
    """
    reading = reading or Reading()
    cache = Cache((folder or cache_folder()) / extractor.identity)
    values: dict[int, Floats] = {}
    bad: list[str] = []
    waiting: list[tuple[int, str, Image.Image]] = []
    size: tuple[int, int] | None = None
    computed = 0

    def finish() -> None:
        nonlocal computed
        if not waiting:
            return
        features = extractor([image for _, _, image in waiting])
        good = [bool(np.isfinite(row).all()) for row in features]
        if any(good):
            cache.put([key for (_, key, _), ok in zip(waiting, good, strict=True) if ok],
                      features[good])  # fmt: skip
        for (index, _, _), row, ok in zip(waiting, features, good, strict=True):
            if ok:
                values[index] = row
            else:
                refuse(f"{found[index].name}: its features hold NaN or infinity")
        computed += len(waiting)
        waiting.clear()
        progress(len(values) + len(bad))

    def refuse(problem: str) -> None:
        if not reading.skip_bad:
            raise EvaluationError(f"{problem} (--skip-bad leaves such images out)")
        bad.append(problem)

    for index, picture in enumerate(found):
        try:
            data = picture.read()
            key = digest_of(picture, data) + reading.manner
            image = opened(picture.name, data, reading)
            size = size or image.size
            if reading.size is None and image.size != size:
                raise EvaluationError(
                    f"{picture.name}: is {image.width}×{image.height}, those before are "
                    f"{size[0]}×{size[1]}; --size N makes all N×N"
                )
            row = cache.get(key)
            if row is None:
                waiting.append((index, key, decoded(picture.name, image, reading)))
            else:
                values[index] = row
        except EvaluationError as error:
            refuse(str(error))
        if len(waiting) == batch_size:
            finish()
        elif not waiting:
            progress(len(values) + len(bad))
    finish()
    if not values:
        raise EvaluationError(f"none of {len(found)} images can be used; the first: {bad[0]}")
    order = sorted(values)
    return Features(np.stack([values[i] for i in order]), [found[i] for i in order], bad, computed)
