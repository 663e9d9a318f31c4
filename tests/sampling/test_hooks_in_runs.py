"""Runs whose images are steered or selected: checkpoints, resume, and what refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hook_cases import SPEC, Shift, brightest, brightness, looks_at_the_student, of_docs, student
from small_jobs import CONFIG, ROOT, SHORT, build_distiller, fit_until, tiny_sampler
from torch import Tensor

from dmkd_fast import Distiller, GeneratedImages, LabelStream, cli, distill
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.jobs.build import make_stream
from dmkd_fast.jobs.images import OpenSource
from dmkd_fast.jobs.resolve import resolve
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.sampling.hooks import Hooks


def test_images_that_look_at_the_student_are_made_when_needed_and_never_again(
    tmp_path: Path,
) -> None:
    images = looks_at_the_student(student())
    assert images.rewrites == [] and images.may_wait
    with pytest.raises(UserError, match=r"guard_blocks: got 1 with images that .* the student"):
        build_distiller(tmp_path / "run", images=images, ring={"guard_blocks": 1})


def hooked(run_dir: Path) -> Distiller:
    model = student()
    return build_distiller(run_dir, images=looks_at_the_student(model), student=model)


def weights(distiller: Distiller) -> list[Tensor]:
    return [value.clone() for value in distiller.student.model.state_dict().values()]


@pytest.mark.parametrize("stop_at", [pytest.param(5, marks=pytest.mark.slow), 21])
def test_a_run_whose_images_depend_on_the_student_resumes_bit_for_bit(
    tmp_path: Path, stop_at: int
) -> None:
    whole = hooked(tmp_path / "whole")
    whole.fit()
    plain = build_distiller(tmp_path / "plain", student=student())
    plain.fit()
    assert not torch.equal(whole.ring.images, plain.ring.images)
    part = hooked(tmp_path / "part")
    fit_until(part, stop_at)
    again = hooked(tmp_path / "part")
    assert again.restore().step == stop_at
    again.fit()
    assert torch.equal(whole.ring.images, again.ring.images)
    assert all(torch.equal(*pair) for pair in zip(weights(whole), weights(again), strict=True))
    row = json.loads((tmp_path / "part" / "stats.jsonl").read_text().splitlines()[-1])
    assert row["rejected_images"] == 2 * row["images"]


def test_checkpoints_keep_every_image_of_the_ring(tmp_path: Path) -> None:
    part = hooked(tmp_path / "part")
    fit_until(part, 21)
    again = hooked(tmp_path / "part")
    again.restore()
    assert torch.equal(part.ring.images, again.ring.images)
    newest = max((tmp_path / "part" / "blocks").glob("block-*"))
    newest.write_bytes(newest.read_bytes()[:-9] + b"x" * 9)
    with pytest.raises(UserError, match="could not be made again"):
        hooked(tmp_path / "part").restore()


def test_a_run_is_not_continued_without_its_hooks(tmp_path: Path) -> None:
    fit_until(hooked(tmp_path / "run"), 5)
    with pytest.raises(UserError, match="guide and selection: got none, expected those of the run"):
        build_distiller(tmp_path / "run", student=student()).restore()


def test_all_samplers_of_a_run_have_one_guide() -> None:
    guide = Shift()
    first, second = tiny_sampler(guide=guide), tiny_sampler(count=1, guide=guide)
    GeneratedImages(LabelStream(4), first, later=[(0.5, second)])
    with pytest.raises(UserError, match="later: got samplers with another guide, expected that of"):
        GeneratedImages(LabelStream(4), first, later=[(0.5, tiny_sampler())])


@pytest.fixture(scope="module")
def run_with_hooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("hooks") / "run"
    config = load_config(DistillConfig, CONFIG, [*SHORT, f"run_dir={run_dir}"])
    guide = of_docs("EntropyGuide")
    summary = distill(
        config,
        show=False,
        guide=lambda student: guide(student, SPEC),
        selection=lambda _: brightest(),
    )
    assert summary["rejected_images"] == 2 * summary["generated_images"]
    return run_dir


def test_distill_takes_hooks_and_records_their_names(run_with_hooks: Path) -> None:
    config = load_config(DistillConfig, run_with_hooks / "config.yaml")
    assert config.hooks == ("guide EntropyGuide", "selection brightness best of 3")


@pytest.mark.parametrize(
    "more",
    [[], ["--shard", "0/2"], ["--teacher-logits", "full"]],
    ids=["plain", "shard", "teacher logits"],
)
def test_generate_refuses_the_config_of_a_run_with_hooks(
    run_with_hooks: Path, tmp_path: Path, more: list[str], capsys: Any
) -> None:
    arguments = ["--out", str(tmp_path / "out"), "--num-images", "64", *more]
    assert cli.main(["generate", str(run_with_hooks / "config.yaml"), *arguments, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "hooks: got guide EntropyGuide, selection brightness" in error
    assert not (tmp_path / "out").exists()


def test_a_config_with_hooks_needs_the_objects(run_with_hooks: Path, tmp_path: Path) -> None:
    config = run_with_hooks / "config.yaml"
    with pytest.raises(UserError, match="hooks: got none, expected guide EntropyGuide"):
        distill(config, show=False, run_dir=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("hooks", "words"),
    [
        ({"guide": Shift()}, "guide: got a Shift, expected a function of the student that"),
        ({"guide": 3}, "guide: got a int, expected a function of the student that"),
        ({"guide": lambda _: None}, "guide: got a function .* NoneType, expected one .* a Guide"),
        ({"selection": brightest()}, "selection: got a Selection, expected a function of the"),
        ({"selection": lambda _: brightness}, "a function, expected one that returns a Selection"),
    ],
)
def test_what_makes_no_hook_is_refused_before_anything_is_written(
    tmp_path: Path, hooks: dict[str, Any], words: str
) -> None:
    config = load_config(DistillConfig, CONFIG, [*SHORT, f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=words):
        distill(config, show=False, **hooks)
    assert not (tmp_path / "run").exists()


def test_hooks_for_images_on_disk_are_refused() -> None:
    config = load_config(DistillConfig, ROOT / "configs" / "from_disk.yaml")
    facts = {"image_shape": (1, 28, 28), "num_classes": 10, "license": "unknown"}
    images = OpenSource(source=object(), kind="shards", **facts)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"hooks: got guide Shift with source, expected none"):
        make_stream(resolve(config), images, 1, hooks=Hooks(guide=Shift()), show=False)
