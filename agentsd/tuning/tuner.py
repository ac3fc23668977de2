"""The stages of tuning; each starts from what is already in the workspace."""

from __future__ import annotations

from collections.abc import Container, Mapping
from contextlib import suppress
from statistics import median
from typing import Any

from diffusers import DiffusionPipeline

from ..errors import GenerationError, SettingsError
from ..evaluation.protocol import UNPATCHED
from ..generation.images import HIDDEN, TimedImage, make_image
from ..generation.interleaving import interleaved, warm_up, with_schedule
from ..generation.records import schedule_hash
from ..image_settings import ImageSettings, warm_up_settings
from ..patching.patch import patched
from ..schedule import Schedule
from .budget import SPEED, Budget, measures_for
from .candidates import schedule_of, uniform_candidates
from .clock import Clock, OutOfTime
from .race import Race, RaceEntry
from .screening import screen
from .split import TUNING, Images
from .step_costs import Kind, StepCosts, measure_steps
from .trajectories import Trajectory, recorded_calls
from .workspace import Workspace

CHOSEN = "tuned"
ANCHOR = "balanced"
"""The preset that shows which images are hard."""

MIN_IMAGE_BUDGET, FULL_IMAGE_BUDGET = 30, 70
"""Time limits, in unpatched images: the minimum for tuning, and enough for all its images."""

TRAJECTORIES = 2
"""Number of unpatched runs that are recorded."""

EXPLORED = 6
"""Number of candidates that calibrate the predictions."""

FRONT_SHARE = 0.3
"""Share of the time left for the other schedules of the front."""

OPTIMISM = (0.0, 0.5, 1.0, 1.5)
"""Optimism bonuses for candidates, in standard deviations, one after the other in the time left."""

FRONT = (-9, -6, -3, 3, 6, 9)
"""Similarity of the other schedules of the front, in dB relative to the winner."""

Similarity = dict[str, float]


class Tuner:
    """Measures a pipeline and its schedules.

    Args:
        pipe: An unpatched pipeline; unpatched again after each stage.
        budget: The budget that the schedule must meet.
        images: Images to tune and to judge on; fewer are used if the time limit requires it.
        workspace: Keeps all measurements.
        clock: Keeps the time.
        call_kwargs: Further arguments of the pipeline's call.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        budget: Budget,
        images: Images,
        workspace: Workspace,
        clock: Clock,
        call_kwargs: Mapping[str, Any],
    ) -> None:
        self.pipe, self.budget, self.workspace, self.clock = pipe, budget, workspace, clock
        self.call_kwargs, self.images = call_kwargs, images
        self.measures = measures_for(budget)
        self.made: dict[str, TimedImage] = {}
        """Images of an earlier run, by name."""
        self.references: list[TimedImage] = []
        self.costs: StepCosts | None = None
        self.race: Race | None = None
        self.judged: list[dict[str, dict[str, float]]] = []

    def prepare(self) -> None:
        """Make the unpatched images, and measure what steps cost.

        Raises:
            SettingsError: If the time is too short for this model.
        """
        self.clock.begin("unpatched images", None)
        self.made = self.workspace.images()
        short = warm_up_settings(self.images.tuning[0], 2, self.call_kwargs)
        make_image(self.pipe, short, call_kwargs=self.call_kwargs)
        number = 0
        while number < len(self.images.tuning):
            reference = self._reference(number)
            if number == 0:
                existing = sum(name.startswith(f"{UNPATCHED}-") for name in self.made)
                self._cut_to_time(reference.seconds, existing)
            number += 1
        self.clock.begin("time of a step", None)
        trajectory = self._trajectories()[0]
        schedules = [Schedule.preset(name) for name in Schedule.presets()]
        num_steps = trajectory.calls[0].position.num_steps
        candidates = uniform_candidates(num_steps)
        schedules += [schedule_of(candidate, num_steps) for candidate in candidates]
        seconds = {Kind.from_json(line): line["seconds"] for line in self.workspace.lines("costs")}
        if not seconds:
            seconds = measure_steps(self.pipe, trajectory, schedules, self.clock.check)
            for kind, cost in seconds.items():
                self.workspace.append("costs", {**kind._asdict(), "seconds": cost})
        self.costs = StepCosts(seconds, rest=0.0)
        unpatched = self.costs.run(None, trajectory)
        whole = median(reference.seconds for reference in self.references)
        self.costs.rest = max(whole - unpatched, 0.0)

    def _cut_to_time(self, seconds: float, existing: int) -> None:
        """Use fewer images if an unpatched one takes long, but at least those already made."""
        affordable = self.clock.limit / seconds
        share = min(1.0, max(affordable / FULL_IMAGE_BUDGET, existing / TUNING))
        if affordable < MIN_IMAGE_BUDGET and not existing:
            minutes = MIN_IMAGE_BUDGET * seconds / 60
            raise SettingsError(
                f"minutes: an unpatched image takes {seconds:.1f} s here, and tuning needs at "
                f"least {MIN_IMAGE_BUDGET} times that; give {minutes:.1f} or more, fewer steps or "
                "a smaller size"
            )
        first, held_out, more = self.images
        tuning, judging = (max(2, round(share * len(images))) for images in (first, held_out))
        self.images = Images(first[:tuning], held_out[:judging], first[tuning:] + more)
        # Judging makes each image three times: unpatched, tuned and with a preset.
        self.clock.reserved = 2.2 * seconds * judging

    def _trajectories(self) -> list[Trajectory]:
        """The recorded trajectories; only one if there is little time."""
        kept = list(self.workspace.trajectories().values())
        return kept if len(self.images.tuning) == TUNING else kept[:1]

    def _reference(self, number: int) -> TimedImage:
        """Load or make the next unpatched image."""
        name = f"{UNPATCHED}-{number}"
        existing = self.made.get(name)
        reference = self._make_reference(number, name) if existing is None else existing
        self.references.append(reference)
        return reference

    def _make_reference(self, number: int, name: str) -> TimedImage:
        self.clock.check()
        settings = self.images.tuning[number]
        if number < TRAJECTORIES:
            with recorded_calls(self.pipe) as calls:
                made = self._make(settings)
            Trajectory(settings, calls).save(self.workspace.trajectory_file(number))
        else:
            made = self._make(settings)
        self.workspace.save_image(name, made)
        return made

    def _make(self, settings: ImageSettings) -> TimedImage:
        made = make_image(self.pipe, settings, call_kwargs=self.call_kwargs)
        if made.nsfw_content_detected:
            raise GenerationError(f"{settings.prompt!r}: {HIDDEN}; tune with other prompts")
        return made

    def screen(self) -> None:
        """Predict which candidates are worth real images."""
        self.clock.begin("screening", None)
        assert self.costs is not None
        trajectories = self._trajectories()
        screened = screen(
            self.pipe, trajectories, self.costs, self.workspace, self.clock, self.call_kwargs
        )
        unpatched = self.costs.run(None, trajectories[0])
        entries = [
            RaceEntry(name, preset, self.costs.run(preset, trajectories[0]) / unpatched)
            for name in Schedule.presets()
            for preset in [Schedule.preset(name)]
        ]
        presets = {entry.schedule.phases for entry in entries}
        for number, candidate in enumerate(screened, start=1):
            if candidate.schedule.phases not in presets and candidate.time < 1:
                entries.append(RaceEntry(f"candidate {number}", *candidate))
        self.race = Race(entries, self.budget, len(self.images.tuning), self._measure)
        self._recall(range(self.race.images))

    def _recall(self, images: Container[int]) -> None:
        """Load an earlier run's measurements of images, by number."""
        assert self.race is not None
        entries = {schedule_hash(entry.schedule): entry for entry in self.race.entries.values()}
        for line in self.workspace.lines("values"):
            entry = entries.get(line["schedule"])
            if entry is not None and line["image"] in images and self.budget.similarity in line:
                entry.values[line["image"]] = line[self.budget.similarity]

    def _measure(self, entry: RaceEntry, image: int) -> float:
        self._show_best()
        self.clock.check_stage()
        with patched(self.pipe, entry.schedule):
            made = self._make(self.images.tuning[image])
        similarity = self._similarity(made, self.references[image])
        line = {"schedule": schedule_hash(entry.schedule), "image": image, **similarity}
        self.workspace.append("values", line)
        return similarity[self.budget.similarity]

    def _similarity(self, made: TimedImage, reference: TimedImage) -> Similarity:
        return {
            name: measure(made.image, reference.image) for name, measure in self.measures.items()
        }

    def find(self) -> None:
        """Find the best preset and candidate, then others of the front, on real images."""
        race = self.race
        assert race is not None
        self.clock.begin("presets", None)
        race.run_whole(race.entries[ANCHOR])
        self.clock.begin("presets", 0.35)
        with suppress(OutOfTime):
            hardest = race.hardest_first(race.expectations())[0]
            for entry in self.presets:
                race.make(entry, hardest)
            race.winner(self.presets)
        self.clock.begin("candidates", 0.75)
        with suppress(OutOfTime):
            race.explore(race.entries.values(), EXPLORED)
            for optimism in OPTIMISM:
                race.winner(race.entries.values(), optimism=optimism)
        self._show_best()
        self.clock.begin("front", FRONT_SHARE)
        with suppress(OutOfTime):
            self._widen_front(race)
        self.clock.begin("confirming")
        with suppress(OutOfTime):
            self._confirm(race)

    def _confirm(self, race: Race) -> None:
        """Re-test the best on further images while there is time; choose again if it fails.

        Selection favours lucky candidates.
        """
        _, held_out, more = self.images
        best, preset = self.best(), self.best_preset()
        if best is None or self.budget.metric == SPEED:  # more images do not change the speed
            return
        for number, settings in enumerate(more, start=race.first):
            self.clock.check_stage()
            self.images = Images([*self.images.tuning, settings], held_out, more)
            self._reference(number)
            race.images += 1
            self._recall([number])
            race.make(best, number)
            if preset is not None:
                race.make(preset, number)
            if not race.may_meet(best, race.first + len(more)):
                winner = race.winner(race.entries.values())
                assert winner is not None
                best = winner
            self._show_best()

    def _widen_front(self, race: Race) -> None:
        best = self.best()
        if best is None:
            return
        for distance in FRONT:
            expected = race.expectations().candidates
            wanted = expected[best.name] + distance
            close = [e for e in race.entries.values() if expected[e.name] >= wanted]
            if close:
                race.run_whole(min(close, key=lambda entry: entry.time))

    @property
    def presets(self) -> list[RaceEntry]:
        """The entries that are presets."""
        assert self.race is not None
        return [self.race.entries[name] for name in Schedule.presets()]

    def best(self) -> RaceEntry | None:
        """The best entry so far, of those that have all of the first images."""
        race = self.race
        return race.best(race.entries.values()) if race else None

    def best_preset(self) -> RaceEntry | None:
        """The best preset so far, likewise."""
        return self.race.best(self.presets) if self.race else None

    def _show_best(self) -> None:
        best = self.best()
        if best is not None:
            assert self.race is not None
            misses = "" if self.race.meets(best) else " (misses the budget)"
            worst = (max if self.budget.metric == "lpips" else min)(best.values.values())
            self.clock.best = f"{1 / best.time:.2f}×, worst {self.budget.shown(worst)}{misses}"

    def judge(self) -> None:
        """Make the held-out images unpatched, with the winner and the best preset, interleaved."""
        best, preset = self.best(), self.best_preset()
        assert best is not None
        self.clock.reserved = 0.0
        self.clock.begin("judging", None)
        chosen = best.name if best.predicted is None else CHOSEN
        schedules = {UNPATCHED: None, chosen: best.schedule}
        if preset is not None and preset is not best:
            schedules[preset.name] = preset.schedule
        variants = {name: with_schedule(schedule) for name, schedule in schedules.items()}
        key = {name: schedule_hash(schedule) for name, schedule in schedules.items()}
        known = {
            line["image"]: line for line in self.workspace.lines("judged") if line["of"] == key
        }
        warm = warm_up_settings(self.images.held_out[0], 4, self.call_kwargs)
        warm_up(self.pipe, variants, warm, call_kwargs=self.call_kwargs)
        for number in range(len(self.images.held_out)):
            if number not in known:
                known[number] = {"image": number, "of": key, **self._turn(variants, number)}
                self.workspace.append("judged", known[number])
            self.judged.append({name: known[number][name] for name in schedules})
            self.clock.check()

    def _turn(self, variants: Mapping[str, Any], number: int) -> dict[str, Similarity]:
        settings = self.images.held_out[number]
        images = interleaved(self.pipe, variants, settings, number, call_kwargs=self.call_kwargs)
        made = dict(images)
        line = {}
        for name, image in made.items():
            self.workspace.save_image(f"held-out-{number}-{name}", image)
            similarity = {} if name == UNPATCHED else self._similarity(image, made[UNPATCHED])
            line[name] = {"seconds": image.seconds, **similarity}
        return line
