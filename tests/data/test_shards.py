"""Shards on disk: what is written can be read by others, and nothing else is ever believed."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shard_files import contents, encode, make_plan, random_images, write_shards

from dmkd_fast.data import plain_tars, shards
from dmkd_fast.data.sources import ShardSource

IMAGES, LABELS = random_images(10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "set", IMAGES, LABELS, 4)
    return tmp_path / "set"


def test_shards_are_read_by_tarfile_and_by_dalis_webdataset_reader(folder: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    paths = sorted(str(p) for p in folder.glob("*.tar"))
    members = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.isreg() and member.mtime == member.uid == member.gid == 0
                members[member.name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    for i in range(10):
        assert np.array_equal(
            np.asarray(Image.open(io.BytesIO(members[f"{i:09d}.png"]))), IMAGES[i, 0]
        )
        assert int(members[f"{i:09d}.cls"]) == LABELS[i]
    with dali.Pipeline(
        batch_size=10, num_threads=1, device_id=None, prefetch_queue_depth=1
    ) as pipe:
        encoded, classes = dali.fn.readers.webdataset(paths=paths, ext=["png", "cls"])
        pipe.set_outputs(encoded, classes)
    encoded, classes = pipe.run()
    for i in range(10):
        assert encoded.at(i).tobytes() == members[f"{i:09d}.png"]
        assert int(classes.at(i).tobytes()) == LABELS[i]


def test_manifest_is_one_table_for_parquet_readers(folder: Path) -> None:
    table = pq.read_table(folder / shards.MANIFEST)
    assert table["id"].to_pylist() == list(range(10))
    assert table["class"].to_pylist() == LABELS.tolist()
    assert table["shard"].to_pylist() == [f"shard-{i // 4:06d}" for i in range(10)]
    assert table.column_names == [
        "id",
        "class",
        "seed",
        "guidance_scale",
        "num_steps",
        "solver",
        "denoiser",
        "revision",
        "teacher_class",
        "teacher_probability",
        "shard",
        "sha256",
    ]


def test_same_images_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "again", IMAGES, LABELS, 4, [2, 0, 1])
    assert contents(tmp_path / "again") == contents(folder)


def test_a_source_reads_back_what_was_written(folder: Path) -> None:
    source = ShardSource(folder)
    assert source.is_complete and source.first_pass.tolist() == list(range(10))
    ids = np.array([9, 0, 5, 4])
    assert source.labels_of(ids).tolist() == LABELS[ids].tolist()
    assert [source.read(i) for i in range(10)] == [encode(image[0]) for image in IMAGES]


def _member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in fields.items():
        setattr(member, key, value)
    return member, data


def _tar(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    for member, data in members:
        file.write(member.tobuf(form))
        file.write(data + bytes(-len(data) % 512))
    return file.getvalue() + bytes(1024)


PNG = encode(IMAGES[0, 0])
HOSTILE = {
    "symlink": _tar(_member("000000000.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    "hardlink": _tar(_member("000000000.png", type=tarfile.LNKTYPE, linkname="../secret")),
    "file with a link name": _tar(_member("000000000.png", PNG, linkname="/etc/passwd")),
    "absolute path": _tar(_member("/etc/cron.d/000000000.png", PNG)),
    "parent folder": _tar(_member("../000000000.png", PNG)),
    "sub-folder": _tar(_member("a/000000000.png", PNG)),
    "long prefix": _tar(_member("a" * 90 + "/" + "000000000.png", PNG)),
    "folder": _tar(_member("000000000.png", type=tarfile.DIRTYPE)),
    "device": _tar(_member("000000000.png", type=tarfile.CHRTYPE, devmajor=1, devminor=3)),
    "fifo": _tar(_member("000000000.png", type=tarfile.FIFOTYPE)),
    "pax header": _tar(
        _member("000000000.png", PNG, pax_headers={"path": "../../evil"}), form=tarfile.PAX_FORMAT
    ),
    "long GNU name": _tar(_member("0" * 200 + ".png", PNG), form=tarfile.GNU_FORMAT),
    "sparse": _tar(_member("000000000.png", PNG, type=tarfile.GNUTYPE_SPARSE)),
    "program": _tar(_member("000000000.py", b"import os")),
    "pickle": _tar(_member("000000000.pkl", b"cos\nsystem\n")),
    "no name": _tar(_member("", PNG)),
    "hidden suffix": _tar(_member("000000000.png\n", PNG)),
    "huge": _tar(_member("000000000.png", size=2**32 - 1)),
    "huge in base 256": _tar(_member("000000000.png", size=2**40), form=tarfile.GNU_FORMAT),
    "beyond the end": _tar(_member("000000000.png", size=60_000_000)),
    "too many": _tar(*[_member("000000000.png", PNG)] * 9),
    "other order": _tar(_member("000000000.cls", b"0"), _member("000000000.png", PNG)),
    "twice": _tar(*[_member("000000000.png", PNG), _member("000000000.cls", b"0")] * 4),
    "empty": b"",
    "zeros": bytes(10240),
    "no tar": b"GIF89a" * 1000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tars_are_refused(folder: Path, name: str) -> None:
    (folder / "shard-000000.tar").write_bytes(HOSTILE[name])
    with pytest.raises(shards.SourceError, match="shard-000000") as error:
        ShardSource(folder)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_found_or_changes_no_image(folder: Path) -> None:
    path, chance = folder / "shard-000001.tar", random.Random(0)
    intact, messages = path.read_bytes(), []
    for _ in range(300):
        damaged = bytearray(intact)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            source = ShardSource(folder)
            read = [source.read(i) for i in range(4, 8)]
        except shards.SourceError as error:
            messages.append(str(error))
        else:
            assert read == [encode(image[0]) for image in IMAGES[4:8]]
            assert source.labels_of(np.arange(4, 8)).tolist() == LABELS[4:8].tolist()
    assert all("shard-000001" in message for message in messages)
    assert len(messages) > 20  # most of so small a tar is padding


def test_every_truncation_is_found(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    intact = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    for length in [*range(0, end, 97), end, end + 512, end + 1023]:
        path.write_bytes(intact[:length])
        with pytest.raises(shards.SourceError, match="shard-000001"):
            ShardSource(folder)
    path.unlink()
    with pytest.raises(shards.SourceError, match="No such file"):
        ShardSource(folder)


def _edit(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    return lambda path: pq.write_table(change(pq.read_table(path)), path)


def _set(name: str, value: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        place = table.column_names.index(name)
        kind = table.schema.field(name).type if isinstance(value, int) else None
        return table.set_column(place, name, pa.array([value] * len(table), kind))

    return change


MANIFESTS: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "empty": lambda path: path.write_bytes(b""),
    "no parquet": lambda path: path.write_text("id,class\n0,1\n"),
    "fewer rows": _edit(lambda table: table.slice(0, 3)),
    "more rows": _edit(lambda table: pa.concat_tables([table, table])),
    "ids twice": _edit(_set("id", 0)),
    "text as ids": _edit(_set("id", "0")),
    "other column of hashes": _edit(_set("sha256", 7.5)),
    "no class": _edit(lambda table: table.drop_columns(["class"])),
    "class too large": _edit(_set("class", 4)),
    "negative class": _edit(_set("class", -1)),
    "other class": _edit(_set("class", (LABELS[0] + 1) % 4)),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_damaged_manifests_are_refused(folder: Path, name: str) -> None:
    MANIFESTS[name](folder / shards.MANIFEST / "shard-000000.parquet")
    with pytest.raises(shards.SourceError, match="shard-000000") as error:
        ShardSource(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"num_images": 0}', json.dumps({"num_images": "many"}), "\x00"]
)
def test_a_damaged_plan_is_one_clear_line(folder: Path, text: str) -> None:
    (folder / shards.PLAN).write_text(text)
    with pytest.raises(shards.SourceError, match=r"job\.json") as error:
        ShardSource(folder)
    assert "\n" not in str(error.value)


def test_a_crash_before_any_disk_call_leaves_only_whole_shards(tmp_path: Path) -> None:
    script = [
        sys.executable,
        str(Path(__file__).parents[1] / "helpers" / "shard_files.py"),
        str(tmp_path),
    ]
    done = subprocess.run(
        script,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["crashes"] > 40 and counts["torn"] == counts["differing"] == 0, counts


def test_shards_are_indexed_by_position_as_tarfile_indexes_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = shards.read_plan(folder)
    for number in range(plan.num_shards):
        fast = shards.load_shard(folder, plan, number)
        assert plain_tars.plain_places(fast.path, plan.ids(number), fast.labels) is not None
        with monkeypatch.context() as patch:
            patch.setattr(shards, "plain_places", lambda *args: None)
            slow = shards.load_shard(folder, plan, number)
        assert fast.offsets.tolist() == slow.offsets.tolist()
        assert fast.sizes.tolist() == slow.sizes.tolist()


def test_jobs_with_the_same_process_id_write_under_different_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two containers that write into one directory may give their jobs the same id."""
    names: list[str] = []
    for call in ("link", "replace"):
        own = getattr(os, call)

        def noted(source: Path, target: Path, own: Callable[..., None] = own) -> None:
            names.append(source.name)
            own(source, target)

        monkeypatch.setattr(os, call, noted)
    for job in ("0", "1"):
        shards.claim(tmp_path / job, make_plan(IMAGES, 4))
    assert len(names) == len(set(names)) == 6  # the plan, the card and timm's file, twice


def test_a_file_that_an_interrupt_left_open_is_removed_with_the_lock(tmp_path: Path) -> None:
    """One came between the opening of a shard and the call that would have discarded it."""
    ours, other = (tmp_path / f".shard-000001.tar.{part}.partial" for part in ("0-of-1", "1-of-2"))

    def interrupted() -> None:
        with shards.locked(tmp_path, "0-of-1"):
            ours.write_bytes(b"half")
            other.write_bytes(b"of another slice")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert other.exists() and not ours.exists()
