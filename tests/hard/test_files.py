"""Random damage to every kind of file that is read: equal values, or one line; never a hang.

A case changes, cuts, copies, removes or inserts bytes of a whole file and reads it. Formats with
a checksum (gzip, PNG, generated shards) must give equal values or the line. Others may give other
values where the bytes are values, but of the same shape.
"""

from __future__ import annotations

import faulthandler
import gzip
import io
import math
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_sets import picture, write_shard
from shard_files import encode, random_images, write_shards

from dmkd_fast import InputSpec, open_set
from dmkd_fast.data import shards
from dmkd_fast.data.sources import ShardSource

pytestmark = pytest.mark.hard
CPU = torch.device("cpu")
SPEC = InputSpec(size=24, mean=(0.0,) * 3, std=(1.0,) * 3)
LONGEST_S, MOST_MIB = 5.0, 400
IMAGES, LABELS = random_images(6)
Numbers = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\1")


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """One to three random edits."""
    edited = bytearray(data)
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(0, len(edited) + 1))
        size = int(min(2 ** random.integers(0, 12), len(edited)))
        kind = random.integers(0, 7)
        if kind == 0 and at < len(edited):
            edited[at] ^= 1 << random.integers(0, 8)
        elif kind == 1 and at < len(edited):
            edited[at] = random.integers(0, 256)
        elif kind == 2:
            del edited[at:]
        elif kind == 3:
            del edited[at : at + size]
        elif kind == 4:
            edited[at:at] = random.bytes(size)
        elif kind == 5:
            edited[at:at] = edited[-size:] if size else b""
        else:
            edited[at : at + 4] = Numbers[random.integers(0, len(Numbers))]
    return bytes(edited)


def peak_mib() -> float:
    """Highest resident memory since the last call."""
    with open("/proc/self/status", encoding="ascii") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    return peak / 1024


def attack(
    root: Path,
    name: str,
    read: Callable[[], Any],
    same: Callable[[Any], bool],
    count: int,
    edit: Callable[[bytes, np.random.Generator], bytes] = damaged,
) -> list[str]:
    """Damage a file many times; returns what went wrong, with the number of the case."""
    path, wrong = root / name, []
    intact = path.read_bytes()
    assert same(read())
    peak_mib()
    before = peak_mib()
    refused = 0
    for case in range(count):
        path.write_bytes(edit(intact, np.random.default_rng(case)))
        faulthandler.dump_traceback_later(60, exit=True)
        started = time.monotonic()
        try:
            if not same(read()):
                wrong.append(f"case {case}: other values")
        except ValueError as error:
            refused += 1
            if "\n" in str(error) or len(str(error)) > 600 or str(root) not in str(error):
                wrong.append(f"case {case}: {type(error).__name__}: {error}")
        except Exception as error:
            wrong.append(f"case {case}: {type(error).__name__}: {error}")
        finally:
            faulthandler.cancel_dump_traceback_later()
        if time.monotonic() - started > LONGEST_S:
            wrong.append(f"case {case}: took {time.monotonic() - started:.1f} s")
        grown = peak_mib() - before
        if grown > MOST_MIB:
            wrong.append(f"case {case}: {grown:.0f} MiB")
    path.write_bytes(intact)
    assert same(read())
    if refused < count // 10:
        wrong.append(f"only {refused} of {count} cases were refused")
    return wrong


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[[str, int, list[str]], None]:
    def tell(claim: str, cases: int, wrong: list[str]) -> None:
        record_property("claim", claim)
        record_property("cases", cases)
        record_property("failures", len(wrong))
        assert not wrong, wrong[:10]

    return tell


def idx_file(values: np.ndarray) -> bytes:
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.tobytes()


@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
@pytest.mark.parametrize("ending", [".gz", ""])
def test_idx_files(
    kind: str, ending: str, tmp_path: Path, num_cases: Callable[[int, int], int], report: Any
) -> None:
    pixels, labels = np.squeeze(IMAGES), (LABELS % 4).astype(np.uint8)
    for name, values in (("images-idx3", pixels), ("labels-idx1", labels)):
        data = gzip.compress(idx_file(values)) if ending else idx_file(values)
        (tmp_path / f"t10k-{name}-ubyte{ending}").write_bytes(data)

    def same(found: Any) -> bool:
        if not ending:  # no checksum
            return len(found.images) == len(found.labels) >= 1 and found.images.ndim == 4
        return np.array_equal(found.images[:, 0], pixels) and np.array_equal(found.labels, labels)

    count = num_cases(1500, 300)
    name = f"t10k-{kind}-ubyte{ending}"
    wrong = attack(tmp_path, name, lambda: open_set(tmp_path, CPU), same, count)
    report("a damaged idx file gives equal values or one line", count, wrong)


def test_whole_gzip_files_of_damaged_idx_data(
    tmp_path: Path, num_cases: Callable[[int, int], int], report: Any
) -> None:
    for name, values in (("images-idx3", np.squeeze(IMAGES)), ("labels-idx1", LABELS)):
        data = gzip.compress(idx_file(values.astype(np.uint8)))
        (tmp_path / f"t10k-{name}-ubyte.gz").write_bytes(data)
    zeros = gzip.compress(bytes(2 * MOST_MIB * 2**20), 1)  # follows what the header announces

    def rezip(data: bytes, random: np.random.Generator) -> bytes:
        body = damaged(gzip.decompress(data), random)
        announced = math.prod(struct.unpack(">3I", body[4:16].ljust(12, b"\0")))
        return gzip.compress(body, 1) + (announced < 2**20) * zeros

    count = num_cases(200, 40)
    wrong = attack(
        tmp_path,
        "t10k-images-idx3-ubyte.gz",
        lambda: open_set(tmp_path, CPU),
        lambda found: found.images.shape == IMAGES.shape,
        count,
        rezip,
    )
    report("idx data behind a valid checksum gives its shape or one line", count, wrong)


@pytest.mark.parametrize("name", ["shard-000001.tar", "manifest/shard-000001.parquet", "job.json"])
def test_generated_shards(
    name: str, tmp_path: Path, num_cases: Callable[[int, int], int], report: Any
) -> None:
    write_shards(tmp_path, IMAGES, LABELS, 2)
    whole = [encode(image[0]) for image in IMAGES]

    def read() -> tuple[list[bytes], list[int]]:
        source = ShardSource(tmp_path)
        ids = np.sort(source.first_pass)
        return [source.read(int(i)) for i in ids], source.labels_of(ids).tolist()

    def same(found: tuple[list[bytes], list[int]]) -> bool:
        images, labels = found
        return images == whole and labels == LABELS.tolist()

    def plan_fits(found: tuple[list[bytes], list[int]]) -> bool:
        # A changed number of images or classes is another plan, under which these may be a part.
        return found[0] == whole[: len(found[0])] and found[1] == LABELS.tolist()[: len(found[1])]

    count = num_cases(2500, 400)
    wrong = attack(tmp_path, name, read, plan_fits if name == shards.PLAN else same, count)
    report("a damaged file of generated shards gives equal values or one line", count, wrong)


def test_tars_of_others(tmp_path: Path, num_cases: Callable[[int, int], int], report: Any) -> None:
    images = [encode(np.asarray(picture(i, 24, 24))) for i in range(6)]
    members = [(f"part/{'x' * 120}{i}.png", image) for i, image in enumerate(images)]
    members += [(name.replace("png", "cls"), b"%d" % i) for i, (name, _) in enumerate(members)]
    write_shard(tmp_path / "0.tar", members)

    def read() -> list[tuple[bytes, int]]:
        found = open_set(tmp_path, CPU, num_classes=9)
        return [(item.read(), item.label) for item in found.items]  # type: ignore

    # Members have no checksum: their number, and that nothing else is read, is what can be known.
    count = num_cases(2500, 400)
    wrong = attack(tmp_path, "0.tar", read, lambda found: 1 <= len(found) <= 12, count)
    report("a damaged WebDataset shard gives samples or one line", count, wrong)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM"])
def test_image_files(
    kind: str, tmp_path: Path, num_cases: Callable[[int, int], int], report: Any
) -> None:
    (tmp_path / "a").mkdir()
    name = f"a/0.{kind.lower()}"
    (tmp_path / name).write_bytes(encode(np.asarray(picture(1, 24, 24)), kind))

    def read() -> torch.Tensor:
        ((views, _),) = open_set(tmp_path, CPU).batches([SPEC])
        return views[SPEC]

    intact = read()

    def same(found: torch.Tensor) -> bool:
        # Of these formats only PNG has a checksum.
        return torch.equal(found, intact) if kind == "PNG" else found.shape == intact.shape

    count = num_cases(200, 40)
    wrong = attack(tmp_path, name, read, same, count)
    report("a damaged image file is decoded or is one line", count, wrong)


def test_class_lists(tmp_path: Path, num_cases: Callable[[int, int], int], report: Any) -> None:
    buffer = io.BytesIO()
    picture(0, 24, 24).save(buffer, "PNG")
    for name in ("ant", "bee", "fünf"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(buffer.getvalue())
    (tmp_path / "classes.txt").write_text("bee\nfünf\nant\n", encoding="utf-8")
    count = num_cases(1000, 200)
    wrong = attack(
        tmp_path,
        "classes.txt",
        lambda: open_set(tmp_path, CPU).class_names,
        lambda found: sorted(found) == ["ant", "bee", "fünf"],
        count,
    )
    report("a damaged list of classes is a whole list or one line", count, wrong)
