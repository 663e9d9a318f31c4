"""Take the pictures of a run's page in docs/images: python scripts/report_pictures.py RUN_DIR.

Needs Chromium. `report.png` is the page at 1,400 pixels up to its real test images.
`report-narrow.png` is two parts of it at 400 pixels in dark mode.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from browser import Browser, browser  # noqa: E402

MOST_BYTES = 150_000
_TOP = "[...document.querySelectorAll('h2,h3')].find(e => e.innerText == '{}')"


def top(tab: Browser, head: str) -> float:
    """Return where a heading of the open page begins."""
    found: float = tab.evaluate(f"{_TOP.format(head)}.getBoundingClientRect().top + scrollY")
    return found


def part(tab: Browser, head: str, width: int, height: int) -> Image.Image:
    """Return the part of the open page that begins with a heading."""
    return Image.open(io.BytesIO(tab.picture(0, top(tab, head), width, height)))


def save(image: Image.Image, name: str) -> None:
    """Write a picture for the documentation."""
    path = ROOT / "docs" / "images" / name
    image.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)
    size = path.stat().st_size
    assert size <= MOST_BYTES, f"{path}: got {size:,} bytes, expected at most {MOST_BYTES:,}"
    print(f"{path.relative_to(ROOT)}: {image.width} x {image.height}, {size:,} bytes")


def main(run: Path) -> None:
    """Take both pictures of a run that has finished."""
    page = run / "report.html"
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as tab:
        tab.open(page, width=1400)
        height = int(top(tab, "Real test images"))
        save(Image.open(io.BytesIO(tab.picture(190, 0, 1020, height))), "report.png")
        tab.open(page, width=400, dark=True)
        height = int(top(tab, "Calibration") - top(tab, "Classes"))
        left = part(tab, "Most confident mistakes", 400, height)
        right = part(tab, "Classes", 400, height)
    both = Image.new("RGB", (812, height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (412, 0))
    save(both, "report-narrow.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
