"""Read the rows of prompt files, each with its place or with what is wrong with it."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ...errors import AgentSDError, SettingsError
from ...settings import short_repr
from ...text_files import NOT_TEXT, text_stream

PROMPT_COLUMNS = ("prompt", "caption", "text")
"""Columns of a .csv or .tsv that prompts are read from; the first one present is used."""

TEXTS = ("id", "prompt", "negative_prompt")
"""Columns that are not read as numbers or mappings."""

LONGEST_LINE = 2**20
"""Characters; a file that is one endless line must not fill the memory."""

TOO_LONG = f"longer than {LONGEST_LINE:,} characters"

UNDECODED = re.compile(r"[\0\ud800-\udfff]")
"""What bytes become that do not belong to the encoding that a file is read in."""

BROKEN = f"broken Unicode; the file {NOT_TEXT}"

LocatedRow = tuple[str, "dict[str, Any] | str"]
"""A row's place, as ``file:line``, with its values or with what is wrong with it."""


def read_rows(
    prompts: Sequence[str], source: str | None, keys: Sequence[str]
) -> Iterator[LocatedRow]:
    """Iterate over the rows of prompts and of a file, which is read as they are asked for.

    Args:
        prompts: Prompts themselves.
        source: A file, or ``-`` for standard input.
        keys: Columns of a table that are read besides the prompt.

    Raises:
        SettingsError: If the file cannot be read.
    """
    for number, prompt in enumerate(prompts, start=1):
        yield f"--prompt {number}", {"prompt": prompt}
    if source is not None:
        yield from _file(source, keys)


def _file(source: str, keys: Sequence[str]) -> Iterator[LocatedRow]:
    name = "standard input" if source == "-" else source
    suffix = Path(source).suffix.lower()
    if source != "-" and suffix not in (".txt", ".jsonl", ".csv", ".tsv"):
        raise SettingsError(
            f"{source}: prompts are read from .txt, .jsonl, .csv, .tsv or - (a pipe)"
        )
    try:
        with text_stream(None if source == "-" else source) as file:
            if suffix in (".csv", ".tsv"):
                yield from _table(file, name, keys, tab=suffix == ".tsv")
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


def _table(file: IO[str], name: str, keys: Sequence[str], *, tab: bool) -> Iterator[LocatedRow]:
    """Rows of a table, whose first row names the columns.

    In tables with tabs, such as PartiPrompts', quotation marks in texts are not escaped.
    """
    lines = (f"{line}\n" if line is not None else "\0\n" for line in _lines(file))
    plain = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    # Strict, or a quotation mark that is never closed would swallow all rows after it.
    reader = csv.reader(lines, **(plain if tab else {"strict": True}))
    header = [column.strip().lower() for column in next(reader, [])]
    column = next((column for column in PROMPT_COLUMNS if column in header), None)
    if any(map(UNDECODED.search, header)):
        raise SettingsError(f"{name}: {NOT_TEXT}")
    if column is None:
        raise SettingsError(
            f"{name}:1: no column {', '.join(PROMPT_COLUMNS[:-1])} or {PROMPT_COLUMNS[-1]} "
            f"(got {short_repr(header)})"
        )
    while True:
        place = f"{name}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield place, f"broken row ({error})"
            continue
        if cells is None:
            return
        if problem := _problem_of(cells, len(header)):
            yield place, problem
            continue
        row = dict(zip(header, map(_unquoted, cells) if tab else cells, strict=True))
        values = {key: _value(key, row[key]) for key in keys if row.get(key)}
        yield place, values | {"prompt": row[column]}


def _problem_of(cells: list[str], columns: int) -> str | None:
    if not cells:
        return "empty"
    if cells == ["\0"]:
        return TOO_LONG
    if len(cells) != columns:
        return f"{len(cells)} columns, but the first row names {columns}"
    return BROKEN if any(map(UNDECODED.search, cells)) else None


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else cell


def _value(key: str, cell: str) -> Any:
    """A cell as the number or mapping that it spells; texts stay texts."""
    if key in TEXTS:
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        return cell
