"""Print hashes of what must not change when code only moves: a short job, its resume, the loss.

    python -m benchmarks digits

Runs the embedded job at reduced size, runs it again with a SIGTERM and `--resume`, and evaluates
loss, views and noise on fixed inputs. Equal hashes before and after a change mean equal bits on
this machine; another CPU or torch version gives other ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import ROOT
from dmkd_fast import DiffusionSampler, Steps, Views, ViewSpec, kd_loss_and_grad, load_denoiser
from dmkd_fast.assets import resolve

JOB = [
    "configs/fashion_mnist.yaml",
    "num_threads=1",
    "sampler.micro_batch_images=128",
    "ring.capacity_images=1024",
    "ring.min_fill_images=256",
    "ring.samples_per_insert=6",
    "train.num_views=4096",
    "train.batch_size=64",
    "train.log_every_steps=8",
    "eval.num_points=1",
]
# Columns of stats.jsonl that say what a run did. Other columns may come and go.
COLUMNS = ("views", "images", "lr", "loss", "top1", "ring_uses", "ring_age_blocks")


def main(argv: list[str]) -> None:
    """Run everything, print the hashes, and as the last line all of them as JSON."""
    argparse.ArgumentParser("digits", description=__doc__).parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        whole, resumed = Path(folder) / "whole", Path(folder) / "resumed"
        _distill([*JOB, f"run_dir={whole}"])
        _distill([*JOB, f"run_dir={resumed}"], stop=True)
        _distill([str(resumed / "config.yaml"), "--resume"])
        found = {"job": _hash_run(whole), "resumed job": _hash_run(resumed)}
    if len(set(found.values())) > 1:
        raise SystemExit(f"digits: the resumed job differs from the whole one: {found}")
    found |= {"loss": _hash_loss(), "views": _hash_views(), "images": _hash_images()}
    for name, digest in found.items():
        print(f"{digest[:16]}  {name}")
    print(json.dumps(found))


def _distill(arguments: list[str], *, stop: bool = False) -> None:
    command = [sys.executable, "-m", "dmkd_fast", "distill", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if stop:
        rows = Path(arguments[-1].removeprefix("run_dir=")) / "stats.jsonl"
        while process.poll() is None and not (rows.exists() and rows.read_bytes().count(b"\n") > 2):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    text = process.stderr.read()
    if process.wait() != (130 if stop else 0):
        raise SystemExit(f"digits: {' '.join(command)}: exit code {process.returncode}\n{text}")


def _hash_run(run: Path) -> str:
    rows = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    kept = [{name: row.get(name) for name in COLUMNS} for row in rows]
    weights = (run / "student" / "model.safetensors").read_bytes()
    return hashlib.sha256(weights + json.dumps(kept).encode()).hexdigest()


def _hash_loss() -> str:
    generator = torch.Generator().manual_seed(0)
    digest = hashlib.sha256()
    for rows, classes in ((7, 10), (64, 100), (33, 1003)):
        student, teacher = (3 * torch.randn(rows, classes, generator=generator) for _ in range(2))
        target = torch.randint(classes, (rows,), generator=generator)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for alpha in (1.0, 0.9):
                loss, grad = kd_loss_and_grad(
                    student.to(dtype),
                    teacher.to(dtype),
                    None if alpha == 1 else target,
                    temperature=4.0,
                    alpha=None if alpha == 1 else alpha,
                )
                digest.update(_bytes(loss) + _bytes(grad))
    return digest.hexdigest()


def _hash_views() -> str:
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(256, (40, 3, 48, 40), generator=generator, dtype=torch.uint8)
    ids = torch.arange(64)
    spec = ViewSpec(size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    views = Views(spec, scale=(0.3, 1.0), ratio=(0.75, 4 / 3))
    boxes, flips = views.parameters(ids, ids % 5, 48, 40)
    seen = views.render(slots, ids % 40, boxes, flips)
    return hashlib.sha256(_bytes(boxes) + _bytes(flips) + _bytes(seen)).hexdigest()


def _hash_images() -> str:
    denoiser = load_denoiser(resolve("embedded:fashion_mnist/fewstep"), torch.device("cpu"))
    sampler = DiffusionSampler(denoiser, Steps(count=4), micro_batch_images=64)
    ids = torch.arange(64)
    out = torch.empty((64, *denoiser.image_shape), dtype=torch.uint8)
    return hashlib.sha256(_bytes(sampler.sample(ids, ids % 10, out=out))).hexdigest()


def _bytes(value: torch.Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
