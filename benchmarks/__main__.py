"""Run the measurement that `python -m benchmarks NAME` names."""

from __future__ import annotations

import importlib
import sys

NAMES = {
    "cost": "how time and memory grow with batch, capacity, image size and ranks",
    "cuda-facts": "the sampler on a GPU: host time, waits, allocations, attention",
    "digits": "hashes of a short job, its resume, the loss: equal where code only moved",
    "embedded": "the embedded job, end to end",
    "end-to-end": "the embedded job against the paper's way of working, and the way between",
    "fewstep": "time to the accuracy of the best many-step setting",
    "fidelity": "what each fidelity preset costs and teaches",
    "finding-1": "diffusion images against real ones, one photograph and noise (5 seeds)",
    "finding-2": "what guidance and steps teach, cost and look like (3 seeds)",
    "finding-3": "three teachers, two students, three temperatures (3 seeds)",
    "imagenet": "ImageNet shapes: sampler, training step, cost of a whole job",
    "kd-loss": "the fused loss against eager PyTorch and torch.compile",
    "kd-loss-accuracy": "its errors against float64, beside eager's",
    "kd-loss-gpu": "the same on a GPU, in GB/s (benchmarks/gpu.sh)",
    "nearest": "generated images beside their nearest real ones",
    "reuse": "how many different images, and where the ring pays (3 seeds)",
    "ring": "insert, draw and limiter, and their share of a training step",
    "sampler": "images/s against diffusers' pipelines",
    "step": "a training step alone, one change at a time, on ready views",
    "views": "crops of images in memory against DALI and torchvision",
    "shards": "images/s to and from disk, beside torchvision's ImageFolder",
    "render": "write the tables of README and docs from the recorded rows",
}
# Folders of the measurements; those of no folder lie beside this file.
FOLDERS = {
    "loss": ("kd-loss", "kd-loss-accuracy", "kd-loss-gpu"),
    "job": ("embedded", "end-to-end", "fewstep", "fidelity", "imagenet", "step"),
    "parts": ("cost", "cuda-facts", "ring", "sampler", "shards", "views"),
    "findings": ("finding-1", "finding-2", "finding-3", "nearest", "reuse"),
}


def main() -> int:
    """Run one measurement."""
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print("usage: python -m benchmarks NAME [--record]\n")
        for name, text in NAMES.items():
            print(f"  {name:16} {text}")
        return 0 if sys.argv[1:] in ([], ["-h"], ["--help"]) else 2
    module = importlib.import_module(module_of(sys.argv[1]))
    return int(module.main(sys.argv[2:]) or 0)


def module_of(name: str) -> str:
    """Return the module of a measurement."""
    folder = next((f"{folder}." for folder, names in FOLDERS.items() if name in names), "")
    return f"benchmarks.{folder}{name.replace('-', '_')}"


if __name__ == "__main__":
    sys.exit(main())
