"""Adapt the package's docstrings to mkdocstrings: Sphinx roles and ``Example:`` sections."""

import re
from functools import partial
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth):`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    """Turn roles into links, and a single example into a section of examples."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            public = set(map(str, obj.package.exports or ()))
            text = ROLE.sub(partial(_link, public), obj.docstring.value)
            obj.docstring.value = text.replace("\nExample:\n", "\nExamples:\n")


def _link(public: set[str], role: re.Match[str]) -> str:
    name = role[1].rpartition(".")[2]
    return f"[`{name}`][agentsd.{name}]" if name in public else f"`{name}`"
