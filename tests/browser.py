"""Pages as a real browser shows them: headless Chromium, without network."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


class Browser:
    def __init__(self, folder: Path) -> None:
        found = next(filter(None, map(shutil.which, NAMES)), None)
        if found is None:
            pytest.skip(f"no browser here: none of {', '.join(NAMES)}")
        self._command, self._folder = found, folder
        self.console: list[str] = []
        """What the last page has said."""

    def _run(self, page: Path, *flags: str) -> str:
        profile = f"--user-data-dir={self._folder / 'profile'}"
        done = subprocess.run(
            [self._command, *FLAGS, profile, *flags, page.as_uri()], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        self.console = re.findall(r"CONSOLE:?\d*\W+(.*)", done.stderr)
        return done.stdout

    def screenshot(self, page: Path, *, dark: bool, width: int = 1280, height: int = 1600) -> Path:
        """A PNG beside the page."""
        target = page.with_name(f"{page.stem}-{'dark' if dark else 'light'}-{width}.png")
        scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
        self._run(page, f"--screenshot={target}", f"--window-size={width},{height}", *scheme)
        return target

    def dom(self, page: Path, *, width: int = 1280) -> str:
        """The HTML of a page that frames it, after its scripts have run: no window is as narrow as a telephone."""
        framed = html.escape(page.read_text(encoding="utf-8"))
        frame = page.with_name(f"{page.stem}-framed.html")
        frame.write_text(
            f'<body style="margin:0"><iframe width={width} height=1600 style="border:0" srcdoc="{framed}">'
        )
        return self._run(frame, "--dump-dom", f"--window-size={max(width, 500)},1600")
