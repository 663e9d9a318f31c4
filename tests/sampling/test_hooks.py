"""Hooks between denoiser and step, and between sampler and ring."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sampler_cases import dit_sampler, make
from small_jobs import (
    CONFIG,
    ROOT,
    SHORT,
    build_distiller,
    fit_until,
    small_classifier,
    tiny_sampler,
)
from torch import Tensor, nn

from dmkd_fast import Distiller, GeneratedImages, LabelStream, Selection, cli, distill
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.jobs.build import make_stream
from dmkd_fast.jobs.images import OpenSource
from dmkd_fast.jobs.resolve import resolve
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.sampling.hooks import Hooks

IDS = torch.arange(16)


class Shift:
    """Adds a constant, and records its arguments."""

    is_function_of_id = True

    def __init__(self, value: float = 0.0) -> None:
        self.value, self.seen = value, []  # type: ignore[var-annotated]

    def __call__(self, image_estimate: Tensor, labels: Tensor, step: Tensor) -> Tensor:
        self.seen.append((image_estimate, labels, step))
        return torch.full_like(image_estimate, self.value)


def of_docs(name: str) -> Any:
    """Return an object that the page about hooks defines."""
    text = (ROOT / "docs" / "guides" / "hooks.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict[str, Any] = {}
    for block in blocks:
        if "class " in block or "def " in block:
            exec(block, names)
    return names[name]


def brightness(images: Tensor, labels: Tensor) -> Tensor:
    assert images.dtype == torch.uint8 and len(images) == len(labels)
    return images.float().mean((1, 2, 3))


def brightest(**changes: Any) -> Selection:
    settings: dict[str, Any] = {"score": brightness, "num_candidates": 3, "is_function_of_id": True}
    return Selection(**(settings | changes))


def test_a_correction_is_added_to_the_estimate_of_the_image() -> None:
    """One Euler step of a flow model ends at the image estimate."""
    plain, shifted = tiny_sampler(count=1), tiny_sampler(count=1, guide=Shift(0.25))
    labels = IDS % 4
    difference = shifted.trajectory(IDS, labels)[-1] - plain.trajectory(IDS, labels)[-1]
    torch.testing.assert_close(difference, torch.full_like(difference, 0.25))


def test_a_guide_sees_the_classes_of_the_job_and_every_step() -> None:
    guide = Shift()
    sampler = tiny_sampler(guide=guide, count=5, class_map=(3, 1, 0, 2))
    assert torch.equal(
        make(sampler, IDS, 4), make(tiny_sampler(count=5, class_map=(3, 1, 0, 2)), IDS, 4)
    )
    assert [int(step) for _, _, step in guide.seen] == [0, 1, 2, 3, 4]
    assert all(torch.equal(labels, IDS % 4) for _, labels, _ in guide.seen)
    assert {estimate.shape for estimate, _, _ in guide.seen} == {(16, 1, 8, 8)}


@pytest.mark.parametrize("wrong", [lambda x, *_: x[:1], lambda *_: 0.5])
def test_a_correction_of_another_shape_is_refused(wrong: Any) -> None:
    with pytest.raises(UserError, match=r"guide: got .* expected a correction \(16, 1, 8, 8\)"):
        make(tiny_sampler(guide=wrong), IDS, 4)


@pytest.mark.slow
def test_noisy_and_guided_steps_take_a_guide() -> None:
    scheduler = {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
    ids = torch.arange(4)
    pair = [
        make(dit_sampler(scheduler=scheduler, guide=guide), ids, 1000) for guide in (None, Shift())
    ]
    assert torch.equal(*pair)


def student() -> nn.Module:
    torch.manual_seed(11)
    return small_classifier()


@torch.no_grad()
def entropy(model: nn.Module, images: Tensor) -> float:
    log_p = model.eval()(images.float() / 127.5 - 1).log_softmax(1)
    return float(-(log_p.exp() * log_p).sum(1).mean())


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_example_raises_the_entropy_of_the_student(compile: bool) -> None:
    model, guide = student(), of_docs("EntropyGuide")
    plain = make(tiny_sampler(), torch.arange(64), 4)
    sampler = tiny_sampler(guide=guide(model, strength=2.0), compile=compile)
    steered = make(sampler, torch.arange(64), 4)
    assert model.training and all(p.grad is None for p in model.parameters())
    highest = math.log(4)
    assert highest - entropy(model, steered) < 0.5 * (highest - entropy(model, plain))
    alone = make(sampler, torch.tensor([40]), 4)
    assert torch.equal(alone[0], steered[40])


def stream(selection: Selection | None, **changes: Any) -> GeneratedImages:
    return GeneratedImages(LabelStream(4), tiny_sampler(**changes), selection=selection)


def written(images: GeneratedImages, ids: Tensor, labels: Tensor) -> Tensor:
    out = torch.empty((len(ids), 1, 8, 8), dtype=torch.uint8)
    images.write(ids, labels, out, progress=0.0)
    return out


def test_the_best_candidate_of_each_image_is_kept() -> None:
    images = stream(brightest())
    ids, labels = images.next_block(8)
    kept = written(images, ids, labels)
    every = torch.empty((24, 1, 8, 8), dtype=torch.uint8)
    tiny_sampler().sample(torch.arange(24), labels.repeat_interleave(3), out=every)
    scores = brightness(every, every[:, 0, 0, 0]).view(8, 3)
    assert torch.equal(kept, every.view(8, 3, 1, 8, 8)[torch.arange(8), scores.argmax(1)])
    assert len(scores.argmax(1).unique()) > 1
    alone = written(images, ids[5:6], labels[5:6])
    assert torch.equal(alone[0], kept[5])


def test_the_example_keeps_what_the_teacher_takes_for_its_class() -> None:
    teacher = student().eval()
    plain, chosen = stream(None), stream(of_docs("teachers_choice")(teacher))
    ids, labels = plain.next_block(64)
    sure = [
        teacher(written(images, ids, labels).float() / 127.5 - 1).softmax(1)[ids, labels].mean()
        for images in (plain, chosen)
    ]
    assert sure[1] > sure[0]


def test_select_replaces_the_choice_of_the_best() -> None:
    def dimmest(images: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
        assert images.shape == (8, 3, 1, 8, 8) and scores.shape == (8, 3) and len(labels) == 8
        return scores.argmin(1)

    ids, labels = stream(None).next_block(8)
    made = [written(stream(brightest(**s)), ids, labels) for s in ({}, {"select": dimmest})]
    assert (made[0].float().mean((1, 2, 3)) > made[1].float().mean((1, 2, 3))).all()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"score": lambda images, labels: images}, r"selection.score: got \(24, 1, 8, 8\)"),
        ({"select": lambda images, labels, scores: scores}, r"selection.select: got \(8, 3\)"),
        ({"num_candidates": 1}, "selection.num_candidates: got 1, expected 2 to 1024"),
        ({"score": 3}, "selection.score: got a value, expected a function"),
    ],
)
def test_wrong_selections_are_refused(changes: dict[str, Any], error: str) -> None:
    ids = torch.arange(8)
    with pytest.raises((UserError, TypeError), match=error):
        written(stream(brightest(**changes)), ids, ids % 4)


def test_rejected_images_are_counted_from_the_position_in_the_stream() -> None:
    images = stream(brightest())
    images.advance(100)
    assert images.totals() == {"rejected_images": 200}
    assert int(images.counts(torch.device("cpu"))["rejected_images"]) == 200
    again = stream(brightest())
    again.load_state_dict(images.state_dict())
    assert again.totals() == {"rejected_images": 200}
    assert stream(None).totals() == {} and "rejected_images" not in stream(None).counts(
        torch.device("cpu")
    )


def test_images_that_are_functions_of_their_id_can_be_made_again() -> None:
    images = stream(brightest())
    ids, labels = images.next_block(8)
    (rewrite,) = images.rewrites
    out = torch.empty((8, 1, 8, 8), dtype=torch.uint8)
    rewrite(ids, labels, out=out)
    assert torch.equal(out, written(images, ids, labels)) and not images.may_wait


def looks_at_the_student(model: nn.Module) -> GeneratedImages:
    guide = of_docs("EntropyGuide")(model, strength=2.0)

    def score(images: Tensor, labels: Tensor) -> Tensor:
        del labels
        was, _ = model.training, model.eval()
        scores = model(images.float() / 127.5 - 1).max(1).values
        model.train(was)
        return scores

    return stream(brightest(score=score, is_function_of_id=False), guide=guide)


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


def test_names_tell_which_hooks_a_run_has() -> None:
    hooks = Hooks(guide=Shift(), selection=brightest())
    assert hooks.names == ["guide Shift", "selection brightness best of 3"]
    assert hooks.is_function_of_id and Hooks().is_function_of_id and not Hooks().in_use


@pytest.fixture(scope="module")
def run_with_hooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("hooks") / "run"
    config = load_config(DistillConfig, CONFIG, [*SHORT, f"run_dir={run_dir}"])
    summary = distill(
        config, show=False, guide=of_docs("EntropyGuide"), selection=lambda _: brightest()
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


def test_hooks_for_images_on_disk_are_refused() -> None:
    config = load_config(DistillConfig, ROOT / "configs" / "from_disk.yaml")
    facts = {"image_shape": (1, 28, 28), "num_classes": 10, "license": "unknown"}
    images = OpenSource(source=object(), kind="shards", **facts)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"hooks: got guide Shift with source.path, expected none"):
        make_stream(resolve(config), images, 1, hooks=Hooks(guide=Shift()), show=False)
