"""Triton kernel `tile` of kd_loss: rows that fit into registers, each read once.

TERMS are the numbers of `divergences.terms_of`. Row offsets are 64-bit.
Shapes: B rows, C classes; a tile is ROWS x BLOCK.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dmkd_fast.loss import triton_math as loss_math


@triton.jit
def _softmax_rows(x, rows_inverse):
    """Return maxima, exponentials and their sums; rows of -inf alone have sum 0."""
    top = tl.max(x, 1)
    top = tl.where(top == -float("inf"), 0.0, top)
    exp = tl.exp2((x - top[:, None]) * (rows_inverse * loss_math.LOG2E)[:, None])
    return top, exp, tl.sum(exp, 1)


@triton.jit
def _log_ratio(s_exp, t_exp, s_sum, t_sum):
    """Return log(s_sum / t_sum) of each row, exact as they meet."""
    return loss_math.log_of_sums(s_sum, t_sum, tl.sum(s_exp - t_exp, 1) / t_sum)


@triton.jit
def _standardized(x, inside, num_classes):
    """Return rows of mean 0 and standard deviation 1, the factor, and the standard deviation."""
    mean = tl.sum(tl.where(inside, x, 0.0), 1) / num_classes
    centered = tl.where(inside, x - mean[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(centered * centered, 1) / tl.maximum(num_classes - 1, 1))
    inverse = 1 / (deviation + 1e-7)
    return tl.where(inside, centered * inverse[:, None], -float("inf")), inverse, deviation


@triton.jit
def _divergence_rows(
    s, t, inside, cols, ids, num_classes, inverse, TERMS: tl.constexpr, STANDARDIZE: tl.constexpr
):
    """Return the divergences of rows (ROWS,), and T times their gradients by the logits."""
    if STANDARDIZE:
        s, s_scale, s_deviation = _standardized(s, inside, num_classes)
        t, _, _ = _standardized(t, inside, num_classes)
    s_top, s_exp, s_sum = _softmax_rows(s, inverse)
    t_top, t_exp, t_sum = _softmax_rows(t, inverse)
    ratio = _log_ratio(s_exp, t_exp, s_sum, t_sum)
    q = s_exp * (1 / s_sum)[:, None]
    p = t_exp * (1 / t_sum)[:, None]
    x = s - s_top[:, None]
    y = t - t_top[:, None]
    d, common = loss_math.log_ratio(
        s, t, s_top[:, None], t_top[:, None], ratio[:, None], inverse[:, None]
    )
    log2_q = x * (inverse * loss_math.LOG2E)[:, None] - tl.log2(s_sum)[:, None]
    log2_p = y * (inverse * loss_math.LOG2E)[:, None] - tl.log2(t_sum)[:, None]
    if len(TERMS) == 0:
        terms, slopes = loss_math.divergence(p, q, d, common)
    else:
        terms, slopes = loss_math.weighted_parts(TERMS, p, q, d, log2_p, log2_q, common)
    loss = tl.sum(tl.where(inside, terms, 0.0), 1)
    for k in tl.static_range(len(TERMS) // 4):
        if TERMS[4 * k] == loss_math.DKD:
            at_id = inside & (cols == ids[:, None])
            value, part = _decoupled_rows(s, t, at_id, inverse, TERMS[4 * k + 2], TERMS[4 * k + 3])
            known = (ids >= 0) & (ids < num_classes)
            loss += TERMS[4 * k + 1] * tl.where(known, value, float("nan"))
            slopes += TERMS[4 * k + 1] * tl.where(known[:, None], part, float("nan"))
    slopes = tl.where(inside, slopes, 0.0)
    grad = slopes
    if len(TERMS) > 0:  # The slopes of forward KL, q - p, sum to 0.
        grad = slopes - q * tl.sum(slopes, 1)[:, None]
    if STANDARDIZE:
        z = tl.where(inside, s, 0.0)
        chain = tl.sum(grad * z, 1) / (tl.maximum(num_classes - 1, 1) * s_deviation)
        chain = tl.where(s_deviation > 0, chain, 0.0)
        grad = grad * s_scale[:, None] - z * chain[:, None]
    return loss, grad


@triton.jit
def _decoupled_rows(s, t, at_id, inverse, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Return dkd's loss and slopes: target against rest, and among the rest."""
    s_id = tl.sum(tl.where(at_id, s, 0.0), 1)
    t_id = tl.sum(tl.where(at_id, t, 0.0), 1)
    x = tl.where(at_id, -float("inf"), s)
    y = tl.where(at_id, -float("inf"), t)
    s_top, s_exp, s_sum = _softmax_rows(x, inverse)
    t_top, t_exp, t_sum = _softmax_rows(y, inverse)
    alone = (s_sum == 0) | (t_sum == 0)
    ratio = tl.where(alone, 0.0, _log_ratio(s_exp, t_exp, s_sum, t_sum))
    odds = (t_id - t_top) * inverse - tl.log(t_sum)
    student = (s_id - s_top) * inverse - tl.log(s_sum)
    excess = ((s_id - s_top) - (t_id - t_top)) * inverse - ratio
    odds = tl.where(alone, 0.0, odds)
    binary, change = loss_math.target_against_rest(odds, excess, student)
    q = s_exp * tl.where(alone, 0.0, 1 / s_sum)[:, None]
    p = t_exp * tl.where(alone, 0.0, 1 / t_sum)[:, None]
    d = ((y - t_top[:, None]) - (x - s_top[:, None])) * inverse[:, None] + ratio[:, None]
    terms, change_rest = loss_math.divergence(p, q, d, ratio[:, None])
    change = tl.where(alone, 0.0, FIRST * change)
    slopes = tl.where(at_id, change[:, None], SECOND * change_rest - change[:, None] * q)
    loss = FIRST * binary + SECOND * tl.sum(tl.where(at_id, 0.0, terms), 1)
    return tl.where(alone, 0.0, loss), slopes


@triton.jit
def tile(
    student,
    teacher,
    target,
    weight,
    upstream,
    temperatures,
    grad,
    num_rows,
    classes_by_vec,
    student_by_vec,
    teacher_by_vec,
    target_stride,
    grad_by_vec,
    inverse_temperature,
    alpha,
    kd_scale,
    ce_scale,
    smoothing,
    grad_scale,
    loss_out,
    kd_out,
    ce_out,
    stats,
    partials,
    ticket,
    LOSS: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    TARGET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    UPSTREAM: tl.constexpr,
    TERMS: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Process whole rows in registers, each read once.

    LOSS: 0 none, 1 sums, 2 one per row. TARGET: 0 none, 1 class ids, 2 probabilities, 3 class ids
    for dkd alone. UPSTREAM: 0 none, 1 one number, 2 one per row. Sizes and strides named
    `..._by_vec` are divided by VEC, as is `target_stride` for probabilities.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    num_classes = classes_by_vec * VEC
    rows64 = rows.to(tl.int64)
    factor = tl.full([ROWS], 1.0, tl.float32)
    if HAS_WEIGHT:
        factor = tl.load(weight + rows64, rows < num_rows, 0.0)
    counts = (rows < num_rows) & (factor != 0)
    inside = counts[:, None] & (cols < num_classes)[None, :]
    s_at = student + rows64[:, None] * (student_by_vec * VEC) + cols[None, :]
    t_at = teacher + rows64[:, None] * (teacher_by_vec * VEC) + cols[None, :]
    s = tl.load(s_at, inside, -float("inf")).to(tl.float32)
    t = tl.load(t_at, inside, -float("inf")).to(tl.float32)
    ids = tl.zeros([ROWS], tl.int64)
    if TARGET % 2 == 1:
        ids = tl.load(target + rows64 * target_stride, counts, 0)
    inverse = tl.full([ROWS], inverse_temperature, tl.float32)
    kd_factor = tl.full([ROWS], 1.0, tl.float32)
    if HAS_TEMPERATURES:
        inverse = 1 / tl.load(temperatures + 2 * rows64, counts, 1.0)
        kd_factor = tl.load(temperatures + 2 * rows64 + 1, counts, 1.0)
    kd, out = _divergence_rows(
        s, t, inside, cols[None, :], ids, num_classes, inverse, TERMS, STANDARDIZE
    )
    up = factor * grad_scale
    if UPSTREAM != 0:
        up *= tl.load(upstream + rows64 * (UPSTREAM == 2), rows < num_rows, 0.0)
    out *= (up * (alpha * kd_scale * inverse * kd_factor))[:, None]
    ce = tl.zeros([ROWS], tl.float32)
    if TARGET == 1 or TARGET == 2:
        kept = 1 - smoothing
        spread = smoothing / num_classes
        s_max = tl.max(s, 1)
        exp1 = tl.exp2((s - s_max[:, None]) * loss_math.LOG2E)
        sum1 = tl.sum(exp1, 1)
        log_sum = tl.log(sum1)
        if TARGET == 1:
            known = (ids >= 0) & (ids < num_classes)
            at_id = student + rows64 * (student_by_vec * VEC) + ids
            # An id out of range makes loss and gradient nan; an error would wait for the device.
            s_id = tl.load(at_id, counts & known, float("nan")).to(tl.float32)
            ce = kept * (log_sum - (s_id - s_max))
            if smoothing != 0:
                gap = tl.sum(tl.where(inside, s_max[:, None] - s, 0.0), 1)
                ce += spread * (gap + num_classes * log_sum)
            share = tl.where(cols[None, :] == ids[:, None], kept + spread, spread)
            mass = tl.where(known, 1.0, float("nan"))
        else:
            at = target + rows64[:, None] * (target_stride * VEC) + cols[None, :]
            share = tl.load(at, inside, 0.0).to(tl.float32) * kept + spread
            share = tl.where(inside, share, 0.0)
            mass = tl.sum(share, 1)
            costs = share * (log_sum[:, None] - (s - s_max[:, None]))
            ce = tl.sum(tl.where(share == 0, 0.0, costs), 1)
        difference1 = exp1 * (mass / sum1)[:, None] - share
        out += difference1 * (up * ((1 - alpha) * ce_scale))[:, None]
    if WITH_GRAD:
        g_at = grad + rows64[:, None] * (grad_by_vec * VEC) + cols[None, :]
        stored = (rows < num_rows)[:, None] & (cols < num_classes)[None, :]
        value = tl.where(counts[:, None], out, 0.0)
        tl.store(g_at, value.to(grad.dtype.element_ty), stored)
    if LOSS != 0:
        kd = tl.where(counts, factor * kd_factor * kd, 0.0)
        ce = tl.where(counts, factor * ce, 0.0)
        scales = (alpha, kd_scale, ce_scale)
        outputs = (loss_out, kd_out, ce_out)
        if LOSS == 2:
            loss_math.store_losses(kd, ce, scales, outputs, rows64, rows < num_rows)
        else:
            loss_math.finish(tl.sum(kd, 0), tl.sum(ce, 0), scales, outputs, partials, ticket)
