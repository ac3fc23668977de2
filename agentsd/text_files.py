"""Read users' text files: UTF-8 or UTF-16, with the line ends of any system.

Lines end only at ``\\n``, ``\\r\\n`` and ``\\r``. ``str.splitlines`` also splits at characters
that prompts may contain, such as U+2028.
"""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any

from .errors import AgentSDError

NOT_TEXT = "must be UTF-8, or UTF-16 with a byte order mark; save it as UTF-8"


def decode_text(data: bytes, place: str, error: type[AgentSDError]) -> str:
    """Decode a file's bytes, without a byte order mark and with ``\\n`` as line end.

    Args:
        data: UTF-8, or UTF-16 with a byte order mark.
        place: Where it is from, for the error.
        error: The kind of error to raise.

    Raises:
        error: Names the place, if the bytes are in another encoding.
    """
    try:
        text = data.decode(_encoding(data))
    except UnicodeDecodeError:
        raise error(f"{place}: {NOT_TEXT}") from None
    if "\0" in text:  # UTF-16 without its mark, UTF-32, or not text
        raise error(f"{place}: {NOT_TEXT}")
    return re.sub("\r\n?", "\n", text)


def read_text(path: str | Path, error: type[AgentSDError]) -> str:
    """Read a text file, as :func:`decode_text` does.

    Raises:
        error: Names the file and why it cannot be read.
    """
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or "not a path"
        raise error(f"{path}: cannot be read ({reason})") from None
    return decode_text(data, str(path), error)


def split_lines(text: str) -> list[str]:
    """Split a decoded text into lines, without their ends."""
    return text.removesuffix("\n").split("\n") if text else []


@contextmanager
def text_stream(path: str | Path | None) -> Iterator[TextIOWrapper]:
    """Open a text file to be read piece by piece, as :func:`decode_text` reads it whole.

    Bytes that cannot be decoded become lone surrogates, so that a reader can name their line.

    Args:
        path: Of the file; ``None`` is standard input.

    Raises:
        OSError: If it cannot be read.
    """
    with ExitStack() as stack:
        raw: Any = sys.stdin.buffer if path is None else stack.enter_context(open(path, "rb"))
        buffered = BufferedReader(raw)
        text = TextIOWrapper(buffered, _encoding(buffered.peek(2)), "surrogateescape")
        try:
            yield text
        finally:
            text.detach()
            buffered.detach()  # else standard input would be closed with it


def _encoding(start: bytes) -> str:
    """The encoding of a text that starts with these bytes."""
    is_utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return "utf-16" if is_utf16 else "utf-8-sig"


def prompt_lines(file: Path, error: type[AgentSDError]) -> list[str]:
    """The prompts in a text file, one a line.

    Raises:
        error: If the file cannot be read, or its suffix is that of a table, JSON or YAML.
    """
    if file.suffix.lower() in (".csv", ".json", ".jsonl", ".tsv", ".yaml", ".yml"):
        raise error(f"{file}: prompts are read from plain text, one a line, not {file.suffix}")
    return split_lines(read_text(file, error))
