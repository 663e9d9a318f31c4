"""Labeled real images for evaluation: idx files, ImageFolder, WebDataset shards.

`open_set` opens a folder as an `ImageSet` (idx files, in memory) or as an `EncodedSet` (image files
or tar members, decoded when needed). For both, `batches(inputs)` yields each image
once, prepared for every network. Image i belongs to rank i mod world_size and nothing is padded, so
the ranks together see each image exactly once.

Preparation is the usual one: the short side is resized to size / crop_pct (antialiased, bilinear or
bicubic, rounded to whole levels), the center is cut out and normalized.

Shapes: N images, b batch, c channels, H x W pixels, S input size.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dmkd_fast.data.class_names import order_by_name, order_folders, read_class_names
from dmkd_fast.data.decode import Decoder
from dmkd_fast.data.listing import CLASS_NAMES, Item, left_out_text, list_images, report_left_out
from dmkd_fast.data.tar_files import list_shards
from dmkd_fast.runtime.device import available_bytes
from dmkd_fast.runtime.errors import UserError, invalid
from dmkd_fast.views.spec import InputSpec

# Upper bound for the number of classes; a higher label is taken as damaged.
MOST_CLASSES = 2**20
# Largest ratio by which deflate can compress.
_MOST_COMPRESSION = 1032
# Batches of image files that are decoded ahead of the one in use.
_AHEAD = 2
Batch = tuple[dict[InputSpec, Tensor], Tensor]
"""Prepared images (b, c, S, S) float32 of each input, channels_last; labels (b,) int64."""
_Decoded = tuple[list[Tensor], Tensor]
"""Pixels (b, c, S, S) uint8 of each input; labels (b,) int64."""
_Pass = tuple[tuple[InputSpec, ...], int, int]
"""What the decoded pixels of a pass depend on: inputs, rank and number of ranks."""


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Labeled real images in memory."""

    images: Tensor
    """Pixels, (N, c, H, W) uint8."""
    labels: Tensor
    """Classes, (N,) int64."""
    class_names: tuple[str, ...]
    is_named: bool = True
    """Whether a list or folders state the class names; otherwise they are the labels."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_channels(self) -> int | None:
        """Number of channels, c."""
        return self.images.shape[1]

    @property
    def num_bytes(self) -> int:
        """Number of bytes kept on the device for the whole run."""
        return self.images.numel()

    def to(self, device: torch.device) -> ImageSet:
        """Return the same set on a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def batches(
        self, inputs: Iterable[InputSpec], *, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """Yield each image of this rank once, in order, prepared for every input.

        Raises:
            UserError: The channels of inputs and images do not agree.
        """
        inputs = check_inputs(inputs, self.num_channels)
        mine = torch.arange(rank, len(self), world_size, device=self.labels.device)
        for indices in torch.split(mine, batch_images(inputs)):
            images = self.images[indices]
            yield {spec: prepare(images, spec) for spec in inputs}, self.labels[indices]


@dataclass(frozen=True, kw_only=True)
class EncodedSet:
    """Labeled images in files or tar shards, decoded on every pass unless a GPU keeps them."""

    items: tuple[Item, ...]
    class_names: tuple[str, ...]
    device: torch.device
    is_named: bool = True
    """Whether a list or folders state the class names; otherwise they are the labels."""
    is_repeated: bool = False
    """Whether more passes follow. A GPU then keeps the decoded pixels of a pass, if they fit."""
    _kept: dict[_Pass, list[_Decoded]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __len__(self) -> int:
        return len(self.items)

    @property
    def num_channels(self) -> int | None:
        """None: images are decoded to gray or color, as the inputs require."""
        return None

    @property
    def num_bytes(self) -> int:
        """0: decoded pixels are kept on the device only if memory is left over."""
        return 0

    def batches(
        self, inputs: Iterable[InputSpec], *, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """Yield each image of this rank once, in order, prepared for every input.

        Raises:
            UserError: The channels of the inputs do not agree, or an image cannot be decoded.
        """
        inputs = check_inputs(inputs, None)
        this = (inputs, rank, world_size)
        kept: list[_Decoded] | None = None
        decoded: Iterable[_Decoded]
        if this in self._kept:
            decoded = self._kept[this]
        else:
            mine = self.items[rank::world_size]
            decoded = self._decoded(mine, inputs)
            kept = [] if self._may_keep(len(mine), inputs) else None
        for images, labels in decoded:
            if kept is not None:
                kept.append((images, labels))
            yield {s: normalized(x, s) for s, x in zip(inputs, images, strict=True)}, labels
        if kept is not None:
            self._kept[this] = kept

    def _may_keep(self, num_images: int, inputs: tuple[InputSpec, ...]) -> bool:
        """Return whether to keep the pixels of a pass: half of what no step needs must hold them.

        Memory that is free now and was in use at the peak is needed again by the next steps.
        """
        if self.device.type != "cuda" or not self.is_repeated or self._kept:
            return False
        need = num_images * sum(spec.num_channels * spec.size**2 for spec in inputs)
        peak = torch.cuda.max_memory_allocated(self.device)
        rest = available_bytes(self.device) - (peak - torch.cuda.memory_allocated(self.device))
        return need <= rest // 2

    def _decoded(self, mine: tuple[Item, ...], inputs: tuple[InputSpec, ...]) -> Iterator[_Decoded]:
        """Yield the decoded batches of some images, the next ones being decoded meanwhile."""
        size = batch_images(inputs)
        decoder = Decoder(
            inputs[0].num_channels, inputs, device=self.device, num_threads=torch.get_num_threads()
        )
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

        def load(items: tuple[Item, ...]) -> _Decoded:
            with torch.cuda.stream(stream):  # as for tensors that are made by the caller
                images = decoder.decode([i.name for i in items], [i.read() for i in items])
                return images, torch.tensor([i.label for i in items], device=self.device)

        pool, waiting = ThreadPoolExecutor(1), deque[Future[_Decoded]]()
        try:
            for start in range(0, len(mine), size):
                waiting.append(pool.submit(load, mine[start : start + size]))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            for future in waiting:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def open_set(
    path: Path, device: torch.device, *, classes: Path | None = None, num_classes: int | None = None
) -> ImageSet | EncodedSet:
    """Open a test set; its kind follows from the files in the folder.

    Args:
        path: Folder with idx files (the `t10k` split), with one folder per class, or with .tar
            shards whose samples are an image and a .cls file.
        device: Device of the batches.
        classes: File with one class name per line, in the order of the networks' outputs. Default:
            `classes.txt` in the folder; without it, the class folders as `class_order` sorts them.
        num_classes: Number of the networks' classes, for shards without a list of classes.

    Raises:
        UserError: The folder does not exist or has no usable images, an image has no label, or
            the classes do not match the list.
    """
    if path.is_file():
        raise invalid(path, "a file", "a folder", f"give {path.parent}")
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give one with idx files, class folders or tars")
    entries = [p for p in path.iterdir() if not p.name.startswith(".")]
    if any("-images-idx3-ubyte" in p.name for p in entries):
        images = load_idx(path, "t10k").to(device)
        if classes is None:
            return images
        names = read_class_names(classes, must_exist=True)
        if len(names) < len(images.class_names):
            expected = f"at least {len(images.class_names)}, as in {path}"
            raise invalid(classes, f"{len(names)} names", expected, "add the missing ones")
        return replace(images, class_names=names, is_named=True)
    names = read_class_names(classes or path / CLASS_NAMES, must_exist=classes is not None)
    tars = [p.name for p in entries if p.suffix == ".tar" and p.is_file()]
    if not tars:
        return _open_folder(path, names, device)
    items, left_out = list_shards(path, tars)
    left_out.update(p.suffix or p.name for p in entries if p.name not in (*tars, CLASS_NAMES))
    worst = max(items, key=lambda item: item.label)
    most = len(names) or num_classes or MOST_CLASSES
    if worst.label >= most:
        fix = "correct the labels or the list of classes"
        raise invalid(worst.name, f"class {worst.label}", f"0 to {most - 1}", fix)
    is_named = bool(names)
    names = names or tuple(str(i) for i in range(num_classes or worst.label + 1))
    report_left_out(path, left_out)
    return EncodedSet(items=tuple(items), class_names=names, device=device, is_named=is_named)


def in_order_of(
    images: ImageSet | EncodedSet, names: Sequence[str] | None
) -> ImageSet | EncodedSet:
    """Return the set with its classes in another order; the same set if the names differ.

    A set that states no names is not reordered, as its labels are outputs of the networks.

    Args:
        images: Labeled images.
        names: Names of the same classes in the wanted order, or None if they are unknown.
    """
    places = order_by_name(images.class_names, names) if images.is_named else None
    if names is None or places is None:
        return images
    if isinstance(images, ImageSet):
        labels = torch.tensor(places, device=images.labels.device)[images.labels]
        return replace(images, labels=labels, class_names=tuple(names))
    items = sorted(
        (replace(item, label=places[item.label]) for item in images.items),
        key=lambda item: item.label,
    )
    return replace(images, items=tuple(items), class_names=tuple(names))


def _open_folder(folder: Path, names: tuple[str, ...], device: torch.device) -> EncodedSet:
    """Open images in class folders, sorted by label and name."""
    listing = list_images(folder)
    if not listing.folders and not listing.images:
        what = f"no idx files, class folders or .tar shards{left_out_text(listing.left_out)}"
        raise invalid(folder, what, "one of these")
    found = listing.by_class()
    names = order_folders(folder, list(found), names)
    items = [
        Item(os.path.join(folder, image), label)
        for label, name in enumerate(names)
        for image in found[name]
    ]
    return EncodedSet(items=tuple(items), class_names=names, device=device)


def load_idx(folder: Path, split: str) -> ImageSet:
    """Read `SPLIT-images-idx3-ubyte(.gz)` and its labels; `t10k` is the test split.

    Raises:
        UserError: A file is missing, damaged, or labels and images do not match.
    """
    images = _read_idx(folder, f"{split}-images-idx3-ubyte", 3)[:, None]  # (N, 1, H, W)
    labels = _read_idx(folder, f"{split}-labels-idx1-ubyte", 1).long()
    if len(images) != len(labels) or len(labels) == 0:
        what = f"{len(images)} images and {len(labels)} labels for {split!r}"
        raise invalid(folder, what, "equally many, at least one", "fetch the files again")
    count = int(labels.max()) + 1
    class_names = read_class_names(folder / CLASS_NAMES, must_exist=False)
    if class_names and len(class_names) < count:
        raise invalid(folder / CLASS_NAMES, f"{len(class_names)} names", f"{count}, one a line")
    is_named = bool(class_names)
    class_names = class_names or tuple(str(i) for i in range(count))
    return ImageSet(images=images, labels=labels, class_names=class_names, is_named=is_named)


def prepare(images: Tensor, spec: InputSpec) -> Tensor:
    """Resize, crop and normalize images as evaluation needs them for a network.

    Args:
        images: (b, c, H, W) uint8.
        spec: Input spec of the network.

    Returns:
        (b, c, S, S) float32, channels_last.
    """
    pixels = images.float()
    height, width = images.shape[-2:]
    size = spec.resized(height, width)
    if size != (height, width):
        pixels = F.interpolate(pixels, size, mode=spec.interpolation, antialias=True)
        pixels = pixels.round().clamp(0, 255)
    top, left = (round((side - spec.size) / 2) for side in pixels.shape[-2:])
    pixels = pixels[..., top : top + spec.size, left : left + spec.size]
    return normalized(pixels, spec)


def normalized(pixels: Tensor, spec: InputSpec) -> Tensor:
    """Return levels 0 to 255, (b, c, S, S), as a network takes them: float32, channels_last."""
    # Filled on the device, as a copy from the host would wait for all work queued there.
    mean, std = (
        torch.stack([torch.full((1, 1), value, device=pixels.device) for value in values])
        for values in (spec.mean, spec.std)
    )
    return ((pixels / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def check_inputs(inputs: Iterable[InputSpec], num_channels: int | None) -> tuple[InputSpec, ...]:
    """Return the distinct inputs, after a check of their channels.

    Args:
        inputs: Input specs of the networks.
        num_channels: Number of channels of the images; None if gray and color are possible.

    Raises:
        UserError: The inputs differ in channels from each other or from the images.
    """
    distinct = tuple(dict.fromkeys(inputs))
    wanted = {spec.num_channels for spec in distinct}
    if len(wanted) != 1 or num_channels not in (None, *wanted):
        what = f"networks for images with {sorted(wanted)} channels"
        what += "" if num_channels is None else f" and images with {num_channels}"
        raise invalid("channels", what, "the same number everywhere")
    if not wanted <= {1, 3} and num_channels is None:
        what = f"a network for {wanted.pop()} channels"
        raise invalid("channels", what, "1 or 3, which image files decode to")
    return distinct


def batch_images(inputs: Iterable[InputSpec]) -> int:
    """Return the batch size: 500 small images, or fewer (111 of 3 x 224 x 224)."""
    # Depends on the inputs alone, because rounding in matrix products may depend on the batch size.
    most = max(spec.num_channels * spec.size**2 for spec in inputs)
    return max(1, min(500, 2**24 // most))


def _read_idx(folder: Path, stem: str, num_dims: int) -> Tensor:
    """Read an idx file of unsigned bytes, gzip-compressed or not.

    Reads no more than the header announces, as a small gzip file can expand to any size.
    """
    path = next((p for p in (folder / f"{stem}.gz", folder / stem) if p.is_file()), None)
    if path is None:
        raise UserError(f"{folder / stem}.gz: no such file; give a folder with idx files")
    is_gzip = path.suffix == ".gz"
    try:
        with gzip.open(path) if is_gzip else path.open("rb") as file:
            header = file.read(4 + 4 * num_dims)
            if len(header) < 4 + 4 * num_dims or header[:4] != bytes((0, 0, 8, num_dims)):
                what = f"header {header[:4].hex(' ') or 'of 0 bytes'}"
                fix = "it is not an idx file of bytes"
                raise invalid(path, what, f"00 00 08 0{num_dims}", fix)
            shape = struct.unpack(f">{num_dims}I", header[4:])
            expected, limit = math.prod(shape), path.stat().st_size
            limit *= _MOST_COMPRESSION if is_gzip else 1
            if min(shape) < 1 or expected > limit:
                what = f"a header that announces {' x '.join(map(str, shape))} bytes"
                bound = f"1 to {limit}, as many as the file can hold"
                raise invalid(path, what, bound, "fetch it again")
            have = available_bytes(torch.device("cpu"))
            if expected > have:
                bound = f"at most the {have} of free memory"
                raise invalid(path, f"{expected} bytes", bound, "use image files or shards")
            values = torch.empty(expected, dtype=torch.uint8)
            view, done = memoryview(values.numpy().data), 0
            while count := file.readinto(view[done : done + 2**24]):
                done += count
            if done < expected or file.read(1):
                more = "more" if done == expected else done
                raise invalid(path, f"{more} bytes", f"{expected} by its header", "fetch it again")
    except (MemoryError, RuntimeError):
        raise UserError(f"{path}: memory is used up; use image files or shards") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged ({error}); fetch it again") from None
    return values.view(shape)
