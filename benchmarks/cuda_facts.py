"""What only a GPU can show of the sampler: host time, waits, allocations, batch, attention.

The embedded-size figures of `sampler.py` run anywhere; these rows need CUDA.
"""

from __future__ import annotations

import importlib
import time
from typing import Any

import torch

from benchmarks.harness import time_interleaved
from dmkd_fast import DiffusionSampler
from dmkd_fast.denoisers import share_embedder
from dmkd_fast.dit import lean_dit

XL2 = {
    "num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "in_channels": 4,
    "out_channels": 8, "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000,
}  # fmt: skip
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False}
STEPS = 10


def sampler_rows(device: torch.device, half: torch.dtype) -> list[dict[str, Any]]:
    """DiT-XL/2 at 256 x 256, guided, latents only, random weights: a row per batch and kernel."""
    diffusers: Any = importlib.import_module("diffusers")
    with torch.device(device):
        dit = diffusers.DiTTransformer2DModel(**XL2).eval()
    share_embedder(dit)
    rows = []
    for attention in ("xformers", "sdpa"):
        for batch in (8, 32, 64, 128):
            rows.append(_row(dit, attention, batch, device, half))
    return rows


def _row(
    dit: Any, attention: Any, batch: int, device: torch.device, half: torch.dtype
) -> dict[str, Any]:
    lean = lean_dit(dit)
    assert lean is not None
    lean.choose_attention(attention, device=device, dtype=half)
    # Latents as four-channel images: the decoder's cost is measured by itself.
    sampler = DiffusionSampler(
        lean, scheduler=DDIM, latent_shape=(4, 32, 32), null_class=1000, num_steps=STEPS,
        guidance_scale=2.0, micro_batch_images=batch, dtype=half, device=device, compile=True,
    )  # fmt: skip
    out = torch.empty(batch, 4, 32, 32, dtype=torch.uint8, device=device)
    ids = torch.arange(batch, device=device)
    call = lambda: sampler.sample(ids, ids, out=out)  # noqa: E731
    timing = time_interleaved({"call": call}, n=9, warmup=2)["call"]
    before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")  # any wait for the device raises
    started = time.perf_counter()
    call()
    host_ms = 1e3 * (time.perf_counter() - started)
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats(device)["allocation.all.allocated"] - before
    return {
        "model": "DiT-XL/2 latents", "decoder": "none", "steps": STEPS, "arm": attention,
        "batch": batch, "images_per_s": round(1e3 * batch / timing["median_ms"], 2), **timing,
        "host_ms_per_batch": round(host_ms, 3), "syncs": 0, "allocations_per_batch": allocated,
    }  # fmt: skip
