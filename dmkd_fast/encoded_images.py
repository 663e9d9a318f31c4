"""Image files and tar members: listing them with their labels, decoding them with NVIDIA DALI.

Stands on floor 1, below `image_sets.py`. Listing is done here and not by DALI's readers: they pad
or drop at the end of a pass, and each kind of storage has another.
Tars are never extracted; only offsets of regular members are kept.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmkd_fast.inputs import InputSpec

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True, slots=True)
class Item:
    """One encoded image: `length` bytes of `path` from `offset` on."""

    path: str
    name: str
    """For messages: the file, or shard and member."""
    offset: int
    length: int
    label: int

    def read(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """(length,) uint8."""
        data = np.fromfile(self.path, np.uint8, count=self.length, offset=self.offset)
        if len(data) != self.length or self.length == 0:
            raise ValueError(
                f"{self.name}: got {len(data)} bytes, expected {self.length or 'some'}; the file "
                "was cut short"
            )
        return data


def list_folder(folder: Path, names: tuple[str, ...]) -> tuple[list[Item], tuple[str, ...]]:
    """Images of `folder/CLASS/**`, classes in the order of `names` (default: sorted).

    Raises:
        ValueError: Images outside of class folders, a class without images, or other classes.
    """
    found = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    loose = [p for p in sorted(folder.iterdir()) if _is_image(p)]
    if loose:
        raise ValueError(
            f"{loose[0]}: got an image without a label, expected every image in the folder of its "
            "class; move it into one"
        )
    if not found:
        raise ValueError(
            f"{folder}: got no idx files, class folders or .tar shards, expected one of these; "
            "give another folder"
        )
    if all(name.isascii() and name.isdigit() for name in found):
        found.sort(key=int)  # as a source of such folders counts them
    names = names or tuple(found)
    missing, extra = sorted(set(names) - set(found)), sorted(set(found) - set(names))
    if missing or extra:
        what = f"no folder for class {missing[0]!r}" if missing else f"folder {extra[0]!r}"
        more = len(missing or extra) - 1
        raise ValueError(
            f"{folder}: got {what}{f' and {more} more' if more else ''}, which the list of "
            f"{len(names)} classes {'has' if missing else 'does not have'}; make both agree"
        )
    items = []
    for label, name in enumerate(names):
        paths = sorted(p for p in (folder / name).rglob("*") if _is_image(p))
        if not paths:
            raise ValueError(
                f"{folder / name}: got no images, expected some ({', '.join(EXTENSIONS)}); remove "
                "the folder or fill it"
            )
        items += [Item(str(p), str(p), 0, os.path.getsize(p), label) for p in paths]
    return items, names


def list_shards(folder: Path) -> list[Item]:
    """Samples of all `folder/*.tar` in WebDataset layout: KEY.jpg (or other) and KEY.cls.

    Raises:
        ValueError: A shard is damaged, holds links, or a sample lacks its image or label.
    """
    items = []
    for shard in sorted(folder.glob("*.tar")):
        items += _list_shard(shard)
    return items


def _list_shard(shard: Path) -> list[Item]:
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                where = f"{shard}: {member.name}"
                if not member.isreg() or member.offset_data + member.size > size:
                    raise ValueError(f"{where}: a link or cut short; make the shard again")
                base = member.name.rfind("/") + 1
                stem, _, ending = member.name[base:].partition(".")
                key, ending = member.name[:base] + stem, "." + ending.lower()
                if ending in EXTENSIONS:
                    if key in images:
                        raise ValueError(f"{where}: a second image of this sample; remove one")
                    images[key] = member
                elif ending == ".cls":
                    text = (tar.extractfile(member) or b"").read(32)  # type: ignore[union-attr]
                    if not text.strip().isdigit():
                        raise ValueError(
                            f"{where}: got {text!r}, expected a class number from 0 on; correct it"
                        )
                    labels[key] = int(text)
    except tarfile.TarError as error:
        raise ValueError(f"{shard}: damaged ({error}); fetch or make it again") from None
    for key in images.keys() ^ labels.keys():
        have, lack = ("image", "label (.cls)") if key in images else ("label", "image")
        raise ValueError(f"{shard}: {key}: got an {have} without {lack}; add it or remove both")
    if not images:
        raise ValueError(f"{shard}: got no images, expected KEY.jpg and KEY.cls; remove the shard")
    return [
        Item(str(shard), f"{shard}: {m.name}", m.offset_data, m.size, labels[key])
        for key, m in images.items()
    ]


def decode(
    items: Sequence[Item], inputs: Sequence[InputSpec], batch_size: int, device: torch.device
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Each item once, in order: one tensor (b, c, S, S) float32 per input, and labels (b,).

    Raises:
        ValueError: DALI is not installed, or an image cannot be read.
    """
    batches = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    if not batches:
        return
    pipeline = _pipeline(([item.read() for item in b] for b in batches), inputs, batch_size, device)
    for number, batch in enumerate(batches):
        try:
            outputs = pipeline.run()
        except RuntimeError as error:  # of this batch, or of those being prefetched
            suspects = [item for b in batches[number : number + 3] for item in b]
            raise ValueError(_blame(suspects, inputs, device, str(error))) from None
        # The pipeline writes its buffers again two runs later. channels_last is HWC in memory.
        views = [torch.from_dlpack(out.as_tensor()).clone().permute(0, 3, 1, 2) for out in outputs]
        if device.type == "cuda":  # and without waiting for these copies
            torch.cuda.current_stream(device).synchronize()
        labels = torch.tensor([item.label for item in batch], device=device)
        yield [view.to(device) for view in views], labels


def _pipeline(
    encoded: Iterator[list[Any]], inputs: Sequence[InputSpec], batch_size: int, device: torch.device
) -> Any:
    """A DALI pipeline from lists of encoded images to one HWC float tensor per input."""
    try:
        from nvidia import dali
    except ImportError:
        raise ValueError(
            "reading image files needs NVIDIA DALI; install it with: pip install 'dmkd_fast[dali]'"
        ) from None
    fn: Any = dali.fn  # generated at import: nothing a type checker could follow
    types: Any = dali.types
    on_gpu = device.type == "cuda"
    kind = "gpu" if on_gpu else "cpu"
    pipeline = dali.Pipeline(
        batch_size=batch_size, num_threads=torch.get_num_threads(),
        device_id=(device.index or 0) if on_gpu else None, prefetch_queue_depth=2,
    )  # fmt: skip
    filters = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
    with pipeline:
        data = fn.external_source(source=encoded, dtype=types.UINT8, ndim=1)
        # Published accuracies are of images as they are stored, whatever their EXIF says.
        shape = fn.peek_image_shape(data, adjust_orientation=False, dtype=types.INT32)
        images = fn.decoders.image(
            data, device="mixed" if on_gpu else "cpu", adjust_orientation=False,
            output_type=types.GRAY if inputs[0].num_channels == 1 else types.RGB,
        )  # fmt: skip
        sides = [shape[0], shape[1]]
        short = dali.math.min(*sides)
        outputs = []
        for spec in inputs:
            # Sizes and offsets as torchvision computes them: long side cut, offset rounded.
            squash = spec.crop_mode == "squash"
            size = [(spec.short_side * side) // (side if squash else short) for side in sides]
            resized = fn.resize(
                images, size=fn.stack(*(fn.cast(s, dtype=types.FLOAT) for s in size)),
                interp_type=filters[spec.interpolation], antialias=True,
            )  # fmt: skip
            slack = [s - spec.size for s in size]
            start = [s // 2 + (s % 2) * ((s // 2) % 2) for s in slack]  # halves to even
            # Named: a positional shape becomes a tensor, on the GPU where the image is there.
            cut = fn.slice(
                resized, start=fn.stack(*start), shape=[spec.size, spec.size], axes=[0, 1]
            )
            outputs.append(fn.crop_mirror_normalize(
                cut, device=kind, dtype=types.FLOAT, output_layout="HWC",
                mean=[255 * m for m in spec.mean], std=[255 * s for s in spec.std],
            ))  # fmt: skip
        pipeline.set_outputs(*outputs)
    pipeline.build()
    return pipeline


def _blame(
    suspects: Sequence[Item], inputs: Sequence[InputSpec], device: torch.device, reason: str
) -> str:
    """Which image cannot be decoded, in one line."""
    for item in suspects:
        try:
            _pipeline(iter([[item.read()]]), inputs, 1, device).run()
        except RuntimeError:
            return f"{item.name}: damaged or not an image; replace or remove it"
    return f"{suspects[0].name} or one after it: {' '.join(reason.split())[:200]}"


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and path.is_file() and path.name[0] != "."
