"""ImageNet shapes on a GPU beside what its users have: everything compiled, channels-last, half.

    python -m benchmarks gpu-rivals [--part sampler|training|recipe]

`pipeline, compiled` is diffusers' DiTPipeline in half precision, compiled: the transformer with
max-autotune, the decoder in channels-last with cudnn.benchmark on, which chooses its convolutions
in less time than max-autotune. `compiled half` is a training step with teacher, student and loss
compiled, channels-last, fused SGD, cudnn.benchmark on, on a batch that waits in pinned host memory.
`recipe` is the published sampler at its batch: DDPM with learned variances, guidance on three
channels; 20 steps in place of 100. `ours, repeatable: false` chooses kernels by timing, too.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Report, arguments, recorded, run_parts
from benchmarks.job.imagenet import Bench
from benchmarks.job.imagenet_sizes import TINY, Settings
from benchmarks.loss.kd_loss import eager as eager_loss
from benchmarks.parts.ring import captured_step
from dmkd_fast import Denoiser, DiffusionSampler, Guidance, Steps
from dmkd_fast.denoisers.dit import lean_dit
from dmkd_fast.denoisers.wrappers import Decoder
from dmkd_fast.runtime.device import resolve_device, set_num_threads, set_repeatable

DDPM = {"_class_name": "DDPMScheduler", "variance_type": "learned_range", "clip_sample": False}
PARTS = ("sampler", "training", "recipe")


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("gpu-rivals", __doc__ or "")
    parser.add_argument("--part", choices=PARTS, help="only this part")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: small models, one timing")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    set_num_threads(0)
    device = resolve_device("auto")
    torch.backends.cuda.matmul.allow_tf32 = True
    set_repeatable()
    report = Report(bench="gpu-rivals", arguments=recorded(options), device=device)
    bench = Rivals(report, TINY if options.tiny else Settings(), device)
    failed = run_parts(bench, PARTS if options.part is None else (options.part,))
    report.finish(record=options.record)
    return failed


class Rivals(Bench):
    """The measurement at ImageNet size with other arms."""

    def sampler(self) -> None:
        """Measure guided images/s of the compiled pipeline and of ours, with many steps."""
        s = self.settings
        steps = s.steps[-1]
        makers = {
            "pipeline, compiled": partial(self._compiled_pipeline, steps),
            "ours": partial(self._ours, steps),
        }
        self._add("sampler", makers, s.n_sampler, s.sampler_batch, "images", steps=steps)

    def training(self) -> None:
        """Measure views/s of the compiled rival and of ours, with either choice of kernels."""
        s = self.settings
        for student in s.students:
            with tempfile.TemporaryDirectory() as folder:
                makers = {
                    "compiled half": partial(self._compiled_half, student),
                    "ours": partial(self._train, student, Path(folder)),
                    "ours, repeatable: false": partial(self._train_freely, student, Path(folder)),
                }
                self._add("training", makers, s.n_training, s.batch, "views", student=student)

    def recipe(self) -> None:
        """Measure images/s of the published recipe at its batch."""
        s = self.settings
        makers = {"pipeline half": self._recipe_pipeline, "ours": self._recipe_ours}
        self._add("recipe", makers, s.n_sampler, s.recipe_batch, "images", steps=s.recipe_steps)

    def _add(
        self, part: str, makers: dict[str, Any], n: int, batch: int, unit: str, **facts: Any
    ) -> None:
        timings, peaks = self._measure(makers, n)
        for arm, timing in timings.items():
            row = {"part": part, "arm": arm, "batch": batch, **facts}
            row[f"{unit}_per_s"] = round(1e3 * batch / timing["median_ms"], 2)
            self.report.rows.append(row | timing | {"peak_mib": peaks[arm]})

    def _compiled_pipeline(self, steps: int) -> Callable[[], object]:
        pipeline: Any = self._pipeline(self.half, steps).func  # type: ignore[attr-defined]
        pipeline.vae.to(memory_format=torch.channels_last)
        fast: Any = partial(torch.compile, fullgraph=True)
        pipeline.transformer = fast(pipeline.transformer, mode="max-autotune")
        pipeline.vae.decode = fast(pipeline.vae.decode)
        return partial(
            _freely,
            partial(
                pipeline,
                [i % self.settings.num_classes for i in range(self.settings.sampler_batch)],
                num_inference_steps=steps,
                guidance_scale=self.settings.guidance_scale,
            ),
        )

    def _compiled_half(self, student: str) -> Callable[[], object]:
        teacher, net, _, batch = self._eager_parts(student)
        teacher, net = (m.to(memory_format=torch.channels_last) for m in (teacher, net))
        optimizer = torch.optim.SGD(
            net.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, fused=True
        )
        fast: Any = torch.compile
        teach, learn, loss_of = fast(teacher), fast(net), fast(eager_loss)

        def step() -> None:
            views = batch.to(self.device, non_blocking=True)
            views = views.contiguous(memory_format=torch.channels_last)
            with torch.autocast(self.device.type, dtype=self.half):
                with torch.no_grad():
                    teacher_logits = teach(views)
                logits = learn(views)
            loss = loss_of(logits.float(), teacher_logits.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return partial(_freely, step)

    def _train_freely(self, student: str, folder: Path) -> Callable[[], object]:
        step = partial(captured_step, self._distiller(student, folder / "free"))
        return partial(_freely, step)

    def _recipe_pipeline(self) -> Callable[[], object]:
        s = self.settings
        pipeline: Any = self._pipeline(self.half, s.recipe_steps).func  # type: ignore[attr-defined]
        diffusers: Any = importlib.import_module("diffusers")
        pipeline.scheduler = diffusers.DDPMScheduler(clip_sample=False)
        labels = [i % s.num_classes for i in range(s.recipe_batch)]
        return partial(
            pipeline, labels, num_inference_steps=s.recipe_steps, guidance_scale=s.guidance_scale
        )

    def _recipe_ours(self) -> Callable[[], object]:
        s = self.settings
        dit, vae = self._models()
        lean = lean_dit(dit)
        assert lean is not None
        lean.choose_attention("auto", device=self.device, dtype=self.half)
        sampler = DiffusionSampler(
            Denoiser(
                module=lean,
                scheduler=DDPM,
                latent_shape=(4, s.latent_side, s.latent_side),
                image_shape=(3, s.image_side, s.image_side),
                decoder=Decoder(vae).to(memory_format=torch.channels_last),
                num_classes=s.num_classes,
                null_class=s.num_classes,
            ),
            Steps(count=s.recipe_steps),
            Guidance(scale=s.guidance_scale, channels=3),
            micro_batch_images=s.recipe_batch,
            dtype=self.half,
            device=self.device,
            compile=self.device.type == "cuda",
        )
        shape = s.recipe_batch, 3, s.image_side, s.image_side
        out = torch.empty(shape, dtype=torch.uint8, device=self.device)
        ids = torch.arange(s.recipe_batch, device=self.device)
        return partial(sampler.sample, ids, ids % s.num_classes, out=out)


def _freely(call: Callable[[], object]) -> None:
    """Call with kernels that are chosen by timing."""
    set_repeatable(False)
    call()
    set_repeatable()
