"""Make a labeled set of color drawings from Debian's openclipart-png, which is public domain.

    apt-get download openclipart-png && dpkg-deb -x openclipart-png*.deb clipart
    python examples/clipart.py clipart/usr/share/openclipart/png data
    dmkd init own-data --data data

Ten of the package's folders are the classes. Each drawing is put on white, padded to a square and
made 64 pixels wide. Copies of one file count once, and not at all if two classes have them.
One drawing in six, chosen by its content, becomes a test image.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from pathlib import Path

from PIL import Image, ImageOps

CLASSES = {
    "animals": "animals",
    "computer": "computer",
    "flags": "signs_and_symbols/flags",
    "food": "food",
    "games": "recreation/games",
    "office": "office",
    "people": "people",
    "plants": "plants",
    "tools": "tools",
    "transportation": "transportation",
}
MOST_IMAGES = 400
"""Of a class, in the order of their digests."""
SIDE = 64

# A few drawings take gigabytes to decode. Those with more pixels are left out.
Image.MAX_IMAGE_PIXELS = 16_000_000
warnings.simplefilter("error", Image.DecompressionBombWarning)
TOO_LARGE = (Image.DecompressionBombWarning, Image.DecompressionBombError)


def main(source: Path, target: Path) -> None:
    """Write the drawings of each class to train and test."""
    if target.exists():
        sys.exit(f"{target}: exists already; give another folder")
    classes: dict[str, set[str]] = {}
    paths: dict[str, Path] = {}
    for name, folder in CLASSES.items():
        found = sorted((source / folder).rglob("*.png"))
        if not found:
            sys.exit(f"{source / folder}: no drawings; give the folder png of the package")
        for path in found:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            classes.setdefault(digest, set()).add(name)
            paths.setdefault(digest, path)
    counts: dict[str, int] = dict.fromkeys(CLASSES, 0)
    for digest in sorted(paths):
        (name, *others) = classes[digest]
        if others or counts[name] == MOST_IMAGES:
            continue
        image = drawing(paths[digest])
        if image is not None:
            part = "test" if int(digest[-8:], 16) % 6 == 0 else "train"
            place = target / part / name
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{digest[:16]}.png")
            counts[name] += 1
    print(", ".join(f"{name} {count}" for name, count in counts.items()))


def drawing(path: Path) -> Image.Image | None:
    """Return a drawing on white, or None if it cannot be read or has too many pixels."""
    try:
        with Image.open(path) as image:
            colors = image.convert("RGBA")
        white = Image.new("RGBA", colors.size, "white")
        white.alpha_composite(colors)
        return ImageOps.pad(white.convert("RGB"), (SIDE, SIDE), color="white")
    # PIL raises the second and the third for some broken files.
    except (OSError, SyntaxError, ValueError, *TOO_LARGE) as error:
        print(f"left out: {path}: {error}", file=sys.stderr)
        return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
