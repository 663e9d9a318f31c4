"""Run many `generate` jobs that are killed at random moments; tests start this as a script.

The parent imports everything and forks one child per job, so that a start costs no imports. The
parent itself runs no tensor operation. The script prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from small_jobs import CONFIG

from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.data import shards
from dmkd_fast.jobs import generate

SETTINGS = [
    "num_threads=1",
    "device=cpu",
    "dtype=float32",
    "sampler.num_steps=1",
    "sampler.guidance_scale=1",
    "sampler.compile=false",
    "sampler.micro_batch_images=16",
    "teacher.path=embedded:fashion_mnist/weak",
]


def make_set(out: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    """Make a directory of 200 images in this process, or what `options` say."""
    config = load_config(DistillConfig, CONFIG, [*SETTINGS, *overrides])
    options = {"num_images": 200, "images_per_shard": 32, "show": False} | options
    return generate.run(config, out, **options)


def start(out: Path, num_images: int, part: tuple[int, int]) -> int:
    """Fork a job and return its process id."""
    child = os.fork()
    if child:
        return child
    try:
        config = load_config(DistillConfig, CONFIG, SETTINGS)
        generate.run(config, out, num_images, job_slice=part, images_per_shard=32, show=False)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def farm(out: Path, num_images: int, parts: int, kills: int, seed: int) -> dict[str, float]:
    """Run all parts in parallel until each has been killed `kills` times and has finished."""
    chance = random.Random(seed)
    running: dict[int, tuple[int, float]] = {}
    killed, early = [0] * parts, 0

    def launch(part: int) -> None:
        moment = time.monotonic() + chance.uniform(0.05, 1.5)
        running[start(out, num_images, (part, parts))] = (part, moment)

    for part in range(parts):
        launch(part)
    while running:
        time.sleep(0.002)
        for pid, (part, moment) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del running[pid]
                if os.waitstatus_to_exitcode(status):
                    raise SystemExit(f"part {part} failed")
                if killed[part] < kills:  # It ended before its kill; run the part once more.
                    early += 1
                    killed[part] += 1
                    launch(part)
            elif killed[part] < kills and time.monotonic() > moment:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                del running[pid]
                killed[part] += 1
                launch(part)
    return {"kills": sum(killed) - early, "shards": len(shards.finished(out))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    for name in ("num_images", "parts", "kills", "seed"):
        parser.add_argument(name, type=int)
    print(json.dumps(farm(**vars(parser.parse_args()))))
    sys.exit(0)
