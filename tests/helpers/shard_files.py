"""Write directories of shards with known images; as a script, crash at every disk call."""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dmkd_fast.data import shards

ROW = {
    "seed": 0,
    "guidance_scale": 1.0,
    "num_steps": 1,
    "solver": "euler",
    "denoiser": "tiny",
    "revision": None,
    "teacher_class": 0,
    "teacher_probability": 0.5,
}


def encode(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """Encode pixels (H, W) or (H, W, 3) uint8 as an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def make_plan(images: np.ndarray, per_shard: int, *, num_classes: int = 4) -> shards.Plan:
    return shards.Plan(
        num_images=len(images),
        images_per_shard=per_shard,
        image_shape=images.shape[1:],
        num_classes=num_classes,
        class_names=tuple(str(i) for i in range(num_classes)),
        license="none",
        settings={"seed": 0},
    )


def write_shards(
    folder: Path,
    images: np.ndarray,
    labels: np.ndarray,
    per_shard: int,
    numbers: Iterable[int] | None = None,
) -> shards.Plan:
    """Write images (N, 1 or 3, H, W) as `dmkd generate` does; only the shards `numbers`."""
    plan = make_plan(images, per_shard)
    shards.claim(folder, plan)
    for number in range(plan.num_shards) if numbers is None else numbers:
        writer = shards.ShardWriter(folder, number, "0-of-1", plan)
        for i in plan.ids(number):
            pixels = images[i].transpose(1, 2, 0) if len(images[i]) == 3 else images[i][0]
            writer.add(i, int(labels[i]), encode(pixels), ROW)
        writer.commit()
    return plan


def random_images(count: int, shape: tuple[int, ...] = (1, 8, 8)) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, *shape), dtype=np.uint8)
    return images, random.integers(0, 4, count)


def contents(folder: Path) -> dict[str, bytes]:
    """Read every file of a directory that is not hidden, by its relative path."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name[0] != ".")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def _die_at(count: int) -> None:
    """End this process like a power cut before the `count`-th call that changes the disk."""
    calls = 0

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count:
                os._exit(9)
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "link", "unlink", "mkdir", "open"):
        setattr(os, name, wrapped(getattr(os, name)))
    io.open = wrapped(io.open)  # type: ignore[assignment]
    shards.ShardWriter.add = wrapped(shards.ShardWriter.add)  # type: ignore[method-assign]


def crash_everywhere(root: Path) -> dict[str, int]:
    """Crash before every single call, check what is left, continue, and compare the results."""
    import pyarrow.parquet  # noqa: F401  before any fork

    images, labels = random_images(6)
    crashes = torn = differing = 0

    def job(folder: Path, die_at: int) -> int:
        child = os.fork()
        if child == 0:
            try:
                _die_at(die_at)
                done = shards.finished(folder)
                plan = make_plan(images, 2)
                shards.claim(folder, plan)
                with shards.locked(folder, "0-of-1"):
                    todo = [n for n in range(3) if n not in done]
                    write_shards(folder, images, labels, 2, todo)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert job(root / "whole", 0) == 0
    whole = contents(root / "whole")
    point = 0
    while True:
        point += 1
        folder = root / f"at{point}"
        status = job(folder, point)
        if status == 0:
            break
        assert status == 9
        crashes += 1
        if (folder / shards.PLAN).is_file():
            plan = shards.read_plan(folder)
            for number in shards.finished(folder):
                shard = shards.load_shard(folder, plan, number)
                torn += sum(shard.read(i) != encode(images[i][0]) for i in plan.ids(number))
        assert job(folder, 0) == 0
        differing += contents(folder) != whole
        hidden = [p.name for p in folder.rglob(".*") if not p.name.endswith(".lock")]
        differing += any("shard" in name for name in hidden)
    return {"crashes": crashes, "torn": torn, "differing": differing}


if __name__ == "__main__":
    print(json.dumps(crash_everywhere(Path(sys.argv[1]))))
