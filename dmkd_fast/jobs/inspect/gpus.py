"""Rates of GPUs for `dmkd plan --gpu NAME`: estimates, none of them measured by this package.

Peaks and memory are from the vendor's data sheets (dense 16-bit products, no sparsity).

The fractions of the peak are a roofline of an H100 (989 TFLOP/s, 3.35 TB/s): operations and bytes
were counted on the meta device, rates of kernels assumed (products 620 TFLOP/s, attention 300,
convolutions 300 to 400, memory 2.9 TB/s). They give 0.44 ms for a forward pass of DiT-XL/2 (237
GFLOP), 2.0 ms for an image of Stable Diffusion's decoder (528 GFLOP), 0.18 ms for one of TAESD (35
GFLOP), 0.12 ms for a view with ResNet-18 as student and teacher (14.5 GFLOP), and 0.33 ms for one
with a ResNet-50 student (28 GFLOP). The fractions are those of these times, rounded down to tenths.
Other GPUs are assumed to reach the same fractions; small networks reach less.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmkd_fast.jobs.inspect.flops import Flops
from dmkd_fast.runtime.errors import invalid


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Peak and memory of a GPU."""

    tflop_per_s: float
    """Dense products in 16 bits, 1e12 operations per second."""
    memory_gb: int


GPUS = {
    "a100": Gpu(tflop_per_s=312, memory_gb=80),
    "b200": Gpu(tflop_per_s=2250, memory_gb=180),
    "h100": Gpu(tflop_per_s=989, memory_gb=80),
    "h200": Gpu(tflop_per_s=989, memory_gb=141),
    "l4": Gpu(tflop_per_s=121, memory_gb=24),
    "l40s": Gpu(tflop_per_s=362, memory_gb=48),
    "rtx4090": Gpu(tflop_per_s=165, memory_gb=24),
}
# Fractions of the peak of the denoiser, of the decoder, and of teachers and student.
DENOISER, DECODER, VIEWS = 0.5, 0.2, 0.1


def find(name: str) -> Gpu:
    """Return a GPU of the table.

    Raises:
        UserError: The GPU is not in the table.
    """
    if name not in GPUS:
        raise invalid("--gpu", name, f"one of {', '.join(GPUS)}")
    return GPUS[name]


def images_per_s(gpu: Gpu, flops: Flops, evaluations: float) -> float | None:
    """Return the images generated per second, or None if their operations are unknown or 0.

    Args:
        gpu: Peak of the GPU.
        flops: Operations of the job.
        evaluations: Work of the steps of an image, in evaluations of the denoiser.
    """
    if flops.denoiser is None or flops.decoder is None:
        return None
    work = evaluations * flops.denoiser / DENOISER + flops.decoder / DECODER
    return gpu.tflop_per_s * 1e12 / work if work else None


def views_per_s(gpu: Gpu, flops: Flops) -> float | None:
    """Return the views trained on per second, or None if their operations are unknown or 0."""
    return VIEWS * gpu.tflop_per_s * 1e12 / flops.view if flops.view else None
