"""Read images from directories: generated shards, class sub-folders, or the paper's files.

A source has images 0 .. num_images - 1, with the class and the encoded bytes of each. Sources never
write to the directories. Shapes: n requested images.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from dmkd_fast.data import shards
from dmkd_fast.data.class_names import teacher_order
from dmkd_fast.data.listing import EXTENSIONS, SourceError, list_images, read_image, report_left_out
from dmkd_fast.data.shards import Plan, Shard

Kind = Literal["shards", "imagefolder", "paper"]
# File names in the published data sets of DM-KD (arXiv 2305.12954).
_PAPER = re.compile(r"class_(\d{1,9})_seed_\d+_num_\d+\.png")


class ShardSource:
    """A directory written by `dmkd generate`, complete or still growing.

    Args:
        folder: Path of the directory.

    Attributes:
        plan: Content of the complete directory.
        first_pass: Ids of the available images, in the order in which their shards were found.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan: Plan = shards.read_plan(folder)
        self.num_images = self.plan.num_images
        self._shards: dict[int, Shard] = {}
        self._order: list[int] = []
        self.first_pass: np.ndarray = np.empty(0, dtype=np.int64)
        self.poll()

    @property
    def is_complete(self) -> bool:
        """Whether all images are available."""
        return self.num_ready == self.num_images

    @property
    def num_ready(self) -> int:
        """Number of available images."""
        return len(self.first_pass)

    def poll(self) -> bool:
        """Load shards finished since the last call, and return whether there were any.

        Raises:
            SourceError: The manifest cannot be read, or a shard is damaged or of another set.
        """
        if self.is_complete:
            return False
        try:
            found = shards.finished(self.folder)
        except OSError as error:
            raise SourceError(f"{self.folder / shards.MANIFEST}: {error.strerror}") from None
        taken = set(self._order)
        if found and found[-1] >= self.plan.num_shards:
            expected = f"0 to {self.plan.num_shards - 1} by {shards.PLAN}"
            raise SourceError.invalid(
                self.folder / shards.MANIFEST, f"shard {found[-1]}", expected, "remove it"
            )
        fresh = [s for s in found if s not in taken]
        self._take(fresh)
        return bool(fresh)

    def labels_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the classes, (n,) int64, of ids, (n,) int64."""
        numbers = ids // self.plan.images_per_shard
        labels = np.empty_like(ids)
        for number in np.unique(numbers):
            shard, mine = self._shards[int(number)], numbers == number
            labels[mine] = shard.labels[ids[mine] - shard.first_id]
        return labels

    def read(self, image_id: int) -> bytes:
        """Read the encoded bytes of an image and verify them against the manifest."""
        return self._shards[image_id // self.plan.images_per_shard].read(image_id)

    def read_logits(self, image_id: int) -> dict[str, np.ndarray]:
        """Read the teacher logits of an image and verify them against the manifest."""
        return self._shards[image_id // self.plan.images_per_shard].read_logits(image_id)

    def name_of(self, image_id: int) -> str:
        """Return the shard and member name of an image, for messages."""
        shard = self._shards[image_id // self.plan.images_per_shard]
        return f"{shard.path}: {image_id:09d}.png"

    def state_dict(self) -> dict[str, object]:
        """Return the numbers of the loaded shards, in order, and the number of images."""
        return {"shards": list(self._order), "num_images": self.num_images}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Load the same shards in the same order, then those finished since.

        Raises:
            SourceError: A shard is gone, or the directory is a different one.
        """
        taken = state["shards"]
        assert isinstance(taken, list)
        there = set(shards.finished(self.folder))
        gone = [s for s in taken if s not in there]
        if gone or state["num_images"] != self.num_images:
            what = f"shard {gone[0]} is gone" if gone else "it has another number of images"
            raise SourceError(f"{self.folder}: not what the run was reading ({what}); put it back")
        self._order, self.first_pass = [], self.first_pass[:0]
        self._take(taken)
        self.poll()

    def _take(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number not in self._shards:
                self._shards[number] = shards.load_shard(self.folder, self.plan, number)
        self._order += numbers
        fresh = [np.array(self.plan.ids(number), dtype=np.int64) for number in numbers]
        self.first_pass = np.concatenate((self.first_pass, *fresh))


class FileSource:
    """Image files below a folder, each with a class.

    Args:
        folder: Root folder.
        names: Paths relative to the folder; image i is entry i.
        labels: Class of each file.
    """

    is_complete = True
    first_pass: np.ndarray | None = None
    """None: files have no order of their own, so the first pass is shuffled like all others."""

    def __init__(self, folder: Path, names: list[str], labels: list[int]) -> None:
        self.folder, self._names = folder, names
        self.num_images = self.num_ready = len(names)
        self._labels = np.array(labels, dtype=np.int64)

    def poll(self) -> bool:
        """Return False: files that are added during a run are ignored."""
        return False

    def labels_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the classes, (n,) int64, of ids, (n,) int64."""
        labels: np.ndarray = self._labels[ids]
        return labels

    def read(self, image_id: int) -> bytes:
        """Read the encoded bytes of an image; see `read_image`."""
        name = self.name_of(image_id)
        return read_image(name, name)

    def name_of(self, image_id: int) -> str:
        """Return the path of an image, for messages."""
        return os.path.join(self.folder, self._names[image_id])

    def state_dict(self) -> dict[str, object]:
        """Return a hash of names and classes."""
        return {"sha256": self._sha256}

    @cached_property
    def _sha256(self) -> str:
        text = "\n".join(f"{n} {c}" for n, c in zip(self._names, self._labels, strict=True))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Check that the files are the same as when the state was saved.

        Raises:
            SourceError: Files were added, removed or renamed, or classes differ.
        """
        if state != self.state_dict():
            raise SourceError(
                f"{self.folder}: files were added, removed or renamed since the run began; put "
                "them back or start a new run"
            )


Source = ShardSource | FileSource


def find_kind(folder: Path) -> Kind:
    """Find out from its content which kind of image directory a folder is.

    Raises:
        SourceError: The folder is not an image directory.
    """
    if (folder / shards.PLAN).is_file():
        return "shards"
    if folder.is_file():
        raise SourceError.invalid(folder, "a file", "a directory", f"give {folder.parent}")
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such directory; give one with images")
    names = list_images(folder).images
    if any(_PAPER.fullmatch(os.path.basename(name)) for name in names[:1]):
        return "paper"
    if names and all("/" in name for name in names):
        return "imagefolder"
    raise SourceError(
        f"{folder}: got neither {shards.PLAN} nor image files in class sub-folders nor files named "
        "class_X_seed_Y_num_Z.png; give another directory"
    )


def open_files(
    folder: Path, kind: Kind, *, num_classes: int, class_names: Sequence[str]
) -> FileSource:
    """Open images in class sub-folders or in the paper's layout, sorted by path.

    Args:
        folder: Root folder.
        kind: `imagefolder` or `paper`.
        num_classes: Number of the teacher's classes.
        class_names: Names of the classes, in the order of the labels; see `teacher_order`.

    Raises:
        SourceError: There are no images, or their classes are not the teacher's.
    """
    listing = list_images(folder)
    names = listing.images
    if not names:
        raise SourceError.invalid(folder, "no image file", ", ".join(EXTENSIONS))
    if kind == "paper":
        report_left_out(folder, listing.left_out)
        return FileSource(folder, names, [_paper_class(folder, n, num_classes) for n in names])
    order = teacher_order(folder, list(listing.by_class()), num_classes, class_names)
    label_of = {name: label for label, name in enumerate(order)}
    return FileSource(folder, names, [label_of[name.split("/")[0]] for name in names])


def _paper_class(folder: Path, name: str, num_classes: int) -> int:
    match = _PAPER.fullmatch(os.path.basename(name))
    if match is None:
        raise SourceError(
            f"{folder / name}: expected a file named class_X_seed_Y_num_Z.png; remove it or set "
            "source.kind=imagefolder"
        )
    if int(match[1]) >= num_classes:
        expected = f"0 to {num_classes - 1}, the teacher's classes"
        raise SourceError.invalid(folder / name, f"class {int(match[1])}", expected)
    return int(match[1])
