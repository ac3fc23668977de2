"""What a run is to make, how, and where; and what it loads for that."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ...errors import SettingsError
from ...models.adapters import Offload, configure_pipeline
from ...models.fingerprints import check_unchanged, snapshot_commit
from ...models.loading import load_pipeline, model_fingerprint, only_variant
from ...models.options import PipelineOptions, recorded_fingerprints
from ...schedule import Schedule
from ..conditions import conditions, warn_if_tuned_for_others
from .run_folder import RunFolder


@dataclass(frozen=True)
class BatchRequest:
    """What a run is to make, how, and where.

    Args:
        out: Folder of the run.
        base: Settings of images whose row does not override them: fields of
            :class:`agentsd.image_settings.ImageSettings`.
        schedule: ``None`` for unpatched images.
        options: What to add to the model.
        model: What to load; see :func:`agentsd.load_pipeline`.
        revision: Branch, tag or commit of a model on the hub.
        variant: Which of a model's weights (``fp16``), where there are several.
        device: Where to run; by default the best there is, and one for each process.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        form: ``png``, ``jpg``, ``webp`` or ``webdataset``.
        batch_size: Images at a time; ``None`` finds the largest that fits.
        batch_position: See :class:`agentsd.generation.batch.engine.Work`.
        offload: See :func:`agentsd.models.adapters.configure_pipeline`.
        allow_pickle: Likewise.
        resume: Whether a run that is already in ``out`` may be resumed.
        progress: ``none``, ``plain`` or ``rich``.
        stale_after: Seconds of silence after which another process's work is taken over.
        known: Fingerprints that files must have, by path or hub id: those of an image that is to
            be regenerated.
    """

    out: Path
    base: dict[str, Any]
    schedule: Schedule | None
    options: PipelineOptions
    model: str = "pocket"
    revision: str | None = None
    variant: str | None = None
    device: str | None = None
    dtype: str | None = None
    form: str = "png"
    batch_size: int | None = 1
    batch_position: tuple[int, int] | None = None
    offload: Offload | None = None
    allow_pickle: bool = False
    resume: bool = True
    progress: str = "plain"
    stale_after: float = 60.0
    known: Mapping[str, Any] = field(default_factory=dict)

    def load(self, device: str | None = None) -> DiffusionPipeline:
        """Load the model and put the options on it.

        Args:
            device: Overrides the request's device.

        Raises:
            AgentSDError: If a file is missing or cannot be used; images are checked first.
        """
        self.options.check_files()
        chosen = {"revision": self.revision, "variant": self._loaded_variant()}
        pipe = load_pipeline(
            self.model,
            device=device or self.device,
            dtype=self.dtype,
            allow_pickle=self.allow_pickle,
            **{name: value for name, value in chosen.items() if value is not None},
        )
        pipe = configure_pipeline(
            pipe, self.options, offload=self.offload, allow_pickle=self.allow_pickle
        )
        if self.schedule is not None and self.schedule.tuned_for is not None:
            weights = model_fingerprint(self.model, self.revision)
            now = conditions(pipe, self.base, self.model, weights)
            warn_if_tuned_for_others(self.schedule, now)
        return pipe

    def recorded(self) -> dict[str, Any]:
        """What is loaded, for the record: which of the model's weights, and the options."""
        local = self.model == "pocket" or os.path.exists(self.model)
        return {
            "revision": None if local else snapshot_commit(self.model, self.revision),
            "variant": self._loaded_variant(),
            "weights": self._weights(),
            **self.options.recorded(),
        }

    def check_fingerprints(self) -> None:
        """Compare the files with :attr:`known`, and with the run that is in ``out``.

        Raises:
            SettingsError: Names the first file that has changed.
        """
        folder = RunFolder(self.out)
        begun = self.resume and folder.run_file.exists()
        if not (self.known or begun):
            return  # hashing takes a while
        now = recorded_fingerprints(self.options.recorded() | {"weights": self._weights()})
        check_unchanged(self.known, now)
        if begun:
            try:
                check_unchanged(recorded_fingerprints(folder.read_run()["config"]), now)
            except SettingsError as error:
                raise SettingsError(
                    f"{self.out} holds a run with another configuration: {error}"
                ) from None

    def _loaded_variant(self) -> str | None:
        """The variant that was asked for, or the only one in the model's folder."""
        folder = Path(self.model)
        if self.variant is not None or not os.path.isdir(folder):
            return self.variant
        return only_variant(folder, allow_pickle=self.allow_pickle)

    def _weights(self) -> dict[str, str | None]:
        """Fingerprints of all weights, by path or hub id."""
        model = model_fingerprint(self.model, self.revision)
        return {self.model: model, **self.options.weights()}
