"""Find a browser for the tests of the page."""

from __future__ import annotations

import shutil
from pathlib import Path


def find_chromium() -> str | None:
    """The Chromium on the PATH, or the one installed by `playwright install chromium`."""
    if found := shutil.which("chromium") or shutil.which("chromium-browser"):
        return found
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).is_file() else None
