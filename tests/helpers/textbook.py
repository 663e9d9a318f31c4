"""The divergences as their papers write them, for autograd, and the eager forward KL."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmkd_fast.loss.reference import Rows, reference_divergence


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def forward_kl(s: Tensor, t: Tensor, target: Tensor | None) -> Tensor:
    return kl(t.softmax(-1), s.softmax(-1))


def reverse_kl(s: Tensor, t: Tensor, target: Tensor | None) -> Tensor:
    return kl(s.softmax(-1), t.softmax(-1))


def jsd(s: Tensor, t: Tensor, target: Tensor | None, beta: float = 0.5) -> Tensor:
    p, q = t.softmax(-1), s.softmax(-1)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def alpha_beta(
    s: Tensor, t: Tensor, target: Tensor | None, alpha: float = 0.2, beta: float = 0.7
) -> Tensor:
    p, q, both = t.softmax(-1), s.softmax(-1), alpha + beta
    inner = p**alpha * q**beta - alpha / both * p**both - beta / both * q**both
    return -inner.sum(-1) / (alpha * beta)


def total_variation(s: Tensor, t: Tensor, target: Tensor | None) -> Tensor:
    return (t.softmax(-1) - s.softmax(-1)).abs().sum(-1) / 2


def dkd(
    s: Tensor, t: Tensor, target: Tensor | None, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    """As in the repository of DKD, with -inf in place of its -1000."""
    assert target is not None
    mask = F.one_hot(target, s.shape[-1]).bool()
    both = [
        torch.stack((x.softmax(-1)[mask], x.softmax(-1).masked_fill(mask, 0).sum(-1)), -1)
        for x in (t, s)
    ]
    rest = [x[~mask].view(len(x), -1).softmax(-1) for x in (t, s)]
    return alpha * kl(*both) + beta * kl(*rest)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + 1e-30)


def dist(
    s: Tensor, t: Tensor, target: Tensor | None, beta: float = 1.0, gamma: float = 1.0
) -> Tensor:
    p, q = t.softmax(-1), s.softmax(-1)
    return beta * (1 - correlation(q, p)) + gamma * (1 - correlation(q.t(), p.t())).mean()


def standardized(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-7)


DEFINITIONS = {
    f.__name__: f for f in (forward_kl, reverse_kl, jsd, alpha_beta, total_variation, dkd, dist)
}


def rows(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    divergence: str | dict,
    temperature: float | Tensor,
    standardize: bool = False,
) -> Tensor:
    """T^2 times the divergence of each row."""
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    s, t = student / temperature, teacher / temperature
    terms = {divergence: 1.0} if isinstance(divergence, str) else divergence
    total = torch.zeros(len(student), dtype=student.dtype)
    for name, given in terms.items():
        values = dict(given) if isinstance(given, dict) else {"weight": given}
        weight = values.pop("weight", 1.0)
        total = total + weight * DEFINITIONS[name](s, t, target, **values)
    factor = temperature**2
    return total * (factor.reshape(-1) if isinstance(factor, Tensor) else factor)


def reference_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """T^2 KL(softmax(t / T) || softmax(s / T)) of each row by the eager definition."""
    return temperature**2 * reference_divergence(_rows(student, teacher, temperature))


def reference_grad(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """The gradient of `reference_loss` by the student's logits, T * (q - p)."""
    rows = _rows(student, teacher, temperature)
    return temperature * (rows.q - rows.p)


def _rows(student: Tensor, teacher: Tensor, temperature: float) -> Rows:
    compute = torch.float64 if student.dtype == torch.float64 else torch.float32
    return Rows(student.to(compute), teacher.to(compute), temperature)
