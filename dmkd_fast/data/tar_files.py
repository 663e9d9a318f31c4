"""Read tar files of images: the shards of `dmkd generate`, and shards in WebDataset's layout.

Nothing is extracted: an image is a range of bytes in its tar. Python's tarfile reads the headers.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dmkd_fast.data.listing import EXTENSIONS, Item, SourceError

_BLOCK, _MOST_DIGITS = 512, 32
# Writers pad a tar with zeros to a multiple of a record; this is the largest record in use.
MOST_PADDING = 2**20
_AGAIN = "fetch or make it again"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


def tar_members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Yield the regular files in a tar, in order; labels (.cls) with their first bytes.

    Raises:
        SourceError: The tar cannot be read, is compressed, damaged or cut off, or holds a link, a
            device or a sparse file.
    """
    position = 0
    try:
        with path.open("rb") as file:
            kind = _COMPRESSED.get(file.read(2))
            if kind is not None:
                expected = "a plain tar, as images are read from the middle of it"
                raise SourceError.invalid(path, f"a tar compressed with {kind}", expected)
            size = os.fstat(file.fileno()).st_size
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    where = f"{path}: {member.name}"
                    if member.size < 0 or member.offset_data <= position:
                        # A negative size makes tarfile go back and loop (CVE-2025-8194).
                        raise SourceError(f"{where}: damaged header; {_AGAIN}")
                    position = member.offset_data
                    if member.isdir():
                        continue
                    if not member.isreg() or member.issparse() or position + member.size > size:
                        raise SourceError(f"{where}: a link or cut short; {_AGAIN}")
                    is_label = member.name.lower().endswith(".cls")
                    length = min(member.size, _MOST_DIGITS + 1) if is_label else 0
                    yield member, os.pread(file.fileno(), length, position)
                # tarfile stops silently at a damaged header or a cut.
                check_end(path, tar.offset, os.pread(file.fileno(), MOST_PADDING + 1, tar.offset))
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}; {_AGAIN}") from None
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise SourceError(f"{path}: damaged ({reason}); {_AGAIN}") from None


def check_end(path: Path, position: int, rest: bytes) -> None:
    """Refuse a tar that does not end with two blocks of zeros and then only zeros."""
    if len(rest) < 2 * _BLOCK:
        where, expected = f"{path}: cut off at byte {position}", "two blocks of zeros"
        raise SourceError.invalid(where, f"{len(rest)} bytes", expected, _AGAIN)
    if len(rest) > MOST_PADDING or rest.count(0) != len(rest):
        where, what = f"{path}: damaged at byte {position}", "more bytes after the last member"
        raise SourceError.invalid(where, what, "only zeros", _AGAIN)


def list_shards(folder: Path, names: list[str]) -> tuple[list[Item], Counter[str]]:
    """List the samples of tar files in WebDataset's layout.

    A sample is KEY.jpg (or another image ending) and KEY.cls.

    Args:
        folder: Folder of the tar files.
        names: File names of the tar files.

    Returns:
        The images, and the number of members left out, by ending.

    Raises:
        SourceError: A shard is damaged, holds links, or a sample lacks its image or label.
    """
    items: list[Item] = []
    left_out: Counter[str] = Counter()
    for name in sorted(names):
        items += _list_shard(folder / name, left_out)
    return items, left_out


def _list_shard(shard: Path, left_out: Counter[str]) -> list[Item]:
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    dotted = ""
    for member, text in tar_members(shard):
        where = f"{shard}: {member.name}"
        base = member.name.rfind("/") + 1
        stem, _, ending = member.name[base:].partition(".")
        key, ending = member.name[:base] + stem, "." + ending.lower()
        if ending in EXTENSIONS:
            if key in images:
                raise SourceError(f"{where}: a second image of this sample; remove one")
            images[key] = member
        elif ending == ".cls":
            if not text.strip().isdigit() or len(text) > _MOST_DIGITS:
                raise SourceError.invalid(where, repr(text), "a class number from 0 on")
            if key in labels:
                raise SourceError(f"{where}: a second label of this sample; remove one")
            labels[key] = int(text)
        else:
            last = os.path.splitext(ending)[1]
            left_out[last[:20] or ending[:20]] += 1
            dotted = dotted or (member.name if last in (*EXTENSIONS, ".cls") else "")
    odd = next(iter(images.keys() ^ labels.keys()), None)
    if (odd is not None or not images) and dotted:
        expected = "KEY.jpg and KEY.cls with no dot in KEY, where WebDataset would end it"
        raise SourceError.invalid(shard, repr(dotted), expected, "rename the members")
    if odd is not None:
        have, lack = ("an image", "label (.cls)") if odd in images else ("a label", "image")
        raise SourceError(
            f"{shard}: {odd}: got {have} without {lack}; add it or remove both "
            f"(images are {', '.join(EXTENSIONS)})"
        )
    if not images:
        raise SourceError.invalid(shard, "no images", "KEY.jpg and KEY.cls", "remove the shard")
    return [
        Item(str(shard), labels[key], m.name, m.offset_data, m.size) for key, m in images.items()
    ]
