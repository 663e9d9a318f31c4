"""Every row of the table of image files in docs/guides/data.md, with both decoders."""

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
TURNED = Image.Exif()
TURNED[0x0112] = 6


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png16(values: np.ndarray, color_type: int) -> bytes:
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body
        data += struct.pack(">I", zlib.crc32(kind + body))
    return data


FILES = {
    "JPEG": save(RGB, "JPEG", quality=95),
    "JPEG, gray": save(RGB.convert("L"), "JPEG"),
    "JPEG, CMYK": save(Image.frombytes("CMYK", RGBA.size, RGBA.tobytes()), "JPEG", quality=95),
    "JPEG, rotated by EXIF": save(RGB, "JPEG", exif=TURNED),
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


def decoded(
    name: str, channels: int, inputs: list[InputSpec], *, has_dali: bool
) -> list[torch.Tensor]:
    decoder = Decoder(channels, inputs, device=torch.device("cpu"), num_threads=1)
    decoder._has_dali = has_dali
    return decoder.decode([name], [FILES[name]])


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
@pytest.mark.parametrize("name", FILES)
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
