"""On the built site, links to files outside ``docs/`` lead to the repository."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

RELATIVE_LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)")


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    docs = Path(config.docs_dir)
    page_folder = (docs / page.file.src_uri).parent

    def to_repository(link: re.Match[str]) -> str:
        target = (page_folder / link[1]).resolve()
        if target.is_relative_to(docs) or not target.exists():
            return link[1]  # checked by MkDocs
        path = target.relative_to(docs.parent).as_posix()
        return f"{config.extra['repository']}/blob/main/{path}"

    return RELATIVE_LINK.sub(to_repository, markdown)
