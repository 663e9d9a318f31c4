"""Directories of generated images: WebDataset tar shards, a parquet manifest and a plan.

`jobs/generate.py` writes such a directory, and `data/sources.py` reads it. The directory holds

    job.json                       the `Plan`: how many images there will be, and how they are made
    README.md, _info.json          the same for other readers, see `data/dataset_card.py`
    shard-000000.tar               ID.png and ID.cls for each of its ids, in order
    shard-000000.logits.parquet    teacher logits, if there are any: `data/teacher_logits.py`
    manifest/shard-000000.parquet  one row per image; it exists once the shard is finished

The manifest of the whole directory is the union of the files in `manifest/`, which parquet readers
accept as one table (`pyarrow.parquet.read_table("DIR/manifest")`). So concurrent jobs never write
the same file. Nothing is extracted from a tar: members are byte ranges, checked against the
manifest. Shapes: n images of a shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import re
import secrets
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from dmkd_fast.data import dataset_card, manifest
from dmkd_fast.data.listing import MOST_BYTES, MOST_PIXELS, read_image
from dmkd_fast.data.listing import SourceError as SourceError
from dmkd_fast.data.plain_tars import plain_places
from dmkd_fast.data.tar_files import tar_members
from dmkd_fast.data.teacher_logits import LogitsFile, LogitsPlan, LogitsWriter
from dmkd_fast.runtime import files
from dmkd_fast.runtime.errors import UserError

PLAN, MANIFEST = "job.json", "manifest"
# Ids of later passes continue after those of the first pass and must fit in int64.
MOST_IMAGES = 10**15
_SHARD = re.compile(r"shard-([0-9]{6,})\.parquet")


class Plan(BaseModel):
    """The content of a complete directory, and the settings of its images."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    num_images: int = Field(ge=1, le=MOST_IMAGES)
    images_per_shard: int = Field(ge=1, le=MOST_IMAGES)
    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    num_classes: int = Field(ge=1)
    class_names: tuple[str, ...]
    license: str
    """License of the denoiser's weights."""
    settings: dict[str, Any]
    """Everything that an image or its row depends on: seed, denoiser, sampler, dtype, teacher."""
    teacher_logits: LogitsPlan | None = None
    """Stored teacher logits. They depend on seed, dtype and teacher in `settings` too."""

    @property
    def num_shards(self) -> int:
        """Number of shards in the complete directory."""
        return -(-self.num_images // self.images_per_shard)

    @property
    def logits_bytes(self) -> int:
        """Bytes of the stored teacher logits of an image."""
        plan = self.teacher_logits
        return 0 if plan is None else plan.bytes_per_image(self.num_classes)

    def ids(self, shard: int) -> range:
        """Return the image ids of a shard."""
        start = shard * self.images_per_shard
        return range(start, min(start + self.images_per_shard, self.num_images))

    def difference(self, other: Plan) -> str:
        """Describe the first setting that differs from `other`; return "" if none does."""
        mine, theirs = (dict(_flat(plan.model_dump(mode="json"))) for plan in (self, other))
        for name in [*mine, *theirs]:
            if mine.get(name) != theirs.get(name):
                return f"{name} is {mine.get(name)!r} there and {theirs.get(name)!r} here"
        return ""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A finished shard: position, class and hash of each image."""

    path: Path
    first_id: int
    labels: np.ndarray
    """Classes, (n,) int64."""
    offsets: np.ndarray
    """Position of each PNG in the tar in bytes, (n,) int64."""
    sizes: np.ndarray
    """Size of each PNG in bytes, (n,) int64."""
    hashes: list[str]
    """SHA-256 of each PNG."""
    logits: LogitsFile | None = None

    def read(self, image_id: int) -> bytes:
        """Read the PNG of an id and verify its hash.

        Raises:
            SourceError: The tar cannot be read, or the bytes differ from those that were written.
        """
        row, name = image_id - self.first_id, f"{image_id:09d}.png"
        offset, size = int(self.offsets[row]), int(self.sizes[row])
        data = read_image(self.path, f"{self.path}: {name}", offset, size)
        if hashlib.sha256(data).hexdigest() != self.hashes[row]:
            raise SourceError(
                f"{self.path}: the bytes of {name} are not those of the manifest; run the same "
                "dmkd generate again, which makes damaged shards again"
            )
        return data

    def read_logits(self, image_id: int) -> dict[str, np.ndarray]:
        """Read the teacher logits of an id and verify their hash; see `LogitsPlan.arrays`.

        Raises:
            SourceError: The file cannot be read, or the bytes differ from those that were written.
        """
        assert self.logits is not None, "the plan has teacher logits"
        return self.logits.read(image_id - self.first_id)


def read_plan(folder: Path) -> Plan:
    """Read the plan of a directory.

    Raises:
        SourceError: The plan is missing or damaged.
    """
    path = folder / PLAN
    try:
        with path.open("rb") as file:
            plan = Plan.model_validate_json(file.read(MOST_BYTES))
    except OSError as error:
        raise SourceError(
            f"{path}: {error.strerror}, expected a directory made by dmkd generate"
        ) from None
    except ValidationError as error:
        reason = error.errors()[0]
        where = " ".join(f"{'.'.join(map(str, reason['loc']))} {reason['msg']}".split())[:120]
        raise SourceError(f"{path}: damaged ({where}); make the directory again") from None
    channels, height, width = plan.image_shape
    if channels not in (1, 3) or height * width > MOST_PIXELS:
        raise SourceError(f"{path}: damaged (image_shape); make the directory again")
    if len(plan.class_names) != plan.num_classes:
        raise SourceError(f"{path}: damaged (class_names); make the directory again")
    return plan


def claim(folder: Path, plan: Plan) -> None:
    """Create a directory for a plan, or check that it was created for the same plan.

    Raises:
        UserError: The directory cannot be written, holds other files, or belongs to another plan.
        SourceError: The plan in the directory is damaged.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / PLAN).exists():
            _begin(folder, plan)
        dataset_card.write(folder, read_plan(folder))
        (folder / MANIFEST).mkdir(exist_ok=True)
        files.sync(folder)
    except OSError as error:
        raise UserError(
            f"--out: cannot write to {folder} ({error.strerror}); choose another"
        ) from None
    found = read_plan(folder).difference(plan)
    if found:
        raise UserError(
            f"--out: {folder} was made with other settings: {found}; choose another directory or "
            "put the setting back"
        )


@contextlib.contextmanager
def locked(folder: Path, job_slice: str) -> Iterator[None]:
    """Hold the lock of one job slice, and remove unfinished files of its last job and its own.

    The lock ends with the process, so a killed job does not block the next one.

    Args:
        folder: Directory that the job writes.
        job_slice: Job slice, as `i-of-n`.

    Raises:
        UserError: Another job holds the lock.
    """
    with files.locked(folder / f".{job_slice}.lock") as is_ours:
        if not is_ours:
            raise UserError(
                f"--shard: another job makes slice {job_slice} of {folder} now; wait for it or "
                "give another slice"
            )
        _remove_unfinished(folder, job_slice)
        try:
            yield
        finally:  # An interrupt may come while a file is opened, before anybody can discard it.
            _remove_unfinished(folder, job_slice)


def _remove_unfinished(folder: Path, job_slice: str) -> None:
    for pattern in (f".*.{job_slice}.partial", f"*/.*.{job_slice}.partial"):
        for left in folder.glob(pattern):
            left.unlink()


def finished(folder: Path) -> list[int]:
    """Return the numbers of the finished shards, in order.

    Raises:
        SourceError: The manifest is not a folder, or a shard is in it under two names.
    """
    rows, found = folder / MANIFEST, []
    if not rows.exists():  # the job that wrote the plan ended before it made the folder
        return []
    if not rows.is_dir():
        raise SourceError.invalid(rows, "a file", "a folder", "remove it")
    for match in filter(None, (_SHARD.fullmatch(entry.name) for entry in os.scandir(rows))):
        number = int(match[1])
        if match[0] != f"shard-{number:06d}.parquet":
            raise SourceError(
                f"{rows / match[0]}: got another name for shard-{number:06d}.parquet, whose "
                "images would be counted twice; remove it"
            )
        found.append(number)
    return sorted(found)


class ShardWriter:
    """Write one shard under temporary names until it is complete.

    `commit` renames first the tar and then the manifest.

    Args:
        folder: Directory that was passed to `claim`.
        shard: Number of the shard.
        job_slice: Job slice, as in `locked`.
        plan: Content of the directory.
    """

    def __init__(self, folder: Path, shard: int, job_slice: str, plan: Plan) -> None:
        self._folder, self._name = folder, f"shard-{shard:06d}"
        self._tar_path = folder / f".{self._name}.tar.{job_slice}.partial"
        self._rows_path = folder / MANIFEST / f".{self._name}.parquet.{job_slice}.partial"
        self._file = self._tar_path.open("wb")
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self._rows: list[dict[str, Any]] = []
        self._logits: LogitsWriter | None = None
        if plan.teacher_logits is not None:
            path = folder / f".{self._name}.logits.parquet.{job_slice}.partial"
            self._logits = LogitsWriter(path, plan.teacher_logits.arrays(plan.num_classes))

    def add(
        self,
        image_id: int,
        label: int,
        png: bytes,
        row: dict[str, Any],
        logits: dict[str, bytes] | None = None,
    ) -> None:
        """Append an image.

        Args:
            image_id: Id of the image.
            label: Class of the image.
            png: Encoded image.
            row: Other columns of its manifest row.
            logits: Arrays of its teacher logits, if the plan has any.
        """
        for kind, data in (("png", png), ("cls", b"%d" % label)):
            # A new TarInfo has time 0 and owner 0, so the same images give the same bytes.
            member = tarfile.TarInfo(f"{image_id:09d}.{kind}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
        facts = {"shard": self._name, "sha256": hashlib.sha256(png).hexdigest()}
        if self._logits is not None:
            facts["logits_sha256"] = self._logits.add(image_id, logits or {})
        self._rows.append({"id": image_id, "class": label, **row, **facts})

    def commit(self) -> None:
        """Flush to disk and make the shard visible."""
        if self._logits is not None:
            self._logits.close()
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        manifest.write(self._rows_path, self._rows)
        if self._logits is not None:
            os.replace(self._logits.path, self._folder / f"{self._name}.logits.parquet")
        os.replace(self._tar_path, self._folder / f"{self._name}.tar")
        files.sync(self._folder)
        os.replace(self._rows_path, self._folder / MANIFEST / f"{self._name}.parquet")
        files.sync(self._folder / MANIFEST)

    def discard(self) -> None:
        """Remove the files of a shard that has not been committed."""
        with contextlib.suppress(OSError):  # closing flushes a buffer, which fails on a full disk
            self._file.close()
        if self._logits is not None:
            self._logits.discard()
        for path in (self._tar_path, self._rows_path):
            path.unlink(missing_ok=True)


def withdraw(folder: Path, shard: int) -> None:
    """Remove a damaged shard from the manifest, so that it is made again."""
    (folder / MANIFEST / f"shard-{shard:06d}.parquet").unlink(missing_ok=True)
    files.sync(folder / MANIFEST)


def load_shard(folder: Path, plan: Plan, shard: int) -> Shard:
    """Load a finished shard, and check its tar headers against the manifest.

    Raises:
        SourceError: They do not agree, a file cannot be read, or a member is not allowed in shards.
    """
    name, ids = f"shard-{shard:06d}", plan.ids(shard)
    path, stored = folder / f"{name}.tar", plan.teacher_logits
    labels, hashes, logits_hashes = manifest.read(
        folder / MANIFEST / f"{name}.parquet", ids, plan.num_classes, with_logits=stored is not None
    )
    logits = None
    if stored is not None:
        file = folder / f"{name}.logits.parquet"
        logits = LogitsFile(file, stored.arrays(plan.num_classes), logits_hashes)
    places = plain_places(path, ids, labels)
    if places is not None:
        offsets, sizes = places
        return Shard(
            path=path,
            first_id=ids.start,
            labels=labels,
            hashes=hashes,
            offsets=offsets,
            sizes=sizes,
            logits=logits,
        )
    # Whatever differs from what `ShardWriter` writes is named here, or is allowed.
    wanted = [f"{i:09d}.{kind}" for i in ids for kind in ("png", "cls")]
    # One more than wanted: a longer shard is refused, and a whole one is read to its end.
    found = list(itertools.islice(tar_members(path), len(wanted) + 1))
    if [member.name for member, _ in found] != wanted:
        raise SourceError(f"{path}: members are not those of the manifest; make it again")
    for (member, text), label in zip(found[1::2], labels, strict=True):
        if text != b"%d" % label:
            raise SourceError(f"{path}: {member.name} is not the class of the manifest")
    images = [member for member, _ in found[::2]]
    return Shard(
        path=path,
        first_id=ids.start,
        labels=labels,
        hashes=hashes,
        offsets=np.array([m.offset_data for m in images], dtype=np.int64),
        sizes=np.array([m.size for m in images], dtype=np.int64),
        logits=logits,
    )


def _begin(folder: Path, plan: Plan) -> None:
    """Write the plan into a new directory."""
    # Jobs of other slices may be writing their first files at the same time.
    ours = (".", PLAN, MANIFEST, dataset_card.CARD, dataset_card.INFO, "shard-")
    kept = next((p.name for p in folder.iterdir() if not p.name.startswith(ours)), None)
    if kept is not None:
        raise UserError(f"--out: {folder} holds other files ({kept}); choose another")
    partial = folder / f".{PLAN}.{secrets.token_hex(8)}.partial"
    try:
        partial.write_bytes(plan.model_dump_json(indent=2).encode() + b"\n")
        files.sync(partial)
        with contextlib.suppress(FileExistsError):  # another job was first
            os.link(partial, folder / PLAN)
    finally:
        partial.unlink(missing_ok=True)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}".lstrip("."))
    else:
        yield name.removeprefix("settings."), value
