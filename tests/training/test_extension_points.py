"""Losses, optimizers and callbacks from outside, and the profiler."""

from __future__ import annotations

import json
import math
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import restore, save
from small_jobs import CONFIG, ROOT, SHORT, build_distiller, fit_until, small_classifier
from torch import Tensor

from dmkd_fast import Distiller, Schedule, StudentTrainer, cli, kd_loss
from dmkd_fast.checkpoint.state import join_state
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.runtime.errors import NotFiniteError, UserError
from dmkd_fast.training.optim import Muon, build_optimizer

Make = Callable[..., Distiller]
OPTIMIZERS = [
    *("timm:muon", "timm:lion", "timm:nadamw", "timm:sgdw"),
    *("timm:adamw", "timm:sgd", "timm:adopt"),  # refuse a step if they have `found_inf`
]


def with_loss(distiller: Distiller, loss: Any) -> Distiller:
    distiller.student.loss = loss
    return distiller


def plain(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return kd_loss(student, teacher, temperature=4.0)


def weights(distiller: Distiller) -> list[Tensor]:
    return [value.clone() for value in distiller.student.model.state_dict().values()]


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [x for inner in value.values() for x in flat(inner)]
    if isinstance(value, list | tuple):
        return [x for inner in value for x in flat(inner)]
    return [value.tolist() if isinstance(value, Tensor) else value]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_function_as_loss_trains_as_the_built_in_one(
    make_distiller: Make, accumulate: int
) -> None:
    runs = [make_distiller(accumulate=accumulate, name="sgd", lr=0.02) for _ in range(2)]
    with_loss(runs[1], plain)
    losses: list[list[float]] = [[], []]
    for distiller, found in zip(runs, losses, strict=True):
        for _ in range(10):
            distiller.refill()
            found.append(float(distiller.train_step()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for one, other in zip(*map(weights, runs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_loss_gets_classes_or_mixtures_and_the_dtype_of_the_run(make_distiller: Make) -> None:
    seen: list[Any] = []

    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        seen.append((tuple(student.shape), student.dtype, tuple(teacher.shape), target.shape))
        return torch.nn.functional.cross_entropy(student.float(), target)

    for mix, shape in ((None, (16,)), ({"cutmix_alpha": 1.0}, (16, 4))):
        distiller = with_loss(make_distiller(mix=mix, dtype=torch.bfloat16), loss)
        distiller.refill()
        distiller.train_step()
        assert seen.pop() == ((16, 4), torch.bfloat16, (16, 4), shape)


@pytest.mark.parametrize("bad", [lambda s, t, y: (s - t).square(), lambda s, t, y: 1.0])
def test_a_loss_that_is_no_scalar_is_refused(make_distiller: Make, bad: Any) -> None:
    distiller = with_loss(make_distiller(), bad)
    distiller.refill()
    with pytest.raises(UserError, match=r"loss: got .*, expected a tensor \(\) with a gradient"):
        distiller.train_step()


@pytest.mark.parametrize("name", [*OPTIMIZERS, "adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_steps_that_are_not_finite_change_nothing(
    make_distiller: Make, name: str, dtype: torch.dtype
) -> None:
    bad_steps = (0, 4)
    distiller = make_distiller(name=name, dtype=dtype, weight_decay=0.1, ema_decay=0.9)

    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        value = plain(student, teacher, target)
        if distiller.step == 0:
            return value * math.inf
        return value + math.inf if distiller.step == 4 else value  # with a finite gradient

    with_loss(distiller, loss)
    for step in range(8):
        distiller.refill()
        parts = distiller.student.objects()
        before = {key: flat(parts[key].state_dict()) for key in ("student", "average")}
        state = flat(distiller.student.optimizer.state_dict()["state"])
        distiller.train_step()
        same = all(before[key] == flat(parts[key].state_dict()) for key in before)
        assert same == (step in bad_steps), step
        if same and name != "adamw":
            assert state == flat(distiller.student.optimizer.state_dict()["state"])
    assert int(distiller.student.counts()["skipped_steps"]) == 2
    assert all(value.isfinite().all() for value in weights(distiller) if value.is_floating_point())


def test_an_optimizer_object_is_used_with_the_rate_of_the_schedule(make_distiller: Make) -> None:
    model, twin = small_classifier(), small_classifier()
    twin.load_state_dict(model.state_dict())
    base = make_distiller()
    first, *rest = model.parameters()
    optimizer = torch.optim.RMSprop([{"params": rest}, {"params": [first], "lr_scale": 0.5}])
    trainer = StudentTrainer(model, base.schedule, plain, optimizer=optimizer)
    head, *tail = twin.parameters()
    theirs = torch.optim.RMSprop([{"params": tail}, {"params": [head]}])
    views, teacher = torch.randn(16, 1, 8, 8), torch.randn(16, 4)
    for lr in (0.01, 0.002):
        trainer.start(lr)
        trainer.learn(views, teacher, torch.zeros(16, dtype=torch.int64))
        trainer.finish()
        for group, scale in zip(theirs.param_groups, (1.0, 0.5), strict=True):
            group["lr"] = lr * scale
        theirs.zero_grad()
        plain(twin(views), teacher, views).backward()
        theirs.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        # A step that it skips by itself would leave momentum without a value.
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
        lambda p: Muon(p, lr=0.1),
    ],
    ids=["sgd", "adamw", "fused sgd", "muon"],
)
def test_an_optimizer_object_takes_no_part_in_a_skipped_first_step(make: Any) -> None:
    factors = [math.inf, 1.0]

    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return plain(student, teacher, target) * factors.pop(0)

    model = small_classifier()
    optimizer = make(model.parameters())
    schedule = Schedule(batch_size=16, num_views=160, lr=0.01)
    trainer = StudentTrainer(model, schedule, loss, optimizer=optimizer)
    seen = [flat([model.state_dict(), optimizer.state_dict()["state"]])]
    for _ in range(2):
        trainer.start(0.01)
        trainer.learn(torch.randn(16, 1, 8, 8), torch.randn(16, 4), torch.zeros(16).long())
        trainer.finish()
        seen.append(flat([model.state_dict(), optimizer.state_dict()["state"]]))
    assert seen[0] == seen[1] != seen[2]
    assert all(p.isfinite().all() for p in model.parameters())


def test_an_optimizer_of_timm_gets_the_settings_of_the_schedule() -> None:
    settings = {"batch_size": 16, "num_views": 160, "lr": 0.01, "momentum": 0.7}
    model = small_classifier()
    for name, given in (("nadamw", {"betas": (0.7, 0.999)}), ("sgd", {"momentum": 0.7})):
        schedule = Schedule(**settings, weight_decay=0.3, name=f"timm:{name}")
        groups = build_optimizer(model, schedule).param_groups
        decays = {p.ndim: g["weight_decay"] for g in groups for p in g["params"]}
        assert decays == {1: 0.0, 2: 0.3, 4: 0.3}
        for group in groups:
            assert group["lr"] == 0.01 and given.items() <= group.items()


@pytest.mark.parametrize("name", [*OPTIMIZERS, "muon"])
def test_a_run_with_another_optimizer_resumes_bit_for_bit(make_distiller: Make, name: str) -> None:
    whole = make_distiller(name=name)
    whole.fit()
    part = make_distiller(name=name)
    fit_until(part, 17)
    again = make_distiller(name=name, run_dir=part.run_dir)
    assert again.restore().step == 17
    again.fit()
    assert all(torch.equal(*pair) for pair in zip(weights(whole), weights(again), strict=True))


class Drawing:
    """State of a generator of Python's, which takes tuples only; timm's Kron saves one."""

    def __init__(self) -> None:
        self.random = random.Random(1)

    def state_dict(self) -> dict[str, Any]:
        return {"rng_state": self.random.getstate(), "written": lambda: ([1], (2.0, [3]))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["written"] == ([1], (2.0, [3]))
        self.random.setstate(state["rng_state"])


def test_tuples_come_back_as_tuples(tmp_path: Path) -> None:
    one, other = Drawing(), Drawing()
    one.random.random()
    save(tmp_path, 1, {"optimizer": one})
    restore(tmp_path, {"optimizer": other})
    assert other.random.random() == one.random.random()
    assert join_state({"list": [1, {"list": [2.0]}]}, {}) == [1, [2.0]]  # of earlier versions


def test_settings_of_the_optimizer_hold_that_were_edited_before_a_resume(
    make_distiller: Make,
) -> None:
    part = make_distiller(name="adamw", momentum=0.9, weight_decay=0.1)
    fit_until(part, 3)
    edited = {"name": "adamw", "momentum": 0.8, "weight_decay": 0.2}
    again = make_distiller(**edited, run_dir=part.run_dir)
    assert again.restore().step == 3
    groups = again.student.optimizer.param_groups
    assert [(g["betas"][0], g["weight_decay"]) for g in groups] == [(0.8, 0.2), (0.8, 0.0)]
    assert all(state["step"] == 3 for state in again.student.optimizer.state.values())
    other = make_distiller(name="sgd", run_dir=part.run_dir)
    with pytest.raises(UserError, match=r"step-0+3: trainer does not fit \(optim.name: got sgd, "):
        other.restore()
    other = make_distiller(**edited, batch_size=32, run_dir=part.run_dir)
    with pytest.raises(UserError, match=r"\(train.batch_size: got 32, expected 16 as in the che"):
        other.restore()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:adafactorbv", "AdafactorBigVision with momentum_dtype=torch.bfloat16, expected"),
        ("timm:muom", "did you mean timm:muon?"),
        ("timm:adahessian", "expected an optimizer that needs no second derivatives"),
        ("timm:no-such-thing", "expected sgd, adamw, muon or timm:NAME"),
        ("adam", "expected sgd, adamw, muon or timm:NAME"),
    ],
)
def test_unknown_optimizers_are_named(tmp_path: Path, name: str, message: str, capsys: Any) -> None:
    arguments = [*SHORT, f"optim.name={name}", f"run_dir={tmp_path / 'run'}"]
    assert cli.main(["distill", CONFIG, *arguments, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error and "optim.name" in error
    assert not (tmp_path / "run").exists()


def test_an_optimizer_of_timm_is_a_setting() -> None:
    config = load_config(DistillConfig, CONFIG, [*SHORT, "optim.name=timm:muon"])
    assert config.optim.name == "timm:muon"


def test_on_row_gets_the_rows_of_stats(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    distiller = build_distiller(tmp_path / "run")
    direct = Distiller(
        distiller.images,
        distiller.ring,
        distiller.student,
        distiller.targets,
        distiller.run_dir,
        show=False,
        on_row=rows.append,
    )
    direct.fit()
    lines = (tmp_path / "run" / "stats.jsonl").read_text().splitlines()
    assert len(rows) == 4 and rows == [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError,
        pytest.param(ValueError, marks=pytest.mark.slow),
        NotFiniteError,
        pytest.param(KeyError, marks=pytest.mark.slow),
    ],
)
def test_a_callback_that_raises_ends_the_run_with_its_error_and_a_checkpoint(
    make_distiller: Make, error: type[Exception]
) -> None:
    whole = make_distiller()
    whole.fit()
    part = make_distiller()

    def on_row(row: dict[str, Any]) -> None:
        if row["views"] == 20 * 16:
            raise error("the tracker is gone")

    part.on_row.append(on_row)
    with pytest.raises(error, match="the tracker is gone") as raised:
        part.fit()
    assert any(entry.name == "on_row" for entry in raised.traceback)
    again = make_distiller(run_dir=part.run_dir)
    assert again.restore().step == 20
    again.fit()
    assert all(torch.equal(*pair) for pair in zip(weights(whole), weights(again), strict=True))
    views = [json.loads(line)["views"] for line in (part.run_dir / "stats.jsonl").open()]
    assert views == [160, 320, 480, 640]  # no row is lost or doubled


def test_a_signal_while_a_row_is_written_keeps_it_from_no_callback(
    make_distiller: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = make_distiller(), []
    monkeypatch.setattr(run, "_check", lambda _: signal.raise_signal(signal.SIGINT))
    run.on_row.append(lambda row: seen.append(row["views"]))
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    again = make_distiller(run_dir=run.run_dir)
    again.on_row.append(lambda row: seen.append(row["views"]))
    again.restore()
    again.fit()
    assert seen == [160, 320, 480, 640]


def test_distill_from_python_takes_a_callback(tmp_path: Path) -> None:
    from dmkd_fast import distill

    rows: list[dict[str, Any]] = []
    config = load_config(DistillConfig, CONFIG, [*SHORT, f"run_dir={tmp_path / 'run'}"])
    distill(config, show=False, on_row=rows.append)
    assert [row["views"] for row in rows] == [160, 320, 480, 640]
    assert (tmp_path / "run" / "report.html").is_file()  # it gets the rows as well


def test_profile_leaves_a_trace_and_a_table_and_changes_no_bit(tmp_path: Path, capsys: Any) -> None:
    tops = []
    for name, more in (("plain", []), ("traced", ["--profile", "3"])):
        arguments = [*SHORT, f"run_dir={tmp_path / name}", *more, "--quiet"]
        assert cli.main(["distill", CONFIG, *arguments]) == 0
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])
        tops.append((summary["top1"], summary["agreement"]))
    assert tops[0] == tops[1]
    assert not (tmp_path / "plain" / "profile").exists()
    events = json.loads((tmp_path / "traced/profile/trace.json").read_text())["traceEvents"]
    counts = {
        piece: sum(event.get("name") == piece and event.get("ph") == "X" for event in events)
        for piece in ("views", "teacher", "student")
    }
    assert counts["views"] == 3 and counts["student"] >= 3 and counts["teacher"] >= 3
    table = (tmp_path / "traced/profile/table.txt").read_text()
    assert table.startswith("3 steps, ") and "aten::" in table
    found = {row.split()[0]: row.split()[1] for row in table.splitlines()[2:8] if row}
    assert {"student", "teacher", "rest"} <= found.keys()


def test_the_example_of_feature_distillation_trains(make_distiller: Make) -> None:
    text = (ROOT / "docs" / "guides" / "your-loop.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import torch\n.*?class AttentionTransfer.*?)```", text, re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    distiller = make_distiller()
    loss = names["AttentionTransfer"](
        distiller.student.model[0], distiller.targets.networks.networks[0].get_submodule("0")
    )
    with_loss(distiller, loss)
    distances = []
    for _ in range(30):
        distiller.refill()
        distiller.train_step()
        distances.append(float(loss.distance.detach()))
    assert sum(distances[-5:]) < sum(distances[:5])
