"""Every row of docs/reference/damage.md: the damage is made and gives what the page says."""

from __future__ import annotations

import gzip
import io
import json
import re
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from real_sets import picture, write_shard
from shard_files import encode, make_plan, random_images, write_shards

from dmkd_fast import InputSpec, open_set
from dmkd_fast.data import shards
from dmkd_fast.data.sources import ShardSource, find_kind

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "reference" / "damage.md").read_text(encoding="utf-8")
ROWS = [
    tuple(cell.strip() for cell in line.strip("|").split("|"))
    for line in PAGE.splitlines()
    if line.startswith("|") and not line.startswith(("| File", "|--"))
]
SPEC = InputSpec(size=24, mean=(0.0,) * 3, std=(1.0,) * 3)
IMAGES, LABELS = random_images(10)
Damage = Callable[[Path], Any]


def pixels(seed: int = 0) -> np.ndarray:
    return np.asarray(picture(seed, 24, 24))


def read_test_set(root: Path) -> None:
    for _ in open_set(root, torch.device("cpu")).batches([SPEC]):
        pass


def read_idx(root: Path) -> None:
    open_set(root, torch.device("cpu"))


def read_shards(root: Path) -> None:
    source = ShardSource(root)
    for image_id in source.first_pass.tolist():
        assert source.read(image_id) == encode(IMAGES[image_id, 0])
    assert source.labels_of(source.first_pass).tolist() == LABELS[source.first_pass].tolist()


def image(data: bytes, name: str = "0.png") -> Damage:
    return lambda root: (root / "a" / name).write_bytes(data)


def changed(data: bytes, at: float) -> bytes:
    """One byte changed at a fraction of the length."""
    edited = bytearray(data)
    edited[int(at * len(edited))] ^= 0x5A
    return bytes(edited)


PNG, JPEG = encode(pixels()), encode(pixels(), "JPEG", quality=90)
BOMB = PNG[:16] + struct.pack(">II", 65536, 65536) + PNG[24:]


def huge(root: Path) -> None:
    with (root / "a" / "0.png").open("wb") as file:
        file.truncate(64 * 2**20 + 1)


def a_file_for_the_folder(root: Path) -> None:
    (root / "a" / "0.png").unlink()
    (root / "a").rmdir()
    root.rmdir()
    root.write_bytes(b"x")


def second_class(root: Path, name: str = "b") -> None:
    (root / name).mkdir()
    (root / name / "0.png").write_bytes(PNG)


def classes(text: bytes) -> Damage:
    def write(root: Path) -> None:
        second_class(root)
        (root / "classes.txt").write_bytes(text)

    return write


SAMPLES = [("0.png", PNG), ("0.cls", b"0"), ("1.png", encode(pixels(1))), ("1.cls", b"1")]


def tar(members: list[tuple[str, bytes]] | None = None) -> Damage:
    return lambda root: write_shard(root / "0.tar", SAMPLES if members is None else members)


def edited_tar(change: Callable[[bytes], bytes]) -> Damage:
    def write(root: Path) -> None:
        write_shard(root / "0.tar", SAMPLES)
        (root / "0.tar").write_bytes(change((root / "0.tar").read_bytes()))

    return write


def start_of(number: int) -> int:
    """Offset of a member's header in the tar of SAMPLES."""
    return sum(512 + -(-len(data) // 512) * 512 for _, data in SAMPLES[:number])


def link(root: Path) -> None:
    with tarfile.open(root / "0.tar", "w") as file:
        member = tarfile.TarInfo("0.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(member)


def idx_bytes(values: np.ndarray) -> bytes:
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.tobytes()


PIXELS = np.random.default_rng(0).integers(0, 256, (20, 24, 24), dtype=np.uint8)


def idx(
    change: Callable[[bytes], bytes] = bytes,
    after: Callable[[bytes], bytes] = bytes,
    labels: int = 20,
    is_gzip: bool = True,
) -> Damage:
    """Change the images' bytes, or those of the file after compression."""

    def write(root: Path) -> None:
        for name, data in (
            ("images-idx3", change(idx_bytes(PIXELS))),
            ("labels-idx1", idx_bytes(np.arange(labels, dtype=np.uint8))),
        ):
            pack = gzip.compress if is_gzip else bytes
            packed = pack(data)
            path = root / f"t10k-{name}-ubyte{'.gz' if is_gzip else ''}"
            path.write_bytes(after(packed) if name == "images-idx3" else packed)

    return write


def plan(**changes: Any) -> Damage:
    def write(root: Path) -> None:
        path = root / shards.PLAN
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return write


def file(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda root: (root / name).write_bytes(change((root / name).read_bytes()))


def table(change: Callable[[pa.Table], pa.Table]) -> Damage:
    def write(root: Path) -> None:
        path = root / shards.MANIFEST / "shard-000000.parquet"
        pq.write_table(change(pq.read_table(path)), path)

    return write


def column(values: list[Any], kind: pa.DataType) -> Damage:
    return table(lambda t: t.set_column(1, "class", pa.array(values, kind)))


def manifest_is_a_file(root: Path) -> None:
    for path in (root / shards.MANIFEST).iterdir():
        path.unlink()
    (root / shards.MANIFEST).rmdir()
    (root / shards.MANIFEST).write_bytes(b"")


def renamed(old: str, new: str) -> Damage:
    """Copy a part of the manifest, and remove the last one, so that the number is right again."""

    def write(root: Path) -> None:
        folder = root / shards.MANIFEST
        (folder / new).write_bytes((folder / old).read_bytes())
        (folder / "shard-000002.parquet").unlink()

    return write


def longer_shard(root: Path) -> None:
    path = root / "shard-000000.tar"
    with tarfile.open(path, "a") as archive:
        for name in ("000000004.png", "000000004.cls"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())


CLASSES = LABELS[:4].tolist()
FIRST, TAR = "shard-000000.tar", "manifest/shard-000000.parquet"
DAMAGES: dict[tuple[str, str], Damage] = {
    ("image", "0 bytes"): image(b""),
    ("image", "no image format"): image(b"no picture" * 50),
    ("image", "more than 64 MiB"): huge,
    ("image", "header announces 65536 x 65536 pixels"): image(BOMB),
    ("PNG", "cut off"): image(PNG[: len(PNG) // 2]),
    ("PNG", "one byte of the pixels changed"): image(changed(PNG, 0.5)),
    ("JPEG", "cut off in the header"): image(JPEG[:100], "0.jpg"),
    ("JPEG", "cut off in the pixels"): image(JPEG[: len(JPEG) * 3 // 4], "0.jpg"),
    ("JPEG", "one byte of the pixels changed"): image(changed(JPEG, 0.8), "0.jpg"),
    ("folder", "a file in its place"): a_file_for_the_folder,
    ("folder", "a link back to a folder above"): lambda root: (root / "a" / "b").symlink_to(root),
    ("folder", "a broken link to an image"): lambda root: (root / "a" / "1.png").symlink_to("none"),
    ("folder", "an image beside the class folders"): lambda root: (root / "1.png").write_bytes(PNG),
    ("folder", "a class folder without images"): lambda root: (root / "b").mkdir(),
    ("classes.txt", "a byte order mark"): classes("\ufeffa\nb\n".encode()),
    ("classes.txt", "UTF-16"): classes("a\nb\n".encode("utf-16")),
    ("classes.txt", "a name twice"): classes(b"a\na\n"),
    ("classes.txt", "0 bytes"): classes(b""),
    ("tar", "0 bytes"): edited_tar(lambda data: b""),
    ("tar", "compressed with gzip"): edited_tar(gzip.compress),
    ("tar", "cut off behind a sample"): edited_tar(lambda data: data[: start_of(2)]),
    ("tar", "cut off in an image"): edited_tar(lambda data: data[: start_of(2) + 600]),
    ("tar", "a damaged header in the middle"): edited_tar(
        lambda data: data[: start_of(2)] + b"?" + data[start_of(2) + 1 :]
    ),
    ("tar", "two tars joined"): edited_tar(lambda data: data + data),
    ("tar", "a link"): link,
    ("tar", "a dot in a key"): tar([("v1.5_0.png", PNG), ("v1.5_0.cls", b"0")]),
    ("tar", "an image without a label"): tar(SAMPLES[:3]),
    ("tar", "a label that is not a whole number"): tar([("0.png", PNG), ("0.cls", b"0.7")]),
    ("tar", "a second label"): tar([*SAMPLES, ("0.cls", b"1")]),
    ("idx.gz", "0 bytes"): idx(after=lambda data: b""),
    ("idx.gz", "cut off"): idx(after=lambda data: data[:-9]),
    ("idx.gz", "one byte of the compressed data changed"): idx(after=lambda d: changed(d, 0.5)),
    ("idx.gz", "more bytes than its header announces"): idx(lambda data: data + bytes(10**8)),
    ("idx.gz", "header announces more than the file can hold"): idx(
        lambda data: data[:4] + struct.pack(">I", 2**31) + data[8:]
    ),
    ("idx.gz", "fewer labels than images"): idx(labels=19),
    ("idx.gz", "numbers of another type"): idx(lambda data: data[:2] + b"\x0d" + data[3:]),
    ("idx", "cut off"): idx(lambda data: data[:-9], is_gzip=False),
    ("idx", "one pixel changed"): idx(lambda data: changed(data, 0.5), is_gzip=False),
    ("job.json", "0 bytes"): file(shards.PLAN, lambda data: b""),
    ("job.json", "text for a number"): plan(num_images="many"),
    ("job.json", "a number beyond all bounds"): plan(num_images=10**400),
    ("job.json", "fewer class names than classes"): plan(class_names=["a"]),
    ("manifest", "a file in its place"): manifest_is_a_file,
    ("manifest", "a shard under a second name"): renamed(
        "shard-000000.parquet", "shard-0000000.parquet"
    ),
    ("manifest", "a shard that the plan does not have"): renamed(
        "shard-000002.parquet", "shard-000007.parquet"
    ),
    ("manifest", "a shard is missing"): lambda root: (root / TAR).unlink(),
    ("parquet", "0 bytes"): file(TAR, lambda data: b""),
    ("parquet", "cut off"): file(TAR, lambda data: data[: len(data) // 2]),
    ("parquet", "bytes added at the end"): file(TAR, lambda data: data + b"more"),
    ("parquet", "a row too few"): table(lambda t: t.slice(0, 3)),
    ("parquet", "a row twice"): table(lambda t: pa.concat_tables([t, t.slice(0, 1)])),
    ("parquet", "classes that are not whole numbers"): column(
        [c + 0.7 for c in CLASSES], pa.float64()
    ),
    ("parquet", "empty fields"): column([None, *CLASSES[1:]], pa.int32()),
    ("parquet", "a class of another image"): column(
        [(CLASSES[0] + 1) % 4, *CLASSES[1:]], pa.int32()
    ),
    ("shard", "missing"): lambda root: (root / FIRST).unlink(),
    ("shard", "cut off"): file(FIRST, lambda data: data[:1500]),
    ("shard", "bytes added at the end"): file(FIRST, lambda data: data + b"more"),
    ("shard", "zeros added at the end"): file(FIRST, lambda data: data + bytes(10240)),
    ("shard", "one byte of an image changed"): file(
        FIRST, lambda data: data[:540] + b"?" + data[541:]
    ),
    ("shard", "one byte of a header changed"): file(FIRST, lambda data: b"1" + data[1:]),
    ("shard", "a sample too many"): longer_shard,
    ("shard", "another shard in its place"): lambda root: (root / FIRST).write_bytes(
        (root / "shard-000001.tar").read_bytes()
    ),
}


def prepare(root: Path, kind: str) -> Callable[[Path], None]:
    """Make a whole set of the kind that a damage is done to; returns what reads it."""
    root.mkdir()
    if kind in ("image", "PNG", "JPEG", "folder", "classes.txt"):
        (root / "a").mkdir()
        if kind in ("folder", "classes.txt"):
            (root / "a" / "0.png").write_bytes(PNG)
        return read_test_set
    if kind == "tar":
        return read_test_set
    if kind.startswith("idx"):
        return read_idx
    write_shards(root, IMAGES, LABELS, 4)
    return read_shards


def test_the_page_and_the_damages_here_are_the_same() -> None:
    assert [row[:2] for row in ROWS] == list(DAMAGES)


@pytest.mark.parametrize(("kind", "damage", "result"), ROWS)
def test_damage_gives_what_the_page_says(
    kind: str, damage: str, result: str, tmp_path: Path
) -> None:
    root = tmp_path / "set"
    read = prepare(root, kind)
    DAMAGES[kind, damage](root)
    words = re.match(r"`([^`]+)`$", result)
    if words is None:
        assert result.startswith(("read", "not noticed", "incomplete"))
        read(root)
        return
    with pytest.raises(ValueError, match=re.escape(words[1])) as error:
        read(root)
    assert "\n" not in str(error.value) and str(root) in str(error.value)


def test_a_set_with_a_missing_shard_is_never_complete(tmp_path: Path) -> None:
    write_shards(tmp_path, IMAGES, LABELS, 4)
    (tmp_path / TAR).unlink()
    assert not ShardSource(tmp_path).is_complete
    table = (tmp_path / "manifest" / "shard-000001.parquet").read_bytes()
    (tmp_path / "manifest" / "shard-0000001.parquet").write_bytes(table)
    with pytest.raises(shards.SourceError, match="would be counted twice"):
        ShardSource(tmp_path)


def test_sources_name_a_file_that_is_given_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(shards.SourceError, match=r"a\.tar: got a file, expected a directory; give"):
        find_kind(tmp_path / "a.tar")


def test_the_bounds_of_a_plan_are_inclusive() -> None:
    plan_of = make_plan(IMAGES, 4).model_dump()
    assert shards.Plan(**plan_of | {"num_images": shards.MOST_IMAGES}).num_images == 10**15
    for wrong in (0, shards.MOST_IMAGES + 1):
        for name in ("num_images", "images_per_shard"):
            with pytest.raises(ValueError, match=name):
                shards.Plan(**plan_of | {name: wrong})
