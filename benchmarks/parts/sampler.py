"""The sampler against the way people sample today: same model, solver, steps and guidance.

Arms: `pipeline fp32`, diffusers as a user writes it (DiTPipeline; for pixel DiTs, which have none,
the same loop over diffusers' module and scheduler); `pipeline half`, the same in bfloat16 (float16
on CUDA); on a CPU `pipeline half compiled`, with torch.compile on its denoiser (for a GPU see
`gpu-rivals`); `lean eager`, ours without compilation, as `dmkd` runs on a CPU; `ours`, compiled.
Compilation is not timed. Embedded weights, else random ones, which
cost the same. One call makes a batch; images/s come from the median of interleaved calls. Each arm
has the allocator of its own process: ours as `dmkd` sets it, the pipelines glibc's.
The share of the ceiling is the arithmetic of the plain model over what the fastest of a few large
matrix products of the same dtype does in that time; the product is timed in turn with the arms.
"""

from __future__ import annotations

import argparse
import copy
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Report, arguments, recorded, time_interleaved
from benchmarks.parts.sampler_models import (
    GPU,
    TINY,
    Sizes,
    decoder_flops,
    diffusers_dit,
    dit_flops,
    dit_s2,
    dit_s2_config,
    fastest_product,
    flow_loop,
    forward_flops,
    sd_vae,
    taesd,
)
from benchmarks.parts.tables import COMPILED
from dmkd_fast import Denoiser, DiffusionSampler, Guidance, Steps, load_denoiser
from dmkd_fast.assets import resolve
from dmkd_fast.denoisers.dit import LeanDiT, lean_dit
from dmkd_fast.denoisers.wrappers import Decoder
from dmkd_fast.runtime.device import (
    keep_freed_memory,
    resolve_device,
    resolve_dtype,
    set_malloc_thresholds,
    set_num_threads,
)

EMBEDDED = "embedded:fashion_mnist/denoiser"
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False}
diffusers: Any = importlib.import_module("diffusers")


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("sampler", __doc__ or "")
    parser.add_argument("--model", type=Path, help="a DiT folder in diffusers format instead")
    parser.add_argument("--n", type=int, default=5, help="timings per arm")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: small models, one timing")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    set_num_threads(0)
    device = resolve_device("auto")
    half = resolve_dtype("auto", device)
    report = Report(bench="sampler", arguments=recorded(options), device=device)
    sizes = TINY if options.tiny else GPU if device.type == "cuda" else Sizes()
    bench = Bench(report, device, half, 1 if options.tiny else options.n, sizes)
    if options.model is not None:
        bench.folder(options.model)
    else:
        bench.embedded()
        bench.latent("SD-VAE", sd_vae)
        bench.latent("TAESD", taesd)
        bench.sweep()
    report.finish(record=options.record)


class Bench:
    """Arms of every model, and the rows that they add."""

    def __init__(
        self, report: Report, device: torch.device, half: torch.dtype, n: int, sizes: Sizes
    ) -> None:
        self.report, self.device, self.half = report, device, half
        self.n, self.sizes = n, sizes
        self._product, self._product_flops = fastest_product(device, half, sizes.products)

    def embedded(self) -> None:
        """The pixel DiT that ships, guidance 1.5."""
        folder = resolve(EMBEDDED)
        for steps, batch in self.sizes.flow_steps:
            labels = torch.arange(batch, device=self.device) % 10
            arms: dict[str, Callable[[], object]] = {}
            for name, dtype, compiles in self._theirs():
                module = diffusers_dit(folder).to(self.device, dtype)
                running = torch.compile(module, dynamic=False) if compiles else module
                loop = partial(flow_loop, running, dtype, labels, steps, 1.5)
                arms[name] = partial(_as_users_run_it, loop)
            for name, compiled in (("lean eager", False), ("ours", True)):
                loaded = load_denoiser(folder, self.device)
                sampler = self._sampler(loaded, steps, batch, compiled, 1.5)
                arms[name] = self._call(sampler, labels, (1, 28, 28))
            flops = 2 * steps * forward_flops(load_denoiser(folder, self.device), self.device)
            medians = self._time(arms, "embedded DiT", "none", steps, batch, flops)
            self._goals(f"embedded, {steps} steps", medians, 5.0, 1.5)

    def _theirs(self) -> Iterator[tuple[str, torch.dtype, bool]]:
        """Yield name, dtype and whether it is compiled of each arm of diffusers."""
        yield "pipeline fp32", torch.float32, False
        yield "pipeline half", self.half, False
        if self.device.type == "cpu" and self.sizes is not TINY:
            yield COMPILED, self.half, True

    def latent(self, name: str, make_vae: Callable[[Sizes], nn.Module]) -> None:
        """DiT-S/2 at 256 x 256 with an autoencoder, guidance 4, random weights."""
        for steps in self.sizes.latent_steps:
            dit, vae = dit_s2(self.sizes), make_vae(self.sizes)
            medians = self._latent_arms("DiT-S/2", name, dit, vae, DDIM, steps)
            if name == "SD-VAE":
                self._goals(f"DiT-S/2 with SD-VAE, {steps} steps", medians, 2.5, 1.2)

    def folder(self, folder: Path) -> None:
        """Any latent DiT folder."""
        loaded = load_denoiser(folder, torch.device("cpu"))
        dit = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer")
        if loaded.decoder is None:
            raise SystemExit(f"--model {folder}: got a pixel model, expected one with vae/")
        for steps in self.sizes.latent_steps:
            vae = loaded.decoder.vae
            self._latent_arms(folder.name, "own", dit, vae, loaded.scheduler, steps)

    def sweep(self) -> None:
        """DiT-S/2 alone, compiled: forwards/s and share of the ceiling by batch."""
        shares = [self._forward(batch) for batch in self.sizes.sweep]
        self.report.at_least("DiT-S/2 denoiser, share of the GEMM ceiling", max(shares), 0.55)

    def _forward(self, batch: int) -> float:
        lean = lean_dit(dit_s2(self.sizes))
        assert lean is not None
        lean.choose_attention("auto", device=self.device, dtype=self.half)
        forward = torch.compile(lean.to(self.device, self.half), fullgraph=True, dynamic=False)
        side = self.sizes.latent_side
        x = torch.randn(batch, 4, side, side, device=self.device, dtype=self.half)
        t, y = torch.full((batch,), 500.0, device=self.device), torch.arange(batch)
        with torch.inference_mode():
            ours = partial(forward, x, t, y.to(self.device))
            timings = time_interleaved({"ours": ours, "product": self._product}, n=9)
        timing, ceiling = timings["ours"], self._ceiling(timings)
        per_s = 1e3 * batch / timing["median_ms"]
        share = per_s * dit_flops(dit_s2_config(self.sizes)) / ceiling
        self.report.rows.append(
            {
                "model": "DiT-S/2 forward",
                "arm": "ours",
                "batch": batch,
                **timing,
                "forwards_per_s": round(per_s, 2),
                "share_of_ceiling": round(share, 3),
                "ceiling_tflop_per_s": round(ceiling / 1e12, 3),
            }
        )
        return share

    def _latent_arms(
        self, model: str, decoder: str, dit: Any, vae: Any, scheduler: dict[str, Any], steps: int
    ) -> dict[str, float]:
        batch = self.sizes.latent_batch
        labels = torch.arange(batch, device=self.device)
        kind = getattr(diffusers, scheduler["_class_name"])
        arms: dict[str, Callable[[], object]] = {}
        for name, dtype, compiles in self._theirs():
            pipeline = diffusers.DiTPipeline(
                transformer=copy.deepcopy(dit),
                vae=copy.deepcopy(vae),
                scheduler=kind.from_config(scheduler),
            ).to(self.device, dtype)
            pipeline.set_progress_bar_config(disable=True)
            if compiles:
                pipeline.transformer = torch.compile(pipeline.transformer, dynamic=False)
            call = partial(pipeline, labels.tolist(), num_inference_steps=steps, guidance_scale=4.0)
            arms[name] = partial(_as_users_run_it, call)
        size = dit.config.sample_size
        pixels = size * 2 ** (len(vae.config.get("block_out_channels") or range(4)) - 1)
        for name, compiled in (("lean eager", False), ("ours", True)):
            lean = lean_dit(copy.deepcopy(dit))
            assert lean is not None
            loaded = Denoiser(
                module=lean,
                scheduler=scheduler,
                num_classes=1000,
                null_class=1000,
                latent_shape=(4, size, size),
                image_shape=(3, pixels, pixels),
                decoder=Decoder(copy.deepcopy(vae)).to(memory_format=torch.channels_last),
            )
            sampler = self._sampler(loaded, steps, batch, compiled, 4.0)
            arms[name] = self._call(sampler, labels, loaded.image_shape)
        flops = 2 * steps * dit_flops(dict(dit.config)) + decoder_flops(vae, size)
        return self._time(arms, model, decoder, steps, batch, flops)

    def _sampler(
        self, loaded: Denoiser, steps: int, batch: int, compiled: bool, scale: float
    ) -> DiffusionSampler:
        if isinstance(loaded.module, LeanDiT):
            loaded.module.choose_attention("auto", device=self.device, dtype=self.half)
        return DiffusionSampler(
            loaded,
            Steps(count=steps),
            Guidance(scale=scale),
            micro_batch_images=batch,
            dtype=self.half,
            device=self.device,
            compile=compiled,
        )

    def _call(
        self, sampler: DiffusionSampler, labels: Tensor, shape: tuple[int, int, int]
    ) -> Callable[[], object]:
        out = torch.empty(len(labels), *shape, dtype=torch.uint8, device=self.device)
        ids = torch.arange(len(labels), device=self.device)

        def call() -> None:
            keep_freed_memory()
            sampler.sample(ids, labels, out=out)

        return call

    def _time(
        self,
        arms: dict[str, Callable[[], object]],
        model: str,
        decoder: str,
        steps: int,
        batch: int,
        flops: float,
    ) -> dict[str, float]:
        timings = time_interleaved(arms | {"product": self._product}, n=self.n, warmup=1)
        ceiling = self._ceiling(timings)
        for arm in arms:
            timing = timings[arm]
            per_s = 1e3 * batch / timing["median_ms"]
            self.report.rows.append(
                {
                    "model": model,
                    "decoder": decoder,
                    "steps": steps,
                    "batch": batch,
                    "arm": arm,
                    "images_per_s": round(per_s, 3),
                    **timing,
                    "share_of_ceiling": round(per_s * flops / ceiling, 3),
                    "ceiling_tflop_per_s": round(ceiling / 1e12, 3),
                }
            )
        return {arm: timing["median_ms"] for arm, timing in timings.items()}

    def _ceiling(self, timings: dict[str, dict[str, float]]) -> float:
        """Return the FLOP/s of the large product, timed beside the arms."""
        return self._product_flops / (timings["product"]["p20_ms"] / 1e3)

    def _goals(self, name: str, medians: dict[str, float], fp32: float, half: float) -> None:
        self.report.at_least(
            f"{name}: vs fp32 pipeline", medians["pipeline fp32"] / medians["ours"], fp32
        )
        theirs = medians[COMPILED] if COMPILED in medians else medians["pipeline half"]
        self.report.at_least(f"{name}: vs half pipeline", theirs / medians["ours"], half)


def _as_users_run_it(arm: Callable[[], object]) -> None:
    """Call with the thresholds that glibc sets after large tensors have been freed."""
    set_malloc_thresholds(mmap_bytes=32 << 20, trim_bytes=64 << 20)
    arm()
