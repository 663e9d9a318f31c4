"""Eager definition of the distillation loss, the reference for tests and benchmarks.

Plain PyTorch, for any device, not optimized for speed.
Shapes: B rows, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dmkd_fast.loss.divergences import FORWARD_KL

# A vector counts as constant, with correlation 0, where its squares around the mean are at most
# this share of its squares.
CONSTANT = 1e-13


def reference_cross_entropy(
    student_logits: Tensor, target: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Compute each row's cross-entropy to class ids or probabilities (B,), and its gradient (B, C).

    Equals `F.cross_entropy(..., reduction="none")`, except that a class with target 0 adds 0 even
    if the student's log-probability of it is -inf.
    """
    log_q = student_logits.log_softmax(-1)
    if target.ndim < log_q.ndim:
        target = torch.zeros_like(log_q).scatter_(-1, target[..., None], 1)
    weights = target.to(log_q.dtype) * (1 - label_smoothing) + label_smoothing / log_q.shape[-1]
    loss = torch.where(weights == 0, 0, -weights * log_q).sum(-1)
    return loss, log_q.exp() * weights.sum(-1, keepdim=True) - weights


class Rows:
    """Teacher p and student q at temperature T, and d = log p - log q, all (B, C).

    Args:
        student_logits, teacher_logits: Logits (B, C) of the same dtype.
        temperature: Softmax temperature T, or one of each row (B, 1).
        target: Class ids (B,), for dkd.
        counted: Rows (B,) that dist's correlations over the batch include; None: all.
        standardize: Whether the logits of each row are standardized before they are divided by T.
    """

    def __init__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        temperature: float | Tensor,
        *,
        target: Tensor | None = None,
        counted: Tensor | None = None,
        standardize: bool = False,
    ) -> None:
        self.logits, self.temperature, self.standardize = student_logits, temperature, standardize
        if standardize:
            student_logits, teacher_logits = map(_standardize, (student_logits, teacher_logits))
        self.student, self.teacher = student_logits / temperature, teacher_logits / temperature
        self.log_p, self.log_q = self.teacher.log_softmax(-1), self.student.log_softmax(-1)
        self.p, self.q, self.d = self.log_p.exp(), self.log_q.exp(), self.log_p - self.log_q
        self.target, self.counted = target, counted


def reference_divergence(rows: Rows, terms: Sequence[float] = ()) -> Tensor:
    """Compute the weighted sum of the divergences `terms` of each row, (B,), without factor T^2."""
    return sum(  # type: ignore[return-value]
        weight * _DEFINITIONS[int(kind)](rows, *numbers)[0]
        for kind, weight, *numbers in _quadruples(terms)
    )


def reference_divergence_grad(rows: Rows, terms: Sequence[float], factors: Tensor) -> Tensor:
    """Compute the gradient of sum(factors * reference_divergence(...)) by the student's logits."""
    grad = torch.zeros_like(rows.q)
    for kind, weight, *numbers in _quadruples(terms):
        slopes = weight * _DEFINITIONS[int(kind)](rows, *numbers)[1](factors[:, None])
        grad = grad + slopes - rows.q * slopes.sum(-1, keepdim=True)
    grad = grad / rows.temperature
    return _standardize_grad(rows.logits, grad) if rows.standardize else grad


# Each definition returns the rows' divergences (B,), and a function from the factors (B, 1) on them
# to slopes (B, C), q * dD/dq. A gradient by s / T is slopes - q * sum(slopes).
_Defined = tuple[Tensor, Callable[[Tensor], Tensor]]


def _forward_kl(rows: Rows, *_: float) -> _Defined:
    """KL(p || q)."""
    p, q = rows.p, rows.q
    return _excess(p, q, rows.d).sum(-1), lambda factors: factors * (q - p)


def _reverse_kl(rows: Rows, *_: float) -> _Defined:
    """KL(q || p). Classes of probability 0 have slope 0, so that the gradient is finite."""
    slopes = torch.where(rows.d.isinf() | (rows.q == 0), 0, -rows.q * rows.d)
    return _excess(rows.q, rows.p, -rows.d).sum(-1), lambda factors: factors * slopes


def _jsd(rows: Rows, beta: float, _: float) -> _Defined:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, as in GKD.

    Source: Agarwal et al., "On-policy distillation of language models" (arXiv 2306.13649), eq. 2.
    """
    p, q = rows.p, rows.q
    # log m from the larger one: log m - log q = log1p(beta * expm1(d)), and the same by p.
    smaller = torch.expm1(-rows.d.abs())
    log_m = torch.where(
        rows.d > 0,
        rows.log_p + torch.log1p((1 - beta) * smaller),
        rows.log_q + torch.log1p(beta * smaller),
    )
    m = beta * p + (1 - beta) * q
    loss = beta * _excess(p, m, rows.log_p - log_m)
    loss = loss + (1 - beta) * _excess(q, m, rows.log_q - log_m)
    slopes = torch.where(q == 0, 0, (1 - beta) * q * (rows.log_q - log_m))
    return loss.sum(-1), lambda factors: factors * slopes


def _alpha_beta(rows: Rows, alpha: float, beta: float) -> _Defined:
    """-1 / (a b) sum(p^a q^b - a / (a + b) p^(a + b) - b / (a + b) q^(a + b)).

    Source: Wang et al., "ABKD" (ICML 2025, arXiv 2505.04560), definition of the divergence.
    """
    both = alpha + beta
    p_power, q_power = (both * rows.log_p).exp(), (both * rows.log_q).exp()
    mixed = (alpha * rows.log_p + beta * rows.log_q).exp()
    far = alpha / both * p_power + beta / both * q_power - mixed
    x, y = both * rows.d, beta * rows.d
    near = p_power * (beta / both * (torch.expm1(-x) + x) - (torch.expm1(-y) + y))
    is_near = x.abs() < 0.5
    loss = torch.where(is_near, near, far) / (alpha * beta)
    slopes = torch.where(is_near, -q_power * torch.expm1(alpha * rows.d), q_power - mixed) / alpha
    return loss.sum(-1), lambda factors: factors * slopes


def _total_variation(rows: Rows, *_: float) -> _Defined:
    """sum |p - q| / 2. Where p equals q the slope is 0."""
    change = rows.q - rows.p
    slopes = rows.q * change.sign() / 2
    return change.abs().sum(-1) / 2, lambda factors: factors * slopes


def _dkd(rows: Rows, alpha: float, beta: float) -> _Defined:
    """alpha KL of target against rest, plus beta KL among the rest.

    Source: Zhao et al., "Decoupled knowledge distillation" (arXiv 2203.08679), eq. 7.
    """
    assert rows.target is not None
    at_target = torch.zeros_like(rows.p, dtype=torch.bool).scatter_(-1, rows.target[:, None], True)
    log_rest_p, log_rest_q = (
        logits.masked_fill(at_target, -torch.inf).logsumexp(-1, keepdim=True)
        for logits in (rows.teacher, rows.student)
    )
    # Target against rest by log odds, so that nothing is lost where the target has almost all.
    odds_p = rows.teacher.gather(-1, rows.target[:, None]) - log_rest_p
    odds_q = rows.student.gather(-1, rows.target[:, None]) - log_rest_q
    binary = torch.zeros_like(odds_p)
    for sign in (1, -1):
        log_p, log_q = F.logsigmoid(sign * odds_p), F.logsigmoid(sign * odds_q)
        binary = binary + _excess(log_p.exp(), log_q.exp(), log_p - log_q)
    log_p, log_q = (
        (logits - log_rest).masked_fill(at_target, -torch.inf)
        for logits, log_rest in ((rows.teacher, log_rest_p), (rows.student, log_rest_q))
    )
    p, q = log_p.exp(), log_q.exp()
    alone = (log_rest_p == -torch.inf) | (log_rest_q == -torch.inf)  # as with one class
    p, q = p.masked_fill(alone, 0), q.masked_fill(alone, 0)
    others = _excess(p, q, log_p - log_q).sum(-1, keepdim=True)
    change = (odds_q.sigmoid() - odds_p.sigmoid()).masked_fill(alone, 0)
    slopes = torch.where(at_target, alpha * change, beta * (q - p) - alpha * change * q)
    loss = alpha * binary.masked_fill(alone, 0) + beta * others
    return loss[:, 0], lambda factors: factors * slopes


def _dist(rows: Rows, beta: float, gamma: float) -> _Defined:
    """beta (1 - correlation over classes) + gamma mean(1 - correlation over rows).

    The second term is the same for all rows.
    Source: Huang et al., "Knowledge distillation from a stronger teacher" (arXiv 2205.10536).
    """
    within, within_grad = _uncorrelated(rows.q, rows.p)
    counted, chosen = rows.counted, (rows.q, rows.p)
    if counted is not None:  # A mask makes the host wait for the number of rows.
        chosen = rows.q[counted], rows.p[counted]
    columns, columns_grad = _uncorrelated(chosen[0].t(), chosen[1].t())

    def slopes(factors: Tensor) -> Tensor:
        grad = beta * factors * within_grad
        kept = factors if counted is None else torch.where(counted[:, None], factors, 0)
        shared = gamma * kept.sum() / len(columns) * columns_grad.t()
        if counted is None:
            return rows.q * (grad + shared)
        grad[counted] += shared
        return rows.q * grad

    return beta * within + gamma * columns.mean(), slopes


_DEFINITIONS: tuple[Callable[..., _Defined], ...] = (  # in the order of divergences.NAMES
    _forward_kl,
    _reverse_kl,
    _jsd,
    _alpha_beta,
    _total_variation,
    _dkd,
    _dist,
)


def _uncorrelated(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 - correlation of each row of a and b, and its gradient by a.

    A constant row has correlation 0 and gradient 0.
    """
    x, y = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    is_constant = torch.zeros(len(a), 1, dtype=torch.bool, device=a.device)
    for centered, whole in ((x, a), (y, b)):
        floor = CONSTANT * whole.square().sum(-1, keepdim=True)
        is_constant |= centered.square().sum(-1, keepdim=True) <= floor
    x_norm, y_norm = (torch.where(is_constant, 1, v.norm(dim=-1, keepdim=True)) for v in (x, y))
    x, y = x / x_norm, y / y_norm
    loss = (x - y).square().sum(-1, keepdim=True) / 2  # = 1 - x * y, without cancellation
    grad = ((1 - loss) * x - y) / x_norm
    return torch.where(is_constant, 1, loss)[:, 0], torch.where(is_constant, 0, grad)


def _excess(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """Return p * (expm1(-d) + d) with d = log p - log q: terms of KL(p || q).

    Their sum equals that of p * d, because p and q both sum to one, but it is exact and never
    negative as q -> p.
    """
    # Far from d = 0, q - p replaces p * expm1(-d), because expm1 may overflow where p is tiny.
    terms = torch.where(d.abs() < 1, p * (torch.expm1(-d) + d), (q - p) + p * d)
    # 0 * log 0 is 0. KL is infinite if q is 0 where p is not.
    return torch.where(p == 0, q, terms)


def _standardize(logits: Tensor) -> Tensor:
    """Return the rows with mean 0 and standard deviation 1.

    Source: Sun et al., "Logit standardization in knowledge distillation" (arXiv 2403.01427).
    """
    centered = logits - logits.mean(-1, keepdim=True)
    return centered / (_deviation(centered) + 1e-7)


def _standardize_grad(logits: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient by the logits from that by the standardized ones."""
    centered = logits - logits.mean(-1, keepdim=True)
    deviation = _deviation(centered)
    scale = 1 / (deviation + 1e-7)
    dot = (grad * centered).sum(-1, keepdim=True) * scale**2
    # Where all logits are equal the standard deviation has no gradient.
    chain = torch.where(deviation > 0, dot / (max(1, logits.shape[-1] - 1) * deviation), 0)
    return grad * scale - chain * centered


def _deviation(centered: Tensor) -> Tensor:
    freedom = max(1, centered.shape[-1] - 1)
    return (centered.square().sum(-1, keepdim=True) / freedom).sqrt()


def _quadruples(terms: Sequence[float]) -> list[Sequence[float]]:
    terms = terms or (FORWARD_KL, 1.0, 0.0, 0.0)
    return [terms[i : i + 4] for i in range(0, len(terms), 4)]
