"""Run the measurement that `python -m benchmarks NAME` names."""

from __future__ import annotations

import importlib
import sys

# Name: module, help.
NAMES = {
    "block-caching": (
        "parts.block_caching",
        "blocks reused and steps guided: images/s, arithmetic, distance, student (5 seeds)",
    ),
    "cost": ("parts.cost", "how time and memory grow with batch, capacity, image size and ranks"),
    "cuda-facts": (
        "parts.cuda_facts",
        "the sampler on a GPU: host time, waits, allocations, attention",
    ),
    "digits": (
        "digits",
        "hashes of a short job, its resume, the loss: equal where code only moved",
    ),
    "drawings": (
        "job.drawings",
        "from a folder of color drawings to a student, beside one of real images (3 seeds)",
    ),
    "embedded": ("job.embedded", "the embedded job, end to end"),
    "end-to-end": (
        "job.end_to_end",
        "the embedded job against the paper's way of working, and the way between",
    ),
    "fewstep": ("job.fewstep", "time to the accuracy of the best many-step setting"),
    "fidelity": ("job.fidelity", "what each fidelity preset costs and teaches"),
    "finding-1": (
        "findings.finding_1",
        "diffusion images against real ones, one photograph and noise (5 seeds)",
    ),
    "finding-2": (
        "findings.finding_2",
        "what guidance and steps teach, cost and look like (3 seeds)",
    ),
    "finding-3": (
        "findings.finding_3",
        "three teachers, two students, three temperatures (3 seeds)",
    ),
    "finding-3-family": (
        "findings.finding_3_family",
        "teachers of one family, two students, three temperatures and losses (3 seeds)",
    ),
    "fp8-emulation": (
        "parts.fp8_emulation",
        "what products in 8 bits change: images, Frechet distance, students",
    ),
    "gpu-job": ("gpu.job", "the embedded job on a GPU beside the paper's way of working"),
    "gpu-pieces": ("gpu.pieces", "ceilings of a GPU, each piece's share of them, compilation"),
    "gpu-rivals": ("gpu.rivals", "ImageNet shapes beside compiled rivals; the published recipe"),
    "gpu-summary": ("gpu.summary", "one page of what a run of benchmarks/gpu.sh found"),
    "imagenet": ("job.imagenet", "ImageNet shapes: sampler, training step, cost of a whole job"),
    "kd-loss": ("loss.kd_loss", "the fused loss against eager PyTorch and torch.compile"),
    "kd-loss-accuracy": ("loss.kd_loss_accuracy", "its errors against float64, beside eager's"),
    "kd-loss-gpu": ("loss.kd_loss_gpu", "the same on a GPU, in GB/s (benchmarks/gpu.sh)"),
    "levers": (
        "findings.levers",
        "settings of the embedded job, each changed alone, on held-out images (2 seeds)",
    ),
    "loader": ("parts.loader", "an ordinary loop with GeneratedLoader beside ours (5 seeds)"),
    "nearest": ("findings.nearest", "generated images beside their nearest real ones"),
    "reuse": ("findings.reuse", "how many different images, and where the ring pays (3 seeds)"),
    "plan": ("job.plan", "the time that dmkd plan predicts for the embedded job, and its run"),
    "ring": ("parts.ring", "insert, draw and limiter, and their share of a training step"),
    "sampler": ("parts.sampler", "images/s against diffusers' pipelines"),
    "selection": (
        "findings.selection",
        "a third of the images, chosen by the learner, beside all of them (10 seeds)",
    ),
    "sooner": (
        "job.sooner",
        "time of the embedded job to a fixed accuracy, beside older settings (5 seeds)",
    ),
    "step": ("parts.step", "a training step alone, one change at a time, on ready views"),
    "stored-teacher": (
        "findings.stored_teacher",
        "stored teacher logits against a live teacher: accuracy, time, bytes (5 seeds)",
    ),
    "views": ("parts.views", "crops of images in memory against DALI and torchvision"),
    "shards": ("parts.shards", "images/s to and from disk, beside torchvision's ImageFolder"),
    "render": ("render", "write the tables of README and docs from the recorded rows"),
}


def main() -> int:
    """Run one measurement."""
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print("usage: python -m benchmarks NAME [--record]\n")
        for name, (_, text) in NAMES.items():
            print(f"  {name:16} {text}")
        return 0 if sys.argv[1:] in ([], ["-h"], ["--help"]) else 2
    module = importlib.import_module(module_of(sys.argv[1]))
    return int(module.main(sys.argv[2:]) or 0)


def module_of(name: str) -> str:
    """Return the module of a measurement."""
    return f"benchmarks.{NAMES[name][0]}"


if __name__ == "__main__":
    sys.exit(main())
