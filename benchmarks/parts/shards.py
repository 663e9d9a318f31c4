"""Images/s to and from disk: our shards and reader beside torchvision's ImageFolder and DataLoader.

Arms that read give (B, c, H, W) uint8 batches of 256 of the same pictures: smooth random ones with
a little noise, whose PNGs are about as large as those of generated images. Files are in memory
(the page cache), so what is compared is the work, not the disk.
"""

from __future__ import annotations

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import Compose, Grayscale, PILToTensor

from benchmarks.harness import Report, arguments, recorded, time_interleaved
from dmkd_fast.data import shards
from dmkd_fast.data.sources import ShardSource, Source, open_files
from dmkd_fast.data.stored import ImageDecoder, StoredImages
from dmkd_fast.jobs import image_maker

BATCH = 256
SETS = {(1, 28, 28): 8192, (3, 256, 256): 512}


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    return arguments("shards", __doc__ or "").parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    report = Report(bench="shards", arguments=recorded(options))
    for shape, count in SETS.items():
        with tempfile.TemporaryDirectory() as scratch:
            rows = measure(Path(scratch), shape, count)
        report.rows += rows
        found = {row["arm"]: row["images_per_s"] for row in rows}
        name = f"{shape[1]} px, shards over DataLoader"
        report.at_least(name, found["read shards"] / found["torchvision ImageFolder"], 1.0)
    report.at_least("28 px images/s", report.rows[1]["images_per_s"], 2000)
    report.finish(record=options.record)


def measure(folder: Path, shape: tuple[int, int, int], count: int) -> list[dict[str, Any]]:
    """Images/s of every arm for one size of image."""
    images, threads = pictures(shape, count), torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)
    plan = shards.Plan(
        num_images=count,
        images_per_shard=1024,
        image_shape=shape,
        num_classes=2,
        class_names=("0", "1"),
        license="none",
        settings={},
    )
    shards.claim(folder / "set", plan)

    def write() -> None:
        for number in range(plan.num_shards):
            writer = shards.ShardWriter(folder / "set", number, "0-of-1", plan)
            ids = plan.ids(number)
            pngs = pool.map(image_maker.to_png, images[ids.start : ids.stop])
            for i, png in zip(ids, pngs, strict=True):
                writer.add(i, i % 2, png, {"seed": 0})
            writer.commit()

    def read(source: Source, *, by_pillow: bool = False) -> None:
        decoder = ImageDecoder(shape, num_threads=threads)
        decoder._decoder._has_dali &= not by_pillow
        images = StoredImages(source, decoder, ring_images=1, show=False)
        out = torch.empty((BATCH, *shape), dtype=torch.uint8)
        for _ in range(count // BATCH):
            ids, labels = images.next_block(BATCH)
            images.read(ids, labels, out=out)
            images.advance(BATCH)

    write()
    source = ShardSource(folder / "set")
    png_kib = sum(len(source.read(i)) for i in range(count)) / count / 1024
    for i in range(count):
        path = folder / "files" / str(i % 2) / f"{i:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read(i))
    files = open_files(folder / "files", "imagefolder", num_classes=2, class_names=("0", "1"))
    steps = [PILToTensor()] if shape[0] == 3 else [PILToTensor(), Grayscale()]
    loader: torch.utils.data.DataLoader[object] = torch.utils.data.DataLoader(
        ImageFolder(str(folder / "files"), Compose(steps)),
        batch_size=BATCH,
        shuffle=True,
        num_workers=threads,
    )
    arms = {
        "write shards": write,
        "read shards": lambda: read(source),
        "read class folders": lambda: read(files),
        "torchvision ImageFolder": lambda: [None for _ in loader],
        "read shards by Pillow": lambda: read(source, by_pillow=True),
    }
    timings = time_interleaved(arms, n=5, warmup=1)
    return [
        {
            "image": "x".join(map(str, shape)),
            "arm": arm,
            "count": count,
            **timing,
            "images_per_s": round(1e3 * count / timing["median_ms"], 1),
            "png_kib": round(png_kib, 2),
        }
        for arm, timing in timings.items()
    ]


def pictures(shape: tuple[int, int, int], count: int) -> np.ndarray:
    """(count, c, H, W) uint8: coarse random colors, enlarged, with noise of a few levels."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    images = np.empty((count, *shape), dtype=np.uint8)
    for i in range(count):
        large = Image.fromarray(coarse[i]).resize(shape[:0:-1], Image.Resampling.BICUBIC)
        pixels = np.asarray(large, dtype=np.int16).transpose(2, 0, 1)[: shape[0]]
        images[i] = np.clip(pixels + random.integers(-3, 4, shape), 0, 255)
    return images
