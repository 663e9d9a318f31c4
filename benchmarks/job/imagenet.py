"""ImageNet shapes with random weights: sampler, training step, and what a whole job would take.

Sampler: DiT-XL/2 at 256 x 256 with SD's autoencoder, guided, beside diffusers' DiTPipeline in
float32 (TF32 products allowed, as in DiT's own script) and in half precision. Training: the whole
of `Distiller.train_step` (draw from a ring on the device, fused views and loss, half precision,
channels_last, compiled on CUDA) beside two eager loops on batches that wait in pinned host memory:
`published` (float32, the teacher's graph kept, the loss read at every step, as in the DM-KD code)
and `eager half` (autocast, teacher without gradients, nothing read). Neither pays for decoding or
augmenting images. The last rows are arithmetic on the others, not measured. Each arm's peak memory
is of its models and work, from before its models were made, beside nothing else.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Report, arguments, peak_mib, recorded, time_interleaved
from benchmarks.job.imagenet_sizes import TINY, Settings
from benchmarks.loss.kd_loss import eager as eager_loss
from benchmarks.parts.ring import bare_step, captured_step
from dmkd_fast import (
    Denoiser,
    DiffusionSampler,
    Distiller,
    GeneratedImages,
    Guidance,
    LabelStream,
    Objective,
    RingBuffer,
    RingPlan,
    Schedule,
    Steps,
    StudentTrainer,
    Targets,
    Views,
    ViewSpec,
    kd_loss_and_grad,
)
from dmkd_fast.denoisers.dit import lean_dit
from dmkd_fast.denoisers.trainable import share_embedder
from dmkd_fast.denoisers.wrappers import Decoder
from dmkd_fast.runtime.device import resolve_device, resolve_dtype, set_num_threads, set_repeatable

diffusers: Any = importlib.import_module("diffusers")
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEMPERATURE = 10.0
# Who makes the images, and who trains on them.
JOBS = (("pipeline fp32", "published"), ("pipeline half", "eager half"), ("ours", "ours"))


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("imagenet", __doc__ or "")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: small models, one timing")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    set_num_threads(0)
    device = resolve_device("auto")
    torch.backends.cuda.matmul.allow_tf32 = True
    set_repeatable()
    torch.backends.cudnn.deterministic = False  # only ours needs it; see `_as_dmkd_runs_it`
    report = Report(bench="imagenet", arguments=recorded(options), device=device)
    bench = Bench(report, TINY if options.tiny else Settings(), device)
    failed = 0
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a time limit: rows are kept
    try:
        for part in (bench.sampler, bench.training, bench.job):
            try:
                part()
            except Exception:  # Minutes of a rented GPU must not be lost for one arm.
                traceback.print_exc()
                failed = 1
    finally:
        signal.signal(signal.SIGTERM, before)
        report.finish(record=options.record)
    return failed


class Bench:
    """Parts of the measurement, and the rows that they add."""

    def __init__(self, report: Report, settings: Settings, device: torch.device) -> None:
        self.report, self.settings, self.device = report, settings, device
        self.half = resolve_dtype("auto", device)
        self.view_dtype = self.half if settings.half_views else torch.float32
        self.found: dict[tuple[str, ...], float] = {}
        """Images/s by ("sampler", arm, steps), views/s by ("training", arm, student)."""

    def sampler(self) -> None:
        """Measure guided images/s, decoded."""
        s = self.settings
        for steps in s.steps:
            makers = {
                "pipeline fp32": partial(self._pipeline, torch.float32, steps),
                "pipeline half": partial(self._pipeline, self.half, steps),
                "ours": partial(self._ours, steps),
            }
            timings, peaks = self._measure(makers, s.n_sampler)
            for arm, timing in timings.items():
                per_s = 1e3 * s.sampler_batch / timing["median_ms"]
                self.found["sampler", arm, str(steps)] = per_s
                self.report.rows.append(
                    {
                        "part": "sampler",
                        "model": "DiT-XL/2 + SD-VAE",
                        "side": s.image_side,
                        "steps": steps,
                        "guidance_scale": s.guidance_scale,
                        "batch": s.sampler_batch,
                        "arm": arm,
                        "images_per_s": round(per_s, 3),
                        **timing,
                        "peak_mib": peaks[arm],
                    }
                )

    def training(self) -> None:
        """Measure views/s of teacher -> student."""
        s = self.settings
        for student in s.students:
            with tempfile.TemporaryDirectory() as folder:
                makers = {
                    "published": partial(self._published, student),
                    "eager half": partial(self._eager_half, student),
                    "ours": partial(self._train, student, Path(folder)),
                    "ours, networks alone": partial(self._networks, student, Path(folder)),
                }
                timings, peaks = self._measure(makers, s.n_training)
            for arm, timing in timings.items():
                per_s = 1e3 * s.batch / timing["median_ms"]
                self.found["training", arm, student] = per_s
                self.report.rows.append(
                    {
                        "part": "training",
                        "teacher": s.teacher,
                        "student": student,
                        "batch": s.batch,
                        "pixels": s.view_size,
                        "arm": arm,
                        "views_per_s": round(per_s, 1),
                        **timing,
                        "peak_mib": peaks[arm],
                    }
                )
            if {"ours", "ours, networks alone"} <= timings.keys():
                networks = timings["ours, networks alone"]["median_ms"]
                share = 1 - networks / timings["ours"]["median_ms"]
                self.report.rows.append(
                    {
                        "part": "outside",
                        "teacher": s.teacher,
                        "student": student,
                        "share_outside_networks": round(share, 4),
                    }
                )
                self.report.at_most(f"{student}: share of a step outside the networks", share, 0.1)

    def job(self) -> None:
        """Compute hours of the whole job: a call takes base + steps x per step."""
        s = self.settings
        few, many = s.steps
        for student in s.students:
            for making, training in JOBS:
                keys = [("sampler", making, str(k)) for k in s.steps]
                keys.append(("training", training, student))
                if not all(key in self.found for key in keys):
                    continue
                fast, slow, views_per_s = (self.found[key] for key in keys)
                per_step = (1 / slow - 1 / fast) / (many - few)
                per_image = 1 / fast + (s.job_steps - few) * per_step
                hours = s.job_images * per_image / 3600
                train = s.job_images * s.job_reuse / views_per_s / 3600
                self.report.rows.append(
                    {
                        "part": "job, by arithmetic",
                        "images": s.job_images,
                        "steps": s.job_steps,
                        "reuse": s.job_reuse,
                        "student": student,
                        "arm": training,
                        "images_by": making,
                        "generation_h": round(hours, 2),
                        "training_h": round(train, 2),
                        "hours": round(hours + train, 2),
                    }
                )

    def _measure(
        self, makers: Mapping[str, Callable[[], Callable[[], object]]], n: int
    ) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """Return interleaved timings, and peaks of each arm alone, without arms that do not fit."""
        peaks, arms = {}, {}
        for name, make in makers.items():
            try:
                with _cleared(self.device), peak_mib(self.device) as peak:
                    call = make()
                    call()
                    call()
            except torch.OutOfMemoryError:
                print(f"{name}: out of memory, left out")
                continue
            peaks[name], arms[name] = peak(), call
            del call
        timings = time_interleaved(arms, n=n, warmup=0, at_least_s=self.settings.at_least_s)
        return timings, peaks

    def _models(self) -> tuple[Any, Any]:
        torch.manual_seed(0)
        with torch.device(self.device):
            dit = diffusers.DiTTransformer2DModel(**self.settings.dit).eval()
            vae = diffusers.AutoencoderKL(**self.settings.vae).eval()
        share_embedder(dit)
        return dit, vae

    def _pipeline(self, dtype: torch.dtype, steps: int) -> Callable[[], object]:
        s = self.settings
        dit, vae = self._models()
        pipeline = diffusers.DiTPipeline(
            transformer=dit, vae=vae, scheduler=diffusers.DDIMScheduler.from_config(DDIM)
        ).to(self.device, dtype)
        pipeline.set_progress_bar_config(disable=True)
        labels = [i % s.num_classes for i in range(s.sampler_batch)]
        return partial(pipeline, labels, num_inference_steps=steps, guidance_scale=s.guidance_scale)

    def _ours(self, steps: int) -> Callable[[], object]:
        s = self.settings
        dit, vae = self._models()
        lean = lean_dit(dit)
        assert lean is not None
        del dit
        lean.choose_attention("auto", device=self.device, dtype=self.half)
        sampler = DiffusionSampler(
            Denoiser(
                module=lean,
                scheduler=DDIM,
                latent_shape=(4, s.latent_side, s.latent_side),
                image_shape=(3, s.image_side, s.image_side),
                decoder=Decoder(vae).to(memory_format=torch.channels_last),
                num_classes=s.num_classes,
                null_class=s.num_classes,
            ),
            Steps(count=steps),
            Guidance(scale=s.guidance_scale),
            micro_batch_images=s.sampler_batch,
            dtype=self.half,
            device=self.device,
            compile=self.device.type == "cuda",
        )
        out = torch.empty(
            s.sampler_batch, 3, s.image_side, s.image_side, dtype=torch.uint8, device=self.device
        )
        ids = torch.arange(s.sampler_batch, device=self.device)
        call = partial(sampler.sample, ids, ids % s.num_classes, out=out)
        return partial(_as_dmkd_runs_it, call)

    def _distiller(self, student: str, folder: Path) -> Distiller:
        """Build a distiller with a ring full of random images."""
        s = self.settings
        plan = RingPlan(
            capacity_images=s.capacity,
            image_shape=(3, s.image_side, s.image_side),
            block_images=s.capacity // 4,
            samples_per_insert=1e6,
            min_fill_images=s.capacity // 4,
        )
        ring = RingBuffer(plan, num_classes=s.num_classes, device=self.device)
        labels = LabelStream(s.num_classes, device=self.device)
        for _ in range(4):
            block = ring.reserve()
            block.images.random_(0, 256)
            ids, classes = labels.peek(ring.block_images)
            ring.commit(block, ids=ids, labels=classes)
            labels.advance(len(ids))
        shape = 3, s.image_side, s.image_side
        unused = DiffusionSampler(
            Denoiser(module=nn.Identity(), scheduler=DDIM, latent_shape=shape), device=self.device
        )
        views = Views(
            ViewSpec(
                size=s.view_size, mean=MEAN, std=STD, dtype=self.view_dtype, device=self.device
            ),
            scale=(0.08, 1.0),
            ratio=(3 / 4, 4 / 3),
        )
        schedule = Schedule(
            batch_size=s.batch, num_views=s.batch * 10**6, lr=1e-4, name="sgd", ema_decay=0.999
        )
        compiles = self.device.type == "cuda"
        teacher = self._network(s.teacher)
        trainer = StudentTrainer(
            self._network(student).to(memory_format=torch.channels_last),
            schedule,
            Objective(temperature=TEMPERATURE),
            dtype=self.half,
            compile=compiles,
        )
        targets = Targets(teacher, views, dtype=self.half, compile=compiles)
        images = GeneratedImages(labels, unused)
        return Distiller(images, ring, trainer, targets, folder / student, show=False)

    def _train(self, student: str, folder: Path) -> Callable[[], object]:
        step = partial(captured_step, self._distiller(student, folder))
        return partial(_as_dmkd_runs_it, step)

    def _networks(self, student: str, folder: Path) -> Callable[[], object]:
        """Run teacher, student, optimizer and EMA on ready views with a ready gradient."""
        s = self.settings
        distiller = self._distiller(student, folder / "networks")
        draw = distiller.ring.sample(s.batch)
        views = distiller.targets.views(distiller.ring.images, draw.indices, draw.ids, draw.uses)
        logits = [torch.randn(s.batch, s.num_classes, device=self.device) for _ in range(2)]
        gradient = kd_loss_and_grad(*logits, temperature=TEMPERATURE)[1]
        return partial(_as_dmkd_runs_it, partial(bare_step, distiller, views, gradient))

    def _published(self, student: str) -> Callable[[], object]:
        teacher, net, optimizer, batch = self._eager_parts(student)

        def step() -> float:
            torch.backends.cudnn.benchmark = True  # as published; ours does without
            views = batch.to(self.device, non_blocking=True)
            loss = eager_loss(net(views), teacher(views))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.backends.cudnn.benchmark = False
            return loss.item()

        return step

    def _eager_half(self, student: str) -> Callable[[], object]:
        teacher, net, optimizer, batch = self._eager_parts(student)
        teacher, net = (m.to(memory_format=torch.channels_last) for m in (teacher, net))

        def step() -> None:
            torch.backends.cudnn.benchmark = True
            views = batch.to(self.device, non_blocking=True)
            views = views.contiguous(memory_format=torch.channels_last)
            with torch.autocast(self.device.type, dtype=self.half):
                with torch.no_grad():
                    teacher_logits = teacher(views)
                logits = net(views)
            loss = eager_loss(logits.float(), teacher_logits.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.backends.cudnn.benchmark = False

        return step

    def _eager_parts(self, student: str) -> tuple[nn.Module, nn.Module, Any, Tensor]:
        s = self.settings
        teacher, net = self._network(s.teacher).eval(), self._network(student)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
        batch = torch.randn(
            s.batch, 3, s.view_size, s.view_size, pin_memory=self.device.type == "cuda"
        )
        return teacher, net, optimizer, batch

    def _network(self, name: str) -> nn.Module:
        import timm

        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=self.settings.num_classes)
        return model.to(self.device)


def _as_dmkd_runs_it(call: Callable[[], object]) -> None:
    """Call with kernels that repeat their bits; the other arms choose freely."""
    torch.backends.cudnn.deterministic = True
    call()
    torch.backends.cudnn.deterministic = False


@contextmanager
def _cleared(device: torch.device) -> Iterator[None]:
    """Return memory that earlier arms have freed to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    yield
