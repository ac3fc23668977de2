"""What to make: prompts from the command, files or a pipe, checked, and the jobs that they are."""

from __future__ import annotations

import csv
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator

from ...errors import AgentSDError, SettingsError
from ...image_settings import ImageSettings, check_steps, image_seed
from ...schedule import Schedule
from ...settings import short_repr
from ...text_files import NOT_TEXT, text_stream

PROMPT_COLUMNS = ("prompt", "caption", "text")
"""Names of the column of a .csv or .tsv that prompts are read from, the first there is."""

TOLD_ROWS = 5
"""Bad rows that the error tells of one by one."""

LONGEST_LINE = 2**20
"""Characters of a line that are read; a file of one endless line must not fill the memory."""

TOO_LONG = f"longer than {LONGEST_LINE:,} characters"

ID = re.compile(r"(?!(?i:con|prn|aux|nul|com\d|lpt\d)\Z)[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
"""What an id may look like: it names a file, on any disk, and a key of a WebDataset."""

UNDECODED = re.compile(r"[\0\ud800-\udfff]")
"""What bytes become that are not of the encoding that a file is read in."""

BROKEN = f"broken Unicode; the file {NOT_TEXT}"

Told = tuple[str, "dict[str, Any] | str"]
"""A row's place, as ``file:line``, with what it holds or what is wrong with it."""


class Row(ImageSettings):
    """A prompt with all that a row of a file may say of it.

    Args:
        id: Names its images: letters, digits, ``-`` and ``_``, at most 100 of them.
        count: Images to make of it, 1 to 1,000,000; those of an id are then ``id-0``, ``id-1``, …
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
                "id: must be letters, digits, - and _, at most 100, no - or _ first, no con or nul "
                f"(got {short_repr(value)})"
            )
        return None if value is None else str(value)


class Job(NamedTuple):
    """An image to make."""

    number: int
    """Its place in the run, from 0."""
    id: str
    prompt_index: int
    image_index: int
    settings: ImageSettings
    schedule: Schedule | None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What jobs of one batch have in common."""
        s = self.settings
        size = (s.height, s.width)
        return (*size, s.num_inference_steps, s.guidance_scale, self.schedule)


class Plan(NamedTuple):
    """Checked rows, one JSON object a line, in a file that is gone when it is closed."""

    file: IO[bytes]
    digest: str
    """SHA-256 of the rows."""
    images: int
    bad: int
    """Rows left out because something was wrong with them."""


def checked_template(template: str) -> str:
    """A text that holds ``{}``, for a prompt, once.

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
) -> Plan:
    """Check all prompts, before any work, one row at a time.

    Args:
        prompts: Prompts themselves.
        source: A file of more: ``.txt``, a prompt a line; ``.jsonl``, a :class:`Row` a line;
            ``.csv`` and ``.tsv`` with a column ``prompt``, ``caption`` or ``text``, where columns
            named as a row's keys are read too; ``-`` is standard input, read as ``.txt``, or as
            ``.jsonl`` where its first line begins with ``{``.
        base: Settings that a row may override: fields of :class:`ImageSettings`.
        template: What each prompt is put into, in the place of ``{}``.
        count: Images of each prompt, unless its row says.
        check: Refuses rows that the options rule out: see :meth:`PipelineOptions.check`.
        on_error: Whether bad rows stop the run, or are left out.
        report: Called with what is wrong with each bad row, by file and line.

    Returns:
        The plan. The seeds of a row do not depend on the bad ones before it.

    Raises:
        SettingsError: If the source cannot be read, rows are bad, or there is none.
    """
    checked_template(template)
    file = tempfile.TemporaryFile()  # noqa: SIM115  # the plan's from here on
    digest, images, bad, ids = sha256(), 0, 0, _Ids()
    told: list[str] = []
    for index, (place, row) in enumerate(_rows(prompts, source)):
        try:
            if isinstance(row, str):
                raise SettingsError(row)
            if isinstance(row.get("prompt"), str) and row["prompt"].strip():
                row = row | {"prompt": template.replace("{}", row["prompt"])}
            row = {"count": count, **row}
            checked = Row(**{**base, **row})
            check(checked)
            if checked.schedule is not None:
                plan = _schedule(json.dumps(checked.schedule))
                row["schedule"] = plan.to_dict() if plan else "none"
            ids.add(checked)
        except AgentSDError as error:
            bad += 1
            told = [*told, f"{place}: {error}"][:TOLD_ROWS]
            report(f"{place}: {error}")
            continue
        line = json.dumps({"index": index, **row}).encode() + b"\n"
        digest.update(line)
        file.write(line)
        images += checked.count
    if bad and on_error == "stop":
        more = f" (and {bad - len(told)} more)" if bad > len(told) else ""
        raise SettingsError(
            f"{'; '.join(told)}{more}; mend what is wrong, or leave it out with --on-error skip"
        )
    if not images:
        raise SettingsError(f"no prompts: {source or 'the list'} has none that can be used")
    file.seek(0)
    return Plan(file, digest.hexdigest(), images, bad)


def jobs(rows: Path, base: Mapping[str, Any], schedule: Schedule | None) -> Iterator[Job]:
    """The images of a plan, in order, read as they are asked for.

    Args:
        rows: A plan's rows, as a file.
        base: The settings that the plan was checked with; ``seed`` is the run's.
        schedule: Of the rows that name none.
    """
    number = 0
    with rows.open("rb") as file:
        for line in file:
            told = json.loads(line)
            index = told.pop("index")
            row = Row(**{**base, **told})
            settings = row.model_dump(exclude={"id", "count", "schedule"})
            # A row with a seed of its own is the first of its own list.
            place = 0 if "seed" in told else index
            plan = schedule if row.schedule is None else _schedule(json.dumps(row.schedule))
            for i, name in enumerate(_names(row, number)):
                settings["seed"] = image_seed(row.seed, place, i)
                yield Job(number + i, name, index, i, ImageSettings(**settings), plan)
            number += row.count


def batches(jobs: Iterator[Job], size: int) -> Iterator[list[Job]]:
    """Jobs that can run together, ``size`` at a time or fewer.

    Which jobs share a batch depends on the list and the size alone, not on what is made already:
    on some devices the last bits of an image vary with its batch's size, and a run that was
    interrupted is to end as one that was not.
    """
    while window := list(islice(jobs, 4 * size)):
        kinds: dict[tuple[Any, ...], list[Job]] = {}
        for job in window:
            kinds.setdefault(job.kind, []).append(job)
        for alike in kinds.values():
            for start in range(0, len(alike), size):
                yield alike[start : start + size]


def _names(row: Row, number: int) -> Iterator[str]:
    """The ids of a row's images, the first of which has this number."""
    for i in range(row.count):
        if row.id is None:
            yield f"{number + i:06d}"
        else:
            yield f"{row.id}-{i}" if row.count > 1 else str(row.id)


class _Ids:
    """Refuses ids that would name one file, on a disk that does not tell capitals apart too."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._given: bool | None = None

    def add(self, row: Row) -> None:
        given = row.id is not None
        if self._given not in (None, given):
            raise SettingsError("id: either all rows have one or none has")
        if given:
            names = {name.lower() for name in _names(row, 0)}
            if taken := names & self._seen:
                raise SettingsError(
                    f"id: an earlier row has {min(taken)!r} (capitals do not count)"
                )
            self._seen |= names
        self._given = given


@lru_cache(maxsize=64)
def _schedule(told: str) -> Schedule | None:
    value = json.loads(told)
    if value == "none":
        return None
    return Schedule.from_dict(value) if isinstance(value, dict) else Schedule.load(value)


def _rows(prompts: Sequence[str], source: str | None) -> Iterator[Told]:
    for number, prompt in enumerate(prompts, start=1):
        yield f"--prompt {number}", {"prompt": prompt}
    if source is not None:
        yield from _file(source)


def _file(source: str) -> Iterator[Told]:
    """The rows of a file."""
    name = "standard input" if source == "-" else source
    suffix = Path(source).suffix.lower()
    if source != "-" and suffix not in (".txt", ".jsonl", ".csv", ".tsv"):
        raise SettingsError(
            f"{source}: prompts are read from .txt, .jsonl, .csv, .tsv or - (a pipe)"
        )
    try:
        with text_stream(None if source == "-" else source) as file:
            if suffix in (".csv", ".tsv"):
                yield from _table(file, name, tab=suffix == ".tsv")
                return
            as_json = suffix == ".jsonl"
            for number, line in enumerate(_lines(file), start=1):
                if source == "-" and number == 1:
                    as_json = line is not None and line.lstrip().startswith("{")
                yield f"{name}:{number}", _line(line, as_json)
    except AgentSDError:
        raise
    except UnicodeDecodeError:
        raise SettingsError(f"{name}: {NOT_TEXT}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"{name}: cannot be read ({reason})") from None


def _lines(file: IO[str]) -> Iterator[str | None]:
    """Lines without their ends; None for one that is too long."""
    while line := file.readline(LONGEST_LINE):
        if line.endswith("\n") or len(line) < LONGEST_LINE:
            yield line.removesuffix("\n")
            continue
        while (line := file.readline(LONGEST_LINE)) and not line.endswith("\n"):
            pass
        yield None


def _line(line: str | None, as_json: bool) -> dict[str, Any] | str:
    if line is None:
        return TOO_LONG
    if not line.strip():
        return "empty"
    if UNDECODED.search(line):
        return BROKEN
    if not as_json:
        return {"prompt": line}
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return f"broken JSON ({error.msg} at character {error.colno})"
    except (ValueError, RecursionError) as error:
        return f"broken JSON ({error})"
    return row if isinstance(row, dict) else f"must be a JSON object (got {short_repr(row)})"


def _table(file: IO[str], name: str, *, tab: bool) -> Iterator[Told]:
    """Rows of a table; its first row names the columns.

    Tables with tabs, PartiPrompts' among them, have quotation marks in their texts as they are.
    """
    lines = (f"{line}\n" if line is not None else "\0\n" for line in _lines(file))
    plain = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    # Strict, or a quotation mark that is never closed would take in all rows after it.
    reader = csv.reader(lines, **(plain if tab else {"strict": True}))
    header = [column.strip().lower() for column in next(reader, [])]
    found = next((column for column in PROMPT_COLUMNS if column in header), None)
    if any(map(UNDECODED.search, header)):
        raise SettingsError(f"{name}: {NOT_TEXT}")
    if found is None:
        raise SettingsError(
            f"{name}:1: no column {', '.join(PROMPT_COLUMNS[:-1])} or {PROMPT_COLUMNS[-1]} "
            f"(got {short_repr(header)})"
        )
    while True:
        start = reader.line_num + 1
        place = f"{name}:{start}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield place, f"broken row ({error})"
            continue
        if cells is None:
            return
        if not cells or cells == ["\0"]:
            yield place, TOO_LONG if cells else "empty"
            continue
        if len(cells) != len(header):
            yield place, f"{len(cells)} columns, but the first row names {len(header)}"
            continue
        if any(map(UNDECODED.search, cells)):
            yield place, BROKEN
            continue
        row = dict(zip(header, map(_unquoted, cells) if tab else cells, strict=True))
        own = {key: _value(key, row[key]) for key in Row.model_fields if row.get(key)}
        yield place, own | {"prompt": row[found]}


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else cell


def _value(key: str, cell: str) -> Any:
    """A cell as the number or mapping that it spells; texts stay texts."""
    if key in ("id", "prompt", "negative_prompt"):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        return cell
