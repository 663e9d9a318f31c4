"""The public Python API with arguments that are wrong: it works, or one line names the argument."""

from __future__ import annotations

import itertools
import random
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from rings import new_ring
from small_jobs import TinyDenoiser, sampler_from, small_classifier, tiny_sampler
from torch import Tensor

from dmkd_fast import (
    Distiller,
    GeneratedImages,
    InputSpec,
    LabelStream,
    Mixer,
    Objective,
    RingBuffer,
    Schedule,
    StudentTrainer,
    Targets,
    Views,
    ViewSpec,
)
from dmkd_fast.jobs.pretrain.denoiser import FLOW

NUMBERS: list[Any] = [
    0,
    1,
    -1,
    2,
    3,
    7,
    2**15,
    2**24,
    2**31,
    2**40,
    2**63,
    10**400,
    0.5,
    1.0,
    -0.5,
    1e-300,
    1e30,
    float("nan"),
    float("inf"),
    -float("inf"),
    True,
    False,
    None,
    "a",
]
PAIRS: list[Any] = [(a, b) for a in (0, 0.1, 1, -1, 2.5, float("nan"), 1e30) for b in (0, 0.5, 3)]
PAIRS += [(), (1,), (0.1, 0.2, 0.3)]
SHAPES: list[Any] = [
    (1, 8, 8),
    (),
    (1, 8),
    (0, 8, 8),
    (1, -8, 8),
    (2**31, 1, 1),
    (1, 8.0, 8),
    None,
    (1, 2**19, 2**19),
]
CHANNELS: list[Any] = [(0.5,), (), (0.5, 0.5), (float("nan"),), (0.0,), (300.0,), (-1.0,), ("a",)]
DTYPES: list[Any] = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]


def tensors(pick: random.Random, good: Tensor) -> Tensor:
    """`good` with another shape, dtype, device or content."""
    kind = pick.choice(["shape", "dtype", "device", "content", "empty", "stride"])
    if kind == "shape":
        return pick.choice([good[:1], good[None], good[..., None], torch.cat((good, good))])
    if kind == "dtype":
        return good.to(pick.choice([torch.float32, torch.int32, torch.uint8, torch.bool]))
    if kind == "device":
        return good.to("meta")
    if kind == "content" and good.dtype == torch.int64:
        bad = pick.choice([-1, 2**24, 2**31, 2**62, -(2**63)])
        return torch.where(torch.arange(good.numel()).view(good.shape) == 0, bad, good)
    if kind == "empty":
        return good[:0]
    return good.repeat_interleave(2, dim=0)[::2]


class TooSlow(BaseException):
    """A call took longer than it may."""


@contextmanager
def at_most(seconds: int) -> Any:
    """Raise TooSlow in a call that does not end."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


RING: dict[str, Any] = {
    "capacity_images": 12,
    "image_shape": (1, 8, 8),
    "block_images": 4,
    "num_classes": 4,
    "samples_per_insert": 4,
    "min_fill_images": 4,
    "seed": 0,
    "guard_blocks": 0,
    "error_buffer": None,
    "max_uses": None,
    "order": "shuffled",
}
VIEWS = {
    "size": 8,
    "scale": (0.5, 1.0),
    "ratio": (0.75, 1.25),
    "pad": 1,
    "flip": 0.5,
    "mean": (0.5,),
    "std": (0.5,),
    "dtype": torch.float32,
    "seed": 0,
}
SAMPLER = {
    "latent_shape": (1, 8, 8),
    "null_class": 4,
    "num_classes": 4,
    "steps.count": 2,
    "guidance.scale": 2.0,
    "guidance.interval": (0.0, 1.0),
    "guidance.channels": None,
    "micro_batch_images": 4,
    "dtype": torch.float32,
    "seed": 0,
}
SCHEDULE = {
    "batch_size": 16,
    "num_views": 640,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "warmup": 0.05,
    "milestones": (0.5, 0.7),
    "decay": 0.1,
    "ema_decay": 0.5,
    "max_grad_norm": 1.0,
    "accumulate": 2,
    "max_skipped_steps": 3,
    "log_every_steps": 5,
    "checkpoint_every_s": 60.0,
    "num_evaluations": 2,
}


def filled_ring() -> RingBuffer:
    ring = new_ring(capacity_images=12, block_images=4, min_fill_images=4, num_classes=4)
    for _ in range(2):
        ids = torch.arange(4)
        ring.commit(ring.reserve(), ids=ids, labels=ids)
    return ring


def values_for(name: str, good: Any, pick: random.Random) -> Any:
    """Another value of roughly the same kind, or of none."""
    if isinstance(good, Tensor):
        return tensors(pick, good)
    for kinds, pool in (
        (("_shape",), SHAPES),
        (("mean", "std"), CHANNELS),
        (("dtype",), DTYPES),
        (("scale", "ratio", "interval"), PAIRS),
    ):
        if name.endswith(kinds) and name != "guidance.scale":
            return pick.choice(pool)
    if name == "null_class":  # How many embeddings a network has is not known.
        return pick.choice([0, 3, -1, 1.5, None, True, 2**63])
    if name == "milestones":
        return pick.choice([(), (0.5, 0.4), (float("nan"),), (2.0,), ("a",), (0.3, 0.3), (0.01,)])
    return pick.choice(NUMBERS)


def make_views(**settings: Any) -> Views:
    form = {name: settings.pop(name) for name in ("size", "mean", "std", "dtype")}
    return Views(ViewSpec(**form), **settings)


def calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Functions and arguments with which they work."""
    ids, labels = torch.arange(4), torch.arange(4)
    slots = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    batch = torch.randn(4, 1, 8, 8)

    def views(**settings: Any) -> None:
        make_views(**settings)(slots, ids, ids, ids)

    def sample(**settings: Any) -> None:
        settings = {name.split(".")[-1]: value for name, value in settings.items()}
        sampler = sampler_from(module=TinyDenoiser(), scheduler=FLOW, **settings)
        if sampler.micro_batch_images <= 64:
            sampler.sample(ids, labels, out=torch.empty_like(slots))

    def draw(count: Any) -> None:
        filled_ring().sample(count)

    def commit(ids: Any, labels: Any) -> None:
        ring = filled_ring()
        ring.commit(ring.reserve(), ids=ids, labels=labels)

    def label(count: Any, **settings: Any) -> None:
        stream = LabelStream(**settings)
        stream.peek(count)
        stream.advance(count)

    def mix(step: Any, views: Any, **settings: Any) -> None:
        mixer = Mixer(**settings)
        mixer(views, step=step)
        mixer.renderings({1: views}, step=step)

    def rates(**settings: Any) -> None:
        schedule = Schedule(**settings)
        schedule.lr_at(0)
        schedule.lr_at(schedule.num_steps - 1)

    return {
        "RingBuffer": (new_ring, RING),
        "RingPlan.check_batch": (filled_ring().plan.check_batch, {"batch_size": 4}),
        "RingBuffer.sample": (draw, {"count": 4}),
        "RingBuffer.commit": (commit, {"ids": ids, "labels": labels}),
        "Views": (views, VIEWS),
        "Views.parameters": (
            make_views(**VIEWS).parameters,
            {"ids": ids, "uses": ids, "height": 8, "width": 8},
        ),
        "Views.__call__": (
            make_views(**VIEWS),
            {"slots": slots, "indices": ids, "ids": ids, "uses": ids},
        ),
        "Views.whole": (make_views(**VIEWS).whole, {"slots": slots, "indices": ids}),
        "ViewSpec": (ViewSpec, {"size": 8, "mean": (0.5,), "std": (0.5,)}),
        "InputSpec": (InputSpec, {"size": 8, "mean": (0.5,), "std": (0.5,), "crop_pct": 0.9}),
        "Mixer": (
            mix,
            {"mixup_alpha": 0.5, "cutmix_alpha": 0.5, "seed": 0, "step": 3, "views": batch},
        ),
        "LabelStream": (
            label,
            {"num_classes": 4, "seed": 0, "rank": 0, "world_size": 2, "count": 8},
        ),
        "LabelStream.labels_of": (LabelStream(4).labels_of, {"ids": ids}),
        "DiffusionSampler": (sample, SAMPLER),
        "DiffusionSampler.sample": (
            tiny_sampler().sample,
            {"ids": ids, "labels": labels, "out": torch.empty_like(slots)},
        ),
        "DiffusionSampler.trajectory": (
            tiny_sampler().trajectory,
            {"ids": torch.arange(16), "labels": torch.arange(16) % 4},
        ),
        "Schedule": (rates, SCHEDULE),
    }


def problem(function: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """What is wrong with how a call ended, or nothing."""
    try:
        with at_most(60):
            function(**arguments)
    except (ValueError, TypeError, IndexError) as error:
        text = str(error)
        if "\n" in text or len(text) > 600:
            return f"{type(error).__name__} of several lines or too long: {text[:200]}"
        # A class count is found to be wrong by labels that have been made by then.
        if not any(name in text for name in (*arguments, "labels", "mean, std")):
            return f"{type(error).__name__} names no argument: {text[:200]}"
    except TooSlow:
        return "does not end"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


@pytest.mark.hard
def test_every_call_works_or_names_an_argument_in_one_line(
    num_cases: Callable[[int, int], int], record_property: Any
) -> None:
    pick, cases, failures = random.Random(0), num_cases(6000, 600), []
    table = calls()
    for name, (function, arguments) in table.items():
        assert not problem(function, dict(arguments)), name
    for case, name in zip(range(cases), itertools.cycle(table), strict=False):
        function, good = table[name]
        changed = pick.sample(sorted(good), k=pick.choice([1, 1, 1, min(2, len(good))]))
        arguments = good | {key: values_for(key, good[key], pick) for key in changed}
        found = problem(function, arguments)
        if found:
            given = ", ".join(
                f"{key}={' '.join(repr(arguments[key]).split())[:80]}" for key in changed
            )
            failures.append(f"{case}: {name}({given}): {found}")
    print("\n".join(failures))
    record_property("claim", "Python API: works, or names an argument in one line")
    record_property("cases", cases)
    record_property("failures", len(failures))
    assert not failures


@pytest.mark.hard
def test_every_distiller_trains_or_names_what_does_not_fit(
    tmp_path: Path, num_cases: Callable[[int, int], int], record_property: Any
) -> None:
    """Parts of other sizes, classes and settings, put together and run for two steps."""
    pick, cases, failures = random.Random(0), num_cases(120, 15), []
    options: dict[str, list[Any]] = {
        "alpha": [0.5, 1.0, 0.0, -1.0, float("nan"), 2.0],
        "temperature": [4.0, 0.0, -1.0, float("nan"), 1e30, 1e-30],
        "sampler": [
            tiny_sampler,
            lambda: tiny_sampler(num_classes=3),
            lambda: tiny_sampler(num_classes=4, micro_batch_images=7),
        ],
        "labels": [lambda: LabelStream(4), lambda: LabelStream(9), lambda: LabelStream(1)],
        "views": [
            lambda: Views(ViewSpec(size=8, mean=(0.5,), std=(0.5,))),
            lambda: Views(ViewSpec(size=8, mean=(0.5,) * 3, std=(0.5,) * 3)),
        ],
        "teacher": [small_classifier, torch.nn.Flatten],
        "student": [small_classifier, torch.nn.Flatten, torch.nn.Identity],
        "batch_size": [16, 1, 40, 64, 10**6],
    }
    for case in range(cases):
        chosen = {
            key: pick.choice(pick.choice([values, values[:1]])) for key, values in options.items()
        }
        made = {k: v() if callable(v) else v for k, v in chosen.items()}
        try:
            with at_most(60):
                ring = new_ring(num_classes=4)
                batch = made.pop("batch_size")
                student = StudentTrainer(
                    made["student"],
                    Schedule(batch_size=batch, num_views=2 * batch, lr=1e-3),
                    Objective(alpha=made["alpha"], temperature=made["temperature"]),
                )
                distiller = Distiller(
                    GeneratedImages(made["labels"], made["sampler"]),
                    ring,
                    student,
                    Targets(made["teacher"], made["views"]),
                    tmp_path / str(case),
                    show=False,
                )
                distiller.fit()
        except (ValueError, TypeError) as error:
            if "\n" in str(error):
                failures.append(f"{case}: {chosen}: {error}")
        except TooSlow:
            failures.append(f"{case}: {chosen}: does not end")
        except Exception as error:
            failures.append(f"{case}: {chosen}: {type(error).__name__}: {str(error)[:150]}")
    print("\n".join(failures))
    record_property("claim", "Distiller: trains, or names what does not fit")
    record_property("cases", cases)
    record_property("failures", len(failures))
    assert not failures
