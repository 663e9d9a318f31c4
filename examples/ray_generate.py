"""Generate images on a Ray cluster, one task per slice of the shards.

    python examples/ray_generate.py JOB.yaml --out DIR --num-images 200000 --slices 64 --gpus 1

Every machine sees DIR. Ray runs a task again if its worker dies, and the new task keeps the shards
that are whole: the files are those of a single `dmkd generate`, byte for byte. `dmkd distill` with
`source.follow=true` can train from DIR meanwhile. Ray listens on all interfaces, behind a token:
use a private network. The extra [ray] has Ray.
"""

from __future__ import annotations

import argparse
import json
import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray


def make_slice(number: int, options: argparse.Namespace) -> int:
    """Make slice `number` in this process, so that it ends with its worker."""
    from dmkd_fast.cli import main

    size = [f"--num-images={options.num_images}", f"--shard={number}/{options.slices}"]
    code = main(["generate", options.config, f"--out={options.out}", *size, *options.overrides])
    if code:
        raise RuntimeError(f"slice {number}: dmkd generate ended with code {code}")
    return number


def run() -> None:
    """Make all slices, wherever the cluster has room."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    parser.add_argument("--out", required=True)
    parser.add_argument("--num-images", type=int, required=True)
    parser.add_argument("--slices", type=int, default=8)
    parser.add_argument("--gpus", type=float, default=0, help="share of a GPU per task")
    parser.add_argument("--cpus", type=float, default=1)
    parser.add_argument("--address", help="of the cluster; default: a new one of this machine")
    options = parser.parse_intermixed_args()
    ray.init(address=options.address, include_dashboard=None if options.address else False)
    # A retry may meet the lock of a worker that is still ending, so errors are retried as well.
    task = ray.remote(
        num_cpus=options.cpus, num_gpus=options.gpus, max_retries=10, retry_exceptions=True
    )(make_slice)
    made = ray.get([task.remote(number, options) for number in range(options.slices)])
    print(json.dumps({"slices": len(made), "out": options.out}))


if __name__ == "__main__":
    run()
