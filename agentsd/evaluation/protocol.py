"""What an experiment is: model, prompts, variants, sizes, steps, seeds; read from YAML."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import Field

from ..baselines import PEERS
from ..errors import AgentSDError, ProtocolError
from ..image_settings import ImageSettings
from ..models.loading import default_guidance
from ..models.schedulers import COMMON_NAMES
from ..patching.patch import patched
from ..schedule import PRESETS, Schedule
from ..settings import StrictModel, parse_yaml, short_repr
from ..text_files import read_text
from .pictures import prompt_lines
from .reading import Reading

UNPATCHED = "unpatched"
"""Name of the variant that all others are compared with; it is always made."""

MOST_IMAGES = 100_000
"""Of a variant."""

Count = Annotated[int, Field(ge=1, le=MOST_IMAGES)]


class Variant(NamedTuple):
    """One way to run the pipeline."""

    name: str
    spec: dict[str, Any]
    """As plain values, by which a resumed run knows its images again."""
    schedule: Schedule | None = None
    peer: str | None = None

    def applied(self, pipe: Any) -> AbstractContextManager[Any]:
        """A context in which ``pipe`` runs this way."""
        if self.schedule is not None:
            return patched(pipe, self.schedule)
        if self.peer is not None:
            return PEERS[self.peer](pipe, **self.spec["settings"])
        return nullcontext(pipe)


class Protocol(StrictModel):
    """An experiment.

    Args:
        model: What to load: ``pocket``, a folder, a ``.safetensors`` file or a hub id.
        prompts: A list, or the path of a text file with one a line, beside the protocol.
        template: Each prompt is put in the place of its ``{}``.
        variants: By name: ``schedule`` (a preset, the path of a YAML file or a mapping of what
            such a file holds), or ``peer`` (``tomesd``, ``deepcache``, ``todo``, ``tiles``) with
            its settings. ``unpatched`` is made in any case.
        num_inference_steps, guidance_scale, height, width, negative_prompt: As for
            :class:`agentsd.image_settings.ImageSettings`; ``guidance_scale`` is 2 for the pocket
            model, else 7.5.
        scheduler: A class of diffusers to sample with; the model's own by default.
        seed: Of the first image; each image of a variant has its own, counting up.
        images_per_prompt: In each replicate.
        replicates: How often all of it is done, with fresh seeds.
        features: Extractor for FID and KID.
        clip: Extractor for the CLIP score and the cosine to the unpatched image.
        reference: What FID and KID compare with: ``unpatched``, or a set of real images.
        size, convert: How the reference is read; see :class:`agentsd.evaluation.reading.Reading`.

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
            raise ProtocolError(f"template: must hold {{}} (got {short_repr(self.template)})")
        if not self.prompts or isinstance(self.prompts, str):
            raise ProtocolError("prompts: a list of one or more, or a file of them, is needed")
        if self.scheduler is not None and self.scheduler not in COMMON_NAMES:
            raise ProtocolError(
                f"scheduler: must be one of {', '.join(COMMON_NAMES)} (got {self.scheduler!r})"
            )
        self.images()[-1].model_dump()  # says now what is wrong with size or prompts

    def images(self) -> list[ImageSettings]:
        """The settings of each image of a variant: all prompts once, then again."""
        guidance = self.guidance_scale
        if guidance is None:
            guidance = default_guidance(self.model)
        total = len(self.prompts) * self.images_per_prompt * self.replicates
        if total > MOST_IMAGES:
            raise ProtocolError(
                f"prompts × images_per_prompt × replicates must be at most {MOST_IMAGES:,} "
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
        """Which replicate the image of that number belongs to."""
        return image // (len(self.prompts) * self.images_per_prompt)

    @property
    def reading(self) -> Reading:
        """How the reference is read."""
        return Reading(self.size, self.convert)

    def ways(self) -> list[Variant]:
        """The variants, the unpatched one first."""
        if len({name.casefold() for name in self.variants}) < len(self.variants):
            raise ProtocolError("variants: two names differ in upper and lower case alone")
        found = [Variant(UNPATCHED, {})]
        return found + [
            _variant(name, spec) for name, spec in self.variants.items() if name != UNPATCHED
        ]


def _variant(name: str, spec: Any) -> Variant:
    if not re.fullmatch(r"\w[\w.+-]{0,63}", name):
        raise ProtocolError(
            f"variants: {short_repr(name)} must be of letters, digits and .-_+, and begin with one "
            "of the first two"
        )
    if not isinstance(spec, Mapping) or len({"schedule", "peer"} & spec.keys()) != 1:
        raise ProtocolError(f"variants.{name}: needs a schedule or a peer (got {short_repr(spec)})")
    try:
        if "schedule" in spec:
            if len(spec) > 1:
                extra = ", ".join(sorted(spec.keys() - {"schedule"}))
                raise ProtocolError(f"beside its schedule it takes nothing (got {extra})")
            given = spec["schedule"]
            mapped = isinstance(given, Mapping)
            schedule = Schedule.from_dict(given) if mapped else Schedule.load(given)
            return Variant(name, {"schedule": schedule.to_dict()}, schedule=schedule)
        if not isinstance(spec["peer"], str) or spec["peer"] not in PEERS:
            raise ProtocolError(f"peer must be {', '.join(PEERS)} (got {short_repr(spec['peer'])})")
        settings = {key: value for key, value in spec.items() if key != "peer"}
        signature = inspect.signature(PEERS[spec["peer"]])
        try:
            signature.bind(None, **settings)
        except TypeError as error:
            raise ProtocolError(f"{spec['peer']}{signature}: {error}") from None
        for key, value in settings.items():
            if not isinstance(value, (bool, int, float)):
                raise ProtocolError(
                    f"{key} must be a number or a yes or no (got {short_repr(value)})"
                )
    except AgentSDError as error:
        raise ProtocolError(f"variants.{name}: {error}") from None
    return Variant(name, {"peer": spec["peer"], "settings": settings}, peer=spec["peer"])


def load_protocol(path: str | Path, *, quick: bool = False, **changes: Any) -> Protocol:
    """Read a protocol.

    Args:
        path: Of a YAML file, or the name of one that comes with agentsd (``pocket``).
        quick: Change what its ``quick`` mapping says: a cut of the experiment, to try it.
        **changes: Keys to change after that; those that are None are left alone.

    Raises:
        ProtocolError: Names the file, and what in it is wrong.
    """
    file, ours = Path(path), {each.stem: each for each in (PRESETS / "eval").glob("*.yaml")}
    if str(path) in ours:
        file = ours[str(path)]
    elif not file.suffix and not file.exists():
        there = ", ".join(sorted(ours))
        raise ProtocolError(f"no protocol {short_repr(str(path))}; give a YAML file, or {there}")
    data = parse_yaml(read_text(file, ProtocolError), str(file), ProtocolError)
    try:
        if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
            raise ProtocolError(
                f"a mapping of names to values was expected (got {short_repr(data)})"
            )
        cut = data.pop("quick", None) or {}
        if not isinstance(cut, dict):
            raise ProtocolError(
                f"quick: must be a mapping of keys to change (got {short_repr(cut)})"
            )
        if quick and not cut:
            raise ProtocolError("it has no quick cut; run it whole")
        data |= cut if quick else {}
        data |= {key: value for key, value in changes.items() if value is not None}
        if isinstance(data.get("prompts"), str):
            lines = prompt_lines(file.parent / data["prompts"], ProtocolError)
            data["prompts"] = [line.strip() for line in lines if line.strip()]
        protocol = Protocol(**data)
        protocol.ways()
    except AgentSDError as error:
        raise ProtocolError(f"{file}: {error}") from None
    return protocol
