"""Where there is a browser for the tests of the page."""

from __future__ import annotations

import shutil
from pathlib import Path


def find_chromium() -> str | None:
    """A Chromium on the PATH, or the one that `playwright install chromium` put into its cache."""
    if found := shutil.which("chromium") or shutil.which("chromium-browser"):
        return found
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).is_file() else None
