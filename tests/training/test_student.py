"""The student's side of a step: what is not finite changes nothing; eager PyTorch's numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_jobs import sampler_of
from torch import Tensor, nn

from dmkd_fast import Distiller, Objective, Schedule
from dmkd_fast.loss.functional import kd_loss_and_grad
from dmkd_fast.runtime.errors import NotFiniteError
from dmkd_fast.training import objective as objective_module
from dmkd_fast.training import student as student_module
from dmkd_fast.training.ema import WeightEMA
from dmkd_fast.training.student import StudentTrainer

Make = Callable[..., Distiller]


def state(distiller: Distiller) -> dict[str, Tensor]:
    """Copies of weights, buffers, optimizer state, averaged weights and their count."""
    found = {f"student {k}": v.clone() for k, v in distiller.student.model.state_dict().items()}
    average = distiller.student.average
    found |= {f"average {k}": v.clone() for k, v in average.module.state_dict().items()}
    found["updates"] = average.num_updates.clone()
    for number, entry in distiller.student.optimizer.state_dict()["state"].items():
        found |= {f"optimizer {number} {k}": v.clone() for k, v in entry.items()}
    return found


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


class Poison:
    """Puts numbers that are not finite in one place of the next micro-batch, once."""

    def __init__(self, distiller: Distiller, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        loss = kd_loss_and_grad

        def bad_loss(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            value, grad = loss(*args, **kwargs)
            if where == "loss":  # infinite, with a finite gradient
                value = value + self.take(math.inf)
            if where == "loss gradient":
                grad[0, 0] += self.take(math.nan)
            return value, grad

        monkeypatch.setattr(objective_module, "kd_loss_and_grad", bad_loss)
        logits = distiller.targets.logits

        def bad_logits(*args: Any, **kwargs: Any) -> Tensor:
            found = logits(*args, **kwargs)
            return found + self.take(math.nan) if where == "teacher" else found

        monkeypatch.setattr(distiller.targets, "logits", bad_logits)
        weight = next(distiller.student.model.parameters())

        def bad_grad(grad: Tensor) -> Tensor:
            return grad + self.take(-math.inf) if where == "gradient" else grad

        weight.register_hook(bad_grad)
        views = distiller.targets.render

        def bad_views(*args: Any, **kwargs: Any) -> dict[Any, Tensor]:
            return {k: v + self.take(math.nan) for k, v in views(*args, **kwargs).items()}

        if where == "views":  # the running statistics of batch norm as well
            monkeypatch.setattr(distiller.targets, "render", bad_views)

    def take(self, value: float) -> float:
        self.left -= 1
        return value if self.left == 0 else 0.0


PLACES = ["teacher", "gradient", "loss", "loss gradient", "views"]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {"name": "adamw"},
        {"name": "sgd", "lr": 0.02},
        {"name": "adamw", "ema_decay": 0.9, "max_grad_norm": 0.5},
        {"name": "sgd", "lr": 0.02, "ema_decay": 0.9, "max_grad_norm": 0.5, "weight_decay": 0.1},
        {"name": "adamw", "dtype": torch.float16},
        {"name": "muon", "ema_decay": 0.9, "max_grad_norm": 0.5, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_a_step_that_is_not_finite_changes_nothing(
    make_distiller: Make,
    where: str,
    accumulate: int,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    distiller = make_distiller(accumulate=accumulate, **settings)
    poison = Poison(distiller, where, monkeypatch)
    for skipped, step in enumerate((0, 4)):  # the very first one, and a later one
        while distiller.step < step:
            distiller.refill()
            assert math.isfinite(distiller.train_step().item())
        distiller.refill()
        before = state(distiller)
        # In the last micro-batch, so that the earlier ones were good.
        poison.left = 1 if where == "views" else accumulate
        distiller.train_step()
        assert changed(before, state(distiller)) == []
        counts = {name: count.item() for name, count in distiller.student.counts().items()}
        assert counts == {"skipped_steps": skipped + 1, "skipped_in_a_row": 1}
        assert distiller.step == step + 1
    scale = distiller.student.state_dict()["scale"].item()
    assert scale == (2.0**14 if "dtype" in settings else 1.0)
    before = state(distiller)
    distiller.refill()
    assert math.isfinite(distiller.train_step().item())
    after = state(distiller)
    assert "student 0.weight" in changed(before, after)
    assert all(value.isfinite().all() for value in after.values())


def test_a_skipped_step_leaves_the_run_as_if_its_views_had_not_been_seen(tmp_path: Any) -> None:
    """The steps after it end where those of a trainer that never took it end."""
    torch.manual_seed(0)
    views, teacher = torch.randn(6, 16, 12), torch.randn(6, 16, 4)
    ends = []
    for bad in (None, 2):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        schedule = Schedule(batch_size=16, num_views=160, lr=0.01, ema_decay=0.9)
        one = StudentTrainer(net, schedule)
        for step in range(6):
            if bad is None and step == 2:
                continue
            one.start(0.01)
            one.learn(views[step], teacher[step] * (math.nan if step == bad else 1), torch.zeros(0))
            one.finish()
        ends.append([*net.state_dict().values(), *one.average.module.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize(("name", "nesterov"), [("sgd", False), ("sgd", True), ("adamw", True)])
def test_a_step_equals_eager_pytorch(name: Any, nesterov: bool) -> None:
    """Unfused optimizer, backward through the loss, lerp for the average."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    twin = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    twin.load_state_dict(net.state_dict())
    schedule = Schedule(
        batch_size=16,
        num_views=160,
        lr=0.1,
        name=name,
        nesterov=nesterov,
        ema_decay=0.6,
        weight_decay=0.01,
        max_grad_norm=0.3,
    )
    one = StudentTrainer(net, schedule, Objective(temperature=3.0, alpha=0.7))
    groups: list[dict[str, Any]] = [
        {"params": [p for p in twin.parameters() if p.ndim == ndim], "weight_decay": decay}
        for ndim, decay in ((2, 0.01), (1, 0.0))
    ]
    plain: torch.optim.Optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=nesterov)
    if name == "adamw":
        plain = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.99), foreach=False)
    mean = [p.detach().clone() for p in twin.parameters()]
    for step in range(5):
        views, teacher = torch.randn(16, 12).double(), torch.randn(16, 4).double()
        labels = torch.randint(4, (16,))
        one.start(0.1)
        loss = one.learn(views, teacher, labels)
        one.finish()
        logits = twin(views)
        kd = nn.functional.kl_div(
            (logits / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="batchmean"
        )
        expected = 0.7 * 9 * kd + 0.3 * nn.functional.cross_entropy(logits, labels)
        plain.zero_grad()
        expected.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.3)
        plain.step()
        decay = min(0.6, (1 + step) / (10 + step))
        for average, p in zip(mean, twin.parameters(), strict=True):
            average.lerp_(p.detach(), 1 - decay)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=1e-12)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for a, b in zip(one.average.module.parameters(), mean, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # its share is a float32


def test_after_many_updates_an_average_moves_by_its_decay() -> None:
    model = nn.Linear(3, 2)
    average = WeightEMA(model, decay=0.5)
    average.num_updates.fill_(1000)
    expected = [(p.detach() + (p.detach() + 1)) / 2 for p in model.parameters()]
    for p in model.parameters():
        p.data.add_(1)
    average.update()
    for mine, theirs in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_parts_of_a_batch_add_up_to_its_gradient(
    make_distiller: Make, accumulate: int, alpha: float
) -> None:
    """A student without batch norm; momentum 0 and rate 1 make the step its gradient."""
    ends, losses = [], []
    for parts in (1, accumulate):
        torch.manual_seed(2)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
        distiller = make_distiller(
            student=net,
            accumulate=parts,
            alpha=alpha,
            name="sgd",
            lr=1.0,
            momentum=0.0,
            warmup=0.0,
            mix={"mixup_alpha": 1.0},
        )
        start = [p.detach().clone() for p in net.parameters()]
        distiller.refill()
        losses.append(distiller.train_step().item())
        ends.append([a - b for a, b in zip(net.parameters(), start, strict=True)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for whole, summed in zip(*ends, strict=True):
        assert whole.abs().max() > 1e-4
        torch.testing.assert_close(whole, summed, rtol=1e-5, atol=2e-7)


def test_gradients_too_small_for_float16_survive_by_the_loss_scale() -> None:
    """A share of 2^-24 of a mean: the gradient by the logits is near 1e-8 and would round to 0."""
    steps = []
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 2.0**16), (torch.float16, 1.0)):
        torch.manual_seed(0)
        net = nn.Linear(12, 4)
        start = net.weight.detach().clone()
        schedule = Schedule(
            batch_size=2**24, accumulate=2**20, num_views=2**24, lr=1.0, name="sgd", momentum=0.0
        )
        one = StudentTrainer(net, schedule, dtype=dtype)
        one._scale.fill_(scale)
        one.start(1e6)
        one.learn(torch.randn(16, 12), torch.randn(16, 4), torch.zeros(0))
        one.finish()
        steps.append(net.weight.detach() - start)
    exact, scaled, lost = steps
    torch.testing.assert_close(scaled, exact, rtol=0.02, atol=1e-4)
    assert exact.abs().max() > 0.01
    assert (lost - exact).abs().max() > 0.3 * exact.abs().max()


def test_loss_scale_is_that_of_gradscaler_also_after_a_restore(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(student_module, "GROWTH_STEPS", 3)
    schedule, net = Schedule(batch_size=16, num_views=160, lr=0.1), nn.Linear(12, 4)
    one = StudentTrainer(net, schedule, dtype=torch.float16)
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    views, teacher = torch.randn(16, 12), torch.randn(16, 4)
    seen = []
    for bad in (1, 1, 0, 0, 0, 0, 1, 0, 0, 0):
        before, one = one, StudentTrainer(net, schedule, dtype=torch.float16)
        one.load_state_dict(before.state_dict())
        one.start(0.1)
        one.learn(views, teacher * (math.inf if bad else 1), torch.zeros(0))
        one.finish()
        loss = torch.zeros((), requires_grad=True)
        optimizer = torch.optim.SGD([loss], lr=0.0)
        scaler.scale(loss * (math.inf if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append((one.state_dict()["scale"].item(), scaler.get_scale()))
    assert [math.log2(ours) for ours, _ in seen] == [15, 14, 14, 14, 15, 15, 14, 14, 14, 15]
    assert all(ours == theirs for ours, theirs in seen), seen


@pytest.mark.parametrize("earlier", [False, True], ids=["", "earlier version"])
@pytest.mark.parametrize(("saved", "present"), [("float16", "float32"), ("float32", "float16")])
def test_another_dtype_after_a_restore_starts_with_its_own_loss_scale(
    saved: str, present: str, earlier: bool
) -> None:
    views, teacher, ends = torch.randn(16, 12), torch.randn(16, 4), []
    schedule = Schedule(batch_size=16, num_views=160, lr=0.1, name="sgd")
    state = StudentTrainer(nn.Linear(12, 4), schedule, dtype=getattr(torch, saved)).state_dict()
    if earlier:
        state.pop("scales", None)
    for is_restored in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(12, 4)
        one = StudentTrainer(net, schedule, dtype=getattr(torch, present))
        if is_restored:
            one.load_state_dict(state)
        one.start(0.1)
        one.learn(views, teacher, torch.zeros(0))
        one.finish()
        ends.append([net.weight, net.bias, one.state_dict()["scale"]])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("bad", ["loss", "logits"])
def test_ranks_that_average_their_gradients_skip_together(bad: str) -> None:
    """One of two has a loss that is not finite, in one case with a gradient that is."""
    ranks, views = [], torch.ones(8, 12)
    for _ in range(2):
        torch.manual_seed(0)
        schedule = Schedule(batch_size=8, num_views=80, lr=0.1)
        ranks.append(StudentTrainer(nn.Linear(12, 4), schedule, Objective(alpha=0.5)))
    start = ranks[0].model.weight.clone()
    for number, rank in enumerate(ranks):
        targets = torch.full((8, 4), 0.25)
        teacher = torch.zeros(8, 4)
        if number == 1 and bad == "loss":
            rank.model.register_forward_hook(  # log 0 for a class that is asked for
                lambda _, args, out: out + torch.tensor([0.0, 0.0, 0.0, -math.inf])
            )
        if number == 1 and bad == "logits":
            teacher *= math.nan
        rank.start(0.1)
        loss = rank.learn(views, teacher, targets)
        assert loss.isfinite() == (number == 0)
    pairs = zip(*(rank.model.parameters() for rank in ranks), strict=True)
    for p, q in pairs:
        assert p.grad is not None and q.grad is not None
        mean = (p.grad + q.grad) / 2
        p.grad.copy_(mean)
        q.grad.copy_(mean)
    for rank in ranks:
        rank.finish()
        assert rank.counts()["skipped_steps"] == 1
        assert torch.equal(rank.model.weight, start)


def test_the_mean_loss_of_a_row_counts_finite_ones_only(make_distiller: Make) -> None:
    distiller = make_distiller()
    step, taken = distiller.train_step, []

    def poisoned() -> Tensor:
        loss = step()
        if distiller.step in (3, 5) or distiller.step > 30:
            return loss * math.nan
        taken.append(loss.item())
        return loss

    distiller.train_step = poisoned  # type: ignore[method-assign]
    distiller.fit()
    rows = [json.loads(r) for r in (distiller.run_dir / "stats.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(sum(taken[:8]) / 8, rel=1e-6)
    assert "loss" not in rows[-1] and "ring_fill" in rows[-1]


@pytest.mark.parametrize("first", [0, 13])
def test_so_many_skipped_steps_in_a_row_stop_the_run(make_distiller: Make, first: int) -> None:
    seen: list[int] = []

    def make(**changes: Any) -> Distiller:
        distiller = make_distiller(max_skipped_steps=5, **changes)
        distiller.on_row.append(lambda row: seen.append(row["views"]))
        weight = next(distiller.student.model.parameters())
        bad = {*range(first, first + 5)}
        weight.register_hook(lambda grad: grad * (math.nan if distiller.step in bad else 1))
        return distiller

    distiller = make()
    with pytest.raises(NotFiniteError, match=r"5 steps in a row .* fewer than max_skipped"):
        distiller.fit()
    assert distiller.step == (10 if first == 0 else 20)  # the next log line
    again = make(run_dir=distiller.run_dir)
    assert again.restore().step == distiller.step
    again.fit()  # The reported streak is over, so the run goes on.
    assert again.step == 40
    rows = [json.loads(r) for r in (again.run_dir / "stats.jsonl").read_text().splitlines()]
    assert [row["views"] for row in rows] == seen == [160, 320, 480, 640]
    assert rows[-1]["skipped_steps"] == 5 and rows[-1]["skipped_in_a_row"] == 0


@pytest.mark.parametrize("first", [0, 3])
def test_a_generator_that_breaks_stops_the_run(make_distiller: Make, first: int) -> None:
    """Blocks of 16 images from number `first` on; they would look like black ones."""

    def make(**changes: Any) -> Distiller:
        distiller = make_distiller(log_every_steps=4, **changes)
        module: Any = sampler_of(distiller)._module
        module.register_forward_hook(lambda _module, _inputs, output: output * factor())
        return distiller

    def factor() -> float:
        return math.nan if distiller.ring.num_inserted >= 16 * first else 1.0

    distiller = make()
    with pytest.raises(NotFiniteError, match=r"\d+ of \d+ images have values .* dtype=bfloat16"):
        distiller.fit()
    assert distiller.ring.num_inserted == (0 if first == 0 else 64)
    broken, distiller = distiller, make(run_dir=distiller.run_dir)
    assert distiller.restore().step == broken.step
    first = 1000  # It was fixed.
    distiller.fit()
    assert distiller.step == 40


def test_a_broken_image_among_many_is_let_pass(make_distiller: Make) -> None:
    distiller = make_distiller()
    sampler_of(distiller).num_made = 100
    sampler_of(distiller).num_broken += 1
    distiller.fit()
    rows = [json.loads(r) for r in (distiller.run_dir / "stats.jsonl").read_text().splitlines()]
    assert [row["broken_images"] for row in rows] == [1] * 4
