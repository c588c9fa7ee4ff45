"""Headless Chromium for the tests of the page, and for its picture: it reaches nothing but the
server of a test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",  # the gate runs as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> str | None:
    """Its path; None where it is not installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def chromium(**options: object) -> Iterator[BrowserContext]:
    """A browser with a profile of its own, which is gone afterwards. `options` are Playwright's."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory(prefix="octavo-chromium-") as profile, sync_playwright() as p:
        context = p.chromium.launch_persistent_context(
            profile,
            executable_path=find_chromium(),
            headless=True,
            args=list(FLAGS),
            **options,  # type: ignore[arg-type]
        )
        try:
            yield context
        finally:
            context.close()
