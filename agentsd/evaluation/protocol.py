"""The protocol of an experiment: model, prompts, variants, steps and seeds, read from YAML."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import Field

from ..baselines import BASELINES
from ..errors import AgentSDError, ProtocolError
from ..image_settings import ImageSettings
from ..models.loading import default_guidance
from ..models.schedulers import COMMON_NAMES, class_name
from ..patching.patch import patched
from ..schedule import PRESETS, Schedule
from ..settings import StrictModel, parse_yaml, short_repr
from ..text_files import prompt_lines, read_text
from .reading import ReadOptions

UNPATCHED = "unpatched"
"""Name of the variant that all others are compared with; always included."""

MAX_IMAGES = 100_000
"""Maximum number of images per variant."""

Count = Annotated[int, Field(ge=1, le=MAX_IMAGES)]


class ProtocolVariant(NamedTuple):
    """A variant of the pipeline: unpatched, with a schedule, or with another project's method."""

    name: str
    spec: dict[str, Any]
    """Its settings as plain values, by which a resumed run recognises its images."""
    schedule: Schedule | None = None
    baseline: str | None = None

    def applied(self, pipe: Any) -> AbstractContextManager[Any]:
        """A context in which ``pipe`` runs as this variant."""
        if self.schedule is not None:
            return patched(pipe, self.schedule)
        if self.baseline is not None:
            return BASELINES[self.baseline](pipe, **self.spec["settings"])
        return nullcontext(pipe)


class Protocol(StrictModel):
    """The protocol of an experiment.

    Args:
        model: What to load: ``pocket``, a folder, a ``.safetensors`` file or a hub id.
        prompts: A list, or the path of a text file with one per line, relative to the protocol.
        template: Text in which ``{}`` is replaced with each prompt.
        variants: By name: ``schedule`` (a preset, the path of a YAML file, or a mapping with the
            content of one), or ``baseline`` (a name of :data:`agentsd.baselines.BASELINES`) with
            its settings. ``unpatched`` is always included.
        num_inference_steps, guidance_scale, height, width, negative_prompt: As for
            :class:`agentsd.image_settings.ImageSettings`; ``guidance_scale`` is by default 2 for
            the pocket model, otherwise 7.5.
        scheduler: Name of a diffusers scheduler; by default the model's own.
        seed: Seed of the first image of each variant; later images count up from it.
        images_per_prompt: Images per prompt in each replicate.
        replicates: How many times the whole experiment is made, each with new seeds.
        features: Extractor for FID and KID.
        clip: Extractor for the CLIP score and the cosine similarity to the unpatched image.
        reference: What FID and KID compare with: ``unpatched``, or a set of real images.
        size, convert: How the reference is read; see
            :class:`agentsd.evaluation.reading.ReadOptions`.

    Raises:
        ProtocolError: Names the key, its value and what is allowed.
    """

    error: ClassVar = ProtocolError

    model: str = "pocket"
    prompts: list[str] | str
    template: str = "{}"
    variants: dict[str, Any]
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 25
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str = ""
    scheduler: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    images_per_prompt: Count = 1
    replicates: Count = 1
    features: str = "pocket"
    clip: str = "pocket"
    reference: str = UNPATCHED
    size: Annotated[int, Field(ge=16, le=4096)] | None = None
    convert: bool = False

    def model_post_init(self, _: Any) -> None:
        if "{}" not in self.template:
            raise ProtocolError(f"template: must contain {{}} (got {short_repr(self.template)})")
        if not self.prompts or isinstance(self.prompts, str):
            raise ProtocolError(
                "prompts: must be a list of at least one prompt, or a text file of them"
            )
        if self.scheduler is not None and class_name(self.scheduler) not in COMMON_NAMES:
            names = ", ".join(COMMON_NAMES.values())
            raise ProtocolError(f"scheduler: must be one of {names} (got {self.scheduler!r})")
        self.images()[-1].model_dump()  # reports an invalid size or prompt now

    def images(self) -> list[ImageSettings]:
        """The settings of each image of a variant: all prompts, then all of them again."""
        guidance = self.guidance_scale
        if guidance is None:
            guidance = default_guidance(self.model)
        total = len(self.prompts) * self.images_per_prompt * self.replicates
        if total > MAX_IMAGES:
            raise ProtocolError(
                f"prompts × images_per_prompt × replicates must be at most {MAX_IMAGES:,} "
                f"(got {total:,})"
            )
        return [
            ImageSettings(
                prompt=self.template.replace("{}", self.prompts[i % len(self.prompts)]),
                negative_prompt=self.negative_prompt,
                seed=self.seed + i,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=guidance,
                height=self.height,
                width=self.width,
            )
            for i in range(total)
        ]

    def replicate(self, image: int) -> int:
        """The replicate that an image belongs to, given its number."""
        return image // (len(self.prompts) * self.images_per_prompt)

    @property
    def read_options(self) -> ReadOptions:
        """How the reference is read."""
        return ReadOptions(self.size, self.convert)

    def all_variants(self) -> list[ProtocolVariant]:
        """The variants, the unpatched one first.

        Raises:
            ProtocolError: If a name or a specification is wrong.
        """
        if len({name.casefold() for name in self.variants}) < len(self.variants):
            raise ProtocolError("variants: two names differ only in case")
        unpatched = ProtocolVariant(UNPATCHED, {})
        others = (name for name in self.variants if name != UNPATCHED)
        return [unpatched, *(_parse_variant(name, self.variants[name]) for name in others)]


def _parse_variant(name: str, spec: Any) -> ProtocolVariant:
    if not re.fullmatch(r"\w[\w.+-]{0,63}", name):
        raise ProtocolError(
            f"variants: {short_repr(name)} must consist of letters, digits and .-_+ (64 at most), "
            "and start with a letter, a digit or _"
        )
    if not isinstance(spec, Mapping) or len({"schedule", "baseline"} & spec.keys()) != 1:
        raise ProtocolError(
            f"variants.{name}: needs a schedule or a baseline (got {short_repr(spec)})"
        )
    try:
        return _schedule_variant(name, spec) if "schedule" in spec else _baseline(name, spec)
    except AgentSDError as error:
        raise ProtocolError(f"variants.{name}: {error}") from None


def _schedule_variant(name: str, spec: Mapping[str, Any]) -> ProtocolVariant:
    if len(spec) > 1:
        extra = ", ".join(sorted(spec.keys() - {"schedule"}))
        raise ProtocolError(f"schedule cannot be combined with other keys (got {extra})")
    given = spec["schedule"]
    is_mapping = isinstance(given, Mapping)
    schedule = Schedule.from_dict(given) if is_mapping else Schedule.load(given)
    return ProtocolVariant(name, {"schedule": schedule.to_dict()}, schedule=schedule)


def _baseline(name: str, spec: Mapping[str, Any]) -> ProtocolVariant:
    baseline = spec["baseline"]
    if not isinstance(baseline, str) or baseline not in BASELINES:
        raise ProtocolError(
            f"baseline must be one of {', '.join(BASELINES)} (got {short_repr(baseline)})"
        )
    settings = {key: value for key, value in spec.items() if key != "baseline"}
    signature = inspect.signature(BASELINES[baseline])
    try:
        signature.bind(None, **settings)
    except TypeError as error:
        raise ProtocolError(f"{baseline}{signature}: {error}") from None
    for key, value in settings.items():
        if not isinstance(value, (bool, int, float)):
            raise ProtocolError(f"{key} must be a number, true or false (got {short_repr(value)})")
    return ProtocolVariant(name, {"baseline": baseline, "settings": settings}, baseline=baseline)


def load_protocol(path: str | Path, *, quick: bool = False, **changes: Any) -> Protocol:
    """Load a protocol.

    Args:
        path: A YAML file, or the name of a protocol that ships with agentsd (``pocket``).
        quick: Apply the changes in its ``quick`` mapping: a short version, to try it out.
        **changes: Keys to change after that; ``None`` changes nothing.

    Raises:
        ProtocolError: Names the file and what is wrong in it.
    """
    file, shipped = Path(path), {yaml.stem: yaml for yaml in (PRESETS / "eval").glob("*.yaml")}
    if str(path) in shipped:
        file = shipped[str(path)]
    elif not file.suffix and not file.exists():
        names = ", ".join(sorted(shipped))
        raise ProtocolError(f"no protocol {short_repr(str(path))}; give a YAML file, or {names}")
    data = parse_yaml(read_text(file, ProtocolError), str(file), ProtocolError)
    try:
        if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
            raise ProtocolError(f"expected a mapping of names to values (got {short_repr(data)})")
        shorter = data.pop("quick", None) or {}
        if not isinstance(shorter, dict):
            raise ProtocolError(
                f"quick: must be a mapping of keys to change (got {short_repr(shorter)})"
            )
        if quick and not shorter:
            raise ProtocolError("it has no quick version; run it without --quick")
        data |= shorter if quick else {}
        data |= {key: value for key, value in changes.items() if value is not None}
        if isinstance(data.get("prompts"), str):
            lines = prompt_lines(file.parent / data["prompts"], ProtocolError)
            data["prompts"] = [line.strip() for line in lines if line.strip()]
        protocol = Protocol(**data)
        protocol.all_variants()
    except AgentSDError as error:
        raise ProtocolError(f"{file}: {error}") from None
    return protocol
