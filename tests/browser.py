"""Pages in a headless Chromium."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)


def settled(page: Path, folder: Path) -> str:
    """The DOM that the browser prints once the page has settled. Fails on an error, a refused resource, or a word on
    the console. `folder` gets a copy of the page that listens for them."""
    listener = (
        "<script>const fault = (what) => document.body.append('FAU' + 'LT ' + what + ';');"  # in two: not this text
        "addEventListener('error', (event) => fault(event.message), true);"
        "addEventListener('securitypolicyviolation', (event) => fault(event.blockedURI));</script>"
    )
    copy = folder / "page.html"
    copy.write_text(page.read_text().replace("</main>", f"</main>{listener}", 1))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}"]
    command += ["--virtual-time-budget=10000", "--enable-logging=stderr", "--dump-dom", copy.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    dom = html.unescape(result.stdout)
    assert re.findall("FAULT [^;]*;", dom) == [] and "CONSOLE" not in result.stderr
    return dom
