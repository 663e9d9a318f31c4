"""A step as a CUDA graph: replayed by the stand-in, it is the ordinary step, bit for bit."""

from __future__ import annotations

import gc
import logging
import math
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from run_state import fingerprint, rows
from small_jobs import build_distiller, fit_until, small_classifier, tiny_sampler
from torch import Tensor, nn

from benchmarks.fake_cuda import pretended
from dmkd_fast import Distiller, GeneratedImages, LabelStream, Targets, Teacher, Teachers, kd_loss
from dmkd_fast.runtime import cuda_graph, errors
from dmkd_fast.sampling.graph import CudaGraph
from dmkd_fast.views.spec import InputSpec


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU that says it is a GPU; no warning has been logged."""
    monkeypatch.setattr(errors, "_warned", set())
    with pretended():
        yield


def job(run_dir: Path, **changes: Any) -> Distiller:
    images = GeneratedImages(LabelStream(4, device="cuda"), tiny_sampler(device="cuda"))
    return build_distiller(run_dir, images=images, **({"compile": True} | changes))


def steps(run: Distiller, count: int, bad: int = -1) -> list[float]:
    """Take steps of a run, one of them with views that are not finite; return the losses."""
    losses, render = [], run.targets.render
    for number in range(count):
        torch.manual_seed(number)
        run.refill()
        scale = math.nan if number == bad else 1.0
        run.targets.render = lambda *a, scale=scale, **k: {  # type: ignore[method-assign]
            spec: views * scale for spec, views in render(*a, **k).items()
        }
        losses.append(float(run.train_step()))
    run.checkpoints.writer.close()
    return losses


SETTINGS: list[dict[str, Any]] = [
    {"name": "adamw", "dropout": 0.3},
    {"name": "sgd", "lr": 0.02, "ema_decay": 0.9, "max_grad_norm": 0.5, "weight_decay": 0.1},
    {"name": "adamw", "dtype": torch.float16, "ema_decay": 0.9},
    {"name": "sgd", "lr": 0.02, "momentum": 0.0, "accumulate": 2, "alpha": 0.5},
    {"name": "muon", "ema_decay": 0.9, "weight_decay": 0.1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_captured_steps_are_the_ordinary_ones_bit_for_bit(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    one, two = (job(tmp_path / name, **settings) for name in ("ordinary", "captured"))
    one._captures = False
    expected, found = steps(one, 7, bad=4), steps(two, 7, bad=4)
    assert two._captured is not None and one._captured is None
    assert found[:4] == expected[:4] and found[5:] == expected[5:]
    assert math.isnan(found[4]) and math.isfinite(found[6])
    assert fingerprint(two) == fingerprint(one)
    counts = {name: int(count) for name, count in two.student.counts().items()}
    assert counts == {"skipped_steps": 1, "skipped_in_a_row": 1}


def test_a_step_is_one_replay_of_what_was_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = job(tmp_path)
    steps(run, 1)
    for owner, name in ((run.student, "learn"), (run.student, "finish"), (run.targets, "logits")):
        monkeypatch.setattr(owner, name, None)
    before = run.student.model[0].weight.clone()
    run.step = 30
    rate = float(run.student._rates[0])
    assert all(math.isfinite(loss) for loss in steps(run, 2))
    assert not torch.equal(run.student.model[0].weight, before)
    assert float(run.student._rates[0]) == run.student.optimizer.param_groups[0]["lr"] != rate


def test_capture_is_told_to_the_optimizer_and_leaves_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = job(tmp_path)
    seen: list[Any] = []
    step = run.student.optimizer.step

    def watched() -> None:
        group = run.student.optimizer.param_groups[0]
        seen.append((group["capturable"], isinstance(group["lr"], Tensor)))
        step()

    monkeypatch.setattr(run.student.optimizer, "step", watched)
    steps(run, 3)
    assert seen == [(True, True)] * 3  # two trials and the capture, then replays
    group = run.student.optimizer.param_groups[0]
    assert group["capturable"] is False and isinstance(group["lr"], float)


@pytest.mark.slow
def test_a_resumed_run_of_captured_steps_ends_with_the_same_bits(tmp_path: Path) -> None:
    settings = {"dropout": 0.3, "ema_decay": 0.9, "num_views": 192}
    torch.manual_seed(0)
    whole = job(tmp_path / "whole", **settings)
    whole.fit()
    expected = fingerprint(whole)
    torch.manual_seed(0)
    broken = job(tmp_path / "broken", **settings)
    fit_until(broken, 5)
    resumed = job(tmp_path / "broken", **settings)
    torch.manual_seed(99)
    assert resumed.restore() == (5, [])
    resumed.fit()
    assert whole._captured is not None and resumed._captured is not None
    assert fingerprint(resumed) == expected
    assert rows(resumed.run_dir) == rows(whole.run_dir)


def test_a_step_is_captured_again_when_other_teachers_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends, captures = [], []
    made = cuda_graph.CapturedFunction.__init__

    def counted(self: Any, *args: Any) -> None:
        captures.append(1)
        made(self, *args)

    monkeypatch.setattr(cuda_graph.CapturedFunction, "__init__", counted)
    for captured in (False, True):
        run = job(tmp_path / str(captured), num_views=96)
        spec = InputSpec(size=8, mean=(0.5,), std=(0.5,))
        torch.manual_seed(3)
        early, late = (small_classifier() for _ in range(2))
        members = [
            Teacher(module=early, input=spec, stop=0.5),
            Teacher(module=late, input=spec, start=0.5),
        ]
        run.targets = run.feed.targets = Targets(Teachers(members), run.targets.views)
        run._captures = captured
        ends.append((steps(run, 6), fingerprint(run)))
    assert ends[0] == ends[1] and len(captures) == 2


def test_a_restore_into_a_used_object_captures_again(tmp_path: Path) -> None:
    """The old graph would go on with the optimizer's state of before."""
    run = job(tmp_path)
    steps(run, 2)
    run.checkpoints.finish(run.step, run._state())
    ends = [(steps(run, 2), fingerprint(run))]
    assert run._captured is not None
    assert run.restore() == (2, []) and run._captured is None
    ends.append((steps(run, 2), fingerprint(run)))
    assert run._captured is not None and ends[0] == ends[1]


def test_captures_bear_other_threads_and_no_garbage_is_collected_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.zeros(4, device="cuda")
    real, modes, seen = torch.cuda.graph, [], []

    def graph(*args: Any, capture_error_mode: str = "global", **named: Any) -> Any:
        modes.append(capture_error_mode)
        return real(*args, **named)

    def function(x: Tensor, *_: Tensor) -> Tensor:
        seen.append(gc.isenabled())
        return x + 1

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "graph", graph)
        assert cuda_graph.CapturedFunction(function, x)(x).tolist() == [1] * 4
        assert CudaGraph(function, x, x)(x + 1, x).tolist() == [2] * 4
        assert modes == ["thread_local"] * 2 and seen == [True, True, False] * 2
        with pytest.raises(cuda_graph.CaptureError, match="capturing"):
            cuda_graph.CapturedFunction(lambda x: x if gc.isenabled() else x.cpu(), x)
    assert gc.isenabled()


def test_captures_run_on_the_device_of_their_inputs_which_need_not_be_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, stream, devices = torch.zeros(4, device="cuda"), torch.cuda.Stream, []
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", lambda at=None: devices.append(at) or stream(at))
        cuda_graph.CapturedFunction(lambda x: x + 1, x)
        CudaGraph(lambda x, _: x + 1, x, x)
    assert devices == [x.device] * 3


class Own(nn.Module):
    """A student with something that a graph cannot replay."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = small_classifier(), kind
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, views: Tensor) -> Tensor:
        if self.kind == "buffer":
            self.seen = self.seen + 1
        factor = random.uniform(0.9, 1.1) if self.kind == "random" else 1.0
        if self.kind == "read":
            factor = min(1.0, 1.0 + views.sum().item())
        logits: Tensor = self.net(views * factor)
        return logits


REASONS = {
    "buffer": "replaces a buffer",
    "random": "random numbers on the host",
    "read": "synchronizing",
    "loss": "the loss is a function",
    "optimizer": "timm:lion reads",
    "mix": "views are mixed",
    "ranks": "2 ranks",
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_cannot_be_captured_runs_as_ever_and_is_said_once(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ends = []
    for captured in (False, True):
        changes: dict[str, Any] = {}
        if kind in ("buffer", "random", "read"):
            torch.manual_seed(7)
            changes["student"] = Own(kind)
        if kind == "mix":
            changes["mix"] = {"mixup_alpha": 0.5}
        if kind == "optimizer":
            changes["name"] = "timm:lion"
        run = job(tmp_path / str(captured), compile=captured, **changes)
        if kind == "loss":
            run.student.loss = lambda student, teacher, _: kd_loss(student, teacher)
        if kind == "ranks":
            alone = run.student.ranks
            run.student.ranks = SimpleNamespace(world_size=2)  # type: ignore[assignment]
        random.seed(1)
        with caplog.at_level(logging.WARNING):
            losses = steps(run, 3)
        if kind == "ranks":
            run.student.ranks = alone
        ends.append((losses, fingerprint(run)))
        assert run._captured is None
    assert ends[0] == ends[1]
    (record,) = caplog.records
    assert "training: steps are not one CUDA graph" in record.message
    assert REASONS[kind] in record.message


def test_only_compiled_students_are_captured(tmp_path: Path) -> None:
    assert job(tmp_path)._captures and not job(tmp_path, compile=False)._captures
