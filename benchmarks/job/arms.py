"""Make a set of images or train one student: one process of the end-to-end comparison.

`end_to_end.py` starts the processes and compares what they leave.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.harness import CONFIGS, environment
from benchmarks.job import baseline, ladder
from benchmarks.job.embedded import ADAMW
from benchmarks.job.fewstep import curve as curve_of
from benchmarks.job.ladder import Recipe
from dmkd_fast import Distiller, GeneratedImages, LabelStream, cli
from dmkd_fast.assets import resolve
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.denoisers.dit import LeanDiT
from dmkd_fast.jobs import build as build_module
from dmkd_fast.jobs.build import make_sampler
from dmkd_fast.jobs.images import open_denoiser
from dmkd_fast.jobs.resolve import resolve as resolve_
from dmkd_fast.jobs.resolve import resolve_images
from dmkd_fast.runtime.clock import Clock
from dmkd_fast.runtime.device import keep_freed_memory, peak_memory_mib, set_num_threads
from dmkd_fast.training import scoring

PUBLISHED, TARGET = "baseline, as published, fp32", "baseline, no_grad, fp32"
BF16, EQUAL, DEFAULT = "baseline, no_grad, bf16", "ours, equal settings", "ours, default"
CHANNELS_LAST = "baseline, no_grad, bf16, channels-last"
COMPILED = "baseline, no_grad, bf16, channels-last, compiled"
OUR_RECIPE = "baseline, no_grad, bf16, channels-last, our recipe"
FEW_STEPS = "ours, few-step denoiser"
IMAGES = ("diffusers fp32", "diffusers bf16", "diffusers bf16 compiled", "lean", "few steps")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to a student: its images and how it is trained on them, or the job itself."""

    images: str | None = None
    """One of `IMAGES`; None: `dmkd distill` makes them."""
    recipe: Recipe | None = None
    after: str | None = None
    """The arm that this one changes in one respect."""
    trains_like: str = EQUAL
    """Job with the settings of views, teachers, optimizer and length."""


def _arms() -> dict[str, Arm]:
    bf16 = Recipe(dtype="bfloat16")
    channels_last = replace(bf16, channels_last=True)
    arms = {
        PUBLISHED: Arm(images="diffusers fp32", recipe=Recipe(teacher_graph=True)),
        TARGET: Arm(images="diffusers fp32", recipe=Recipe(), after=PUBLISHED),
        BF16: Arm(images="diffusers bf16", recipe=bf16, after=TARGET),
        CHANNELS_LAST: Arm(images="diffusers bf16", recipe=channels_last, after=BF16),
        COMPILED: Arm(
            images="diffusers bf16 compiled",
            recipe=replace(channels_last, compiled_student=True),
            after=CHANNELS_LAST,
        ),
        OUR_RECIPE: Arm(
            images="diffusers bf16", recipe=channels_last, after=CHANNELS_LAST, trains_like=DEFAULT
        ),
        "lean sampler": Arm(images="lean", recipe=channels_last, after=CHANNELS_LAST),
    }
    recipe, before = channels_last, "lean sampler"
    changes: dict[str, dict[str, Any]] = {
        "images in a ring": {"ring": True},
        "fused views": {"fused_views": True},
        "fused loss": {"fused_loss": True},
        "folded teacher": {"folded_teacher": True},
        "no reads per step": {"reads_each_step": False},
        "freed memory kept": {"keeps_memory": True},
    }
    for name, change in changes.items():
        recipe = replace(recipe, **change)
        arms[name] = Arm(images="lean", recipe=recipe, after=before)
        before = name
    compiled = replace(recipe, compiled_student=True)
    arms["compiled student"] = Arm(images="lean", recipe=compiled, after=before)
    arms["few-step generator"] = Arm(images="few steps", recipe=recipe, after=before)
    return arms | {EQUAL: Arm(), FEW_STEPS: Arm(after=EQUAL), DEFAULT: Arm(after=FEW_STEPS)}


ARMS = _arms()


@dataclass(frozen=True, kw_only=True)
class Study:
    """Sizes of the comparison."""

    num_images: int
    num_views: int
    num_points: int
    seed: int = 0
    overrides: tuple[str, ...] = ()
    """Overrides of both jobs' configs."""

    def config(self, arm: str) -> tuple[Path, list[str]]:
        """Settings of a job: file and overrides."""
        overrides = [*self.overrides, f"seed={self.seed}", "device=cpu"]
        if arm in (FEW_STEPS, DEFAULT):
            path = CONFIGS / "fashion_mnist.yaml"
            if arm == FEW_STEPS:
                overrides = [*ADAMW, *overrides, f"train.num_views={self.num_views}"]
            views = load_config(DistillConfig, path, overrides).train.num_views
            # The other arms' distance between evaluations.
            points = max(1, views * self.num_points // self.num_views)
            return path, [*overrides, f"eval.num_points={points}"]
        path = CONFIGS / "many_steps.yaml"
        batch = load_config(DistillConfig, path, overrides).train.batch_size
        block = min(256, self.num_images)
        if self.num_images % block:
            raise ValueError(f"--images: got {self.num_images}, expected a multiple of {block}")
        drawn = -(-self.num_views // batch) * batch
        # All images before the first view, and none later.
        return path, [
            *overrides,
            f"train.num_views={self.num_views}",
            f"eval.num_points={self.num_points}",
            f"sampler.micro_batch_images={block}",
            f"ring.min_fill_images={self.num_images}",
            f"ring.capacity_images={self.num_images + block}",
            f"ring.samples_per_insert={math.ceil(1e3 * drawn / self.num_images) / 1e3}",
        ]

    def load(self, arm: str) -> DistillConfig:
        """The same, read."""
        path, overrides = self.config(arm)
        return load_config(DistillConfig, path, overrides)

    def facts(self) -> dict[str, Any]:
        """Arguments and settings that the figures of a part depend on."""
        return {
            "images": self.num_images,
            "views": self.num_views,
            "points": self.num_points,
            "seed": self.seed,
            "overrides": list(self.overrides),
            # A file in configs/ may have changed since a part was made.
            "configs": self.configs(),
        }

    def configs(self) -> str:
        """Hash of all settings of our jobs, but for their seed."""
        study = replace(self, seed=0)
        texts = [study.load(arm).model_dump_json() for arm in (EQUAL, FEW_STEPS, DEFAULT)]
        return hashlib.sha256("".join(texts).encode()).hexdigest()


def run_part(study: Study, name: str, work: Path) -> None:
    """Make a set of images or run an arm, here, and keep what was measured."""
    target = part_file(work, study.seed, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    found = (make_images if name in IMAGES else run_arm)(study, name, target.parent)
    fresh = target.with_suffix(".new")
    fresh.write_text(
        json.dumps({"study": study.facts(), "commit": environment()["commit"], **found}),
        encoding="utf-8",
    )
    fresh.rename(target)


def part_file(work: Path, seed: int, name: str) -> Path:
    """Where a finished part's figures are."""
    return work / f"seed-{seed}" / f"{slug(name)}.json"


def make_images(study: Study, name: str, work: Path) -> dict[str, Any]:
    """All images of a set into a folder below `work`: tensors and, where an arm wants them, PNGs.

    Returns:
        Seconds of loading and compiling (setup), of the images and of the PNG files.
    """
    folder = work / f"images-{slug(name)}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    clock = Clock()
    set_num_threads(0)
    make = _ours if name in ("lean", "few steps") else _theirs
    images, labels, times, proof = make(study, name, clock)
    save_file({"images": images, "labels": labels}, folder / "images.safetensors")
    times["pngs"] = {"wall_s": 0.0, "cpu_s": 0.0}
    if any(arm.images == name and arm.recipe and not arm.recipe.ring for arm in ARMS.values()):
        before = Clock()
        baseline.write_pngs(images, labels, folder / "pngs")
        times["pngs"] = before.state_dict()
    return {
        **times,
        "num_images": len(images),
        "proof": proof,
        "disk_mib": _mib(folder / "pngs"),
        "peak_memory_mib": peak_memory_mib(),
    }


def run_arm(study: Study, name: str, work: Path) -> dict[str, Any]:
    """Train an arm's student; see `ladder.train` for what comes back."""
    arm = ARMS[name]
    if arm.recipe is None:
        return run_job(study, name)
    assert arm.images is not None
    made = work / f"images-{slug(arm.images)}"
    tensors = load_file(made / "images.safetensors")
    return ladder.train(
        arm.recipe,
        study.load(arm.trains_like),
        images=tensors["images"],
        labels=tensors["labels"],
        pngs=None if arm.recipe.ring else made / "pngs",
    )


def run_job(study: Study, name: str) -> dict[str, Any]:
    """`dmkd distill`, as a user runs it, with stopwatches on its parts."""
    path, overrides = study.config(name)
    watch: dict[str, float] = {"generation": 0.0, "training": 0.0, "evaluation": 0.0}
    runs: list[Distiller] = []
    evaluated: list[float] = []

    @contextlib.contextmanager
    def on(part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        watch[part] += time.perf_counter() - started

    class Watched(Distiller):
        def refill(self, *args: Any, **more: Any) -> None:
            with on("generation"):
                super().refill(*args, **more)

        def train_step(self) -> Tensor:
            with on("training"):
                return super().train_step()

        def fit(self) -> dict[str, Any]:
            runs.append(self)
            return super().fit()

    def measured(*args: Any, **more: Any) -> scoring.Scores:
        with on("evaluation"):
            scores = real_measure(*args, **more)
        evaluated.append(watch["evaluation"])
        return scores

    real_measure = scoring.measure
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        out = Path(scratch) / "out"
        with (
            mock.patch.object(build_module, "Distiller", Watched),
            mock.patch.object(scoring, "measure", measured),
            out.open("w") as file,
            contextlib.redirect_stdout(file),
        ):
            code = cli.main(["distill", str(path), f"run_dir={run}", *overrides])
        if code:
            raise RuntimeError(f"{name}: dmkd distill ended with {code}; see above")
        summary = json.loads(out.read_text().splitlines()[-1])
        stats = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
        config = load_config(DistillConfig, run / "config.yaml")
        disk_mib = _mib(run)
    distiller = runs[0]
    assert isinstance(distiller.images, GeneratedImages)
    seen = ladder.seen_in(distiller.train_step, distiller.student.model)
    graphs = seen.pop("compiled_graphs")  # No more than the sampler is compiled on a CPU.
    proof = {
        **seen,
        "sampler": type(distiller.images.samplers[0][1]).__name__,
        "attention": config.sampler.attention,
        "sampler_compiled_graphs": graphs,
        "sampler_dtype": config.dtype,
        "ring_draws": distiller.ring.num_sampled,
        "png_files": 0,
    }
    ops = seen["ops"]
    if (ops[ladder.FUSED_VIEWS], ops[ladder.FUSED_LOSS], ops[ladder.EAGER_LOSS]) != (1, 1, 0):
        raise RuntimeError(f"{name}: not the job's own operators ({proof}); fix the arm")
    return {
        "wall_s": summary["wall_s"],
        "cpu_s": summary["cpu_s"],
        "views": summary["views"],
        "num_images": summary["generated_images"],
        "generation_s": watch["generation"],
        "training_s": watch["training"],
        "evaluation_s": watch["evaluation"],
        # One evaluation more comes after the last row: that of the saved student.
        "curve": [(*point, s) for point, s in zip(curve_of(stats), evaluated, strict=False)],
        "disk_mib": disk_mib,
        "peak_memory_mib": peak_memory_mib(),
        "proof": proof,
    }


def slug(name: str) -> str:
    """A part's name as a file's."""
    return name.replace(",", "").replace(" ", "-")


Made = tuple[Tensor, Tensor, dict[str, Any], dict[str, Any]]


def _theirs(study: Study, name: str, clock: Clock) -> Made:
    """Images of diffusers' eager loop, balanced labels, and what they took."""
    config = study.load(EQUAL)
    assert config.denoiser is not None
    if config.sampler.solver != "dpm++2m":
        raise ValueError(f"sampler.solver: got {config.sampler.solver}, expected dpm++2m")
    from benchmarks.parts.sampler_models import diffusers_dit

    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    module = diffusers_dit(resolve(config.denoiser.path)).to(dtype)
    generator = torch.Generator().manual_seed(study.seed)
    side, channels = module.config.sample_size, module.config.in_channels
    noise = torch.randn(study.num_images, channels, side, side, generator=generator)
    labels = torch.arange(study.num_images) % module.config.num_embeds_ada_norm
    make = partial(
        baseline.make_images, num_steps=config.sampler.steps, guidance_scale=config.sampler.scale
    )
    setup: dict[str, Any] = clock.state_dict()
    most = min(study.num_images, max(baseline.BATCHES))
    batch = baseline.fastest(
        [b for b in baseline.BATCHES if b <= most],
        lambda size: make(module, noise[:most], labels[:most], batch=size),
    )
    before = Clock()  # Compilation counts.
    running: Any = torch.compile(module, dynamic=False) if name.endswith("compiled") else module
    images = make(running, noise, labels, batch=batch)
    proof = {
        "sampler": f"diffusers {type(module).__name__}",
        "sampler_batch": batch,
        "attention": type(module.transformer_blocks[0].attn1.processor).__name__,
        "sampler_compiled_graphs": ladder.compiled_graphs(),
        "sampler_dtype": str(module.dtype).removeprefix("torch."),
    }
    return images, labels, {"setup": setup, "images": before.state_dict()}, proof


def _ours(study: Study, name: str, clock: Clock) -> Made:
    """Images of our sampler, as `dmkd` would make them, and what they took."""
    keep_freed_memory()
    config = study.load(EQUAL)
    if name == "few steps":
        default = study.load(DEFAULT)
        size = min(default.sampler.micro_batch_images, study.num_images)
        sampler = default.sampler.model_copy(update={"micro_batch_images": size})
        config = config.model_copy(update={"denoiser": default.denoiser, "sampler": sampler})
    job = resolve_(config)
    denoiser = open_denoiser(job.config.denoiser, ladder.CPU)
    sampling = make_sampler(resolve_images(job, denoiser), denoiser)
    ids = torch.arange(study.num_images)
    labels = LabelStream(denoiser.num_classes, seed=study.seed).labels_of(ids)
    images = torch.empty(len(ids), *denoiser.image_shape, dtype=torch.uint8)
    size = sampling.micro_batch_images
    sampling.sample(ids[:size], labels[:size], out=images[:size])  # compiles
    setup, before = clock.state_dict(), Clock()
    sampling.sample(ids, labels, out=images)
    module = denoiser.module
    proof: dict[str, Any] = {
        "sampler": f"{type(sampling).__name__} on {type(module).__name__}",
        "sampler_batch": size,
        "attention": module.attention if isinstance(module, LeanDiT) else "sdpa",
        "sampler_compiled_graphs": ladder.compiled_graphs(),
        "sampler_dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
    }
    if (proof["sampler_compiled_graphs"] > 0) != job.compile_sampler:
        raise RuntimeError(f"{name}: the sampler was not compiled ({proof}); fix the arm")
    return images, labels, {"setup": setup, "images": before.state_dict()}, proof


def _mib(folder: Path) -> float:
    """Disk blocks of all files, in MiB."""
    return sum(p.stat().st_blocks for p in folder.rglob("*") if p.is_file()) * 512 / 2**20
