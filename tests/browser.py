"""Pages in a headless Chromium, where the machine has one: else a test that asks for it is skipped, and says so."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def chromium() -> str:
    """The program; skips where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no Chromium here ({', '.join(NAMES)}): the page was not looked at")
    return found


@contextmanager
def opened(file: Path, width: int, height: int = 900) -> Iterator[Any]:
    """A page of a file at a width in CSS pixels. Errors of its scripts, and what it asks from outside, fail."""
    problems: list[str] = []
    with sync_playwright() as playwright:
        options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium(), args=options)
        page = browser.new_page(viewport={"width": width, "height": height})
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
        page.on("request", lambda request: problems.append(request.url) if is_outside(request.url) else None)
        page.goto(file.resolve().as_uri())
        yield page
        browser.close()
    assert problems == []


def is_outside(url: str) -> bool:
    return not url.startswith(("file:", "data:", "blob:"))
