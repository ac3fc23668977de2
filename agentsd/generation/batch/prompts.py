"""Check prompts, from the command, a file or a pipe, before any image is made."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import IO, Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator

from ...errors import AgentSDError, SettingsError
from ...image_settings import ImageSettings, check_steps
from ...schedule import Schedule
from ...settings import short_repr
from .prompt_files import read_rows

SHOWN_ERRORS = 5
"""Bad rows that the error describes one by one."""

ID = re.compile(r"(?!(?i:con|prn|aux|nul|com\d|lpt\d)\Z)[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
"""What an id may look like: it names a file, on any disk, and a key of a WebDataset."""


class PromptRow(ImageSettings):
    """A prompt with all that a row of a file may say about it.

    Args:
        id: Names its images: letters, digits, ``-`` and ``_``, at most 100 of them.
        count: Images to make of it, 1 to 1,000,000; they are then named ``id-0``, ``id-1``, …
        schedule: A preset's name, a YAML file, a schedule as a mapping, or ``"none"``.

    Raises:
        SettingsError: Names the key, its value and what is allowed.
    """

    id: str | int | None = None
    count: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    schedule: str | dict[str, Any] | None = None

    @field_validator("id")
    @classmethod
    def _names_a_file(cls, value: str | int | None) -> str | None:
        if value is not None and not ID.fullmatch(str(value)):
            raise SettingsError(
                "id: must be letters, digits, - and _, at most 100, not start with - or _, and not "
                f"be a reserved name such as con or nul (got {short_repr(value)})"
            )
        return None if value is None else str(value)

    def ids(self, number: int) -> Iterator[str]:
        """The ids of its images, the first of which has this number in the run."""
        for i in range(self.count):
            if self.id is None:
                yield f"{number + i:06d}"
            else:
                yield f"{self.id}-{i}" if self.count > 1 else str(self.id)

    def read_schedule(self) -> Schedule | None:
        """Its own schedule; ``None`` for unpatched images.

        Raises:
            ScheduleError: If it is not a valid one.
        """
        return _schedule(json.dumps(self.schedule))


@lru_cache(maxsize=64)
def _schedule(text: str) -> Schedule | None:
    value = json.loads(text)
    if value == "none":
        return None
    return Schedule.from_dict(value) if isinstance(value, dict) else Schedule.load(value)


class PromptList(NamedTuple):
    """Checked prompts."""

    file: IO[bytes]
    """Their rows, one JSON object a line; a temporary file."""
    digest: str
    """SHA-256 of the rows."""
    images: int
    bad: int
    """Rows left out because something was wrong with them."""


def checked_template(template: str) -> str:
    """Check that a template holds ``{}``, for a prompt, exactly once.

    Raises:
        SettingsError: If it does not.
    """
    if template.count("{}") != 1:
        raise SettingsError(f"template: must hold {{}} once (got {short_repr(template)})")
    return template


def read_prompts(
    prompts: Sequence[str],
    source: str | None,
    base: Mapping[str, Any],
    *,
    template: str = "{}",
    count: int = 1,
    check: Callable[[ImageSettings], None] = lambda row: check_steps(row.num_inference_steps, 1.0),
    on_error: Literal["stop", "skip"] = "stop",
    report: Callable[[str], None] = lambda _: None,
) -> PromptList:
    """Check all prompts, one row at a time.

    Args:
        prompts: Prompts themselves.
        source: A file of more: ``.txt``, a prompt a line; ``.jsonl``, a :class:`PromptRow` a line;
            ``.csv`` and ``.tsv`` with a column ``prompt``, ``caption`` or ``text``, where columns
            named like a row's keys are read too; ``-`` is standard input, read as ``.txt``, or as
            ``.jsonl`` if its first line begins with ``{``.
        base: Settings that a row may override: fields of :class:`ImageSettings`.
        template: Text around each prompt, which replaces its ``{}``.
        count: Images per prompt, unless its row says otherwise.
        check: Refuses rows that the options rule out: see :meth:`PipelineOptions.check`.
        on_error: Whether bad rows stop the run or are left out.
        report: Called with what is wrong with each bad row, by file and line.

    Returns:
        The checked prompts. The seeds of a row do not depend on whether those before it are bad.

    Raises:
        SettingsError: If the source cannot be read, rows are bad, or there are none.
    """
    checked_template(template)
    file = tempfile.TemporaryFile()  # noqa: SIM115  # closed by whoever gets the list
    digest, images, bad, ids = sha256(), 0, 0, _Ids()
    problems: list[str] = []
    for index, (place, row) in enumerate(read_rows(prompts, source, tuple(PromptRow.model_fields))):
        try:
            if isinstance(row, str):
                raise SettingsError(row)
            row = {"count": count, **_in_template(row, template)}
            checked = PromptRow(**{**base, **row})
            check(checked)
            if checked.schedule is not None:
                schedule = checked.read_schedule()
                row["schedule"] = schedule.to_dict() if schedule else "none"
            ids.add(checked)
        except AgentSDError as error:
            bad += 1
            problems = [*problems, f"{place}: {error}"][:SHOWN_ERRORS]
            report(f"{place}: {error}")
            continue
        line = json.dumps({"index": index, **row}).encode() + b"\n"
        digest.update(line)
        file.write(line)
        images += checked.count
    if bad and on_error == "stop":
        more = f" (and {bad - len(problems)} more)" if bad > len(problems) else ""
        raise SettingsError(
            f"{'; '.join(problems)}{more}; fix these rows, or skip them with --on-error skip"
        )
    if not images:
        raise SettingsError(f"no prompts: {source or 'the list'} has none that can be used")
    file.seek(0)
    return PromptList(file, digest.hexdigest(), images, bad)


def _in_template(row: dict[str, Any], template: str) -> dict[str, Any]:
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        return row
    return row | {"prompt": template.replace("{}", prompt)}


class _Ids:
    """Refuses ids that would name the same file, also where file names ignore case."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._given: bool | None = None

    def add(self, row: PromptRow) -> None:
        given = row.id is not None
        if self._given not in (None, given):
            raise SettingsError("id: either all rows have one or none has")
        if given:
            names = {name.lower() for name in row.ids(0)}
            if taken := names & self._seen:
                raise SettingsError(f"id: an earlier row has {min(taken)!r} (ignoring case)")
            self._seen |= names
        self._given = given
