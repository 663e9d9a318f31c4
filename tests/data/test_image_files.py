"""Every row of the table of image files in docs/guides/data.md, and more, with both decoders."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dmkd_fast import InputSpec
from dmkd_fast.data.decode import Decoder
from dmkd_fast.data.listing import SourceError

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "data.md"
ROWS = [
    line.split("|")[1].strip()
    for line in PAGE.read_text(encoding="utf-8").partition("| File |")[2].splitlines()
    if line.startswith("|") and "---" not in line
]
ROUGH = np.random.default_rng(0).integers(0, 256, (8, 11, 4), dtype=np.uint8)
RGBA = Image.fromarray(ROUGH).resize((57, 40), Image.Resampling.BICUBIC)
RGB = Image.fromarray(np.asarray(RGBA)[..., :3].copy())
DEEP = np.asarray(RGBA).astype(np.uint16) * 256 + np.random.default_rng(1).integers(
    0, 256, (40, 57, 4), dtype=np.uint16
)


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(
    rows: list[bytes], width: int, depth: int, color_type: int, *chunks: tuple[bytes, bytes]
) -> bytes:
    """Write a PNG of unfiltered rows, as Pillow cannot write all kinds."""
    data = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, len(rows), depth, color_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    for kind, body in ((b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body
        data += struct.pack(">I", zlib.crc32(kind + body))
    return data


def png16(values: np.ndarray, color_type: int) -> bytes:
    return png([row.astype(">u2").tobytes() for row in values], values.shape[1], 16, color_type)


def png_bits(depth: int, color_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Write a PNG with random pixels of a few bits, and with a random palette for type 3."""
    numbers = np.random.default_rng(depth)
    if color_type == 3:
        palette = numbers.integers(0, 256, 3 * 2**depth, dtype=np.uint8).tobytes()
        chunks = ((b"PLTE", palette), *chunks)
    rows = [numbers.bytes(-(-57 * depth // 8)) for _ in range(40)]
    return png(rows, 57, depth, color_type, *chunks)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


FILES = {
    "JPEG": save(RGB, "JPEG", quality=95),
    "JPEG, gray": save(RGB.convert("L"), "JPEG"),
    "JPEG, CMYK": save(Image.frombytes("CMYK", RGBA.size, RGBA.tobytes()), "JPEG", quality=95),
    "JPEG, rotated by EXIF": save(RGB, "JPEG", exif=turned(6)),
    "PNG": save(RGB, "PNG"),
    "PNG, gray": save(RGB.convert("L"), "PNG"),
    "PNG, palette": save(RGB.quantize(32), "PNG"),
    "PNG, palette with alpha": save(RGB.quantize(32), "PNG", transparency=bytes(range(32))),
    "PNG, alpha": save(RGBA, "PNG"),
    "PNG, gray and alpha": save(RGBA.convert("LA"), "PNG"),
    "PNG, 16 bits gray": png16(DEEP[..., :1], 0),
    "PNG, 16 bits color": png16(DEEP[..., :3], 2),
    "TIFF, rotated by EXIF": save(RGB, "TIFF", tiffinfo={274: 6}),
    "WebP": save(RGB, "WEBP", quality=90),
    "WebP, alpha": save(RGBA, "WEBP", lossless=True),
    "TIFF, float": save(RGB.convert("F"), "TIFF"),
}


GRAY, INK = RGB.convert("L"), RGB.convert("CMYK")
RGB_ROWS = [row.tobytes() for row in np.asarray(RGB)]
MORE = {
    **{
        f"JPEG {chroma}, quality {quality}": save(RGB, "JPEG", quality=quality, subsampling=chroma)
        for chroma in ("4:4:4", "4:2:2", "4:2:0")
        for quality in (30, 90)
    },
    "JPEG, progressive": save(RGB, "JPEG", progressive=True),
    "JPEG, gray, progressive": save(GRAY, "JPEG", progressive=True),
    "JPEG, restart markers": save(RGB, "JPEG", restart_marker_blocks=2),
    "JPEG, stored as RGB": save(RGB, "JPEG", keep_rgb=True),
    "JPEG, CMYK, low quality": save(INK, "JPEG", quality=40),
    "JPEG, CMYK, progressive": save(INK, "JPEG", progressive=True),
    "JPEG, 7 x 5": save(RGB.crop((0, 0, 7, 5)), "JPEG", subsampling="4:2:0"),
    "JPEG, large": save(RGB.resize((640, 480)), "JPEG"),
    **{f"JPEG, orientation {k}": save(RGB, "JPEG", exif=turned(k)) for k in (2, 3, 5, 8)},
    "PNG, rotated by EXIF": save(RGB, "PNG", exif=turned(6)),
    "WebP, rotated by EXIF": save(RGB, "WEBP", exif=turned(8)),
    "TIFF, orientation 3": save(RGB, "TIFF", tiffinfo={274: 3}),
    **{f"PNG, gray, {depth} bits": png_bits(depth, 0) for depth in (1, 2, 4)},
    **{f"PNG, palette, {depth} bits": png_bits(depth, 3) for depth in (1, 2, 4, 8)},
    "PNG, gray with a transparent level": png_bits(8, 0, (b"tRNS", b"\0\7")),
    "PNG with a transparent color": png(RGB_ROWS, 57, 8, 2, (b"tRNS", b"\0\1\0\2\0\3")),
    "PNG, gamma": png(RGB_ROWS, 57, 8, 2, (b"gAMA", struct.pack(">I", 100_000))),
    "PNG, 16 bits gray and alpha": png16(DEEP[..., :2], 4),
    "PNG, 16 bits color and alpha": png16(DEEP, 6),
    "BMP": save(RGB, "BMP"),
    "BMP, palette": save(RGB.quantize(16), "BMP"),
    "PPM": save(RGB, "PPM"),
    "PGM": save(GRAY, "PPM"),
    "PGM, 16 bits": save(Image.fromarray(DEEP[..., 0]), "PPM"),
    "TIFF, LZW": save(RGB, "TIFF", compression="tiff_lzw"),
    "TIFF, gray": save(GRAY, "TIFF"),
    "TIFF, alpha": save(RGBA, "TIFF"),
    "TIFF, CMYK": save(INK, "TIFF"),
    "WebP, alpha, lossy": save(RGBA, "WEBP", quality=60),
    "JPEG 2000": save(RGB, "JPEG2000"),
    "JPEG 2000, alpha": save(RGBA, "JPEG2000"),
}


def decoded(
    name: str, channels: int, inputs: list[InputSpec], *, has_dali: bool
) -> list[torch.Tensor]:
    decoder = Decoder(channels, inputs, device=torch.device("cpu"), num_threads=1)
    decoder._has_dali = has_dali
    return decoder.decode([name], [(FILES | MORE)[name]])


def specs(channels: int) -> list[InputSpec]:
    usual: dict[str, Any] = {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    return [
        InputSpec(size=24, crop_pct=0.75, **usual),
        InputSpec(size=16, interpolation="bicubic", **usual),
        InputSpec(size=48, crop_pct=0.9, interpolation="bicubic", **usual),
        InputSpec(size=17, crop_mode="squash", **usual),
    ]


def test_the_page_and_the_files_here_are_the_same() -> None:
    assert list(FILES) == ROWS


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FILES)
def test_pillow_decodes_what_the_page_says(name: str, channels: int) -> None:
    if name == "TIFF, float":
        with pytest.raises(SourceError, match="TIFF, float: got pixels of kind F, expected 8 or"):
            decoded(name, channels, [], has_dali=False)
        return
    (image,) = decoded(name, channels, [], has_dali=False)
    assert image.shape == (1, channels, 40, 57)
    views = decoded(name, channels, specs(channels), has_dali=False)
    assert [view.shape[-1] for view in views] == [24, 16, 48, 17]
    if name == "PNG, 16 bits gray":
        assert torch.equal(image[0, 0], torch.from_numpy(np.rint(DEEP[..., 0] / 257)).byte())
    if name == "PNG, alpha" and channels == 3:
        assert torch.equal(image[0].permute(1, 2, 0), torch.from_numpy(np.array(RGB)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FILES | MORE)
def test_dali_and_pillow_agree_within_one_level(name: str, channels: int) -> None:
    pytest.importorskip("nvidia.dali")
    if name == "TIFF, float":
        with pytest.raises(SourceError, match="TIFF, float: got pixels of kind F, expected 8 or"):
            decoded(name, channels, [], has_dali=True)
        return
    for inputs in ([], specs(channels)):
        mine, other = (decoded(name, channels, inputs, has_dali=has) for has in (True, False))
        for one, same in zip(mine, other, strict=True):
            assert (one.int() - same.int()).abs().max() <= 1
