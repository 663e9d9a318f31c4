"""Find the image files below a folder and the class of each, for test sets and for sources.

Links are followed. Hidden files and folders are left out, as are files that are not images. They
are counted by ending and reported in one log line.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dmkd_fast.runtime.errors import UserError, warn_once

# The list of torchvision's ImageFolder, then further endings of formats that DALI decodes.
EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
    ".jpe",
    ".jfif",
    ".pbm",
    ".pnm",
    ".jp2",
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
    """One encoded image: `length` bytes of `path`, starting at byte `offset`."""

    path: str
    name: str
    """Name for messages: the file, or the shard and its member."""
    offset: int
    length: int
    label: int

    def read(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Read the encoded bytes, (length,) uint8.

        Raises:
            SourceError: The bytes cannot be read, or there are none or too many for one image.
        """
        if not 0 < self.length <= MOST_BYTES:
            raise SourceError(
                f"{self.name}: got {self.length} bytes, expected an image of 1 to {MOST_BYTES}; "
                "replace or remove it"
            )
        try:
            data = np.fromfile(self.path, np.uint8, count=self.length, offset=self.offset)
        except OSError as error:
            raise SourceError(f"{self.name}: {error.strerror}; put it back") from None
        if len(data) != self.length:
            raise SourceError(
                f"{self.name}: got {len(data)} bytes, expected {self.length}, as when the set was "
                "opened; put it back"
            )
        return data


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The images and sub-folders below a folder."""

    images: list[str]
    """Paths of the images relative to the folder, with "/" as separator, sorted."""
    folders: list[str]
    """Names of the direct sub-folders, sorted."""
    left_out: Counter[str]
    """Number of files that are not images, by ending, and of hidden files and folders."""


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
                raise SourceError(
                    f"{place}: got a folder that links lead to again and again, expected no cycle; "
                    "remove the link"
                )
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
                        raise SourceError(
                            f"{entry.path}: got a broken link or a special file, expected an "
                            "image; replace or remove it"
                        )
        except OSError as error:
            where = error.filename or place
            raise SourceError(f"{where}: {error.strerror}; make it readable or remove it") from None
        folders = sorted(inner) if folders is None else folders
        waiting += [(f"{place}/{n}", f"{base}{n}/", (*above, this)) for n in inner]
    return Listing(images=sorted(images), folders=folders or [], left_out=left_out)


def by_class(folder: Path, listing: Listing) -> dict[str, list[str]]:
    """Group images by class folder, with the folders in the order of `class_order`.

    Raises:
        SourceError: An image is outside the class folders, or a class folder has no image.
    """
    found: dict[str, list[str]] = {name: [] for name in class_order(listing.folders)}
    for name in listing.images:
        base, slash, _ = name.partition("/")
        if not slash:
            raise SourceError(
                f"{folder / name}: got an image without a label, expected every image in the "
                "folder of its class; move it into one"
            )
        found[base].append(name)
    empty = next((name for name, images in found.items() if not images), None)
    if empty is not None:
        raise SourceError(
            f"{folder / empty}: got no images in a class folder, expected some "
            f"({', '.join(EXTENSIONS)}){_left_out(listing.left_out)}; remove the folder or fill it"
        )
    return found


def class_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort class folders by label: numbers by value, other names alphabetically."""
    order = sorted(names)
    return tuple(sorted(order, key=int) if all_numbers(order) else order)


def warn_of_order(folder: Path, names: Sequence[str]) -> None:
    """Log once if the labels differ from those of torchvision's ImageFolder."""
    for label, (mine, other) in enumerate(zip(names, sorted(names), strict=True)):
        if mine != other:
            warn_once(
                f"{folder}: class folders are in numeric order, so class {label} is {mine!r}; in "
                f"alphabetical order, torchvision's ImageFolder has {other!r} there; to choose, "
                f"list the names in {CLASS_NAMES}, eval.classes or --classes"
            )
            return


def all_numbers(names: Sequence[str]) -> bool:
    """Return whether all names are whole numbers, which do not describe the classes."""
    return all(name.isascii() and name.isdigit() for name in names)


def list_folder(folder: Path, names: tuple[str, ...]) -> tuple[list[Item], tuple[str, ...]]:
    """List the images of `folder/CLASS/**`.

    Args:
        folder: Folder with one sub-folder per class.
        names: Names of the sub-folders in the order of the labels; if empty, `class_order` applies.

    Returns:
        The images, sorted by label and name, and the names of the classes.

    Raises:
        SourceError: See `list_images` and `by_class`; or `names` differ from the sub-folders.
    """
    listing = list_images(folder)
    if not listing.folders and not listing.images:
        raise SourceError(
            f"{folder}: got no idx files, class folders or .tar shards"
            f"{_left_out(listing.left_out)}, expected one of these; give another folder"
        )
    found = by_class(folder, listing)
    if not names:
        names = tuple(found)
        warn_of_order(folder, names)
    missing, extra = sorted(set(names) - set(found)), sorted(set(found) - set(names))
    if missing or extra:
        what = f"no folder for class {missing[0]!r}" if missing else f"folder {extra[0]!r}"
        more = len(missing or extra) - 1
        raise SourceError(
            f"{folder}: got {what}{f' and {more} more' if more else ''}, which the list of "
            f"{len(names)} classes {'has' if missing else 'does not have'}; make both agree"
        )
    report(folder, listing.left_out)
    items = []
    for label, name in enumerate(names):
        paths = [os.path.join(folder, image) for image in found[name]]
        items += [Item(path, path, 0, os.path.getsize(path), label) for path in paths]
    return items, names


def report(folder: Path, left_out: Counter[str]) -> None:
    """Log which kinds of files were left out and how many."""
    if left_out:
        warn_once(f"{folder}: not all files are images in a known format{_left_out(left_out)}")


def _left_out(left_out: Counter[str]) -> str:
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
