"""Real images that `dmkd pretrain` trains on: idx files, class folders or WebDataset shards.

Part of the training images is held out: it is never trained on, and all settings are chosen by
results on it. The test set, if there is one, is evaluated once, after the last step, and is only
reported. Images are kept on the training device as uint8; those of files and shards are decoded
once and then read from `cache.py`.

Shapes: N images, c channels, H x W pixels, S image size.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dmkd_fast.config.data import RealImagesConfig
from dmkd_fast.data import test_sets
from dmkd_fast.data.class_names import compare_class_names
from dmkd_fast.data.decode import Decoder
from dmkd_fast.data.listing import CLASS_NAMES, EXTENSIONS, Item, SourceError
from dmkd_fast.data.test_sets import EncodedSet, ImageSet, load_idx, open_set
from dmkd_fast.jobs.pretrain import cache
from dmkd_fast.runtime import files
from dmkd_fast.runtime.device import available_bytes
from dmkd_fast.runtime.errors import UserError, invalid, warn_once
from dmkd_fast.views.spec import InputSpec

HELD_OUT, HELD_OUT_FRACTION = 5_000, 0.1
HELD_OUT_FILE = "held_out.txt"
TESTS = ("test", "val", "valid", "validation")  # folders with test images; the first counts


@dataclass(frozen=True, kw_only=True)
class RealData:
    """Real images on the training device, in three sets."""

    train: ImageSet
    held_out: ImageSet
    test: ImageSet | None
    source: str
    """Which images are trained on, for the model card."""
    record: str
    """Text that names the held-out images; equal text means an equal split."""

    def write_record(self, folder: Path) -> None:
        """Record the split in a run directory, or compare it with the one of the run to resume.

        Raises:
            UserError: The images, or those held out, have changed since the run began.
        """
        path = folder / HELD_OUT_FILE
        if not path.is_file():
            files.replace(path, [self.record.encode("utf-8", "surrogateescape")])
            return
        before = path.read_bytes().decode("utf-8", "surrogateescape")
        if before == self.record:
            return
        if _all_images(before) == _all_images(self.record):
            got, expected = f"other images than those in {path}", "the same to be held out"
            raise invalid("data.held_out", got, expected, "set it back, or start a new run")
        raise UserError(
            f"--data: images were added, removed or renamed since {path} was written; put them "
            "back, or start a new run"
        )


def _all_images(record: str) -> str:
    """Return the part of a record about all images: how many, and of files the digest."""
    return record.partition("\n")[0].partition(" of ")[2]


class ListedImages(NamedTuple):
    """Real images that are known but not decoded, which may take minutes."""

    shape: tuple[int, int, int]
    """Shape of an image, (c, H, W)."""
    class_names: tuple[str, ...]
    decode: Callable[[], RealData]
    """Function that decodes them, or reads them from `cache.py`."""


def load_real(
    folder: Path, device: torch.device, config: RealImagesConfig | None = None
) -> RealData:
    """Read labeled images, and hold out some of them; see `list_real`."""
    return list_real(folder, device, config).decode()


def list_real(
    folder: Path, device: torch.device, config: RealImagesConfig | None = None
) -> ListedImages:
    """Find labeled images, and choose the ones to hold out; idx files are read at once.

    Args:
        folder: Folder with idx files (`train` and `t10k`), with one folder per class, or with
            shards; or with two such folders, `train` and one of `TESTS`. Beside class folders, a
            folder `train` with image files is a class of that name.
        device: Device of the images.
        config: Sizes and fractions.

    Raises:
        UserError: A file is missing or damaged, there are too few images, or a setting does not
            fit them.
    """
    config = config or RealImagesConfig()
    if any(folder.glob("*-images-idx3-ubyte*")):
        real = _load_idx(folder, device, config)
        channels, height, width = real.train.images.shape[1:]
        return ListedImages((channels, height, width), real.train.class_names, lambda: real)
    return _list_files(folder, device, config)


def _load_idx(folder: Path, device: torch.device, config: RealImagesConfig) -> RealData:
    """Read an idx folder; the last training images become the held-out set."""
    full = load_idx(folder, "train").to(device)
    total = len(full)
    count = HELD_OUT if config.held_out is None else max(1, round(config.held_out * total))
    if total <= count:
        raise invalid(
            str(folder),
            f"{total} training images",
            f"more than the {count} that are held out",
            "use a larger set",
        )
    full = _resized(full, config.image_size)
    return RealData(
        train=_rows(full, slice(None, -count)),
        held_out=_rows(full, slice(-count, None)),
        test=_resized(load_idx(folder, "t10k").to(device), config.image_size),
        source=f"the training images less the last {count:,}; the test images decided nothing",
        record=f"# the last {count} of {total} training images\n",
    )


def _list_files(folder: Path, device: torch.device, config: RealImagesConfig) -> ListedImages:
    """Find image files or shards; a fraction of each class becomes the held-out set."""
    if not folder.is_dir() or not any(folder.iterdir()):
        expected = "labeled images: idx files, class folders or WebDataset shards"
        raise invalid("--data", f"no images in {folder}", expected)
    if config.image_size is None:
        fix = "set it to the size to train at, for example data.image_size=32"
        raise invalid("data.image_size", "null for image files", "a number of pixels", fix)
    is_split = has_parts(folder)
    tests = [folder / name for name in TESTS if (folder / name).is_dir()]
    listed = folder / CLASS_NAMES
    classes = listed if is_split and listed.is_file() else None
    full = _open(folder / "train" if is_split else folder, device, classes, None)
    fraction = HELD_OUT_FRACTION if config.held_out is None else config.held_out
    kept, held_out_items = _split(full.items, full.class_names, fraction, folder)
    test = None
    if is_split and tests:
        test = _open(tests[0], device, classes, len(full.class_names))
        _check_classes(folder / "train", full.class_names, tests[0], test.class_names)
        names = full.class_names
        compare_class_names(str(folder / "train"), names, test.class_names, setting=str(listed))
    shape = config.channels, config.image_size, config.image_size
    count = len(full.items) + (0 if test is None else len(test.items))
    need, have = count * shape[0] * shape[1] * shape[2], available_bytes(device)
    if need > have:
        what = f"{count:,} images of {' x '.join(map(str, shape))}, {need / 2**30:.1f} GiB"
        raise invalid("--data", what, f"at most {have / 2**30:.1f} GiB", "lower data.image_size")
    every = "\n".join(sorted(_name(item, folder) for item in full.items))
    digest = hashlib.sha256(every.encode("utf-8", "surrogateescape")).hexdigest()

    def decode() -> RealData:
        try:
            train, held_out = (
                _decoded(replace(full, items=items), config) for items in (kept, held_out_items)
            )
            tested = None if test is None else _decoded(test, config)
        except SourceError:
            items = full.items if test is None else full.items + test.items
            _report_unusable(items, config, folder)
            raise
        return RealData(
            train=train,
            held_out=held_out,
            test=tested,
            source=f"{len(kept):,} images of {len(full.class_names)} classes; {len(held_out):,} "
            f"others were held out ({HELD_OUT_FILE} in the run directory)",
            record=f"# held out of {len(full.items)} images, sha256 of their names {digest}\n"
            + "".join(f"{_name(item, folder)}\n" for item in held_out_items),
        )

    return ListedImages(shape, full.class_names, decode)


def has_parts(folder: Path) -> bool:
    """Return whether the folder `train` holds a part of the set, and is not the class "train"."""
    train = folder / "train"
    if not train.is_dir():
        return False
    folders = {path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."}
    inside = [path for path in train.iterdir() if path.name[0] != "."]
    num_images = sum(path.suffix.lower() in EXTENSIONS for path in inside)
    num_folders = sum(path.is_dir() for path in inside)
    # Beside folders of other classes. A stray image among the folders of its classes makes none.
    is_class = num_images > num_folders and not any(path.suffix == ".tar" for path in inside)
    if folders <= {"train", *TESTS} or not is_class:
        return True
    others = ", ".join(sorted(folders - {"train"})[:3])
    warn_once(f"{train}: taken as a class, beside {others}; it holds images without class folders")
    return False


def _check_classes(train: Path, names: Sequence[str], test: Path, tested: Sequence[str]) -> None:
    """Refuse a test set with fewer or more classes than the training images, and name them.

    Raises:
        UserError: The numbers of classes differ.
    """
    if len(tested) == len(names):
        return
    missing = [name for name in names if name not in tested]
    extra = [name for name in tested if name not in names]
    what = f"no class {_some(missing)}" if len(tested) < len(names) else f"class {_some(extra)}"
    fix = "give both folders the same classes"
    raise invalid("--data", f"{what} in {test}", f"the {len(names)} of {train}", fix)


def _some(names: Sequence[str]) -> str:
    """Return up to five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _report_unusable(items: Sequence[Item], config: RealImagesConfig, folder: Path) -> None:
    """Log a line for each image that cannot be used, if there are several.

    Raises:
        UserError: There are several; the message says how many.
    """
    assert config.image_size is not None
    spec = _pixels(config.image_size, config.channels)
    decoder = Decoder(config.channels, [spec], device=torch.device("cpu"), num_threads=1)
    unusable = []
    for item in items:
        try:
            decoder.decode([item.name], [item.read()])
        except SourceError as error:
            unusable.append(str(error))
    if len(unusable) < 2:
        return
    for line in unusable:
        warn_once(line)
    got = f"{len(unusable)} of {len(items):,} images that cannot be used, listed above"
    raise invalid("--data", f"{got}, in {folder}", "none", "replace or remove them")


def _open(
    folder: Path, device: torch.device, classes: Path | None, num_classes: int | None
) -> EncodedSet:
    images = open_set(folder, device, classes=classes, num_classes=num_classes)
    if not isinstance(images, EncodedSet):
        expected = "class folders or shards, as idx files hold both parts"
        raise invalid("--data", f"idx files in {folder}", expected, f"give {folder} itself")
    return images


def _split(
    items: Sequence[Item], class_names: Sequence[str], fraction: float, folder: Path
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Split images into those to train on and the held-out ones, both in the given order.

    In each class, the images whose names have the lowest SHA-256 are held out. The split therefore
    does not depend on the order of the files, nor on where the folder lies.
    """
    chosen: set[int] = set()
    counts = Counter(item.label for item in items)
    few = [name for label, name in enumerate(class_names) if counts[label] < 2]
    if few:
        expected = "at least 2 of each class, as one is held out"
        raise invalid(folder, f"fewer than 2 images of class {_some(few)}", expected, "add images")
    for label in range(len(class_names)):
        mine = [place for place, item in enumerate(items) if item.label == label]
        count = min(len(mine) - 1, max(1, round(fraction * len(mine))))
        chosen |= set(sorted(mine, key=lambda place: _digest(items[place], folder))[:count])
    kept = tuple(item for place, item in enumerate(items) if place not in chosen)
    return kept, tuple(items[place] for place in sorted(chosen))


def _digest(item: Item, folder: Path) -> bytes:
    return hashlib.sha256(_name(item, folder).encode("utf-8", "surrogateescape")).digest()


def _name(item: Item, folder: Path) -> str:
    """Return the path of an image below the folder, with its member if it is in a tar."""
    path = Path(item.path).relative_to(folder).as_posix()
    return f"{path}: {item.member}" if item.member else path


def _pixels(size: int, channels: int) -> InputSpec:
    """Return an input of pixels in [0, 1], resized by the short side and cut to the center."""
    return InputSpec(size=size, mean=(0.0,) * channels, std=(1.0,) * channels)


def _decoded(images: EncodedSet, config: RealImagesConfig) -> ImageSet:
    """Decode, resize and crop all images, to (N, c, S, S) uint8, unless a file holds them."""
    assert config.image_size is not None
    spec = _pixels(config.image_size, config.channels)
    shape = len(images), config.channels, config.image_size, config.image_size
    pixels = cache.cached(
        _content_key(images.items, f"{shape}"),
        shape,
        torch.uint8,
        lambda: (_levels(views[spec]) for views, _ in images.batches([spec])),
    )
    labels = torch.tensor([item.label for item in images.items], device=images.device)
    return ImageSet(images=pixels.to(images.device), labels=labels, class_names=images.class_names)


def _content_key(items: Sequence[Item], shape: str) -> str:
    """Return a digest of the names, sizes and times of the files, and of the resulting shape."""
    stats = {path: os.stat(path) for path in {item.path for item in items}}
    digest = hashlib.sha256(f"pixels {shape}".encode())
    for item in items:
        path, stat = os.path.abspath(item.path), stats[item.path]
        row = path, item.offset, item.length, stat.st_size, stat.st_mtime_ns
        digest.update(f"{row!r}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _resized(images: ImageSet, size: int | None) -> ImageSet:
    """Return a set with images of `size` pixels; None leaves them unchanged."""
    if size is None:
        return images
    spec = _pixels(size, images.images.shape[1])
    pixels = [_levels(test_sets.prepare(part, spec)) for part in images.images.split(1000)]
    return replace(images, images=torch.cat(pixels))


def _levels(pixels: Tensor) -> Tensor:
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)


def _rows(images: ImageSet, rows: slice) -> ImageSet:
    return replace(images, images=images.images[rows], labels=images.labels[rows])
