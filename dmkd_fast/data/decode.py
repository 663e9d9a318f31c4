"""Decode image files, with NVIDIA DALI where it is installed and with Pillow elsewhere.

Both decoders give the same images within one of 255 levels, see `docs/guides/data.md`.
`data/listing.py` and `data/tar_files.py` find the images, because DALI's own readers pad or drop
images at the end of a pass. Shapes: b images of a batch, c channels, S input size, h x w pixels.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from dmkd_fast.data.listing import MOST_PIXELS, SourceError
from dmkd_fast.runtime.errors import invalid, warn_once
from dmkd_fast.views.spec import InputSpec

_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_JPEG = b"\xff\xd8"
# Pillow reads more formats, some of them with the help of other programs.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "JPEG2000")
# Further kinds of pixels are read in one way by DALI and in another, or not at all, by Pillow.
_MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L", "I;16N")
_MODES_OF_FORMATS = ("PPM I", "JPEG2000 LA")
_MEMORY = "memory is used up: set a smaller batch or device=cpu"
_SHRINK = "make it smaller or remove it"
_ORIENTATION = 0x0112  # EXIF tag
_GRAY = (9797, 19234, 3737)  # of 2**15; DALI's decoders round down for PNG and JPEG


class Decoder:
    """Decode batches of image files to the sizes that networks take.

    DALI decodes where it is installed; Pillow decodes elsewhere, and what DALI cannot read.

    Args:
        num_channels: Number of channels of the results, c: 1 for gray, 3 for color.
        inputs: Input specs to resize and crop for; without any, whole images of one size result.
        device: CPU, or a CUDA device with its index.
        num_threads: Number of decoding threads.

    Raises:
        SourceError: Pillow is not installed.
        UserError: The device is `cuda` without an index; DALI would use GPU 0.
    """

    def __init__(
        self,
        num_channels: int,
        inputs: Sequence[InputSpec],
        *,
        device: torch.device,
        num_threads: int,
    ) -> None:
        if device.type == "cuda" and device.index is None:
            raise invalid("device", "cuda without an index", "for example cuda:0")
        self.num_channels, self.inputs = num_channels, tuple(inputs)
        self.device, self.num_threads = device, num_threads
        self._has_dali = _find_dali(device)
        self._pipeline: Any = None
        self._pipeline_batch = 0

    def decode(self, names: Sequence[str], encoded: Sequence[bytes]) -> list[Tensor]:
        """Decode images in order.

        Args:
            names: Names of the images, for messages.
            encoded: Contents of the image files.

        Returns:
            One tensor (b, c, S, S) uint8 per input, or one (b, c, h, w), channels_last on the
            device of the decoder.

        Raises:
            SourceError: An image is damaged, too large, or has pixels of an unknown kind.
        """
        short_side = max((spec.short_side for spec in self.inputs), default=1)
        sizes = [
            image_size(name, data, short_side=short_side)
            for name, data in zip(names, encoded, strict=True)
        ]
        if self._has_dali:
            if self._pipeline is None or len(encoded) > self._pipeline_batch:
                self._pipeline, self._pipeline_batch = self._build(len(encoded)), len(encoded)
            try:
                return self._decode_by_dali(encoded, sizes)
            except torch.OutOfMemoryError:
                raise  # not caused by an image
            except RuntimeError as error:
                self._pipeline = None  # DALI pipelines cannot be used after an error
                if any(t in str(error) for t in ("bad_alloc", "out of memory", "annot allocate")):
                    raise SourceError(f"{names[0]} or one of the next: {_MEMORY}") from None
        decoded = self._decode_by_pillow(names, encoded, sizes)
        if self._has_dali:
            warn_once("DALI cannot decode some of the images; Pillow decodes their batches, slower")
        return decoded

    def _decode_by_dali(
        self, encoded: Sequence[bytes], sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        # NumPy, because DALI asks torch tensors for a CUDA stream, even without a driver.
        self._pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
        # `clone`, because DALI writes the next batch into the same buffers.
        images = [from_dlpack(out.as_tensor()).clone() for out in self._pipeline.run()]
        if not self.inputs and set(sizes) != {tuple(images[0].shape[1:3])}:
            raise RuntimeError("sizes of pixels and headers differ")
        if self.device.type == "cuda":  # DALI does not wait for the copies
            torch.cuda.current_stream(self.device).synchronize()
        return [image.permute(0, 3, 1, 2) for image in images]

    def _decode_by_pillow(
        self, names: Sequence[str], encoded: Sequence[bytes], sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        one = partial(_decode_one, num_channels=self.num_channels, inputs=self.inputs)
        with ThreadPoolExecutor(self.num_threads) as pool:
            found = list(pool.map(one, names, encoded, sizes))
        stacked = [torch.from_numpy(np.stack(images)) for images in zip(*found, strict=True)]
        return [images.to(self.device).permute(0, 3, 1, 2) for images in stacked]

    def _build(self, batch_size: int) -> Any:
        """Build a DALI pipeline that returns one HWC uint8 tensor per input."""
        from nvidia import dali

        is_cuda = self.device.type == "cuda"
        fn: Any = dali.fn  # DALI generates its functions at import, so they have no static types
        types: Any = dali.types
        pipeline: Any = dali.Pipeline(
            batch_size=batch_size,
            num_threads=self.num_threads,
            prefetch_queue_depth=1,
            device_id=self.device.index if is_cuda else None,  # None: no driver needed
        )
        with pipeline:
            data = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, batch=True)
            images = fn.decoders.image(
                data,
                device="mixed" if is_cuda else "cpu",
                output_type=types.GRAY if self.num_channels == 1 else types.RGB,
                adjust_orientation=False,  # published accuracies ignore EXIF
                jpeg_fancy_upsampling=True,  # interpolate chroma on the GPU as on the CPU
            )
            shape = fn.peek_image_shape(data, adjust_orientation=False, dtype=types.INT32)
            outputs = [_cropped_by_dali(images, shape, spec) for spec in self.inputs]
            pipeline.set_outputs(*outputs or [images])
        pipeline.build()
        return pipeline


def image_size(name: str, data: bytes, *, short_side: int = 1) -> tuple[int, int]:
    """Read height and width of an encoded image from its header.

    Call it before decoding, because a small file can hold a huge image.

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
    if short < 1 or short * long > MOST_PIXELS:
        expected = f"1 to {MOST_PIXELS:,} in all"
        raise SourceError.invalid(name, f"{width} x {height} pixels", expected, _SHRINK)
    if short_side**2 * long // short > MOST_PIXELS:
        expected = f"at most {MOST_PIXELS:,} in all once the short side is resized to {short_side}"
        raise SourceError.invalid(name, f"{width} x {height} pixels", expected, "cut or remove it")
    return height, width


def is_transparent(data: bytes) -> bool:
    """Return whether parts of an encoded image are transparent; False if it cannot be read.

    Decoding drops transparency and shows the colors that are stored below, often black.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if not image.has_transparency_data:
                return False
            lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
            return bool(lowest < 128)  # type: ignore[operator]
    except Exception:  # Pillow raises many kinds of errors; decoding reports them
        return False


def _find_dali(device: torch.device) -> bool:
    """Decide whether DALI decodes.

    Raises:
        SourceError: Pillow, which also reads the headers for DALI, cannot be imported.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise SourceError(
            f"reading image files takes Pillow ({error}); install it with: pip install pillow"
        ) from None
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        if device.type == "cuda":
            cuda = "120" if (torch.version.cuda or "").startswith("12") else "130"
            warn_once(
                "images are decoded on the CPU by Pillow; to decode them on the GPU, install "
                f"DALI: pip install nvidia-dali-cuda{cuda}"
            )
        return False
    return True


def _cropped_by_dali(images: Any, shape: Any, spec: InputSpec) -> Any:
    """Return a DALI node that resizes and crops images as `_cropped` does."""
    from nvidia import dali

    fn: Any = dali.fn
    types: Any = dali.types
    sides = [shape[0], shape[1]]
    short = dali.math.min(*sides)
    # Sizes and offsets as in torchvision: long side rounded down, offset rounded, halves to even.
    squash = spec.crop_mode == "squash"
    size = [(spec.short_side * side) // (side if squash else short) for side in sides]
    is_linear = spec.interpolation == "bilinear"
    resized = fn.resize(
        images,
        size=fn.stack(*(fn.cast(s, dtype=types.FLOAT) for s in size)),
        interp_type=types.INTERP_LINEAR if is_linear else types.INTERP_CUBIC,
        antialias=True,
    )
    slack = [s - spec.size for s in size]
    start = [s // 2 + (s % 2) * ((s // 2) % 2) for s in slack]
    # By keyword: a positional shape becomes a tensor, on the GPU if the image is there.
    return fn.slice(resized, start=fn.stack(*start), shape=[spec.size, spec.size], axes=[0, 1])


def _size_by_pillow(name: str, data: bytes) -> tuple[int, int]:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `image_size` has its own bound of pixels
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                mode, size = image.mode, image.size
                if image.format == "TIFF":  # Pillow turns these, and states the turned size
                    size = (image.tag_v2[256], image.tag_v2[257])  # type: ignore[attr-defined]
                is_known = mode in _MODES or f"{image.format} {mode}" in _MODES_OF_FORMATS
    except Exception as error:  # Pillow raises many kinds of errors on damaged headers
        reason = _one_line(error)
        raise SourceError(f"{name}: not an image that can be read ({reason}); remove it") from None
    if not is_known:
        expected = "8 or 16 bits of gray, color, palette or CMYK"
        raise SourceError.invalid(name, f"pixels of kind {mode}", expected, "convert the image")
    return size


def _decode_one(
    name: str, data: bytes, size: tuple[int, int], *, num_channels: int, inputs: Sequence[InputSpec]
) -> list[np.ndarray]:
    """Decode an image with Pillow; return one array (S, S, c) uint8 per input, or (h, w, c)."""
    try:
        pixels = _pixels(data, num_channels)
        if pixels.shape[:2] != size:
            raise ValueError("sizes of pixels and header differ")
        return [_cropped(pixels, spec) for spec in inputs] or [pixels]
    except ImportError as error:
        raise SourceError(f"{name}: reading 16 bits takes torchvision ({error})") from None
    except MemoryError:
        raise SourceError(f"{name}: {_MEMORY}") from None
    except Exception as error:  # Pillow raises many kinds of errors on damaged images
        reason = _one_line(error)
        raise SourceError(
            f"{name}: damaged, cannot be decoded ({reason}); replace or remove it"
        ) from None


def _pixels(data: bytes, num_channels: int) -> np.ndarray:
    """Decode an image to (h, w, c) uint8 with DALI's conversions, ignoring EXIF and alpha."""
    from PIL import Image

    is_png = data.startswith(_PNG)
    if is_png:
        Image.open(io.BytesIO(data)).verify()  # decoding ignores the checksums
    if is_png and data[len(_PNG) + 8] == 16:
        from torchvision.io import ImageReadMode, decode_png

        read = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        values = decode_png(read, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    else:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            values = _values(image, is_gray=num_channels == 1)
    values = values[..., : 3 if values.shape[2] > 2 else 1]
    if num_channels < values.shape[2]:
        is_rounded = values.dtype == np.uint16 or not (is_png or data.startswith(_JPEG))
        total = sum(values[..., i].astype(np.uint32) * w for i, w in enumerate(_GRAY))
        values = ((total + is_rounded * 2**14) >> 15)[..., None].astype(values.dtype)
    if values.dtype == np.uint16:
        values = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.repeat(values, num_channels // values.shape[2], axis=2)


def _values(image: Any, *, is_gray: bool) -> np.ndarray:
    """Return the pixels of a Pillow image as stored: (h, w, 1 to 4) uint8 or uint16."""
    from PIL import ImageOps

    if is_gray:
        image.draft("L", None)  # the luma of a JPEG, without a way over RGB
    turned = image.getexif().get(_ORIENTATION) if image.format == "TIFF" else None
    image.load()
    if turned is not None and _ORIENTATION not in image.getexif():
        image.getexif()[_ORIENTATION] = {6: 8, 8: 6}.get(turned, turned)
        ImageOps.exif_transpose(image, in_place=True)  # the inverse of what Pillow did
    if image.mode == "CMYK":
        ink = 255 - np.asarray(image).astype(np.uint16)
        return (ink[..., :3] * ink[..., 3:] // 255).astype(np.uint8)
    if image.mode.startswith("I"):
        return np.asarray(image).astype(np.uint16)[..., None]
    image.info.pop("transparency", None)
    is_plain = image.mode in ("1", "L", "LA")
    values = np.asarray(image.convert("L" if is_plain else "RGB"))
    return values[..., None] if is_plain else values


def _cropped(pixels: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Resize (h, w, c) uint8 and cut out the center, as DALI does it.

    DALI repeats the pixels at the border, where Pillow would renormalize the filter, and rounds
    once, where Pillow rounds after each axis.
    """
    from PIL import Image

    height, width = pixels.shape[:2]
    rows, columns = spec.resized(height, width)
    if (rows, columns) != (height, width):
        is_linear = spec.interpolation == "bilinear"
        reach = (1 if is_linear else 2) * max(1, height / rows, width / columns)
        border = math.ceil(reach) + 1
        box = (border, border, border + width, border + height)
        filters = Image.Resampling
        kind = filters.BILINEAR if is_linear else filters.BICUBIC
        planes = []
        for plane in np.moveaxis(pixels, 2, 0):
            padded = np.pad(plane.astype(np.float32), border, mode="edge")
            planes.append(np.asarray(Image.fromarray(padded).resize((columns, rows), kind, box)))
        pixels = np.clip(np.rint(np.stack(planes, axis=2)), 0, 255).astype(np.uint8)
    top, left = (round((side - spec.size) / 2) for side in (rows, columns))
    return pixels[top : top + spec.size, left : left + spec.size]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).partition(" <_io")[0][:80]
