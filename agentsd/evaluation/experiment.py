"""Run an experiment: make the images that are missing, and measure all of them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..generation.image_files import encode_image, prepare_folder, write_whole
from ..generation.images import TimedImage, make_image
from ..generation.records import shared_record
from ..image_settings import ImageSettings
from ..models.fingerprints import check_unchanged
from ..models.loading import model_fingerprint
from ..models.schedulers import scheduled
from .image_sets import MANIFEST, read_manifest
from .protocol import Protocol, ProtocolVariant
from .scoring import Metrics, Progress, measure

TIMING = ("seconds", "device", "agentsd", "torch", "file", "sha256")
"""What of a manifest's entry may differ from what a resumed run would write."""


def run(
    protocol: Protocol,
    out: Path,
    pipe: Any,
    *,
    cache: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Make what is missing of an experiment and measure it; started again, it goes on.

    Args:
        protocol: What to do.
        out: Folder; a folder of images for each variant is made in it, and ``report.json``.
        pipe: The protocol's model, loaded.
        cache: Folder of the features' cache.
        progress: Told of progress.

    Returns:
        What ``report.json`` holds.

    Raises:
        EvaluationError: If the folder holds images of another experiment, or on what measuring
            finds wrong.
        AgentSDError: If the pipeline cannot run a variant.
    """
    metrics = Metrics.load(protocol, pipe.device)  # rather now than after hours of making images
    begun = time.perf_counter()
    with scheduled(pipe, protocol.scheduler):
        generate(protocol, out, pipe, progress)
    made = time.perf_counter()
    report = measure(protocol, out, metrics, cache=cache, progress=progress)
    report["seconds"] = {"making": made - begun, "measuring": time.perf_counter() - made}
    write_whole(out / "report.json", json.dumps(report, indent=1).encode())
    return report


def make(
    pipe: Any, settings: ImageSettings, variant: ProtocolVariant, label: str = ""
) -> TimedImage:
    """Make one image of a variant."""
    with variant.applied(pipe):
        return make_image(pipe, settings, label)


def generate(protocol: Protocol, out: Path, pipe: Any, progress: Progress) -> None:
    """Make the images that are not there yet; the variants take turns, so that times compare."""
    wanted, ways = protocol.images(), protocol.all_variants()
    weights = {"weights": {protocol.model: model_fingerprint(protocol.model)}}
    by = {way.name: shared_record(pipe, protocol.model, way.schedule, weights) for way in ways}
    there = {way.name: _begun(out, way, wanted, by[way.name]) for way in ways}
    done, total = sum(map(len, there.values())), len(wanted) * len(ways)
    warm: set[str] = set()
    for number, settings in enumerate(wanted):
        turn = number % len(ways)  # another one first each time
        for way in ways[turn:] + ways[:turn]:
            if number in there[way.name]:
                continue
            if way.name not in warm:  # its first steps are slower, and not counted
                few = min(4, settings.num_inference_steps)
                make(pipe, settings.model_copy(update={"num_inference_steps": few}), way)
                warm.add(way.name)
            progress("images", done, total)
            made = make(pipe, settings, way, f"{way.name}, image {number + 1}")
            _keep(out, way, number, settings.model_dump() | by[way.name], made)
            done += 1
    progress("images", done, total)


def _begun(
    out: Path, way: ProtocolVariant, wanted: list[ImageSettings], by: dict[str, Any]
) -> set[int]:
    """The numbers of the images that are there; a last line that was cut short is dropped.

    Args:
        out: Folder of the experiment.
        way: The variant.
        wanted: Its images.
        by: What all their records share.

    Raises:
        EvaluationError: If one was made otherwise.
        SettingsError: If one was made with other weights of that name.
    """
    folder = out / "images" / way.name
    prepare_folder(folder / "images")
    file = folder / MANIFEST
    if not file.is_file():
        return set()
    data = file.read_bytes()
    if not data.endswith(b"\n"):
        write_whole(file, data[: data.rfind(b"\n") + 1])
    there = set()
    for entry in read_manifest(file):
        number = entry.get("id")
        if not isinstance(number, int) or not 0 <= number < len(wanted):
            continue  # of a longer run of the same experiment
        # Through JSON, as the entry went, so that tuples are lists.
        recorded = wanted[number].model_dump() | by
        expected = json.loads(json.dumps(_entry(way, number, recorded), sort_keys=True))
        check_unchanged(entry.get("weights") or {}, expected.pop("weights"))
        for key, value in expected.items():
            if key not in TIMING and entry.get(key) != value:
                raise EvaluationError(
                    f"{file}: image {number} was made with another {key} "
                    f"({entry.get(key)!r:.80}, now {value!r:.80}); take another --out, or delete "
                    "that folder"
                )
        if (folder / entry["file"]).is_file():
            there.add(number)
    return there


def _keep(
    out: Path, way: ProtocolVariant, number: int, recorded: dict[str, Any], made: TimedImage
) -> None:
    """Write an image, and then what the manifest says of it."""
    folder = out / "images" / way.name
    name = f"images/{number:06}.png"
    data = encode_image(made.image, recorded)
    write_whole(folder / name, data)
    entry = _entry(way, number, recorded) | {
        "file": name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "seconds": round(made.seconds, 4),
        "nsfw_content_detected": made.nsfw_content_detected,
    }
    with (folder / MANIFEST).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _entry(way: ProtocolVariant, number: int, recorded: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of an image, besides how it turned out."""
    return {"id": number, **recorded, "variant": way.spec}
