"""The student's loss by its settings: every divergence trains and resumes, and is `kd_loss`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from small_jobs import CONFIG, fit_until
from torch import nn

from dmkd_fast import Distiller, Objective, kd_loss, kd_loss_topk
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.config.training import _Name
from dmkd_fast.loss.divergences import NAMES
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.training import objective as objective_module
from dmkd_fast.training.objective import TopLogits

Make = Callable[..., Distiller]
SETTINGS = [
    *([f"loss.divergence={name}"] for name in NAMES),
    ["loss.divergence={jsd: {beta: 0.1}}"],
    ["loss.divergence={alpha_beta: {alpha: 0.5, beta: 0.5}}", "loss.alpha=0.5"],
    ["loss.divergence={forward_kl: 0.9, dkd: {weight: 0.1, beta: 4}}"],
    ["loss.standardize_logits=true", "loss.temperature=2"],
]


def objective(overrides: list[str]) -> Objective:
    return Objective(**load_config(DistillConfig, CONFIG, overrides).loss.model_dump())


def test_the_settings_know_every_divergence() -> None:
    assert get_args(_Name) == NAMES


@pytest.mark.parametrize("overrides", SETTINGS)
def test_a_job_of_each_divergence_learns(make_distiller: Make, overrides: list[str]) -> None:
    distiller = make_distiller(objective=objective(overrides), num_views=320, lr=1e-2)
    distiller.refill()
    before = copy.deepcopy(distiller.student.model.state_dict())
    losses = [distiller.train_step().item()]
    for _ in range(19):
        distiller.refill()
        losses.append(distiller.train_step().item())
    assert sum(losses[-5:]) < sum(losses[:5])
    after = distiller.student.model.state_dict()
    assert all(not torch.equal(before[n], after[n]) for n in before if n.endswith("weight"))


def test_a_run_of_a_mixture_resumes_to_the_same_bits(make_distiller: Make) -> None:
    wanted = objective(["loss.divergence={forward_kl: 0.9, dkd: {weight: 0.1, beta: 4}}"])
    options: dict[str, Any] = {"objective": wanted, "num_views": 160}
    whole, first = make_distiller(**options), make_distiller(**options)
    whole.fit()
    fit_until(first, 6)
    again = make_distiller(run_dir=first.run_dir, **options)
    again.restore()
    again.fit()
    ends = (d.student.average.module.state_dict().values() for d in (whole, again))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("overrides", SETTINGS)
def test_loss_and_gradient_are_those_of_kd_loss(overrides: list[str]) -> None:
    torch.manual_seed(0)
    wanted = objective(overrides)
    student, teacher, labels = torch.randn(16, 5), torch.randn(16, 5), torch.randint(5, (16,))
    ours, theirs = (nn.Parameter(student.clone()) for _ in range(2))
    loss = wanted.backward(ours * 1, teacher, labels, num_items=32, grad_scale=8.0)
    expected = kd_loss(
        theirs,
        teacher,
        labels if wanted.uses_target else None,
        alpha=wanted.alpha if wanted.alpha < 1 else None,
        temperature=wanted.temperature,
        divergence=wanted.divergence,
        standardize_logits=wanted.standardize_logits,
        num_items=32,
    )
    (8 * expected).backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("rest", ["bucket", "renormalize"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_top_logits_have_the_loss_of_kd_loss_topk(rest: Any, alpha: float, divergence: str) -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(8, 9), 3 * torch.randn(8, 9), torch.randint(9, (8,))
    values, indices = teacher.topk(3)
    top = TopLogits(values, indices, (teacher / 2).logsumexp(1))
    ours, theirs = (nn.Parameter(student.clone()) for _ in range(2))
    wanted = Objective(temperature=2.0, alpha=alpha, rest=rest, divergence=divergence)
    loss = wanted.backward(ours * 1, top, labels, num_items=16)
    kd = kd_loss_topk(
        theirs,
        values,
        indices,
        teacher_logsumexp=top.logsumexp if rest == "bucket" else None,
        rest=rest,
        temperature=2.0,
        divergence=divergence,
        num_items=16,
    )
    hard = nn.functional.cross_entropy(theirs, labels, reduction="sum") / 16
    expected = alpha * kd + (1 - alpha) * hard
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
        ("0.5", TypeError, "^alpha: got '0.5', expected a number$"),
        (None, TypeError, "^alpha: got None, expected a number$"),
        (True, TypeError, "^alpha: got True, expected a number$"),
        (math.nan, UserError, "^alpha: got nan, expected a finite number$"),
        (0, UserError, "^alpha: got 0, expected a number above 0 and at most 1; raise it, as with"),
        (1.5, UserError, "^alpha: got 1.5, expected a number above 0 and at most 1$"),
    ],
)
def test_an_alpha_that_is_no_weight_is_refused(
    alpha: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Objective(alpha=alpha)


def test_an_infinite_loss_of_top_logits_shows_in_the_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the step would be taken, as the gradient alone is finite."""
    real = objective_module.kd_loss_topk
    for more in (0.0, math.inf):

        def added(*args: Any, more: float = more, **named: Any) -> Any:
            return real(*args, **named) + more

        monkeypatch.setattr(objective_module, "kd_loss_topk", added)
        student, teacher = nn.Parameter(torch.randn(4, 9)), torch.randn(4, 9)
        values, indices = teacher.topk(3)
        top = TopLogits(values, indices, (teacher / 4).logsumexp(1))
        loss = Objective().backward(student * 1, top, torch.zeros(0), num_items=4)
        assert student.grad is not None
        assert bool(loss.isfinite()) == bool(student.grad.isfinite().all()) == (more == 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.divergence=kl"], "loss.divergence: got 'kl', expected one of"),
        (["loss.divergence={jsd: {beta: 1}}"], r"jsd.beta: got 1, expected 0 to 1 \(exclusive\)"),
        (["loss.divergence={jsd: {gamma: 1}}"], r"loss.divergence: jsd: got \['gamma'\]"),
        (["loss.divergence={jsd: 1, dkd: 1, dist: 1}"], "got 3 terms, expected 1 or 2"),
        (["loss.divergence={jsd: true}"], "jsd.weight: got bool, expected a number"),
        (["loss.divergence=[jsd]"], "loss.divergence: got tuple, expected one of"),
        (["loss.divergence=dkd", "mix.mixup_alpha=1"], "loss.divergence: got dkd with mix"),
        (["loss.rest=renormalize"], "loss.rest: got renormalize, expected it with teacher.stored"),
        (["loss.rest=drop"], "loss.rest: got 'drop'"),
    ],
)
def test_a_wrong_loss_is_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(DistillConfig, CONFIG, overrides)
