"""Measure the sampler on a GPU: host time, waits, allocations, attention.

DiT-XL/2 at 256 x 256, guided, latents only, random weights: a row per attention kernel.
Run by benchmarks/gpu.sh.
"""

from __future__ import annotations

import argparse
import importlib
import time
from functools import partial
from typing import Any

import torch

from benchmarks.harness import Report, arguments, recorded, time_interleaved
from benchmarks.job.imagenet import DDIM
from benchmarks.job.imagenet_sizes import TINY, Settings
from dmkd_fast import Denoiser, DiffusionSampler, Guidance, Steps
from dmkd_fast.denoisers.dit import lean_dit
from dmkd_fast.denoisers.trainable import share_embedder
from dmkd_fast.runtime.device import resolve_dtype

STEPS = 10
CASES = ("sdpa", "xformers")


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("cuda-facts", __doc__ or "")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: small model, one timing")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    if not torch.cuda.is_available():
        print("cuda-facts: no CUDA device")
        return 2
    device = torch.device("cuda")
    half = resolve_dtype("auto", device)
    report = Report(bench="cuda-facts", arguments=recorded(options), device=device)
    diffusers: Any = importlib.import_module("diffusers")
    settings = TINY if options.tiny else Settings()
    with torch.device(device):
        dit = diffusers.DiTTransformer2DModel(**settings.dit).eval()
    share_embedder(dit)
    for attention in CASES:
        try:
            row = _row(dit, attention, settings, half, n=1 if options.tiny else 5)
        except (ValueError, torch.OutOfMemoryError) as reason:  # no xformers, or no room
            print(f"{attention}: left out ({reason})")
            continue
        report.rows.append(row)
    report.finish(record=options.record)
    return 0 if report.rows else 1


def _row(
    dit: Any, attention: Any, settings: Settings, half: torch.dtype, *, n: int
) -> dict[str, Any]:
    device, side = torch.device("cuda"), settings.latent_side
    batch = settings.sampler_batch
    lean = lean_dit(dit)
    assert lean is not None
    lean.choose_attention(attention, device=device, dtype=half)
    # Latents as four-channel images: the decoder's cost is measured by itself.
    sampler = DiffusionSampler(
        Denoiser(
            module=lean,
            scheduler=DDIM,
            latent_shape=(4, side, side),
            num_classes=settings.num_classes,
            null_class=settings.num_classes,
        ),
        Steps(count=STEPS),
        Guidance(scale=settings.guidance_scale),
        micro_batch_images=batch,
        dtype=half,
        device=device,
        compile=True,
    )
    out = torch.empty(batch, 4, side, side, dtype=torch.uint8, device=device)
    ids = torch.arange(batch, device=device)
    call = partial(sampler.sample, ids, ids % settings.num_classes, out=out)
    timing = time_interleaved({"call": call}, n=n, warmup=2)["call"]
    before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")  # any wait for the device raises
    try:
        started = time.perf_counter()
        call()
        host_ms = 1e3 * (time.perf_counter() - started)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats(device)["allocation.all.allocated"] - before
    return {
        "model": "DiT-XL/2 latents",
        "decoder": "none",
        "steps": STEPS,
        "arm": attention,
        "batch": batch,
        "images_per_s": round(1e3 * batch / timing["median_ms"], 2),
        **timing,
        "host_ms_per_batch": round(host_ms, 3),
        "syncs": 0,
        "allocations_per_batch": allocated,
    }
