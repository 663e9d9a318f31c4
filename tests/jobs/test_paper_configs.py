"""The paper's recipes: what their files say, and each of them through a run in its true sizes."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import paper_models
import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_jobs import ROOT, fit_until

from dmkd_fast import Distiller
from dmkd_fast.config.jobs import (
    DistillConfig,
    PretrainDenoiserConfig,
    PretrainFewstepConfig,
    TeacherConfig,
)
from dmkd_fast.config.loading import load_config
from dmkd_fast.jobs import memory, networks, run_dir
from dmkd_fast.jobs.build import build
from dmkd_fast.jobs.distill import run
from dmkd_fast.jobs.parts import prepare

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PAPER = sorted((ROOT / "configs" / "paper").glob("*.yaml"))
KINDS = {
    "distill": DistillConfig,
    "pretrain teacher": TeacherConfig,
    "pretrain denoiser": PretrainDenoiserConfig,
    "pretrain fewstep": PretrainFewstepConfig,
}
IMAGES = {"imagenet": 256, "imagenet100": 256, "flowers102": 512, "cifar100": 512}
CLASSES = {"imagenet": 1000, "imagenet100": 100, "flowers102": 102, "cifar100": 100}
PUBLISHED = {
    "imagenet": [61.61, 68.63],
    "imagenet100": [85.9],
    "flowers102": [85.4],
    "cifar100": [76.58, 70.83, 56.29, 65.01, 66.89],
}
# Of the published networks, in units of 10,000; see paper_models.py for the denoisers.
PARAMETERS = {
    "imagenet": [1169, 2556],
    "imagenet100": [2371],
    "flowers102": [2372],
    "cifar100": [1122, 1122, 18, 57, 70],
}
TEACHERS = {
    "cifar100_resnet34": ("resnet34", "conv3"),
    "cifar100_vgg11": ("cifar_vgg11", "own"),
    "cifar100_wrn40_2": ("cifar_wrn40_2", "own"),
}
SMALL = [
    "device=cpu",
    "dtype=bfloat16",
    "num_threads=1",
    "sampler.num_steps=2",
    "sampler.micro_batch_images=4",
    "sampler.compile=false",
    "ring.capacity_images=8",
    "ring.min_fill_images=4",
    "train.batch_size=4",
    "train.num_views=8",
    "train.log_every_steps=1",
    "eval.num_points=1",
]


def comment(path: Path) -> list[str]:
    """The lines before the first setting, without their marks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").removeprefix(" ") for line in lines[:end]]


def pairs(path: Path) -> list[tuple[float, list[str]]]:
    """Published top-1 and the overrides that the comment gives for it."""
    found = [re.fullmatch(r"  (\d\d\.\d+)  (\S.*)", line) for line in comment(path)]
    return [(float(m[1]), m[2].split()) for m in found if m]


def load(path: Path, overrides: Sequence[str] = ()) -> DistillConfig:
    return load_config(DistillConfig, path, overrides)


def random_teacher(path: Path, config: DistillConfig, scratch: Path) -> list[str]:
    """Overrides that put random weights of the same network in place of the teacher's."""
    name = Path(config.teacher.path or "").name
    architecture, stem = TEACHERS.get(name, ("torchvision:resnet18", "own"))
    classes = 1000 if config.teacher.class_map else CLASSES[path.stem]
    folder = paper_models.classifier(
        scratch / "teacher", architecture, num_classes=classes, stem=stem
    )
    return [f"teacher.path={folder}", "teacher.arch=null", "teacher.pretrained=false"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_says_command_hardware_and_result(path: Path) -> None:
    first, *rest = comment(path)
    match = re.fullmatch(r"dmkd (distill|pretrain \w+) (\S+)( --data \w+)?", first)
    assert match and match[2] == str(path.relative_to(ROOT))
    text = " ".join(rest)
    assert re.search(r"\b(CPU cores?|CUDA GPU)\b", text), "no hardware"
    assert re.search(r"\b(top-1|RMS|loss|the student is the same)\b", text), "no result"
    kind = KINDS[match[1]]
    assert load_config(kind, path).name == path.stem


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_recipe_is_the_papers(path: Path) -> None:
    assert [top1 for top1, _ in pairs(path)] == PUBLISHED[path.stem]
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert "Needed:" in comment(path) and values["loss"] == {"temperature": 10}
    optim = values["optim"]
    assert (optim["name"], optim["lr"], optim["momentum"]) == ("sgd", 0.1, 0.9)
    assert optim["nesterov"] is False and optim["warmup"] == 0
    is_cifar = path.stem == "cifar100"
    assert optim["milestones"] == (
        [150 / 240, 180 / 240, 210 / 240] if is_cifar else [0.3, 0.6, 0.9]
    )
    assert optim["weight_decay"] == (5e-4 if is_cifar else 1e-4)
    config = load(path)
    assert config.train.batch_size == (128 if is_cifar else 256)
    views = config.views
    if is_cifar:  # a pad of 4 in 32
        assert (views.size, views.pad, views.scale) == (32, 4 * 512 // 32, (1, 1))
    else:
        assert (views.size, views.scale) == (224, (0.08, 1.0))
        assert views.ratio == pytest.approx((3 / 4, 4 / 3))
    assert config.sampler.guidance_scale == 2 and views.flip == 0.5


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_ring_holds_all_images_in_whole_blocks_as_the_comment_says(path: Path) -> None:
    config, size = load(path), IMAGES[path.stem]
    ring, block = config.ring, config.block_images
    assert ring.capacity_images % block == 0 and ring.min_fill_images % block == 0
    assert ring.capacity_images == ring.min_fill_images + block
    # Whole epochs over all images and no image more; whole batches.
    assert config.train.num_views == ring.min_fill_images * ring.samples_per_insert
    assert config.train.num_views % config.train.batch_size == 0
    plan = memory.ring_plan(config, (3, size, size))
    stated = re.search(r"the ring takes (\d+) GiB", " ".join(comment(path)))
    assert stated and round(sum(plan.num_bytes.values()) / 2**30) == int(stated[1])


@pytest.mark.parametrize("name", ["imagenet100", "flowers102", "cifar100"])
def test_every_class_has_its_index_or_prompt_once(name: str) -> None:
    config = load(ROOT / "configs" / "paper" / f"{name}.yaml")
    assert config.denoiser is not None
    given: tuple[Any, ...] = config.denoiser.prompts or config.denoiser.class_map or ()
    assert len(set(given)) == len(given) == CLASSES[name]
    if name == "imagenet100":  # in the order of WordNet ids, as sorted folders are
        assert list(given) == sorted(given) and max(given) < 1000
        assert config.teacher.class_map == given


@pytest.mark.parametrize(
    ("path", "number"),
    [(path, number) for path in PAPER for number in range(len(PUBLISHED[path.stem]))],
    ids=lambda value: value.stem if isinstance(value, Path) else str(value),
)
def test_every_published_pair_is_built_from_its_line(
    path: Path, number: int, tmp_path: Path
) -> None:
    overrides = pairs(path)[number][1]
    config = load(path, overrides)
    teacher = random_teacher(path, config, tmp_path)
    config = load(path, overrides + teacher)
    loaded = networks.load_teachers(config.teachers, temperature=10.0, device=torch.device("cpu"))
    student, spec = networks.load_student(
        config.student, loaded, view_size=config.views.size, device=torch.device("cpu"), seed=0
    )
    assert spec.num_classes == loaded.num_classes["teacher"] == CLASSES[path.stem]
    count = sum(p.numel() for p in student.parameters())
    assert round(count / 1e4) == PARAMETERS[path.stem][number]


@pytest.fixture(scope="module")
def generators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Folders with gigabytes of random weights, made when asked for and deleted at the end."""
    root = tmp_path_factory.mktemp("generators")

    class Made(dict[str, Path]):
        def __missing__(self, kind: str) -> Path:
            self[kind] = getattr(paper_models, kind)(root / kind)
            return self[kind]

    yield Made()
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_a_recipe_in_its_true_sizes_trains_stops_and_goes_on(
    path: Path, generators: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights; only steps, batches and lengths are small."""
    size, classes = IMAGES[path.stem], CLASSES[path.stem]
    kind = "dit_xl_2" if size == 256 else "stable_diffusion_1_5"
    images = paper_models.write_test_images(tmp_path / "test", num_classes=classes)
    overrides = [
        *SMALL,
        f"denoiser.path={generators[kind]}",
        "denoiser.revision=null",
        f"eval.path={images}",
        f"run_dir={tmp_path / 'run'}",
        *random_teacher(path, load(path), tmp_path),
    ]
    job, parts = prepare(load(path, overrides))
    config = job.config
    memory.check(job, parts)
    assert parts.origin.image_shape == (3, size, size)
    assert parts.origin.num_classes == classes
    distiller = build(job, parts, show=False)
    before = {name: value.clone() for name, value in parts.student.state_dict().items()}
    folder = run_dir.claim(config)
    fit_until(distiller, 1)
    made = distiller.ring.images[:4].float()
    assert made.shape == (4, 3, size, size) and made.std() > 1
    assert not torch.equal(made[0], made[1])
    after = parts.student.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    del distiller, parts, made

    steps, restored = [], []
    train_step, restore = Distiller.train_step, Distiller.restore

    def seen_step(self: Distiller) -> torch.Tensor:
        steps.append(self.step)
        return train_step(self)

    def seen_restore(self: Distiller) -> Any:
        restored.append(restore(self))
        return restored[-1]

    monkeypatch.setattr(Distiller, "train_step", seen_step)
    monkeypatch.setattr(Distiller, "restore", seen_restore)
    summary = run(config, resume=True, show=False)
    assert [found.step for found in restored] == [1] and not restored[0].notes
    assert steps == [1]
    assert summary["views"] == 8 and summary["generated_images"] == 4
    rows = [json.loads(row) for row in (folder / "stats.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(math.isfinite(row["loss"]) for row in rows)
    saved = load_file(folder / "student" / "model.safetensors")
    assert saved.keys() == before.keys()
    assert all(value.isfinite().all() for value in saved.values())
    assert any(not torch.equal(saved[name], value) for name, value in after.items())
