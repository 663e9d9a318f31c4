"""Check the networks of a job: finite weights, frozen teachers, normalization, class order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from dmkd_fast.classifiers.ensemble import Teacher
from dmkd_fast.data.test_sets import prepare
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.jobs.inspect.findings import Finding, ok, wrong
from dmkd_fast.jobs.parts import Parts
from dmkd_fast.views.spec import InputSpec

TEST_BATCHES = 2
# A class whose images are mostly taken for one other class is in the wrong place.
RARELY, MOSTLY = 0.2, 0.5
# A normalization is wrong if another one recognizes most images, and so many more ...
GAIN = 0.1
# ... or if the inputs of the first batch norm differ so much from its running statistics: mean
# difference of the means in standard deviations, mean absolute logarithm of the variances' ratio.
SHIFT, RATIO = 0.2, 0.5
# Usual normalizations: none, [-1, 1], ImageNet's.
USUAL = (
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
)


def weights(parts: Parts) -> Finding:
    """Check that all weights and buffers are finite."""
    modules: dict[str, nn.Module] = {"student": parts.student, "teacher": parts.teachers.together}
    if isinstance(parts.origin, Denoiser):
        modules["denoiser"] = parts.origin.module
        if parts.origin.decoder is not None:
            modules["decoder"] = parts.origin.decoder
    bad = [
        f"{whose}: {name}"
        for whose, module in modules.items()
        for name, value in itertools.chain(module.named_parameters(), module.named_buffers())
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        means = "images, targets or losses become NaN"
        return wrong("weights", f"NaN or infinite in {bad[0]}{more}", means, "fetch them again")
    return ok("weights", f"finite ({', '.join(modules)})")


def frozen(teachers: list[nn.Module], before: list[Tensor]) -> Finding:
    """Check that teachers are in eval mode, need no gradients, and were not changed by a step.

    Args:
        teachers: Teachers, and the copies of them that run.
        before: Result of `fingerprint` before a training step.
    """
    modules = [module for teacher in teachers for module in teacher.modules()]
    trainable = sum(p.requires_grad for teacher in teachers for p in teacher.parameters())
    training = sum(module.training for module in modules)
    changed = sum(
        not torch.equal(old, new) for old, new in zip(before, fingerprint(teachers), strict=True)
    )
    means = "the targets of an image change during the run"
    if trainable:
        do = "call teacher.requires_grad_(False)"
        return wrong("teachers", f"{trainable} weights require gradients", means, do)
    if training:
        do = "call teacher.eval()"
        return wrong("teachers", f"{training} modules are in training mode", means, do)
    if changed:
        do = "look for code that writes to the teacher"
        return wrong("teachers", f"a step changed {changed} weights or buffers", means, do)
    return ok("teachers", "frozen, in eval mode, and unchanged by a training step")


def fingerprint(modules: list[nn.Module]) -> list[Tensor]:
    """Return a sum for each weight and buffer."""
    return [
        value.detach().double().sum()
        for module in modules
        for value in itertools.chain(module.parameters(), module.buffers())
    ]


def understanding(parts: Parts, images: Tensor, labels: Tensor) -> Iterator[Finding]:
    """Check normalization and class order of each teacher by its predictions.

    Args:
        parts: Loaded parts.
        images: Images of the run, (B, c, H, W) uint8.
        labels: Classes that they were made for, (B,) int64.
    """
    names = parts.test_set.class_names
    for section, member in zip(parts.teachers.specs, parts.teachers.together.members, strict=True):
        chosen = torch.ones_like(labels, dtype=torch.bool)
        if member.teaches is not None:
            chosen = torch.isin(labels, torch.tensor(member.teaches, device=labels.device))
        shown, wanted = images[chosen], labels[chosen]
        if not len(wanted):
            yield ok(f"{section}: classes", "no generated image is of a class that it teaches")
            continue
        found, guesses = _normalization(section, member, shown, wanted)
        yield found
        yield class_order(f"{section}: classes", guesses, wanted, names, "generated images")


def real_images(parts: Parts) -> Finding:
    """Check the class order of the test set by the teachers' predictions."""
    together, guesses, labels = parts.teachers.together, [], []
    batches = parts.test_set.batches(together.inputs_at(1.0))
    for views, wanted in itertools.islice(batches, TEST_BATCHES):
        guesses.append(together.predict(views).argmax(dim=1))
        labels.append(wanted)
    found = torch.cat(guesses), torch.cat(labels)
    return class_order("test set: classes", *found, parts.test_set.class_names, "test images")


def class_order(
    name: str, guesses: Tensor, labels: Tensor, class_names: tuple[str, ...], whose: str
) -> Finding:
    """Check by predictions that labels and outputs of the teachers have the same order.

    Args:
        name: Name of the finding.
        guesses: Predicted classes, (B,) int64.
        labels: Classes, (B,) int64.
        class_names: Names of all classes.
        whose: What the images are.
    """
    accuracy = (guesses == labels).float().mean().item()
    taken: dict[int, int] = {}
    for label in labels.unique().tolist():
        among = guesses[labels == label]
        most = int(among.mode().values)
        if (among == label).float().mean() <= RARELY and (among == most).float().mean() >= MOSTLY:
            taken[label] = most
    text = f"teacher recognizes {accuracy:.0%} of {len(labels)} {whose}"
    # Many classes taken for a single one are no other order.
    if taken and len(set(taken.values())) == len(taken):
        pairs = [f"{class_names[a]} for {class_names[b]}" for a, b in [*taken.items()][:3]]
        return wrong(
            name,
            f"{text}; takes {', '.join(pairs)}{', ...' if len(taken) > 3 else ''}",
            "labels and outputs are in another order, so the student learns wrong names",
            "correct denoiser.class_map, teacher.class_map, the prompts or eval.classes",
        )
    if accuracy < max(0.3, 2 / len(class_names)):
        return wrong(
            name,
            text,
            "teacher and images do not fit each other",
            "look at the images and the guidance, and try another teacher",
        )
    return ok(name, text)


@torch.no_grad()
def _normalization(
    section: str, member: Teacher, images: Tensor, labels: Tensor
) -> tuple[Finding, Tensor]:
    """Return the finding, and the predictions of the normalization that recognizes most images."""
    channels, pixels = member.input.num_channels, images.float() / 255
    mean = tuple(pixels.mean((0, 2, 3)).tolist())
    std = tuple(pixels.std((0, 2, 3)).clamp_min(1e-3).tolist())
    own = _guesses(member, member.input, images)
    best, best_guesses = member.input, own
    for other_mean, other_std in (*(_for_channels(u, channels) for u in USUAL), (mean, std)):
        spec = replace(member.input, mean=other_mean, std=other_std)
        guesses = _guesses(member, spec, images)
        if (guesses == labels).sum() > (best_guesses == labels).sum():
            best, best_guesses = spec, guesses
    name, used = f"{section}: normalization", _shown(member.input)
    reached = (best_guesses == labels).float().mean().item()
    gain = reached - (own == labels).float().mean().item()
    means = "the teacher sees other brightness and contrast than in its training"
    do = f"correct mean and std in the config.json of {section}"
    if gain > GAIN and reached > MOSTLY:
        what = f"{used}; with {_shown(best)} it recognizes {gain:.0%} more of the images"
        return wrong(name, what, means, do), best_guesses
    shift, ratio = _batch_norm_gap(member, images)
    if shift > SHIFT or ratio > RATIO:
        what = (
            f"{used}; inputs of the first batch norm are off by {shift:.2f} standard deviations, "
            f"and their variance by a factor of {torch.tensor(ratio).exp():.2f}"
        )
        return wrong(name, what, means, do), own
    return ok(name, used), own


def _batch_norm_gap(member: Teacher, images: Tensor) -> tuple[float, float]:
    """Compare the input of the first batch norm with its running statistics; 0, 0 without one."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    norm = next((m for m in member.module.modules() if isinstance(m, kinds)), None)
    if norm is None or norm.running_mean is None or norm.running_var is None:
        return 0.0, 0.0
    seen: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float()))
    try:
        member.module(prepare(images, member.input))
    finally:
        hook.remove()
    if not seen:
        return 0.0, 0.0
    dims = [d for d in range(seen[0].dim()) if d != 1]
    mean, var = seen[0].mean(dims), seen[0].var(dims) + norm.eps
    expected = norm.running_var + norm.eps
    shift = ((mean - norm.running_mean).abs() / expected.sqrt()).mean()
    return shift.item(), (var / expected).log().abs().mean().item()


def _guesses(member: Teacher, spec: InputSpec, images: Tensor) -> Tensor:
    """Return the classes (B,) that a teacher predicts with another normalization."""
    logits: Tensor = member.module(prepare(images, spec))
    if member.class_map is not None:
        logits = logits[:, list(member.class_map)]
    return logits.argmax(dim=1)


def _for_channels(
    usual: tuple[tuple[float, ...], tuple[float, ...]], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std for another number of channels, as the mean over three."""
    if channels == 3:
        return usual
    mean, std = (sum(values) / 3 for values in usual)
    return (mean,) * channels, (std,) * channels


def _shown(spec: InputSpec) -> str:
    mean, std = (", ".join(f"{v:.3g}" for v in values) for values in (spec.mean, spec.std))
    return f"mean ({mean}), std ({std})"
