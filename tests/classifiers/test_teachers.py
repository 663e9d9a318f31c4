"""Teachers: frozen, each with its own rendering; averaged, routed by class, scheduled, mapped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_jobs import labels_of, sampler_of, small_classifier, tiny_sampler
from torch import Tensor, nn

from dmkd_fast import (
    DiffusionSampler,
    Distiller,
    GeneratedImages,
    InputSpec,
    LabelStream,
    StudentTrainer,
    Targets,
    Teacher,
    Teachers,
    kd_loss,
)
from dmkd_fast.views.reference import reference_views

SMALL = InputSpec(size=8, mean=(0.5,), std=(0.5,))
LARGE = InputSpec(size=12, mean=(0.3,), std=(0.2,))
Make = Callable[..., Distiller]


class Pooled(nn.Module):
    """Takes any size; batch norm and dropout show what mode it is in."""

    def __init__(self, num_classes: int = 4, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.head, self.drop = nn.Linear(6, num_classes), nn.Dropout(0.5)
        self.calls = 0

    def forward(self, views: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(views)).relu().mean((2, 3))))


def views() -> dict[InputSpec, Tensor]:
    torch.manual_seed(9)
    return {SMALL: torch.randn(10, 1, 8, 8), LARGE: torch.randn(10, 1, 12, 12)}


def logits(module: nn.Module, spec: InputSpec) -> Tensor:
    with torch.no_grad():
        return module.eval()(views()[spec])


LABELS = torch.arange(10) % 4


def test_averaged_teachers_give_the_mean_of_their_tempered_probabilities() -> None:
    a, b, temperature = Pooled(seed=1), Pooled(seed=2), 4.0
    both = Teachers(
        [Teacher(module=a, input=SMALL), Teacher(module=b, input=LARGE)], temperature=temperature
    )
    got = both(views(), LABELS, 0.5)
    expected = (logits(a, SMALL) / 4).softmax(1) / 2 + (logits(b, LARGE) / 4).softmax(1) / 2
    torch.testing.assert_close((got / temperature).softmax(1), expected, rtol=1e-5, atol=1e-7)
    # And so the loss is the divergence from that mean.
    student = torch.randn(10, 4)
    loss = kd_loss(student, got, temperature=temperature)
    rows = (expected * (expected.log() - (student / 4).log_softmax(1))).sum(1)
    torch.testing.assert_close(loss, 16 * rows.mean(), rtol=1e-4, atol=1e-6)
    assert both.inputs == (SMALL, LARGE)


def test_one_teacher_alone_is_passed_on_bit_for_bit() -> None:
    a = Pooled(seed=1)
    alone = Teachers([Teacher(module=a, input=SMALL)], temperature=4.0)
    assert torch.equal(alone(views(), LABELS, 0.0), logits(a, SMALL))
    assert torch.equal(alone.predict(views()), logits(a, SMALL))


def test_routed_teachers_judge_the_images_of_their_classes_only() -> None:
    a, b = Pooled(seed=1), Pooled(seed=2)
    members = [
        Teacher(module=a, input=SMALL, teaches=(0, 3)),
        Teacher(module=b, input=LARGE, teaches=(1, 2)),
    ]
    routed = Teachers(members, num_classes=4, temperature=2.0)
    got = (routed(views(), LABELS, 0.0) / 2).softmax(1)
    own = torch.tensor([label in (0, 3) for label in LABELS.tolist()])[:, None]
    expected = torch.where(own, logits(a, SMALL) / 2, logits(b, LARGE) / 2).softmax(1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    # Without a label (a test image) everybody is asked, whatever they teach.
    mean = (logits(a, SMALL).softmax(1) + logits(b, LARGE).softmax(1)) / 2
    torch.testing.assert_close(routed.predict(views()).softmax(1), mean, rtol=1e-5, atol=1e-7)


def test_a_class_that_two_of_three_teach_gets_the_mean_of_the_two() -> None:
    nets = [Pooled(seed=s) for s in range(3)]
    taught = [(0, 1, 2, 3), (0,), (1, 2, 3)]
    several = Teachers(
        [Teacher(module=n, input=SMALL, teaches=t) for n, t in zip(nets, taught, strict=True)],
        num_classes=4,
    )
    got = several(views(), LABELS, 0.2).softmax(1)
    parts = [logits(n, SMALL).softmax(1) for n in nets]
    for row, label in enumerate(LABELS.tolist()):
        mine = [p[row] for p, t in zip(parts, taught, strict=True) if label in t]
        assert len(mine) == 2
        torch.testing.assert_close(got[row], (mine[0] + mine[1]) / 2, rtol=1e-5, atol=1e-7)


def test_scheduled_teachers_run_in_their_time_and_not_outside_of_it() -> None:
    weak, strong = Pooled(seed=1), Pooled(seed=2)
    first = Teacher(module=weak, input=SMALL, stop=0.25)
    schedule = Teachers([first, Teacher(module=strong, input=LARGE, start=0.25)])
    for share, module, spec in (
        (0.0, weak, SMALL),
        (0.2499, weak, SMALL),
        (0.25, strong, LARGE),
        (1.0, strong, LARGE),
    ):
        assert schedule.inputs_at(share) == (spec,)
        only = {spec: views()[spec]}  # the other rendering is not even there
        assert torch.equal(schedule(only, LABELS, share), logits(module, spec))
    assert torch.equal(schedule.predict({LARGE: views()[LARGE]}), logits(strong, LARGE))


def test_a_class_map_orders_and_restricts_the_teachers_logits() -> None:
    wide = Pooled(num_classes=9, seed=3)
    mapped = Teachers([Teacher(module=wide, input=SMALL, class_map=(7, 0, 8, 2))])
    assert torch.equal(mapped(views(), LABELS, 0.0), logits(wide, SMALL)[:, [7, 0, 8, 2]])


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([], "got none"),
        ([{"teaches": (0, 1)}], "no teacher for class 2 from progress 0"),
        ([{"teaches": (0, 1)}, {"teaches": (2, 3), "start": 0.5}], "no teacher for class 2"),
        ([{"stop": 0.5}], "no teacher from progress 0.5"),
        ([{"start": 0.5}], "no teacher from progress 0.0"),
        ([{"stop": 0.4}, {"start": 0.5}], "no teacher from progress 0.4"),
        ([{"start": 0.5, "stop": 0.5}], "start < stop"),
        ([{"teaches": (0, 1, 2, 3, 4)}], "got 4, expected classes from 0 to 3"),
        ([{"teaches": ()}], "got no classes"),
        ([{"class_map": (1, 1)}], "2 entries, 1 different"),
        ([{"class_map": (-1, 1)}], "the lowest -1"),
    ],
)
def test_gaps_and_impossible_settings_are_refused(members: list[dict], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Teachers([Teacher(module=Pooled(), input=SMALL, **m) for m in members], num_classes=4)


def digest(*modules: nn.Module) -> str:
    """SHA-256 of all weights and buffers, batch-norm statistics included."""
    made = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            made.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return made.hexdigest()


def test_teachers_stay_as_they_are_whatever_happens_to_them(make_distiller: Make) -> None:
    a, b = small_classifier(), Pooled(seed=2)
    teachers = Teachers([Teacher(module=a, input=SMALL), Teacher(module=b, input=LARGE, start=0.5)])
    before = digest(a, b)
    distiller = with_teachers(make_distiller(num_views=640), teachers)
    parent = nn.ModuleList([teachers, distiller.student.model])
    parent.train()
    assert distiller.student.model.training
    assert not any(m.training for m in teachers.modules() if m is not teachers) and not a.training
    weights = [value.clone() for value in distiller.student.model.state_dict().values()]
    distiller.fit()
    assert digest(a, b) == before
    assert not any(p.requires_grad or p.grad is not None for p in teachers.parameters())
    changed = zip(weights, distiller.student.model.state_dict().values(), strict=True)
    assert not all(torch.equal(x, y) for x, y in changed)
    answer = teachers({s: v.requires_grad_() for s, v in views().items()}, LABELS, 0.7)
    assert not answer.requires_grad


def test_training_mode_of_the_callers_own_module_does_not_reach_the_run(
    make_distiller: Make,
) -> None:
    runs = []
    for meddle in (False, True):
        distiller = make_distiller()
        if meddle:
            distiller.targets.teachers.train().requires_grad_(True)
        before = digest(distiller.targets.teachers)
        distiller.fit()
        assert digest(distiller.targets.teachers) == before
        runs.append(digest(distiller.student.model))
    assert runs[0] == runs[1]


def with_teachers(
    distiller: Distiller,
    teachers: nn.Module,
    *,
    student: nn.Module | None = None,
    images: GeneratedImages | None = None,
) -> Distiller:
    """The same run with other teachers, another student or other images."""
    return Distiller(
        images or distiller.images,
        distiller.ring,
        StudentTrainer(student or distiller.student.model, distiller.schedule),
        Targets(teachers, distiller.targets.views),
        distiller.run_dir,
        show=False,
    )


def with_later(distiller: Distiller, late: DiffusionSampler) -> GeneratedImages:
    """The same images, but of another sampler from the middle of the run on."""
    return GeneratedImages(labels_of(distiller), sampler_of(distiller), later=[(0.5, late)])


def test_every_teacher_sees_the_students_crop_in_its_own_size_and_scale(
    make_distiller: Make,
) -> None:
    """The trainer's renderings are the reference's for the boxes and flips of the student."""
    seen: dict[str, Tensor] = {}

    class Watching(Pooled):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, views: Tensor) -> Tensor:
            if float(views.sum()) < 1e9:  # cannot be traced, so the run calls this very code
                seen[self.name] = views.detach().clone()
            return super().forward(views)

    large = Teacher(module=Watching("large"), input=LARGE)
    teachers = Teachers([large, Teacher(module=Watching("small"), input=SMALL)])
    distiller = with_teachers(make_distiller(), teachers)
    distiller.refill()
    ring, views = distiller.ring, distiller.targets.views
    plan: dict[str, Tensor] = {}
    sample = ring.sample

    def spying(count: int) -> Any:
        draw = sample(count)
        boxes, flips = views.parameters(draw.ids, draw.uses, 8, 8)
        plan.update(indices=draw.indices, boxes=boxes, flips=flips)
        return draw

    ring.sample = spying  # type: ignore[method-assign]
    distiller.train_step()
    for name, spec in (("large", LARGE), ("small", SMALL)):
        expected = reference_views(
            ring.images,
            plan["indices"],
            plan["boxes"],
            plan["flips"],
            size=spec.size,
            pad=1,
            mean=torch.tensor(spec.mean),
            std=torch.tensor(spec.std),
            dtype=torch.float32,
        )
        torch.testing.assert_close(seen[name], expected, rtol=1e-5, atol=1e-5)


class WithFeatures(Pooled):
    """As the networks of mdistiller and RepDistiller return them."""

    def forward(self, views: Tensor) -> Any:
        return super().forward(views), views


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_networks_that_return_more_than_logits_are_refused_before_training(
    who: str, make_distiller: Make
) -> None:
    base = make_distiller()
    student = WithFeatures() if who == "student" else None
    teacher = WithFeatures() if who == "teacher" else base.targets.teachers
    with pytest.raises(ValueError, match=f"^{who}: got a tuple from forward"):
        with_teachers(base, teacher, student=student).fit()


def test_a_weak_then_strong_run_resumes_in_the_right_phase(make_distiller: Make) -> None:
    """Share of the run decides, so a run that was cut in two ends like a whole one."""

    def scheduled(run_dir: Path | None = None) -> Distiller:
        teachers = Teachers(
            [
                Teacher(module=Pooled(seed=1), input=LARGE, stop=0.5),
                Teacher(module=Pooled(seed=2), input=SMALL, start=0.5),
            ]
        )
        distiller = make_distiller(run_dir=run_dir)
        late = tiny_sampler(count=1, scale=1.0)
        return with_teachers(distiller, teachers, images=with_later(distiller, late))

    whole, broken = scheduled(), scheduled()
    whole.fit()
    step = broken.train_step

    def stops() -> Tensor:
        if broken.step == 30:
            raise KeyboardInterrupt
        return step()

    broken.train_step = stops  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    again = scheduled(broken.run_dir)
    again.restore()
    again.fit()
    assert digest(whole.student.model) == digest(again.student.model)
    assert torch.equal(whole.ring.images, again.ring.images)


def test_later_samplers_make_the_images_from_their_share_on(make_distiller: Make) -> None:
    distiller = make_distiller()
    late = tiny_sampler(count=1, scale=1.0)
    made: list[tuple[str, float]] = []
    images = with_later(distiller, late)
    distiller = with_teachers(distiller, distiller.targets.teachers, images=images)
    for name, sampler in (("first", sampler_of(distiller)), ("late", late)):
        sample = sampler.sample

        def noted(*args: Any, name: str = name, sample: Any = sample, **kwargs: Any) -> Tensor:
            made.append((name, distiller.progress))
            return sample(*args, **kwargs)

        sampler.sample = noted  # type: ignore[method-assign]
    distiller.fit()
    made = made[2:]  # the warm-up runs both
    assert {name for name, _ in made} == {"first", "late"}
    assert all((progress >= 0.5) == (name == "late") for name, progress in made)


def test_a_restricted_generator_makes_the_images_of_its_own_classes() -> None:
    """Label k of the job is class_map[k] of the model, in every step, null class untouched."""
    plain = tiny_sampler(num_classes=4)
    some = tiny_sampler(num_classes=2, class_map=(3, 1))
    ids, labels = torch.arange(16), torch.arange(16) % 2
    out = torch.empty(16, 1, 8, 8, dtype=torch.uint8)
    got = some.sample(ids, labels, out=out).clone()
    expected = plain.sample(ids, torch.tensor([3, 1])[labels], out=out)
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="got 2, expected 0 to 1"):
        some.sample(ids, labels + 1, out=out)


def test_distilling_some_of_a_teachers_classes_from_some_of_a_generators(
    make_distiller: Make,
) -> None:
    """A 2-class student of a 4-class teacher: it learns what the restricted teacher says."""
    base = make_distiller(num_views=3200, lr=1e-2)
    wide = base.targets.teachers
    teachers = Teachers([Teacher(module=wide, input=SMALL, class_map=(3, 1))])
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    distiller = with_teachers(
        base,
        teachers,
        student=student,
        images=GeneratedImages(LabelStream(2), tiny_sampler(num_classes=2, class_map=(3, 1))),
    )
    distiller.refill()
    before = distiller.train_step().item()
    distiller.fit()
    assert distiller.train_step().item() < before / 10
    assert set(distiller.ring.labels.tolist()) == {0, 1}
