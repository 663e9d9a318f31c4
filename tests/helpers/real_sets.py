"""Labeled test images as JPEG and PNG files, in class folders and in tars.

`conftest.py` loads this module as a plugin, so all tests can use its fixtures.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmkd_fast import InputSpec

COLOUR = InputSpec(size=24, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), crop_pct=0.75)
NAMES = ("ant", "bee", "cat")


def picture(seed: int, height: int, width: int) -> Image.Image:
    """Make an image of smooth random colors, so that resizing has something to average."""
    rough = np.random.default_rng(seed).integers(0, 256, (height // 6 + 2, width // 6 + 2, 3))
    return Image.fromarray(rough.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def encoded(seed: int) -> tuple[bytes, str]:
    """Encode an image: JPEG or PNG, color or gray, of several shapes, one rotated by EXIF."""
    shapes = ((40, 57), (64, 40), (33, 33), (70, 95), (32, 61))
    image, buffer = picture(seed, *shapes[seed % 5]), io.BytesIO()
    if seed % 7 == 3:
        image = image.convert("L")
    exif = Image.Exif()
    if seed == 5:
        exif[0x0112] = 6
    kind = "png" if seed % 2 else "jpg"
    image.save(buffer, "PNG" if kind == "png" else "JPEG", exif=exif)
    return buffer.getvalue(), kind


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 23 images to class folders, some of them one folder deeper."""
    root = tmp_path_factory.mktemp("folder")
    for seed in range(23):
        data, kind = encoded(seed)
        place = root / NAMES[seed % 3] / ("deeper" if seed % 4 == 0 else "")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{seed:03d}.{kind}").write_bytes(data)
    (root / "ant" / "notes.txt").write_text("not an image")
    return root


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the same images with the same labels to three tars."""
    root = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        members = []
        for seed in range(shard, 23, 3):
            data, kind = encoded(seed)
            members += [
                (f"part/{seed:03d}.{kind}", data),
                (f"part/{seed:03d}.json", b"{}"),
                (f"part/{seed:03d}.cls", b"%d\n" % (seed % 3)),
            ]
        write_shard(root / f"{shard:05d}.tar", members)
    return root
