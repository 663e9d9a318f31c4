"""Where the time of a GPU goes: ceilings, pieces with their share of the peak, compilation.

    python -m benchmarks gpu-pieces [--part ceilings|pieces|compile]

Ceilings: many products of two square matrices in half precision in a row, and a copy. Pieces: one
evaluation of DiT-XL/2 for guided images, the decoder, the teacher's forward pass, the student's
step, views, loss, and whole steps as one CUDA graph each and not. MFU is the operations of a piece
by its time, as a part of the measured product's. The kernels that a step spends most time in are
printed by the profiler. Compilation: seconds of a sampler's first call and of a first step, in a
process of their own with an empty compiler cache (cold), and in one with a full cache (warm).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import ROOT, Report, arguments, recorded, run_parts, time_interleaved
from benchmarks.job.imagenet import MEAN, STD, Bench
from benchmarks.job.imagenet_sizes import TINY, Settings
from benchmarks.parts.ring import captured_step
from benchmarks.parts.sampler_models import dit_flops
from dmkd_fast import Views, ViewSpec, kd_loss_and_grad
from dmkd_fast.denoisers.dit import lean_dit
from dmkd_fast.denoisers.wrappers import Decoder
from dmkd_fast.runtime.device import resolve_device, set_num_threads, set_repeatable
from dmkd_fast.training.distiller import Distiller

PARTS = ("ceilings", "pieces", "compile")
# Least seconds of an arm, all its timings together.
OF_CEILINGS, OF_PIECES = 10.0, 2.0


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("gpu-pieces", __doc__ or "")
    parser.add_argument("--part", choices=PARTS, help="only this part")
    parser.add_argument("--one", action="store_true", help="time the first calls alone, in here")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: small models, one timing")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    set_num_threads(0)
    device = resolve_device("auto")
    set_repeatable()
    report = Report(bench="gpu-pieces", arguments=recorded(options), device=device)
    bench = Pieces(report, TINY if options.tiny else Settings(), device, is_tiny=options.tiny)
    if options.one:
        print(json.dumps(bench.first_calls()))
        return 0
    failed = run_parts(bench, PARTS if options.part is None else (options.part,))
    report.finish(record=options.record)
    return failed


class Pieces(Bench):
    """The networks at ImageNet size, one piece at a time."""

    def __init__(
        self, report: Report, settings: Settings, device: torch.device, *, is_tiny: bool
    ) -> None:
        super().__init__(report, settings, device)
        self.is_tiny, self.product = is_tiny, 0.0  # TFLOP/s of the large product

    def ceilings(self) -> None:
        """Measure a large product and a copy."""
        side = self.settings.gemm
        a, b = (torch.randn(side, side, device=self.device).to(self.half) for _ in range(2))
        out, copied = torch.empty_like(a), torch.empty_like(a)
        found = self._timed(
            {"product": partial(torch.mm, a, b, out=out), "copy": partial(copied.copy_, a)},
            OF_CEILINGS,
        )
        self.product = 2e-9 * side**3 / found["product"]
        for name, ms in found.items():
            rate = {"tflop_per_s": round(2e-9 * side**3 / ms, 6)}
            if name == "copy":
                rate = {"gb_per_s": round(2e-6 * a.nbytes / ms, 3)}
            row = {"part": "ceiling", "piece": name, "side": side, "median_ms": ms}
            self.report.rows.append(row | rate)

    def pieces(self) -> None:
        """Measure each piece of sampling and of a training step."""
        if not self.product:
            self.ceilings()
        with tempfile.TemporaryDirectory() as folder:
            for student in self.settings.students:
                self._pieces_of_step(student, Path(folder))
        self._pieces_of_sampling()

    def compile(self) -> None:
        """Measure the first calls, in a process for each state of the compiler cache."""
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold",) if self.is_tiny else ("cold", "warm"):
                self.report.rows += [
                    {"part": "compile", "piece": which, "cache": state, "seconds": seconds}
                    for which, seconds in self._in_a_process(cache).items()
                ]

    def first_calls(self) -> dict[str, float]:
        """Return the seconds of the first sampling and of the first step, models not counted."""
        s, found = self.settings, {}
        with tempfile.TemporaryDirectory() as folder:
            makers: dict[str, Callable[[], Callable[[], object]]] = {
                "sampler": partial(self._ours, s.steps[0]),
                "step": lambda: self._distiller(s.students[0], Path(folder)).train_step,
            }
            for name, make in makers.items():
                call = make()
                self._wait()
                started = time.perf_counter()
                call()
                self._wait()
                found[name] = round(time.perf_counter() - started, 2)
        return found

    def _pieces_of_step(self, student: str, folder: Path) -> None:
        s = self.settings
        one = self._distiller(student, folder / "captured")
        two = self._distiller(student, folder / "ordinary")
        two._captures = False
        draw = one.ring.sample(s.batch)
        at = one.ring.images, draw.indices, draw.ids, draw.uses
        spec = ViewSpec(
            size=s.view_size, mean=MEAN, std=STD, dtype=self.view_dtype, device=self.device
        )
        views = Views(spec, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
        seen = views(*at)
        logits = [torch.randn(s.batch, s.num_classes, device=self.device) for _ in range(2)]
        forward = partial(_teacher, one, seen)
        learn = partial(_learn, one, seen)
        flops = {name: _flops(call) for name, call in (("teacher", forward), ("student", learn))}
        in_one_graph = partial(captured_step, one)
        for call in (in_one_graph, two.train_step, forward, learn):
            call()  # compiles
        found = self._timed(
            {
                "whole step, one graph": in_one_graph,
                "whole step": two.train_step,
                "draw": partial(one.feed.skip),
                "views": partial(views, *at),
                "teacher": forward,
                "student": learn,
                "loss": partial(kd_loss_and_grad, *logits, temperature=10.0),
            },
            OF_PIECES,
        )
        whole = flops["teacher"] + flops["student"]
        flops |= {"whole step, one graph": whole, "whole step": whole}
        self._add(found, flops, of=student, batch=s.batch)
        if not self.is_tiny:
            _profile(two.train_step)

    def _pieces_of_sampling(self) -> None:
        s = self.settings
        dit, vae = self._models()
        lean = lean_dit(dit)
        assert lean is not None
        attention = lean.choose_attention("auto", device=self.device, dtype=self.half)
        lean.to(self.half)
        lean.shares_block_graph = self.device.type == "cuda"  # as a sampler compiles it
        decoder = Decoder(vae).to(self.half).to(memory_format=torch.channels_last)
        count, side = s.sampler_batch, s.latent_side
        latents = torch.randn(2 * count, 4, side, side, device=self.device, dtype=self.half)
        times = torch.full((2 * count,), 500, device=self.device)
        labels = torch.arange(2 * count, device=self.device) % s.num_classes
        fast: Any = torch.compile(lean, dynamic=False)
        decode: Any = torch.compile(decoder, dynamic=False)
        few = latents[: min(count, 16)].contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            flops = {"DiT": 2 * count * dit_flops(s.dit), "decoder": _flops(partial(decoder, few))}
            arms = {"DiT": partial(fast, latents, times, labels), "decoder": partial(decode, few)}
            found = self._timed(arms, OF_PIECES)
        self._add(found, flops, of=f"sampler, attention {attention}", batch=count)

    def _add(self, found: Mapping[str, float], flops: Mapping[str, float], **facts: Any) -> None:
        for piece, ms in found.items():
            rate = 1e-9 * flops.get(piece, 0) / ms
            self.report.rows.append(
                {
                    "part": "piece",
                    "piece": piece,
                    **facts,
                    "median_ms": ms,
                    "tflop_per_s": round(rate, 6),
                    "share_of_product": round(rate / self.product, 6),
                }
            )

    def _timed(
        self, arms: Mapping[str, Callable[[], object]], at_least_s: float
    ) -> dict[str, float]:
        """Return median milliseconds of one call of each arm."""
        n, at_least_s = (1, 0.0) if self.is_tiny else (5, at_least_s)
        timings = time_interleaved(arms, n=n, warmup=1, at_least_s=at_least_s)
        return {name: timing["median_ms"] for name, timing in timings.items()}

    def _in_a_process(self, cache: str) -> dict[str, float]:
        command = [sys.executable]
        if torch.cuda.get_device_name() == "no GPU: rehearsal":
            command += ["-m", "benchmarks.fake_cuda"]
        command += ["-m", "benchmarks", "gpu-pieces", "--one"]
        places = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        done = subprocess.run(
            command + ["--tiny"] * self.is_tiny,
            cwd=ROOT,
            env=os.environ | places,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@torch.no_grad()
def _teacher(distiller: Distiller, views: Any) -> Any:
    return distiller.targets.networks.networks[0](views.to(distiller.targets._dtype))


def _learn(distiller: Distiller, views: Any) -> None:
    """Run the student forward and backward, without its optimizer."""
    distiller.student.logits(views).sum().backward()
    distiller.student.optimizer.zero_grad(set_to_none=True)


def _flops(call: Callable[[], object]) -> int:
    """Count the operations of a call, which is not compiled yet."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def _profile(step: Callable[[], object]) -> None:
    """Print the kernels that ten steps spend most time in."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        for _ in range(10):
            step()
        torch.cuda.synchronize()
    print(trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=25))
