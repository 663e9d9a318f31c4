"""Decode image files and tar members with NVIDIA DALI, for test sets and for the ring.

`data/listing.py` and `data/tar_files.py` find the images, because DALI's own readers pad or drop
images at the end of a pass. Shapes: b images of a batch, c channels, S input size.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from dmkd_fast.data.listing import MOST_PIXELS, Item, SourceError
from dmkd_fast.runtime.errors import invalid
from dmkd_fast.views.spec import InputSpec

_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def check_dali() -> None:
    """Check that DALI can be imported.

    Raises:
        SourceError: DALI is not installed.
    """
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise SourceError(
            f"reading images takes NVIDIA DALI ({error}); install it with: "
            "pip install nvidia-dali-cuda130 (CUDA 12: nvidia-dali-cuda120)"
        ) from None


def new_pipeline(
    *, batch_size: int, num_threads: int, device: torch.device, prefetch_queue_depth: int
) -> Any:
    """Return an empty DALI pipeline that decodes on a device.

    Args:
        batch_size: Largest number of images per run.
        num_threads: Number of decoding threads.
        device: CPU, or a CUDA device with its index.
        prefetch_queue_depth: Number of batches that DALI prepares in advance.

    Raises:
        SourceError: DALI is not installed.
        UserError: The device is `cuda` without an index; DALI would use GPU 0.
    """
    check_dali()
    import nvidia.dali

    dali: Any = nvidia.dali  # it has no static types
    if device.type == "cuda" and device.index is None:
        raise invalid("device", "cuda without an index", "for example cuda:0")
    return dali.Pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        prefetch_queue_depth=prefetch_queue_depth,
        device_id=device.index if device.type == "cuda" else None,  # None: no driver needed
    )


def decoded(encoded: Any, device: torch.device, num_channels: int) -> Any:
    """Return a DALI node that decodes images to (h, w, num_channels) uint8.

    The images are neither scaled nor rotated.

    Args:
        encoded: DALI node with encoded images.
        device: Device of the pipeline.
        num_channels: 1 for gray, otherwise color.
    """
    from nvidia import dali

    fn: Any = dali.fn  # DALI generates its functions at import, so they have no static types
    types: Any = dali.types
    return fn.decoders.image(
        encoded,
        device="mixed" if device.type == "cuda" else "cpu",
        output_type=types.GRAY if num_channels == 1 else types.RGB,
        adjust_orientation=False,  # published accuracies ignore EXIF
        jpeg_fancy_upsampling=True,  # interpolate chroma on the GPU as on the CPU
    )


def image_size(name: str, data: bytes, *, short_side: int = 1) -> tuple[int, int]:
    """Read height and width of an encoded image from its header.

    The check of the number of pixels belongs before decoding: a small file can be a huge image.

    Args:
        name: Name of the image, for messages.
        data: Encoded bytes.
        short_side: Length to which the short side will be resized, in pixels.

    Raises:
        SourceError: The data is not a readable image, or the image has too many pixels, as stored
            or resized.
    """
    if data.startswith(_PNG):
        size = data[len(_PNG) : len(_PNG) + 8].ljust(8, b"\0")
        width, height = struct.unpack(">II", size)
    else:
        width, height = _size_by_pillow(name, data)
    short, long = sorted((width, height))
    if short < 1 or max(short * long, short_side**2 * long // short) > MOST_PIXELS:
        expected = f"1 to {MOST_PIXELS} in all, also if the short side is resized to {short_side}"
        raise SourceError.invalid(name, f"{width} x {height} pixels", expected, "remove it")
    return height, width


def reason_of(error: BaseException) -> str:
    """Return the message of a DALI error on one line, or advice if memory was used up."""
    text = " ".join(str(error).split())
    if any(words in text for words in ("bad_alloc", "out of memory", "annot allocate")):
        return "memory is used up: set a smaller batch or device=cpu"
    return text.removeprefix("Critical error in pipeline: ")[:200]


def decode(
    items: Sequence[Item], inputs: Sequence[InputSpec], batch_size: int, device: torch.device
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Decode each item once, in order, in batches prepared for every input.

    Args:
        items: Encoded images.
        inputs: Input specs of the networks; all have the same number of channels.
        batch_size: Images per batch, b; the last batch may be smaller.
        device: Device of the results.

    Yields:
        One tensor (b, c, S, S) float32 per input, channels_last; labels (b,) int64.

    Raises:
        SourceError: DALI is not installed, or an image cannot be read.
    """
    batches = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    if not batches:
        return
    pipeline = _pipeline((_read(b, inputs) for b in batches), inputs, batch_size, device)
    for number, batch in enumerate(batches):
        try:
            outputs = pipeline.run()
        except RuntimeError as error:  # caused by this batch or by one being prefetched
            suspects = [item for b in batches[number : number + 3] for item in b]
            raise SourceError(_blame(suspects, inputs, device, reason_of(error))) from None
        # DALI reuses its buffers two runs later, hence `clone`. channels_last is HWC in memory.
        views = [from_dlpack(out.as_tensor()).clone().permute(0, 3, 1, 2) for out in outputs]
        if device.type == "cuda":  # DALI does not wait for these copies
            torch.cuda.current_stream(device).synchronize()
        labels = torch.tensor([item.label for item in batch], device=device)
        yield [view.to(device) for view in views], labels


def _pipeline(
    encoded: Iterator[list[Any]], inputs: Sequence[InputSpec], batch_size: int, device: torch.device
) -> Any:
    """Build a DALI pipeline that returns one HWC float tensor per input."""
    pipeline = new_pipeline(
        batch_size=batch_size,
        num_threads=torch.get_num_threads(),
        device=device,
        prefetch_queue_depth=2,
    )
    from nvidia import dali

    fn: Any = dali.fn
    types: Any = dali.types
    filters = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
    with pipeline:
        data = fn.external_source(source=encoded, dtype=types.UINT8, ndim=1)
        shape = fn.peek_image_shape(data, adjust_orientation=False, dtype=types.INT32)
        images = decoded(data, device, inputs[0].num_channels)
        sides = [shape[0], shape[1]]
        short = dali.math.min(*sides)
        outputs = []
        for spec in inputs:
            # Sizes and offsets as in torchvision: long side rounded down, offset rounded.
            squash = spec.crop_mode == "squash"
            size = [(spec.short_side * side) // (side if squash else short) for side in sides]
            resized = fn.resize(
                images,
                size=fn.stack(*(fn.cast(s, dtype=types.FLOAT) for s in size)),
                interp_type=filters[spec.interpolation],
                antialias=True,
            )
            slack = [s - spec.size for s in size]
            start = [s // 2 + (s % 2) * ((s // 2) % 2) for s in slack]  # halves to even
            # By keyword: a positional shape becomes a tensor, on the GPU if the image is there.
            cut = fn.slice(
                resized, start=fn.stack(*start), shape=[spec.size, spec.size], axes=[0, 1]
            )
            outputs.append(
                fn.crop_mirror_normalize(
                    cut,
                    device="gpu" if device.type == "cuda" else "cpu",
                    dtype=types.FLOAT,
                    output_layout="HWC",
                    mean=[255 * m for m in spec.mean],
                    std=[255 * s for s in spec.std],
                )
            )
        pipeline.set_outputs(*outputs)
    pipeline.build()
    return pipeline


def _read(items: Sequence[Item], inputs: Sequence[InputSpec]) -> list[Any]:
    """Read the bytes of each image and check its size in pixels."""
    encoded, short_side = [item.read() for item in items], max(s.short_side for s in inputs)
    for item, data in zip(items, encoded, strict=True):
        image_size(item.name, data, short_side=short_side)
    return [np.frombuffer(data, np.uint8) for data in encoded]


def _blame(
    suspects: Sequence[Item], inputs: Sequence[InputSpec], device: torch.device, reason: str
) -> str:
    """Find the image that cannot be decoded and return a message of one line about it."""
    for item in suspects:
        try:
            _pipeline(iter([_read([item], inputs)]), inputs, 1, device).run()
        except RuntimeError:
            return f"{item.name}: damaged or not an image; replace or remove it"
    return f"{suspects[0].name} or one after it cannot be decoded: {reason}"


def _size_by_pillow(name: str, data: bytes) -> tuple[int, int]:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `image_size` has its own bound of pixels
            with Image.open(io.BytesIO(data)) as image:
                return image.size
    except Exception as error:  # Pillow raises many kinds of errors on damaged headers
        reason = " ".join(str(error).split()).partition(" <_io")[0][:80]
        raise SourceError(f"{name}: not an image that can be read ({reason}); remove it") from None
