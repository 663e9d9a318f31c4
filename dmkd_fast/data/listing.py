"""Find the image files below a folder, and read them, for test sets and for sources.

Links are followed. Hidden files and folders are left out, as are files that are not images. They
are counted by ending and reported in one log line.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dmkd_fast.runtime.errors import UserError, warn_once

# The list of torchvision's ImageFolder, then further endings of formats that DALI decodes.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".jpe", ".jfif", ".pbm", ".pnm", ".jp2"),
)
# Upper bound for one image; larger files and tar members are rejected.
MOST_BYTES = 64 * 2**20
MOST_PIXELS = 2**26
# A folder that is visited more often than this is assumed to be reached through a cycle of links.
MOST_LINKS = 100
CLASS_NAMES = "classes.txt"


class SourceError(UserError):
    """Raised if images cannot be read; the message is one line for the user."""


@dataclass(frozen=True, slots=True)
class Item:
    """One encoded image: a whole file, or a member of a tar file."""

    path: str
    label: int
    member: str = ""
    """Name of the member, for messages."""
    offset: int = 0
    """Position of the first byte in the file."""
    length: int | None = None
    """Number of bytes; None means the whole file."""

    @property
    def name(self) -> str:
        """Name for messages: the file, or the tar file and its member."""
        return f"{self.path}: {self.member}" if self.member else self.path

    def read(self) -> bytes:
        """Read the encoded bytes; see `read_image`."""
        return read_image(self.path, self.name, self.offset, self.length)


def read_image(path: str | Path, name: str, offset: int = 0, length: int | None = None) -> bytes:
    """Read the encoded bytes of an image.

    Args:
        path: File to read.
        name: Name of the image, for messages.
        offset: Position of the first byte.
        length: Number of bytes; None means the whole file.

    Raises:
        SourceError: The bytes cannot be read, or there are none or too many for one image.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size if length is None else length
            if not 0 < size <= MOST_BYTES:
                expected = f"an image of 1 to {MOST_BYTES}"
                raise SourceError.invalid(name, f"{size} bytes", expected, "replace or remove it")
            data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise SourceError(f"{name}: {error.strerror}; put it back") from None
    if len(data) != size:
        expected = f"{size}, as when the set was opened"
        raise SourceError.invalid(name, f"{len(data)} bytes", expected, "put it back")
    return data


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The images and sub-folders below a folder."""

    folder: Path
    images: list[str]
    """Paths of the images relative to the folder, with "/" as separator, sorted."""
    folders: list[str]
    """Names of the direct sub-folders, sorted."""
    left_out: Counter[str]
    """Number of files that are not images, by ending, and of hidden files and folders."""

    def by_class(self) -> dict[str, list[str]]:
        """Group the images by class folder, and log once which files are left out.

        Raises:
            SourceError: An image is outside the class folders, or a class folder has no image.
        """
        found: dict[str, list[str]] = {name: [] for name in self.folders}
        for name in self.images:
            base, slash, _ = name.partition("/")
            if not slash:
                expected = "every image in the folder of its class"
                raise SourceError.invalid(self.folder / name, "an image without a label", expected)
            found[base].append(name)
        empty = next((name for name, images in found.items() if not images), None)
        if empty is not None:
            what = f"no images in a class folder{left_out_text(self.left_out)}"
            raise SourceError.invalid(self.folder / empty, what, f"some ({', '.join(EXTENSIONS)})")
        report_left_out(self.folder, self.left_out)
        return found


def list_images(folder: Path) -> Listing:
    """Find all image files below a folder.

    Raises:
        SourceError: A folder cannot be read, a link leads to nothing, or links form a cycle.
    """
    images: list[str] = []
    left_out: Counter[str] = Counter()
    visits: Counter[tuple[int, int]] = Counter()
    folders: list[str] | None = None
    waiting: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [(str(folder), "", ())]
    while waiting:
        place, base, above = waiting.pop()
        inner = []
        try:
            status = os.stat(place)
            this = (status.st_dev, status.st_ino)
            visits[this] += 1
            if this in above or visits[this] > MOST_LINKS:
                what = "a folder that links lead to again and again"
                raise SourceError.invalid(place, what, "no cycle", "remove the link")
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        left_out["hidden"] += 1
                    elif entry.is_dir():
                        inner.append(entry.name)
                    elif not entry.name.lower().endswith(EXTENSIONS):
                        if base or entry.name != CLASS_NAMES:
                            left_out[_ending(entry.name)] += 1
                    elif entry.is_file():
                        images.append(base + entry.name)
                    else:
                        what = "a broken link or a special file"
                        raise SourceError.invalid(entry.path, what, "an image", "remove it")
        except OSError as error:
            where = error.filename or place
            raise SourceError(f"{where}: {error.strerror}; make it readable or remove it") from None
        folders = sorted(inner) if folders is None else folders
        waiting += [(f"{place}/{n}", f"{base}{n}/", (*above, this)) for n in inner]
    return Listing(folder=folder, images=sorted(images), folders=folders or [], left_out=left_out)


def report_left_out(folder: Path, left_out: Counter[str]) -> None:
    """Log once which kinds of files were left out and how many."""
    if left_out:
        warn_once(f"{folder}: not all files are images in a known format{left_out_text(left_out)}")


def left_out_text(left_out: Counter[str]) -> str:
    """Return text like ` (3 files left out: 2 .gif, 1 hidden)`, or "" for none."""
    if not left_out:
        return ""
    total = left_out.total()
    shown = sorted(left_out.items(), key=lambda kind: (-kind[1], kind[0]))[:5]
    kinds = [f"{count} {ending}" for ending, count in shown]
    rest = total - sum(count for _, count in shown)
    kinds += [f"{rest} others"] if rest else []
    return f" ({total} {'file' if total == 1 else 'files'} left out: {', '.join(kinds)})"


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()[:20] or "without an ending"
