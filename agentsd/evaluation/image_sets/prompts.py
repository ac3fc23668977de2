"""Prompts from text files, one a line."""

from __future__ import annotations

from pathlib import Path

from ...errors import AgentSDError, EvaluationError
from ...text_files import read_text, split_lines
from .entry import ImageEntry


def prompt_lines(file: Path, error: type[AgentSDError]) -> list[str]:
    """The prompts in a text file, one a line.

    Raises:
        error: If the file cannot be read, or its suffix is that of a table, JSON or YAML.
    """
    if file.suffix.lower() in (".csv", ".json", ".jsonl", ".tsv", ".yaml", ".yml"):
        raise error(f"{file}: prompts are read from plain text, one a line, not {file.suffix}")
    return split_lines(read_text(file, error))


def with_prompts(images: list[ImageEntry], file: Path) -> list[ImageEntry]:
    """The images with prompts from a text file, in the order of its lines.

    Raises:
        EvaluationError: If the numbers of lines and images differ, or a line is empty.
    """
    lines = prompt_lines(file, EvaluationError)
    if len(lines) != len(images):
        raise EvaluationError(
            f"{file} has {len(lines)} prompts for {len(images)} images; write one line per image"
        )
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise EvaluationError(f"{file}:{number}: empty")
    return [image._replace(prompt=line) for image, line in zip(images, lines, strict=True)]
