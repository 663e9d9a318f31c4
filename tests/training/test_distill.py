"""The training loop: it learns, repeats, resumes, and never waits for the device."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy
import pytest
import torch
from small_jobs import CONFIG, SHORT, fit_until, labels_of, sampler_of, small_classifier
from torch import nn

from dmkd_fast import Distiller, ImageSet, cli, measure
from dmkd_fast.runtime.device import InFlight
from dmkd_fast.runtime.errors import NotFiniteError
from dmkd_fast.training import objective as objective_module

Make = Callable[..., Distiller]


def weights(distiller: Distiller) -> list[torch.Tensor]:
    return [
        *distiller.student.model.state_dict().values(),
        *distiller.student.average.module.state_dict().values(),
    ]


def test_student_learns_what_the_teacher_knows(make_distiller: Make) -> None:
    distiller = make_distiller(num_views=6400, lr=1e-2)
    distiller.refill()
    before = distiller.train_step().item()
    distiller.fit()
    draw = distiller.ring.sample(64)
    views = distiller.targets.views(distiller.ring.images, draw.indices, draw.ids, draw.uses)
    with torch.no_grad():
        same = distiller.student.average.module(views).argmax(1) == distiller.targets.teachers(
            views
        ).argmax(1)
    assert distiller.train_step().item() < before / 20
    assert same.float().mean() > 0.8  # a quarter by chance


def test_fused_and_reference_loss_train_the_same_student(
    make_distiller: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # SGD, because Adam turns the rounding noise of gradients that are zero into full steps.
    fused = make_distiller(name="sgd", lr=0.02)
    fused.fit()

    from textbook import reference_grad, reference_loss

    def eager(
        student: torch.Tensor, teacher: torch.Tensor, _: None, *, temperature: float, **rest: Any
    ) -> Any:
        assert rest == {
            "alpha": None,
            "num_items": 16,
            "grad_scale": 1.0,
            "divergence": "forward_kl",
            "standardize_logits": False,
        }
        rows = reference_loss(student.detach(), teacher, temperature=temperature)
        grad = reference_grad(student.detach(), teacher, temperature=temperature)
        return rows.mean(), grad / len(rows)

    monkeypatch.setattr(objective_module, "kd_loss_and_grad", eager)
    plain = make_distiller(name="sgd", lr=0.02)
    plain.fit()
    for a, b in zip(weights(fused), weights(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_one_seed_gives_one_student(make_distiller: Make) -> None:
    first, second = make_distiller(dropout=0.3), make_distiller(dropout=0.3)
    for distiller in (first, second):
        torch.manual_seed(0)
        distiller.fit()
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


@pytest.mark.parametrize(
    "stop_at",
    [pytest.param(1, marks=pytest.mark.slow), 17, pytest.param(39, marks=pytest.mark.slow)],
)
def test_resumed_run_ends_like_an_uninterrupted_one(make_distiller: Make, stop_at: int) -> None:
    whole, broken = make_distiller(dropout=0.3), make_distiller(dropout=0.3)
    torch.manual_seed(0)
    whole.fit()

    torch.manual_seed(0)
    fit_until(broken, stop_at)
    again = make_distiller(dropout=0.3, run_dir=broken.run_dir)
    torch.manual_seed(99)
    again.restore()
    totals = again.fit()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))
    assert torch.equal(whole.ring.images, again.ring.images)
    assert totals["views"] == 640


class Jittered(nn.Module):
    """A student that draws from the global generators of Python and NumPy."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_classifier()

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net(views * (random.uniform(0.5, 1) + numpy.random.rand()))
        return logits


def test_a_resumed_run_draws_what_the_uninterrupted_one_draws_on_the_host(
    make_distiller: Make,
) -> None:
    """The warm-up of the resumed run draws as well, which must leave no trace."""

    def make(**changes: Any) -> Distiller:
        torch.manual_seed(7)
        return make_distiller(student=Jittered(), num_views=160, **changes)

    def seed() -> None:
        random.seed(1)
        numpy.random.seed(1)

    whole, broken = make(), make()
    seed()
    whole.fit()
    seed()
    fit_until(broken, 6)
    again = make(run_dir=broken.run_dir)
    again.restore()
    again.fit()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


def test_interrupt_while_generating_loses_nothing(make_distiller: Make) -> None:
    whole, broken = make_distiller(), make_distiller()
    whole.fit()
    sample, calls = sampler_of(broken).sample, 0

    def interrupted(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        kwargs["out"].zero_()
        if calls == 8:  # the ring is full: this block lies over old images
            signal.raise_signal(signal.SIGINT)
        return sample(*args, **kwargs)

    sampler_of(broken).sample = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    again = make_distiller(run_dir=broken.run_dir)
    again.restore()
    again.fit()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


def test_reuse_is_what_was_asked_for(make_distiller: Make) -> None:
    distiller = make_distiller(num_views=3200)
    totals = distiller.fit()
    assert totals["reuse"] == pytest.approx(4, rel=0.05)
    assert totals["generated_images"] == distiller.ring.num_inserted == labels_of(distiller).next_id


def test_statistics_tell_the_run(make_distiller: Make) -> None:
    distiller = make_distiller()
    distiller.fit()
    rows = [json.loads(r) for r in (distiller.run_dir / "stats.jsonl").read_text().splitlines()]
    assert [row["views"] for row in rows] == [160, 320, 480, 640]
    assert rows[-1]["images"] == distiller.ring.num_inserted
    assert all(row["loss"] > 0 and row["views_per_s"] >= 0 for row in rows)
    last = rows[-1]
    assert last["ring_fill"] == 1 and last["ring_age_blocks"] == 1.5  # four blocks: 0 to 3
    held = distiller.ring.uses.float().mean().item()
    assert last["ring_uses"] == pytest.approx(held, rel=1e-5) and last["reuse_error"] <= 64
    assert last["consumer_wait_s"] > 0 and last["producer_wait_s"] > 0
    made = last["images"]
    assert last["retired_uses"] * (made - 64) + held * 64 == pytest.approx(640, rel=1e-3)
    assert list(distiller.run_dir.glob("events.out.tfevents*"))


def noise_set(count: int = 50) -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    return ImageSet(
        images=torch.randint(0, 256, (count, 1, 8, 8), generator=generator).to(torch.uint8),
        labels=torch.randint(0, 4, (count,), generator=generator),
        class_names=tuple("abcd"),
    )


def rows_of(distiller: Distiller) -> list[dict[str, Any]]:
    path = distiller.run_dir / "stats.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_averaged_student_is_scored_at_equal_distances_the_last_step_included(
    make_distiller: Make,
) -> None:
    test_set = noise_set(400)
    distiller = make_distiller(
        test_set=test_set, num_evaluations=3, ema_decay=0.99, log_every_steps=7, lr=1e-2
    )
    distiller.fit()
    scored = [row for row in rows_of(distiller) if "top1" in row]
    assert [row["views"] for row in scored] == [16 * step for step in (13, 26, 40)]
    spec = distiller.targets.input
    top1 = {}
    for name, network in (
        ("average", distiller.student.average.module),
        ("last", distiller.student.model),
    ):
        found = measure(network, test_set.batches([spec]), input=spec, num_classes=4)
        top1[name] = found.result()["top1"]
    assert scored[-1]["top1"] == top1["average"] != top1["last"]


@pytest.mark.parametrize("num_views", [160, 640])
def test_a_student_that_diverges_ends_the_run_with_a_checkpoint(
    make_distiller: Make, num_views: int
) -> None:
    settings = {"test_set": noise_set(), "lr": 1e30, "num_views": num_views, "warmup": 0.0}
    distiller = make_distiller(**settings)
    with pytest.raises(NotFiniteError, match="not finite"):
        distiller.fit()
    again = make_distiller(run_dir=distiller.run_dir, **settings)
    assert again.restore() == (distiller.step, [])
    with pytest.raises(NotFiniteError, match="not finite"):  # It has not become a student.
        again.fit()


class FakeEvent:
    """Stands for torch.cuda.Event: which blocks the host has waited for."""

    recorded: ClassVar[list[FakeEvent]] = []
    waited: ClassVar[list[FakeEvent]] = []

    def __init__(self, *, blocking: bool) -> None:
        assert blocking  # A host that spins would take a core for the whole fill.

    def record(self, stream: torch.device) -> None:
        assert stream == torch.device("cuda", 1)  # which need not be the current device
        self.recorded.append(self)

    def synchronize(self) -> None:
        self.waited.append(self)


def test_the_host_is_at_most_two_blocks_ahead_of_a_gpu(
    make_distiller: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    distiller = make_distiller()
    distiller.feed.in_flight = InFlight(torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    FakeEvent.recorded, FakeEvent.waited = [], []
    sample, ahead = sampler_of(distiller).sample, []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        ahead.append(len(FakeEvent.recorded) - len(FakeEvent.waited))
        return sample(*args, **kwargs)

    sampler_of(distiller).sample = counted  # type: ignore[method-assign]
    for _ in range(20):
        distiller.refill()
        distiller.train_step()
    assert len(ahead) > 4 and ahead[:2] == [0, 1] and set(ahead[2:]) == {1}
    assert FakeEvent.waited == FakeEvent.recorded[:-2]


def test_sigterm_during_a_fill_is_served_before_another_block_is_queued(
    make_distiller: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Event(FakeEvent):
        def synchronize(self) -> None:
            super().synchronize()
            signal.raise_signal(signal.SIGTERM)  # It arrives while the host waits.

    distiller = make_distiller(num_views=10_000)
    distiller.feed.in_flight = InFlight(torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    FakeEvent.recorded, FakeEvent.waited = [], []
    with pytest.raises(KeyboardInterrupt):
        distiller.fit()
    assert len(FakeEvent.recorded) == 2 and FakeEvent.waited == FakeEvent.recorded[:1]
    assert list(distiller.checkpoints.folder.glob("step-*"))


def test_a_cpu_never_waits_for_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", None)
    in_flight = InFlight(torch.device("cpu"))
    for _ in range(5):
        with in_flight.piece():
            pass


@pytest.mark.parametrize("changes", [["optim={name: sgd, lr: 1000}"]])
def test_the_command_ends_a_diverged_run_in_one_line_with_a_checkpoint(
    changes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.main(["distill", CONFIG, *SHORT, *changes, f"run_dir={run}"]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("dmkd: ")]
    assert captured.out == "" and len(lines) == 1 and "not finite" in lines[0]
    assert "Traceback" not in captured.err and "to go on: " in captured.err
    assert list((run / "checkpoints").glob("step-*")) and not (run / "student").exists()
