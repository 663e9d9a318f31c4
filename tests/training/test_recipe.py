"""The recipe's settings: rates, mixing, hard labels, what is refused; and running out of memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_jobs import CONFIG, SHORT, small_classifier

from dmkd_fast import (
    Distiller,
    InputSpec,
    Mixer,
    Schedule,
    Teacher,
    Teachers,
    Views,
    ViewSpec,
    cli,
    kd_loss,
)
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.jobs import parts as parts_module
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.training.student import StudentTrainer
from dmkd_fast.training.targets import Targets

Make = Callable[..., Distiller]


def test_milestones_multiply_the_rate_at_their_shares_of_the_run() -> None:
    """The paper's: 0.1 over 100 epochs, a tenth at 30, 60 and 90; a step each epoch here."""
    paper = Schedule(batch_size=10, num_views=1000, lr=0.1, warmup=0.0, milestones=(0.3, 0.6, 0.9))
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    torchs = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[30, 60, 90])
    for step in range(100):
        assert paper.lr_at(step) == pytest.approx(torchs.get_last_lr()[0]), step
        optimizer.step()
        torchs.step()
    half = Schedule(
        batch_size=10, num_views=1000, lr=0.1, warmup=0.1, milestones=(0.1, 0.29), decay=0.5
    )
    rates = [half.lr_at(step) for step in range(100)]
    assert rates[4] == pytest.approx(0.05) and rates[9] == 0.1 and rates[10] == 0.05
    assert rates[28] == 0.05 and rates[29] == 0.025 == rates[99]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.milestones=[0.6,0.3]", r"optim: milestones: got \[0.6, 0.3\], expected rising"),
        ("optim.milestones=[0.5,1.0]", "milestones.1: got 1, expected less than 1"),
        (
            "optim.milestones=[0.03]",
            "milestones: got 0.03 as the first, expected at least warmup=0.05",
        ),
        ("optim.decay=0.5", "decay: got 0.5 without milestones"),
        ("optim.nesterov=false", "nesterov: got false with name=adamw"),
        ("train.accumulate=3", "accumulate: got 3, expected a divisor of batch_size=32"),
        ("train.max_skipped_steps=0", "max_skipped_steps: got 0, expected greater"),
        ("loss.alpha=0", "loss.alpha: got 0, expected greater than 0"),
        ("mix.mixup_alpha=-1", "mix.mixup_alpha: got -1, expected greater"),
        ("mix={cutmix_alpha: .inf}", "mix.cutmix_alpha: got inf, expected"),
    ],
)
def test_settings_that_contradict_or_do_nothing_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(DistillConfig, CONFIG, [*SHORT, override])


def test_mixing_with_teachers_of_some_classes_is_refused(make_distiller: Make) -> None:
    overrides = ["mix={mixup_alpha: 1}", "teacher.teaches=[0, 1]"]
    with pytest.raises(UserError, match=r"teacher\.teaches: got classes with mix, expected"):
        load_config(DistillConfig, CONFIG, overrides)
    distiller = make_distiller()
    spec = distiller.targets.input
    halves = [Teacher(module=small_classifier(), input=spec, teaches=t) for t in ((0, 1), (2, 3))]
    with pytest.raises(ValueError, match="mixer: got one with teachers that teach some classes"):
        Targets(
            Teachers(halves, num_classes=4), distiller.targets.views, mixer=Mixer(mixup_alpha=1.0)
        )


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"mixer": Mixer(mixup_alpha=1.0), "stored": object()},
            "^mixer: got one with stored logits, expected none, as stored logits are of whole",
        ),
        (
            {"input": InputSpec(size=9, mean=(0.5,), std=(0.5,))},
            "^input: got 1 channels of 9 pixels, expected the views' 1 of 8; make both agree$",
        ),
        (
            {"input": InputSpec(size=8, mean=(0.5,) * 3, std=(0.5,) * 3)},
            "^input: got 3 channels of 8 pixels, expected the views' 1 of 8; make both agree$",
        ),
    ],
)
def test_targets_whose_parts_do_not_fit_are_refused(parts: dict[str, Any], message: str) -> None:
    views = Views(ViewSpec(size=8, mean=(0.5,), std=(0.5,)))
    with pytest.raises(UserError, match=message):
        Targets(small_classifier(), views, **parts)


def test_every_rendering_is_mixed_with_the_same_partners_at_the_same_place() -> None:
    """Pictures of one color each, so that sizes compare: the pasted part says who and where."""
    colors = torch.arange(1.0, 9.0)[:, None, None, None]
    sizes = {"small": colors.expand(8, 1, 16, 16), "large": colors.expand(8, 1, 64, 64)}
    for settings in ({"cutmix_alpha": 1.0}, {"mixup_alpha": 1.0}):
        mixer = Mixer(**settings, seed=4)
        for step in range(20):
            mixed = mixer.renderings(sizes, step=step)
            small, large = mixed["small"], mixed["large"]
            assert torch.equal(small.views, mixer(sizes["small"], step=step).views)
            assert torch.equal(large.views, mixer(sizes["large"], step=step).views)
            assert torch.equal(small.partner, large.partner)
            if "mixup_alpha" in settings:
                assert small.lam == large.lam
                assert torch.equal(small.views[..., 0, 0], large.views[..., 0, 0])
                continue
            squares = [mixer.parameters(step, side, side)[1] for side in (16, 64)]
            assert squares[0] is not None and squares[1] is not None
            for few, many in zip(*squares, strict=True):
                assert abs(few - many / 4) < 2  # whole pixels are cut, centre and half side alike
            assert abs(small.lam - large.lam) < 0.1
            # The middle of the square, if it has one, is the partner's in both.
            top, bottom, left, right = squares[0]
            if min(bottom - top, right - left) > 4:
                row, column = (top + bottom) // 2, (left + right) // 2
                pasted = colors[small.partner, 0, 0, 0]
                assert torch.equal(small.views[:, 0, row, column], pasted)
                assert torch.equal(large.views[:, 0, 4 * row, 4 * column], pasted)


def test_mixed_targets_weigh_both_cross_entropies() -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(6, 5), torch.randn(6, 5), torch.randint(5, (6,))
    mixed = Mixer(mixup_alpha=1.0, seed=1)(torch.randn(6, 1, 4, 4), step=3)
    loss = kd_loss(student, teacher, mixed.targets(labels, 5), alpha=0.25)
    own, other = (kd_loss(student, teacher, t, alpha=0.25) for t in (labels, labels[mixed.partner]))
    torch.testing.assert_close(loss, mixed.lam * own + (1 - mixed.lam) * other)
    assert 0.05 < mixed.lam < 0.95 and (own - other).abs() > 1e-3


def test_teachers_and_student_see_the_same_mixed_views_with_mixed_labels(
    make_distiller: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of the trainer, taken apart: views, partners, labels and the loss."""
    distiller = make_distiller(mix={"mixup_alpha": 1.0}, alpha=0.5, accumulate=2)
    small = distiller.targets.input
    large = InputSpec(size=16, mean=(0.1,), std=(0.3,))
    torch.manual_seed(8)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 4))
    distiller.targets = distiller.feed.targets = Targets(
        Teachers([Teacher(module=network, input=large)]),
        distiller.targets.views,
        mixer=Mixer(mixup_alpha=1.0),
    )
    parts = []
    learn = StudentTrainer.learn
    monkeypatch.setattr(
        StudentTrainer, "learn", lambda self, *part: parts.append(part) or learn(self, *part)
    )
    draws = []
    sample = distiller.ring.sample
    distiller.ring.sample = lambda n: draws.append(sample(n)) or draws[-1]  # type: ignore
    distiller.refill()
    loss = distiller.train_step()
    draw = draws[0]
    plain = distiller.targets.render(
        distiller.ring.images, draw.indices, draw.ids, draw.uses, progress=0.0
    )
    assert set(plain) == {small, large}
    mixer, labels = Mixer(mixup_alpha=1.0), distiller.ring.labels[draw.indices]
    partner = mixer.partners(0, 16, torch.device("cpu"))
    share, _ = mixer.parameters(0, 8, 8)
    views, logits, targets = (torch.cat(list(p)) for p in zip(*parts, strict=True))
    mixed = {k: share * v + (1 - share) * v[partner] for k, v in plain.items()}
    torch.testing.assert_close(views, mixed[small], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, network(mixed[large]).detach(), rtol=1e-4, atol=1e-4)
    one_hot = torch.nn.functional.one_hot(labels, 4).float()
    torch.testing.assert_close(targets, share * one_hot + (1 - share) * one_hot[partner])
    assert loss > 0 and len(parts) == 2 and 0.05 < share < 0.95


def test_hard_labels_teach_what_the_teacher_does_not(make_distiller: Make) -> None:
    """With little of the teacher's term, the student gives the labels of what it was shown."""
    found = {}
    for alpha in (1.0, 0.02):
        distiller = make_distiller(alpha=alpha, num_views=4800, lr=1e-2)
        distiller.fit()
        ring = distiller.ring
        views = (ring.images.float() / 255 - 0.5) / 0.5
        with torch.no_grad():
            guesses = distiller.student.average.module(views).argmax(1)
        found[alpha] = (guesses == ring.labels).float().mean().item()
    assert found[0.02] > 0.6 > found[1.0] + 0.1, found


class OutOfMemory:
    """Errors as the CPU's and CUDA's allocators raise them."""

    CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    CPU = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory:"
        " you tried to allocate 8388608000000 bytes. Error code 12 (Cannot allocate memory)"
    )


LINE = (
    r"dmkd: out of memory: the run had \d+\.\d\d GiB of cpu memory left when it began; it keeps "
    r"\d+\.\d\d GiB \(ring \d+\.\d\d, denoiser \d+\.\d\d, teacher .*\) and activations on top; "
    r"lower train.batch_size=32, ring.capacity_images=192 or sampler.micro_batch_images=64, or "
    r"raise train.accumulate=1\n"
)


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("learn", OutOfMemory.CPU),
        pytest.param("learn", OutOfMemory.CUDA, marks=pytest.mark.slow),
        pytest.param("learn", MemoryError(), marks=pytest.mark.slow),
        ("finish", OutOfMemory.CUDA),
        pytest.param("sampler", OutOfMemory.CUDA, marks=pytest.mark.slow),
        ("build", OutOfMemory.CUDA),
    ],
)
def test_out_of_memory_is_one_line_and_leaves_a_checkpoint(
    tmp_path: Path,
    where: str,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = 0
    from dmkd_fast import DiffusionSampler, RingBuffer
    from dmkd_fast.training.ema import WeightEMA

    def failing(home: Any, name: str, at: int) -> None:
        real = getattr(home, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(home, name, call)

    if where == "build":
        failing(RingBuffer, "__init__", 1)
    elif where == "sampler":
        failing(DiffusionSampler, "sample", 4)
    else:
        failing(*((StudentTrainer, "learn") if where == "learn" else (WeightEMA, "update")), 8)
    run = tmp_path / "run"
    assert cli.main(["distill", CONFIG, *SHORT, f"run_dir={run}"]) == 2
    printed = capsys.readouterr().err
    assert re.search(LINE, printed), printed
    assert "Traceback" not in printed
    monkeypatch.undo()
    if where in ("build", "finish"):  # Nothing was done, or weights were half changed.
        assert not list((run / "checkpoints").glob("step-*"))
        return
    assert "to go on: dmkd distill" in printed
    assert cli.main(["distill", str(run / "config.yaml"), "--resume"]) == 0
    rows = (run / "stats.jsonl").read_text()
    assert f'"skipped_steps": {int(where == "learn")}' in rows.splitlines()[-1]
    assert '"views": 640' in rows.splitlines()[-1]


def test_out_of_memory_while_parts_are_loaded_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OutOfMemory.CPU

    monkeypatch.setattr(parts_module, "load_parts", full)
    assert cli.main(["distill", CONFIG, *SHORT]) == 2
    assert "models and test images do not fit; lower train.batch_size=32" in capsys.readouterr().err


def test_a_run_that_learns_nothing_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logits = Targets.logits
    monkeypatch.setattr(
        Targets, "logits", lambda *args, **kwargs: logits(*args, **kwargs) * float("nan")
    )
    overrides = [*SHORT, "train.max_skipped_steps=7", f"run_dir={tmp_path / 'run'}"]
    assert cli.main(["distill", CONFIG, *overrides]) == 2
    printed = capsys.readouterr().err
    assert "dmkd: 10 steps in a row had a loss or gradient that is not finite" in printed
    assert "skipped 5 steps" in printed and "to go on: dmkd distill" in printed
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
