"""Hooks between denoiser and step, and between sampler and ring."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hook_cases import SPEC, Shift, brightest, brightness, of_docs, stream, student, written
from sampler_cases import dit_sampler, make
from small_jobs import build_distiller, tiny_sampler
from torch import Tensor, nn

from dmkd_fast.runtime.errors import NotFiniteError, UserError
from dmkd_fast.sampling.hooks import Hooks

IDS = torch.arange(16)


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


class Wrong(Shift):
    """Returns what a function makes of the estimate."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def __call__(self, image_estimate: Tensor, labels: Tensor, step: Tensor) -> Any:
        return self.function(image_estimate)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda x: x[:1], r"got \(1, 1, 8, 8\) torch.float32"),
        (lambda x: 0.5, "got float"),
        (lambda x: None, "got NoneType"),
        (lambda x: x > 0, r"got \(16, 1, 8, 8\) torch.bool"),
        (lambda x: x.clamp_(-1, 1) * 0, "got an image estimate changed in place"),
    ],
)
def test_a_wrong_correction_is_refused(wrong: Any, words: str) -> None:
    with pytest.raises(UserError, match=rf"^guide: {words}"):
        make(tiny_sampler(guide=Wrong(wrong)), IDS, 4)


def test_a_correction_of_another_precision_keeps_the_states_float32() -> None:
    labels = IDS % 4
    plain, double = (
        tiny_sampler(guide=guide) for guide in (Shift(), Wrong(lambda x: 0 * x.double()))
    )
    states = double.trajectory(IDS, labels)
    assert states.dtype == torch.float32 and torch.equal(states, plain.trajectory(IDS, labels))


def test_an_error_of_a_guide_keeps_its_traceback() -> None:
    def fails(estimate: Tensor) -> Tensor:
        raise ZeroDivisionError("of the guide")

    with pytest.raises(ZeroDivisionError, match="of the guide"):
        make(tiny_sampler(guide=Wrong(fails)), IDS, 4)


def test_corrections_that_are_not_finite_end_the_run_with_a_line_about_the_guide(
    tmp_path: Path,
) -> None:
    images = stream(None, guide=Shift(math.nan))
    with pytest.raises(NotFiniteError, match="check that the guide's corrections are finite"):
        build_distiller(tmp_path / "run", images=images).fit()


@pytest.mark.parametrize("value", [None, 1, "no", lambda: True])
def test_a_hook_says_whether_it_is_a_function_of_the_id(value: Any) -> None:
    """Also a method in place of a value is refused: it would always count as True."""
    guide = Shift()
    guide.is_function_of_id = value
    with pytest.raises(UserError, match=r"guidance\.guide\.is_function_of_id: got"):
        tiny_sampler(guide=guide)
    with pytest.raises(UserError, match=r"selection\.is_function_of_id: got"):
        brightest(is_function_of_id=value)


@pytest.mark.slow
def test_noisy_and_guided_steps_take_a_guide() -> None:
    scheduler = {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
    ids = torch.arange(4)
    pair = [
        make(dit_sampler(scheduler=scheduler, guide=guide), ids, 1000) for guide in (None, Shift())
    ]
    assert torch.equal(*pair)


@torch.no_grad()
def entropy(model: nn.Module, images: Tensor) -> float:
    log_p = model.eval()(images.float() / 127.5 - 1).log_softmax(1)
    return float(-(log_p.exp() * log_p).sum(1).mean())


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_example_raises_the_entropy_of_the_student(compile: bool) -> None:
    model, guide = student(), of_docs("EntropyGuide")
    plain = make(tiny_sampler(), torch.arange(64), 4)
    sampler = tiny_sampler(guide=guide(model, SPEC, strength=2.0), compile=compile)
    steered = make(sampler, torch.arange(64), 4)
    assert model.training and all(p.grad is None for p in model.parameters())
    highest = math.log(4)
    assert highest - entropy(model, steered) < 0.5 * (highest - entropy(model, plain))
    alone = make(sampler, torch.tensor([40]), 4)
    assert torch.equal(alone[0], steered[40])


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
    plain, chosen = stream(None), stream(of_docs("teachers_choice")(teacher, SPEC))
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
        ({"score": 3}, "selection.score: got int, expected a function"),
        (
            {"select": lambda images, labels, scores: scores[:, 0] > 0},
            r"selection.select: got \(8,\) torch.bool",
        ),
        (
            {"select": lambda images, labels, scores: scores.argmax(1) + 3},
            "selection.select: got [345], expected 0 to 2",
        ),
    ],
)
def test_wrong_selections_are_refused(changes: dict[str, Any], error: str) -> None:
    ids = torch.arange(8)
    with pytest.raises((UserError, TypeError), match=error):
        written(stream(brightest(**changes)), ids, ids % 4)


def test_a_score_that_is_not_a_number_is_never_the_best() -> None:
    def score(images: Tensor, labels: Tensor) -> Tensor:
        scores = brightness(images, labels)
        scores[::3] = math.nan
        scores[1::3] = -math.inf
        return scores

    ids = torch.arange(8)
    chosen = written(stream(brightest(score=score)), ids, ids % 4)
    third = written(
        stream(brightest(select=lambda images, labels, scores: torch.full((8,), 2))), ids, ids % 4
    )
    assert torch.equal(chosen, third)


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


def test_names_tell_which_hooks_a_run_has() -> None:
    hooks = Hooks(guide=Shift(), selection=brightest())
    assert hooks.names == ["guide Shift", "selection brightness best of 3"]
    assert hooks.is_function_of_id and Hooks().is_function_of_id and not Hooks().in_use
