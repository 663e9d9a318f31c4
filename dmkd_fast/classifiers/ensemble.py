"""Combine several frozen teachers into one: average them, route by class, or switch over time.

The teachers of an image are those that are active at this progress of the run and teach the class
of the image. Their tempered probabilities are averaged (Hinton et al., arXiv 1503.02531,
section 2):

    softmax(logits / T) = mean over k of softmax(logits_k / T)

This covers an average (all teachers for all images), routing (each class has its own teacher) and a
schedule (a weak teacher first, a strong one later), in any combination.
Shapes: B images in a batch, C classes of the job, K active teachers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dmkd_fast.runtime.errors import invalid
from dmkd_fast.views.spec import InputSpec


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A classifier, the classes that it teaches, and the part of the run in which it teaches."""

    module: nn.Module
    """Network, (B, c, S, S) -> logits."""
    input: InputSpec
    """Input that the network expects; it gets its own rendering of the same crops."""
    class_map: tuple[int, ...] | None = None
    """Index of each class of the job among the network's outputs; None: the same order."""
    teaches: tuple[int, ...] | None = None
    """Classes of the job whose images this teacher labels; None: all."""
    start: float = 0.0
    """Progress of the run at which the teacher starts, in [0, 1)."""
    stop: float = 1.0
    """Progress of the run at which the teacher stops, in (0, 1]; 1 includes the end."""

    def is_active(self, progress: float) -> bool:
        """Return whether the teacher is used at this progress of the run, in [0, 1]."""
        return self.start <= progress and (progress < self.stop or self.stop == 1.0)


class Teachers(nn.Module):
    """Several frozen teachers as one module, which always stays in eval mode.

    Args:
        members: Teachers to combine.
        num_classes: Number of classes C; required if a teacher has `teaches`.
        temperature: Softmax temperature T of the loss.

    Raises:
        UserError: A class has no teacher at some progress of the run, or a setting is out of
            range.
    """

    def __init__(
        self,
        members: Sequence[Teacher],
        *,
        num_classes: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not members:
            raise invalid("teachers", "none", "at least one")
        for member in members:
            _check_member(member)
        _check_all_classes_taught(members, num_classes)
        self.members, self.temperature = tuple(members), temperature
        self.num_classes = num_classes
        self.networks = nn.ModuleList(m.module for m in members).requires_grad_(False)
        for number, member in enumerate(members):
            if member.class_map is not None:
                self._keep(f"_map{number}", torch.tensor(member.class_map))
            if member.teaches is not None:
                mask = torch.zeros(num_classes or 0, dtype=torch.bool)
                mask[list(member.teaches)] = True
                self._keep(f"_teaches{number}", mask)
        super().train(False)

    def train(self, mode: bool = True) -> Teachers:
        """Do nothing, so that the teachers stay in eval mode when a parent module changes mode."""
        del mode
        return self

    def mapped(self, change: Callable[[nn.Module, InputSpec], nn.Module]) -> Teachers:
        """Return the same teachers with every module replaced, for example by a faster copy."""
        members = [replace(m, module=change(m.module, m.input)) for m in self.members]
        return Teachers(members, num_classes=self.num_classes, temperature=self.temperature)

    def inputs_at(self, progress: float) -> tuple[InputSpec, ...]:
        """Return the distinct inputs that `forward` needs at this progress of the run."""
        return tuple(dict.fromkeys(m.input for m in self.members if m.is_active(progress)))

    def active_at(self, progress: float) -> tuple[int, ...]:
        """Return the numbers of the members that teach at this progress of the run."""
        return tuple(k for k, m in enumerate(self.members) if m.is_active(progress))

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """All distinct inputs of the run."""
        return tuple(dict.fromkeys(m.input for m in self.members))

    @torch.no_grad()
    def forward(self, views: Mapping[InputSpec, Tensor], labels: Tensor, progress: float) -> Tensor:
        """Return the logits that the student is trained to match.

        Args:
            views: Views (B, c, S, S) of the same crops for each of `inputs_at(progress)`.
            labels: Classes (B,) int64 that the images were made for.
            progress: Progress of the run in [0, 1].

        Returns:
            Logits (B, C). With several active teachers: T * log(mean probability at temperature
            T), in float32.
        """
        return self._combine(self.active_at(progress), views, labels, self.temperature)

    @torch.no_grad()
    def predict(self, views: Mapping[InputSpec, Tensor]) -> Tensor:
        """Return logits (B, C) for unlabeled images.

        The probabilities of all teachers that are active at the end of the run are averaged at
        temperature 1, whichever classes each of them teaches.
        """
        return self._combine(self.active_at(1.0), views, None, 1.0)

    def _combine(
        self,
        active: Sequence[int],
        views: Mapping[InputSpec, Tensor],
        labels: Tensor | None,
        temperature: float,
    ) -> Tensor:
        parts, masks = [], []
        for k in active:
            logits: Tensor = self.networks[k](views[self.members[k].input])
            if self.members[k].class_map is not None:
                logits = logits.index_select(1, self.get_buffer(f"_map{k}"))
            if len(active) == 1:
                return logits  # (B, C)
            parts.append((logits.float() / temperature).log_softmax(dim=1))
            if labels is None or self.members[k].teaches is None:
                masks.append(torch.ones(len(logits), dtype=torch.bool, device=logits.device))
            else:
                masks.append(self.get_buffer(f"_teaches{k}")[labels])
        teaches = torch.stack(masks)[..., None]  # (K, B, 1)
        log_p = torch.stack(parts).where(teaches, -math.inf)  # (K, B, C)
        mean = log_p.logsumexp(dim=0) - teaches.sum(dim=0).log()
        return temperature * mean  # (B, C)

    def _keep(self, name: str, values: Tensor) -> None:
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        self.register_buffer(name, values.to(device), persistent=False)


def _check_member(member: Teacher) -> None:
    entries = member.class_map or (0,)
    if len(set(entries)) < len(entries) or min(entries) < 0:
        got = f"{len(entries)} entries, {len(set(entries))} different, the lowest {min(entries)}"
        raise invalid("class_map", got, "different numbers from 0 on")
    if not 0 <= member.start < member.stop <= 1:
        got, expected = f"{member.start} and {member.stop}", "0 <= start < stop <= 1"
        raise invalid("start and stop", got, f"{expected}, the progress of the run")


def _check_all_classes_taught(members: Sequence[Teacher], num_classes: int | None) -> None:
    """Check that every class has a teacher at every progress of the run."""
    for member in members:
        if member.teaches is None:
            continue
        if num_classes is None:
            raise invalid("teaches", "classes without num_classes", "both")
        bad = [c for c in member.teaches if not 0 <= c < num_classes]
        if bad or not member.teaches:
            got = bad[0] if bad else "no classes"
            raise invalid("teaches", got, f"classes from 0 to {num_classes - 1}")
    points = {0.0, 1.0} | {m.start for m in members} | {m.stop for m in members}
    for progress in sorted(points):
        active = [m for m in members if m.is_active(progress)]
        if not active:
            got = f"no teacher from progress {progress} on"
            raise invalid("start and stop", got, "one at any time", "change start or stop")
        if all(m.teaches is not None for m in active):
            taught = {c for m in active for c in m.teaches or ()}
            missing = sorted(set(range(num_classes or 0)) - taught)
            if missing:
                got = f"no teacher for class {missing[0]} from progress {progress} on"
                raise invalid("teaches", got, "one", "add the class to a teacher")
