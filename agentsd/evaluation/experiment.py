"""Run an experiment: make missing images, then measure all of them."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..generation.batch.run_folder import RunFolder, only_run_in
from ..generation.image_files import encode_image, prepare_folder, write_whole
from ..generation.images import TimedImage
from ..generation.interleaving import interleaved, warm_up
from ..generation.records import ImageRecord, manifest_entry
from ..image_settings import ImageSettings, warm_up_settings
from ..models.fingerprints import check_unchanged
from ..models.loading import model_fingerprint
from ..models.schedulers import scheduled
from .protocol import Protocol, ProtocolVariant
from .scoring import Metrics, ProgressReport, measure

MAY_DIFFER = ("device", "agentsd", "torch", "weights")
"""Keys in which existing images may differ from new ones; fingerprints of weights are compared
separately."""

WARM_UP_STEPS = 4


def run(
    protocol: Protocol,
    out: Path,
    pipe: Any,
    *,
    cache: Path | None = None,
    progress: ProgressReport = lambda what, done, total: None,
) -> dict[str, Any]:
    """Make an experiment's missing images and measure all; a second call resumes the first.

    Args:
        protocol: The experiment.
        out: Folder for ``report.json`` and one folder of images per variant.
        pipe: The protocol's model, loaded.
        cache: Folder of the feature cache.
        progress: Called as the work proceeds.

    Returns:
        The content of ``report.json``.

    Raises:
        EvaluationError: If the folder holds images of another experiment, or the images cannot be
            measured.
        AgentSDError: If the pipeline cannot run a variant.
    """
    metrics = Metrics.load(protocol, pipe.device)  # fails before hours of making images
    begun = time.perf_counter()
    with only_run_in(out), scheduled(pipe, protocol.scheduler):
        generate(protocol, out, pipe, progress)
    made = time.perf_counter()
    report = measure(protocol, out, metrics, cache=cache, progress=progress)
    report["seconds"] = {"making": made - begun, "measuring": time.perf_counter() - made}
    write_whole(out / "report.json", json.dumps(report, indent=1).encode())
    return report


def generate(protocol: Protocol, out: Path, pipe: Any, progress: ProgressReport) -> None:
    """Make missing images; variants are interleaved so that their times can be compared.

    They are made one by one, not by :func:`agentsd.generation.batch.engine.run`, which stays
    patched between batches and writes in the background: that would distort the times.
    """
    images = protocol.images()
    weights = {"weights": {protocol.model: model_fingerprint(protocol.model)}}
    folders = {
        variant.name: _VariantFolder(out, variant, images, pipe, protocol.model, weights)
        for variant in protocol.all_variants()
    }
    appliers = {name: folder.variant.applied for name, folder in folders.items()}
    missing = {name: folder.missing(len(images)) for name, folder in folders.items()}
    total = len(images) * len(folders)
    done = total - sum(map(len, missing.values()))
    progress("images", done, total)
    unfinished = {name: appliers[name] for name in folders if missing[name]}
    warm_up(pipe, unfinished, warm_up_settings(images[0], WARM_UP_STEPS))
    for number, settings in enumerate(images):
        skip = {name for name in folders if number not in missing[name]}
        label = f"{{}}, image {number + 1}"
        for name, made in interleaved(pipe, appliers, settings, number, label=label, skip=skip):
            folders[name].save(number, made)
            done += 1
            progress("images", done, total)


class _VariantFolder:
    """The images of a variant, some of which may exist from an earlier run.

    Args:
        out: Folder of the experiment.
        variant: The variant.
        images: Settings of its images, by number.
        pipe: The pipeline.
        model: What the pipeline was loaded from.
        weights: Fingerprints of the weights, for the records.

    Raises:
        EvaluationError: If an existing image was made with other settings.
        SettingsError: If an existing image was made with different weights of the same name.
    """

    def __init__(
        self,
        out: Path,
        variant: ProtocolVariant,
        images: list[ImageSettings],
        pipe: Any,
        model: str,
        weights: dict[str, Any],
    ) -> None:
        self.variant = variant
        self._images = images
        self._record = ImageRecord.of(pipe, images[0], model, variant.schedule, weights)
        self._folder = RunFolder(out / "images" / variant.name)
        prepare_folder(self._folder.images)
        self._folder.recover()
        for line in self._folder.lines():
            self._check(line)
        self._folder.open(len(images))

    def missing(self, total: int) -> set[int]:
        """The numbers of the missing images."""
        return {number for number in range(total) if not self._folder.is_settled(number)}

    def save(self, number: int, made: TimedImage) -> None:
        """Write an image and its line of the manifest."""
        data = encode_image(made.image, self._record_of(number))
        hidden = made.nsfw_content_detected
        line = self._line(number, seconds=made.seconds, nsfw_content_detected=hidden)
        self._folder.save(f"images/{number:06}.png", data, line)

    def _check(self, line: dict[str, Any]) -> None:
        """Refuse an existing image that would be made differently now."""
        number = line.get("number", line["id"])
        if number >= len(self._images):
            return  # from a longer run of the same experiment
        # Through JSON, like the line, so that tuples become lists.
        now = json.loads(json.dumps(self._record_of(number).to_dict() | self._extra(number)))
        check_unchanged(line.get("weights") or {}, now["weights"])
        for key, value in now.items():
            if key not in MAY_DIFFER and line.get(key) != value:
                raise EvaluationError(
                    f"{self._folder.path}: image {number} was made with another {key} "
                    f"({line.get(key)!r:.80}, now {value!r:.80}); use another --out, or delete "
                    "that folder"
                )

    def _record_of(self, number: int) -> ImageRecord:
        return replace(self._record, settings=self._images[number])

    def _extra(self, number: int) -> dict[str, Any]:
        return {"id": number, "variant": self.variant.spec}

    def _line(self, number: int, **outcome: Any) -> dict[str, Any]:
        return manifest_entry(
            self._record_of(number), number=number, **self._extra(number), **outcome
        )
