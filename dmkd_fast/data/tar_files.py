"""Read tar files of images: the shards of `dmkd generate`, and shards in WebDataset's layout.

Nothing is extracted: an image is a range of bytes in its tar. Generated shards hold only what
`data/shards.py` writes and are checked strictly. Shards from other tools may hold any files and any
kind of tar header; Python's tarfile reads them.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dmkd_fast.data.listing import EXTENSIONS, MOST_BYTES, Item, SourceError

_BLOCK, _MOST_DIGITS = 512, 32
# Writers pad a tar with zeros to a multiple of a record; this is the largest record in use.
_MOST_PADDING = 2**20
_MEMBER = re.compile(rb"([0-9]{9,18})\.(png|cls)")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


def tar_members(path: Path, *, most_members: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of each member of a generated shard.

    Members must be files named ID.png or ID.cls. Rejected are links, devices, folders, other names,
    long-name and sparse extensions, wrong checksums, and members that are too large or reach beyond
    the end of the file.

    Raises:
        SourceError: A member is rejected, there are too many members, or the tar is cut off.
    """
    end = path.stat().st_size
    with path.open("rb") as file:
        position = 0
        for _ in range(most_members + 1):
            file.seek(position)
            header = file.read(_BLOCK)
            if header == bytes(_BLOCK):
                check_end(path, position)
                return
            size = _check_header(path, position, header)
            if position + _BLOCK + size > end:
                raise SourceError(f"{path}: cut off at byte {position}; make it again")
            yield header[:100].rstrip(b"\0").decode(), position + _BLOCK, size
            position += _BLOCK + -(-size // _BLOCK) * _BLOCK
    raise SourceError(f"{path}: more than {most_members} members; make it again")


def check_end(path: Path, position: int) -> None:
    """Check that a tar ends at a position: two blocks of zeros, then only zeros.

    Raises:
        SourceError: The tar is cut off there, or other bytes follow.
    """
    with path.open("rb") as file:
        file.seek(position)
        rest = file.read(_MOST_PADDING + 1)
    if len(rest) < 2 * _BLOCK:
        raise SourceError(
            f"{path}: cut off at byte {position}: got {len(rest)} bytes there, expected the two "
            "blocks of zeros that end a tar; fetch or make it again"
        )
    if len(rest) > _MOST_PADDING or rest.count(0) != len(rest):
        raise SourceError(
            f"{path}: damaged at byte {position}: got more bytes after the last member, expected "
            "only zeros; fetch or make it again"
        )


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
    try:
        for member, text in _members(shard):
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
                    raise SourceError(
                        f"{where}: got {text!r}, expected a class number from 0 on; correct it"
                    )
                if key in labels:
                    raise SourceError(f"{where}: a second label of this sample; remove one")
                labels[key] = int(text)
            else:
                last = os.path.splitext(ending)[1]
                left_out[last[:20] or ending[:20]] += 1
                dotted = dotted or (member.name if last in (*EXTENSIONS, ".cls") else "")
    except OSError as error:
        raise SourceError(f"{shard}: {error.strerror}; fetch or make it again") from None
    odd = next(iter(images.keys() ^ labels.keys()), None)
    if (odd is not None or not images) and dotted:
        raise SourceError(
            f"{shard}: got {dotted!r}, expected KEY.jpg and KEY.cls with no dot in KEY, as "
            "WebDataset ends a key at its first dot; rename the members"
        )
    if odd is not None:
        have, lack = ("an image", "label (.cls)") if odd in images else ("a label", "image")
        raise SourceError(
            f"{shard}: {odd}: got {have} without {lack}; add it or remove both "
            f"(images are {', '.join(EXTENSIONS)})"
        )
    if not images:
        raise SourceError(f"{shard}: got no images, expected KEY.jpg and KEY.cls; remove the shard")
    return [
        Item(str(shard), f"{shard}: {m.name}", m.offset_data, m.size, labels[key])
        for key, m in images.items()
    ]


def _members(shard: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Yield the regular files in a tar, in order, each with its text if a label."""
    size, position = shard.stat().st_size, 0
    with shard.open("rb") as file:
        start = file.read(2)
    if start in _COMPRESSED:
        raise SourceError(
            f"{shard}: compressed with {_COMPRESSED[start]}, expected a plain tar, as images are "
            "read from the middle of it; decompress it"
        )
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                where = f"{shard}: {member.name}"
                if member.size < 0 or member.offset_data <= position:
                    # A negative size makes tarfile go back in the file and loop (CVE-2025-8194).
                    raise SourceError(f"{where}: damaged header; fetch or make the shard again")
                position = member.offset_data
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse() or position + member.size > size:
                    raise SourceError(f"{where}: a link or cut short; make the shard again")
                label = tar.extractfile(member) if member.name.lower().endswith(".cls") else None
                yield member, b"" if label is None else label.read(_MOST_DIGITS + 1)
            end = tar.offset  # tarfile stops silently at a damaged header or a cut
    except SourceError:
        raise
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise SourceError(f"{shard}: damaged ({reason}); fetch or make it again") from None
    check_end(shard, end)


def _check_header(path: Path, position: int, header: bytes) -> int:
    """Check a tar header of a generated shard and return the size of its member."""
    where = f"{path}: the member at byte {position}"
    if len(header) != _BLOCK:
        raise SourceError(f"{path}: cut off at byte {position}; make it again")
    name, kind = header[:100].rstrip(b"\0"), header[156:157]
    try:
        size, checksum = (int(header[a:b].strip(b" \0"), 8) for a, b in ((124, 136), (148, 156)))
    except ValueError:
        raise SourceError(f"{where} has a damaged header; make the shard again") from None
    if checksum != sum(header[:148]) + 8 * 32 + sum(header[156:]):
        raise SourceError(f"{where} has a damaged header (checksum); make the shard again")
    if kind not in (b"0", b"\0") or any(header[157:257]) or any(header[345:500]):
        raise SourceError(f"{where} is a link or no plain file; shards hold only ID.png and ID.cls")
    if not _MEMBER.fullmatch(name):
        raise SourceError(f"{where} is named {name[:60]!r}; shards hold only ID.png and ID.cls")
    if size > MOST_BYTES:
        raise SourceError(f"{where} has {size} bytes, expected at most {MOST_BYTES}")
    return size
