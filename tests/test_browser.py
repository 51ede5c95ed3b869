"""Pages in a browser (Debian's Chromium): no script error, nothing wider than the screen, in light and dark."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_stages import run, values
from tokengrain.report.html import write_report

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")]

# A page that is narrower by its scroll bar, as Chromium says of some, is not wider.
WIDER = "<script>document.title = Math.max(0, document.documentElement.scrollWidth - innerWidth)</script></body>"


def look(page: Path, width: int, dark: bool, profile: Path) -> tuple[list[str], int]:
    """What the browser's console says, and by how many pixels the page is wider than the screen."""
    probe = page.with_name(f"probe-{page.name}")
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", WIDER), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--hide-scrollbars"]
    options += [f"--window-size={width},900", "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [str(CHROMIUM), *options, probe.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    probe.unlink()
    title = found.stdout.partition("<title>")[2].partition("</title>")[0]
    return [line for line in found.stderr.splitlines() if "CONSOLE" in line], int(float(title))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 500])  # headless Chromium is never narrower than 500
def test_a_report(width: int, dark: bool, tmp_path: Path) -> None:
    run(values(tmp_path))
    assert look(write_report(tmp_path / "run"), width, dark, tmp_path / "profile") == ([], 0)


def test_the_documentation(tmp_path: Path) -> None:
    subprocess.run([Path(sys.executable).with_name("zensical"), "build", "--strict"], cwd=ROOT, check=True)
    for name in ("index", "getting-started", "compare", "reference/api", "credit-matrix"):
        for width in (1280, 500):
            errors, wider = look(ROOT / "site" / f"{name}.html", width, False, tmp_path / "profile")
            assert (name, errors, wider) == (name, [], 0)
