"""Schedules: what is refused and with which message, reading and writing, the phase of a step."""

from __future__ import annotations

import copy
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_phase

from agentsd.errors import AgentSDError, ScheduleError
from agentsd.methods import Agent, Cache, Full, Merge
from agentsd.schedule import METHODS, PRESETS, Plan, Schedule

TWO_PHASES = """\
phases:
  - until: 0.4
    method: agent
    sx: 4
    sy: 4
    ratio: 0.4
    agent_ratio: 0.95
  - method: keys
    select: random
seed: 7
"""

READS = {name: kind.parameters() for name, kind in METHODS.items()}
FIELDS = {name: field for kind in METHODS.values() for name, field in kind.model_fields.items()}


def refused(make: Any, *says: str) -> None:
    """``make`` raises a :class:`ScheduleError` whose text has every part of ``says``."""
    with pytest.raises(ScheduleError) as caught:
        make()
    for part in says:
        assert part in str(caught.value)


NUMBERS = ("ratio", "agent_ratio", "k_scale2", "k_shortcut", "until")
WHOLE = ("sx", "sy", "until_step")


class TestPhaseRefuses:
    @pytest.mark.parametrize("name", NUMBERS)
    @pytest.mark.parametrize("value", [True, "0.4", [0.4], {}, math.nan, math.inf, -math.inf])
    def test_a_value_that_is_not_a_finite_number(self, name: str, value: Any) -> None:
        refused(lambda: Agent(**{name: value}), f"{name}: ", "number", f"(got {value!r})")

    @pytest.mark.parametrize("name", WHOLE)
    @pytest.mark.parametrize("value", [True, "4", 2.5, 2.0, [2], math.nan, math.inf])
    def test_a_value_that_is_not_a_whole_number(self, name: str, value: Any) -> None:
        refused(lambda: Agent(**{name: value}), f"{name}: ", f"(got {value!r})")

    @pytest.mark.parametrize(
        ("name", "value", "allowed"),
        [
            ("ratio", -0.01, "greater than or equal to 0"),
            ("ratio", 1.01, "less than or equal to 1"),
            ("agent_ratio", -1, "greater than or equal to 0"),
            ("agent_ratio", 2, "less than or equal to 1"),
            ("sx", 0, "greater than or equal to 1"),
            ("sx", 65, "less than or equal to 64"),
            ("sy", -4, "greater than or equal to 1"),
            ("sy", 10**30, "less than or equal to 64"),
            ("k_scale2", 0.0, "greater than 0"),
            ("k_scale2", 2.1, "less than or equal to 2"),
            ("k_shortcut", -1.5, "greater than or equal to -1"),
            ("k_shortcut", 1.5, "less than or equal to 1"),
            ("until", 0.0, "greater than 0"),
            ("until", 1.5, "less than or equal to 1"),
            ("until_step", 0, "greater than or equal to 1"),
        ],
    )
    def test_a_value_out_of_range(self, name: str, value: float, allowed: str) -> None:
        refused(lambda: Agent(**{name: value}), f"{name}: ", allowed, f"(got {value!r})")

    @pytest.mark.parametrize(
        ("settings", "allowed"),
        [
            ({"method": "agents"}, "one of 'agent', 'full', 'keys', 'merge'"),
            ({"method": 3}, "one of 'agent', 'full', 'keys', 'merge'"),
            ({"method": None}, "one of 'agent', 'full', 'keys', 'merge'"),
            ({"method": "keys", "select": "rand"}, "'grid', 'random' or 'cycle'"),
            ({"attn_precision": "fp16"}, "'fp32'"),
            ({"attn_precision": True}, "'fp32'"),
            ({"max_downsample": 3}, "1, 2, 4 or 8"),
            ({"max_downsample": 16}, "1, 2, 4 or 8"),
            ({"max_downsample": True}, "1, 2, 4 or 8"),
            ({"max_downsample": 1.0}, "1, 2, 4 or 8"),
            ({"max_downsample": "1"}, "1, 2, 4 or 8"),
            ({"use_rand": 1}, "boolean"),
            ({"use_rand": "yes"}, "boolean"),
        ],
    )
    def test_a_value_that_is_not_a_choice(self, settings: dict[str, Any], allowed: str) -> None:
        name, value = list(settings.items())[-1]
        refused(lambda: make_phase(**settings), f"{name}: ", allowed, f"(got {value!r})")

    @pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if f.default])
    def test_none_where_it_has_no_meaning(self, name: str) -> None:
        method = {"method": "keys"} if name == "select" else {}
        refused(lambda: make_phase(**method | {name: None}), f"{name}: ", "(got None)")

    @pytest.mark.parametrize(
        ("key", "meant"),
        [
            ("rato", "ratio"),
            ("agent-ratio", "agent_ratio"),
            ("untilstep", "until_step"),
            ("k_shortcat", "k_shortcut"),
        ],
    )
    def test_unknown_keys_with_a_hint(self, key: str, meant: str) -> None:
        refused(lambda: Agent(**{key: 1}), f"does not read {key!r}", f"did you mean {meant!r}?")

    def test_unknown_keys_without_one(self) -> None:
        with pytest.raises(ScheduleError, match="method 'agent' does not read 'zzz'; it reads"):
            Agent(zzz=1)

    @pytest.mark.parametrize(
        ("method", "name"),
        [
            (method, name)
            for method, reads in READS.items()
            for name in sorted(set().union(*READS.values()) - set(reads))
        ],
    )
    def test_parameters_that_the_method_does_not_read(self, method: str, name: str) -> None:
        value = FIELDS[name].default
        says = f"method {method!r} does not read {name!r}"
        refused(lambda: METHODS[method](**{name: value}), says, "it reads")

    def test_two_ends(self) -> None:
        refused(lambda: Agent(until=0.4, until_step=20), "until or until_step, not both")

    def test_several_mistakes_at_once(self) -> None:
        refused(lambda: Agent(rato=0.4, sx=0, ratio="x"), "rato", "sx: ", "ratio: ")


class TestPhaseTakes:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *[("ratio", 0), ("ratio", 1), ("agent_ratio", 0.0), ("agent_ratio", 1.0)],
            *[("sx", 1), ("sy", 64), ("k_scale2", 2), ("k_shortcut", -1), ("until", 1)],
            *[("until_step", 1), ("max_downsample", 8), ("attn_precision", "fp32")],
        ],
    )
    def test_the_ends_of_a_range(self, name: str, value: Any) -> None:
        assert getattr(Agent(**{name: value}), name) == value

    def test_published_defaults(self) -> None:
        phase = Agent()
        found = {name: getattr(phase, name) for name in READS["agent"]}
        assert found == {
            "ratio": 0.4,
            "sx": 4,
            "sy": 4,
            "agent_ratio": 0.95,
            "k_scale2": 0.3,
            "k_shortcut": 0.075,
            "use_rand": True,
            "attn_precision": None,
            "max_downsample": None,
            "min_tokens": None,
            "agents": None,
            "merge_crossattn": False,
            "merge_mlp": False,
            "cache": None,
        }

    @pytest.mark.parametrize("make", [Agent, lambda: Schedule(phases=[Agent()])])
    def test_nothing_changes_later(self, make: Any) -> None:
        made = make()
        for name in type(made).model_fields:
            with pytest.raises(ValueError, match="frozen"):
                setattr(made, name, getattr(made, name))
        with pytest.raises(ValueError, match="frozen"):
            made.another = 1
        assert isinstance(hash(made), int)


@pytest.mark.parametrize(
    ("settings", "grid", "plan"),
    [
        # The published schedule at 64×64 tokens.
        (
            {"sx": 4, "sy": 4, "ratio": 0.4, "agent_ratio": 0.95},
            (64, 64),
            Plan(4096, 2458, 256, 2458),
        ),
        ({"sx": 2, "sy": 2, "ratio": 0.4, "agent_ratio": 0.5}, (64, 64), Plan(4096, 2458, 0, 2458)),
        ({"method": "merge", "ratio": 0.4}, (64, 64), Plan(4096, 2458, 0, 2458)),
        ({"method": "keys"}, (64, 64), Plan(4096, 4096, 0, 1024)),
        ({"method": "keys", "sx": 4, "sy": 4}, (5, 9), Plan(45, 45, 0, 6)),
        ({"method": "keys", "sx": 8, "sy": 8}, (4, 4), Plan(16, 16, 0, 1)),
        ({"method": "full"}, (8, 8), Plan(64, 64, 0, 64)),
        ({"method": "merge", "ratio": 1.0}, (8, 8), Plan(64, 16, 0, 16)),
        ({"method": "merge", "ratio": 0}, (8, 8), Plan(64, 64, 0, 64)),
        ({"sx": 4, "sy": 4}, (3, 8), Plan(24, 24, 0, 24)),
        ({"ratio": 0, "agent_ratio": 0.5}, (8, 8), Plan(64, 64, 0, 64)),
        ({"ratio": 0, "agent_ratio": 0.52}, (8, 8), Plan(64, 64, 31, 64)),
    ],
)
def test_plan(settings: dict[str, Any], grid: tuple[int, int], plan: Plan) -> None:
    found = make_phase(**settings).plan(*grid)
    assert found == plan
    assert found.untouched == (found == (plan.tokens, plan.tokens, 0, plan.tokens))


class TestScheduleRefuses:
    @pytest.mark.parametrize("phases", [None, [], (), {}, "agent", 3, {"method": "agent"}])
    def test_phases_that_are_not_a_list(self, phases: Any) -> None:
        refused(lambda: Schedule(phases=phases), "phases: must be a list", f"(got {phases!r})")

    @pytest.mark.parametrize("item", [None, "agent", 3, [], {1: 2}])
    def test_an_item_that_is_not_a_phase(self, item: Any) -> None:
        refused(lambda: Schedule(phases=[item]), "phase 1 must be a mapping", f"(got {item!r})")

    def test_no_phases_at_all(self) -> None:
        refused(lambda: Schedule(), "phases: is missing")

    @pytest.mark.parametrize("seed", [-1, 2**32, True, "1", 1.5, None])
    def test_seeds(self, seed: Any) -> None:
        refused(lambda: Schedule(phases=[Agent()], seed=seed), "seed: ", f"(got {seed!r})")

    def test_mistakes_in_a_phase_by_its_number(self) -> None:
        phases = [{"until": 0.5}, {"method": "agent", "ratio": 1.5}]
        refused(lambda: Schedule(phases=phases), "phase 2: ratio: ", "(got 1.5)")

    def test_unknown_keys(self) -> None:
        refused(lambda: Schedule(phase=[{}]), "unknown key 'phase'", "did you mean 'phases'?")

    def test_a_phase_without_end_before_another(self) -> None:
        refused(lambda: Schedule(phases=[{}, {}]), "phase 1: needs until or until_step")

    @pytest.mark.parametrize("end", [{"until": 0.9}, {"until_step": 5}])
    def test_an_end_of_the_last(self, end: dict[str, Any]) -> None:
        refused(lambda: Schedule(phases=[end]), "phase 1: the last phase runs to the end")

    @pytest.mark.parametrize("ends", [(0.4, 0.4), (0.6, 0.4), (5, 5), (9, 2)])
    def test_ends_that_do_not_increase(self, ends: tuple[float, float]) -> None:
        kind = "until_step" if isinstance(ends[0], int) else "until"
        phases = [*({kind: end} for end in ends), {}]
        refused(lambda: Schedule(phases=phases), f"{kind} must increase", f"(got {list(ends)})")


def _numbered(*ends: dict[str, float]) -> Schedule:
    """Phases that differ in the width of their cells: 1, 2, …"""
    return Schedule(
        phases=[{"sx": number, **end} for number, end in enumerate([*ends, {}], start=1)]
    )


class TestPhaseAt:
    @pytest.mark.parametrize(
        ("ends", "num_steps", "lengths"),
        [
            ([{"until": 0.4}], 50, [20, 30]),
            ([{"until": 0.4}], 20, [8, 12]),
            ([{"until": 0.4}], 1, [1, 0]),
            ([{"until": 0.5}], 3, [2, 1]),
            ([{"until": 0.25}, {"until": 0.5}], 8, [2, 2, 4]),
            ([{"until_step": 20}], 50, [20, 30]),
            ([{"until_step": 20}], 12, [12, 0]),
            ([{"until_step": 3}, {"until": 0.5}], 10, [3, 2, 5]),
            ([{"until": 0.5}, {"until_step": 3}], 10, [5, 0, 5]),
            ([{"until": 1.0}], 10, [10, 0]),
        ],
    )
    def test_counts(self, ends: list[dict[str, float]], num_steps: int, lengths: list[int]) -> None:
        schedule = _numbered(*ends)
        found = [schedule.phase_at(step, num_steps).sx for step in range(num_steps)]
        expected = [n for n, length in enumerate(lengths, start=1) for _ in range(length)]
        assert found == expected

    @pytest.mark.parametrize("num_steps", [10, 20, 25, 50, 100])
    def test_a_share_of_whole_steps_is_exact(self, num_steps: int) -> None:
        """0.14 of 50 steps are 7, though ``0.14 * 50`` is a little more."""
        for steps in range(1, num_steps + 1):
            phase = Agent(until=float(f"{steps / num_steps:.15g}"))
            assert sum(phase.is_active_at(step, num_steps) for step in range(num_steps)) == steps

    def test_counts_steps(self) -> None:
        assert _numbered({"until_step": 3}).counts_steps
        assert not _numbered({"until": 0.3}).counts_steps

    def test_reach(self) -> None:
        schedule = Schedule(phases=[{"until": 0.5, "max_downsample": 1}, {}])
        assert [schedule.reach(top) for top in (1, 2)] == [1, 2]
        assert Schedule(phases=[{"max_downsample": 4}]).reach(1) == 4


class TestOverride:
    def test_changes_the_phases_that_read_it(self) -> None:
        schedule = Schedule.from_yaml(TWO_PHASES)
        changed = schedule.override(ratio=0.2, sx=3)
        assert [phase.sx for phase in changed.phases] == [3, 3]
        assert changed.phases[0].ratio == 0.2
        assert changed.phases[1].to_dict().keys() == schedule.phases[1].to_dict().keys()
        assert changed.seed == 7
        assert changed.phases[0].until == 0.4
        assert schedule == Schedule.from_yaml(TWO_PHASES), "the original is left alone"

    def test_nothing_to_change(self) -> None:
        schedule = Schedule.from_yaml(TWO_PHASES)
        assert schedule.override() == schedule
        cached = Schedule(phases=[{"method": "keys", "cache_interval": 3, "cache_order": 2}])
        assert cached.override(cache_interval=1) == Schedule(phases=[{"method": "keys"}])
        assert cached.override(cache_interval=2).phases[0].cache == Cache(interval=2, order=2)

    @pytest.mark.parametrize("name", ["rato", "until", "method", "seed"])
    def test_refuses_what_no_phase_reads(self, name: str) -> None:
        schedule = Schedule.from_yaml(TWO_PHASES)
        refused(
            lambda: schedule.override(**{name: 0.3}), f"no phase of this schedule reads {name!r}"
        )

    def test_refuses_values_out_of_range(self) -> None:
        refused(lambda: Schedule.from_yaml(TWO_PHASES).override(ratio=2), "ratio: ", "(got 2)")


@pytest.fixture(
    params=["paper", "faithful", "two", "full", "steps"],
)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    own = {
        "two": Schedule.from_yaml(TWO_PHASES),
        "full": Schedule(phases=[Full()]),
        "steps": Schedule(
            phases=[
                {"until_step": 3, "attn_precision": "fp32", "max_downsample": 2},
                {"method": "merge", "use_rand": False, "ratio": 1},
            ],
            seed=2**32 - 1,
        ),
    }
    return own.get(request.param) or Schedule.preset(request.param)


class TestRoundTrip:
    def test_dict(self, schedule: Schedule) -> None:
        expected = schedule.model_copy(update={"measured": ()})  # which only files keep
        assert Schedule.from_dict(schedule.to_dict()) == expected

    @pytest.mark.parametrize(
        "text",
        [
            "phases:\n" + "[" * 5000,
            "phases:\n  - {method: keys, sx: 2020-13-45}",
            "phases:\n  - {method: keys, sx: !!int abc}",
            "phases:\n  - {method: keys, sx: !!bool abc}",
            "phases:\n  - {method: keys, sx: " + "9" * 5000 + "}",
        ],
    )
    def test_values_that_are_not_yaml(self, text: str) -> None:
        with pytest.raises(ScheduleError, match="not valid YAML"):
            Schedule.from_yaml(text)

    def test_an_error_shortens_a_value(self) -> None:
        """Each line holds the one before nine times over: written out, 9**9 zeros."""
        lines = ["a0: &a0 [0]"]
        lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
        with pytest.raises(ScheduleError) as raised:
            Schedule.from_yaml("\n".join([*lines, "phases: *a9"]))
        assert len(str(raised.value)) < 3000

    @pytest.mark.parametrize("source", [None, 3, b"phases:\n", "a\0b.yaml"])
    def test_a_source_that_is_not_a_path(self, source: Any) -> None:
        with pytest.raises(ScheduleError, match="path"):
            Schedule.from_yaml(source)

    def test_yaml_text(self, schedule: Schedule) -> None:
        assert Schedule.from_yaml(schedule.to_yaml()) == schedule

    def test_yaml_file(self, schedule: Schedule, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text(schedule.to_yaml(), encoding="utf-8")
        assert Schedule.load(path) == Schedule.load(str(path)) == schedule

    @pytest.mark.parametrize("duplicate", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy])
    def test_copies(self, schedule: Schedule, duplicate: Any) -> None:
        assert duplicate(schedule) == schedule
        assert hash(duplicate(schedule)) == hash(schedule)

    def test_another_schedule_is_not_equal(self, schedule: Schedule) -> None:
        other = Schedule(phases=schedule.phases, seed=schedule.seed - 1 if schedule.seed else 1)
        assert Schedule.from_dict(other.to_dict()) != schedule

    def test_json_is_plain(self, schedule: Schedule) -> None:
        def plain(value: Any) -> bool:
            if isinstance(value, dict):
                return all(type(k) is str and plain(v) for k, v in value.items())
            if isinstance(value, list):
                return all(plain(v) for v in value)
            return type(value) in (int, float, str, bool)

        assert plain(schedule.to_dict())


class TestLoad:
    def test_presets_all_load(self) -> None:
        names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
        assert {"paper", "faithful", "fast"} <= set(names)
        for name in names:
            assert Schedule.load(name) == Schedule.preset(name)

    def test_paper_is_the_published_schedule(self) -> None:
        first, second = Schedule.preset("paper").phases
        assert first == Agent(until=0.4, sx=4, sy=4, ratio=0.4, agent_ratio=0.95)
        assert second == Merge(sx=2, sy=2, ratio=0.4)
        assert first.plan(64, 64) == Plan(4096, 2458, 256, 2458)

    def test_unknown_preset(self) -> None:
        refused(
            lambda: Schedule.load("papre"),
            "no preset schedule 'papre'",
            "faithful, fast, paper",
            ".yaml",
        )

    @pytest.mark.parametrize("value", [None, 3, {"phases": []}, [Agent()], Agent(), b"paper"])
    def test_wrong_type(self, value: Any) -> None:
        refused(lambda: Schedule.load(value), "schedule must be a Schedule", type(value).__name__)

    def test_a_schedule_is_returned_unchanged(self) -> None:
        schedule = Schedule.preset("paper")
        assert Schedule.load(schedule) is schedule


class TestBrokenFiles:
    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("phases: [\n  {method: agent\n", "not valid YAML"),
            ("phases:\n  - method: agent\n    method: merge\n", "line 3: not valid YAML"),
            ("phases:\n\t- method: agent\n", "line 2: not valid YAML"),
            ("phases: &a\n  - *b\n", "not valid YAML"),
            ("- method: agent\n- method: merge\n", "a schedule must be a mapping"),
            ("just words\n", "a schedule must be a mapping"),
            ("\n", "a schedule must be a mapping"),
            ("1: 2\n", "a schedule must be a mapping"),
            ("phases:\n", "phases: must be a list"),
            (
                "phases:\n  - rato: 0.4\n",
                "phase 1: method 'agent' does not read 'rato' (did you mean 'ratio'?)",
            ),
            ("phases:\n  - sx: '4'\n", "phase 1: sx: "),
            ("phases:\n  - ratio: .nan\n", "phase 1: ratio: input should be a finite number"),
            ("phases:\n  - use_rand: 1\n", "phase 1: use_rand: "),
            ("phases:\n  - {}\nseed: 1.5\n", "seed: "),
            ("a: 1\n---\nb: 2\n", "not valid YAML"),
            ("phases: !!python/object/apply:os.getcwd []\n", ""),
        ],
    )
    def test_names_the_file_and_the_line_or_key(self, text: str, says: str, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        refused(lambda: Schedule.load(path), str(path), says)
        refused(lambda: Schedule.from_yaml(text), "YAML text", says)

    def test_missing(self, tmp_path: Path) -> None:
        path = tmp_path / "none.yaml"
        refused(lambda: Schedule.load(path), str(path), "cannot be read (No such file")

    def test_folder(self, tmp_path: Path) -> None:
        refused(lambda: Schedule.load(tmp_path), str(tmp_path), "cannot be read (Is a directory)")

    @pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"a\x00b: 1\n", bytes(range(256))])
    def test_binary(self, data: bytes, tmp_path: Path) -> None:
        path = tmp_path / "image.yaml"
        path.write_bytes(data)
        refused(lambda: Schedule.load(path), str(path))


def test_a_schedule_error_is_a_value_error() -> None:
    assert issubclass(ScheduleError, AgentSDError)
    assert issubclass(ScheduleError, ValueError)


def test_removed_parameters() -> None:
    """Records of agentsd 0.1 contain them with the values that had no effect."""
    old = {"phases": [{"method": "merge", "share": "none", "refresh": 1, "reuse": 1}]}
    assert Schedule.from_dict(old) == Schedule(phases=[{"method": "merge"}])
    for name, value in {"share": "layers", "refresh": 2, "reuse": 3}.items():
        with pytest.raises(ScheduleError, match=f"{name} was removed in agentsd 0.2.*{value}"):
            Schedule.from_dict({"phases": [{"method": "merge", name: value}]})


@pytest.mark.parametrize("name", Schedule.presets())
def test_what_a_preset_was_measured_at_is_what_the_docs_say(name: str) -> None:
    first, *_ = Schedule.preset(name).measured
    row = rf"\| \**`{name}`.*\| \**{100 * first.time:.1f} \[.*\| \**{first.psnr:.1f} \["
    assert first.source is not None
    docs = (Path(__file__).parents[1] / first.source).read_text("utf-8")
    assert re.search(row, docs)
    assert not re.search(row.replace(f"{first.psnr:.1f}", f"{first.psnr + 1:.1f}"), docs)


def test_what_was_measured_goes_with_a_change_and_is_kept_in_files() -> None:
    schedule = Schedule.preset("balanced")
    assert Schedule.from_yaml(schedule.to_yaml()).measured == schedule.measured != ()
    changed = schedule.override(sx=4)
    assert changed.measured == ()
    assert not changed.is_equivalent_to(schedule)
    assert changed.override(sx=2).is_equivalent_to(schedule)
