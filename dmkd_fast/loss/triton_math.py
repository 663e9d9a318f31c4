"""Arithmetic of the loss's Triton kernels: divergences of one class, sums over programs.

The same as csrc/kd_loss_divergences.h and csrc/scalar_types.h, in float32 for any input dtype. The
program that finishes last adds up the results of all programs in their order, so the same launch
always gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
DKD = tl.constexpr(5)  # its position in divergences.NAMES


@triton.jit
def _excess_series(d):
    """Return (exp(-d) - 1 + d) / d^2 where |d| < 0.5."""
    series = tl.full(d.shape, -1.98756289e-4, tl.float32)
    series = tl.fma(series, d, 1.39819970e-3)
    series = tl.fma(series, d, -8.33345205e-3)
    series = tl.fma(series, d, 4.16657962e-2)
    series = tl.fma(series, d, -0.166666657)
    return tl.fma(series, d, 0.5)


@triton.jit
def divergence(p, q, d, offset):
    """Return p * (expm1(-d) + d) and q - p, both exact as d -> 0; 0 * log 0 is 0.

    `offset` is the common part of all d of the row. If it is large, a small d is the difference of
    large numbers, and its rounding error exceeds that of q - p, which is then used directly.
    """
    pd = p * d
    near = pd * (d * _excess_series(d))
    far = q - p
    is_near = tl.abs(d) < 0.5
    term = tl.where(is_near, near, far + pd)
    limit = tl.where(tl.abs(offset) < 1, 0.5, 0.0)
    return tl.where(p == 0, q, term), tl.where(tl.abs(d) < limit, near - pd, far)


@triton.jit
def log_ratio(s, t, s_top, t_top, ratio, inverse):
    """Return log p - log q, and the common part of it in a row.

    Near the teacher t - s is exact. Elsewhere each row's own maximum is subtracted first.
    """
    offset = (s_top - t_top) * inverse + ratio
    is_near = tl.abs(offset) < 1
    gap = (t - tl.where(is_near, 0.0, t_top)) - (s - tl.where(is_near, 0.0, s_top))
    common = tl.where(is_near, offset, ratio)
    d = tl.fma(gap, tl.broadcast_to(inverse, gap.shape), tl.broadcast_to(common, gap.shape))
    return d, common


@triton.jit
def class_part(
    KIND: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, p, q, d, log2_p, log2_q, ratio
):
    """Return the classes' terms of a divergence D and its slopes q * dD/dq.

    KIND is the position in `divergences.NAMES`; FIRST and SECOND are its parameters.
    """
    if KIND == 0:
        terms, slopes = divergence(p, q, d, ratio)
    elif KIND == 1:
        terms, _ = divergence(q, p, -d, ratio)
        slopes = tl.where((q == 0) | (tl.abs(d) == float("inf")), 0.0, -q * d)
    elif KIND == 2:
        _, change = divergence(p, q, d, ratio)
        # With m = beta p + (1 - beta) q: log(m / q) and log(m / p) by the smaller ratio of p and q.
        above = d > 0
        larger = tl.maximum(tl.maximum(p, q), 1.2e-38)
        other = tl.where(above, 1 - FIRST, FIRST)
        fall = -other * (tl.abs(change) / larger)
        whole = tl.where(above, FIRST, 1 - FIRST) + other * (tl.minimum(p, q) / larger)
        log_m = _log_near_1(fall, tl.where(fall < -0.5, whole, 1 + fall))
        by_q = tl.where(above, log_m + d, log_m)
        by_p = tl.where(above, log_m, log_m - d)
        p_share = FIRST * p
        q_share = (1 - FIRST) * q
        near = p_share * (by_p * (by_p * _excess_series(-by_p)))
        near += q_share * (by_q * (by_q * _excess_series(-by_q)))
        slopes = tl.where(q == 0, 0.0, -q_share * by_q)
        terms = tl.where(tl.abs(d) < 0.5, near, tl.where(p == 0, 0.0, -p_share * by_p) + slopes)
    elif KIND == 3:
        both = FIRST + SECOND
        p_power = tl.exp2(both * log2_p)
        q_power = tl.exp2(both * log2_q)
        mixed = tl.exp2(FIRST * log2_p + SECOND * log2_q)
        is_near = tl.abs(d) * both < 0.5
        x = both * d
        y = SECOND * d
        z = FIRST * d
        near = SECOND / both * (x * (x * _excess_series(x))) - y * (y * _excess_series(y))
        far = FIRST / both * p_power + SECOND / both * q_power - mixed
        terms = tl.where(is_near, p_power * near, far) / (FIRST * SECOND)
        near = -q_power * (z + z * (z * _excess_series(-z)))  # expm1(z) = z + excess(-z)
        slopes = tl.where(is_near, near, q_power - mixed) / FIRST
    else:
        tl.static_assert(KIND == 4)
        _, change = divergence(p, q, d, ratio)
        terms = 0.5 * tl.abs(change)
        slopes = 0.5 * q * tl.where(change > 0, 1.0, tl.where(change < 0, -1.0, 0.0))
    return terms, slopes


@triton.jit
def weighted_parts(TERMS: tl.constexpr, p, q, d, log2_p, log2_q, ratio):
    """Return terms and slopes of a sum of divergences, without that of dkd."""
    terms = tl.zeros(d.shape, tl.float32)
    slopes = tl.zeros(d.shape, tl.float32)
    for k in tl.static_range(len(TERMS) // 4):
        if TERMS[4 * k] != DKD:
            term, slope = class_part(
                TERMS[4 * k], TERMS[4 * k + 2], TERMS[4 * k + 3], p, q, d, log2_p, log2_q, ratio
            )
            terms += TERMS[4 * k + 1] * term
            slopes += TERMS[4 * k + 1] * slope
    return terms, slopes


@triton.jit
def target_against_rest(odds, excess, student):
    """Return KL between teacher and student on {target, rest}, and q - p of the target.

    `odds`: log odds of the target for the teacher; `excess`: by how much the student's exceed them;
    `student`: the student's, which is read where the teacher's are infinite.
    """
    is_infinite = tl.abs(odds) == float("inf")
    student = tl.where(is_infinite, student, odds + excess)
    p = 1 / (1 + tl.exp(-odds))
    p_rest = 1 / (1 + tl.exp(odds))
    q = 1 / (1 + tl.exp(-student))
    q_rest = 1 / (1 + tl.exp(student))
    size = tl.abs(excess)
    fall = tl.where(size < 0.5, size - size * (size * _excess_series(size)), 1 - tl.exp(-size))
    change = tl.where(excess > 0, fall * q * p_rest, -fall * p * q_rest)
    change = tl.where(is_infinite, tl.where(odds > 0, -q_rest, q), change)
    loss = tl.zeros(odds.shape, tl.float32)
    for sign in tl.static_range(-1, 2, 2):
        share = p if sign > 0 else p_rest
        ratio = sign * change / tl.maximum(share, 1.2e-38)
        far = _log_sigmoid(sign * odds) - _log_sigmoid(sign * student)
        d = tl.where(tl.abs(ratio) < 0.25, -log1p(ratio), far)
        term, _ = divergence(share, share + sign * change, d, d)
        loss += term
    return loss, change


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def log_of_sums(s_sum, t_sum, gap):
    """Return log(s_sum / t_sum), with gap = s_sum / t_sum - 1; exact as the sums meet."""
    return _log_near_1(gap, tl.where(tl.abs(gap) < 0.5, 1 + gap, s_sum / t_sum))


@triton.jit
def log1p(x):
    """Return log(1 + x) for x > -1; as x -> -1, 1 + x has no more digits than x."""
    return _log_near_1(x, 1 + x)


@triton.jit
def _log_near_1(x, whole):
    """Return log(whole), with x = whole - 1 > -1.

    A series is used near x = 0, where the absolute error of tl.log, 2e-7, is largest relative to
    the result.
    """
    z = x / (2 + x)
    z2 = z * z
    near = 2 * z * (1 + z2 * (0.33333333 + z2 * (0.2 + z2 * (0.14285714 + z2 * 0.11111111))))
    return tl.where(tl.abs(x) < 0.25, near, tl.log(whole))


@triton.jit
def finish(kd, ce, scales, outputs, partials, ticket):
    """Store the sums of this program; the last program to do so adds up all of them, in order."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(partials + 2 * pid, kd)
    tl.store(partials + 2 * pid + 1, ce)
    tl.debug_barrier()
    done = tl.atomic_add(ticket, 1, sem="acq_rel")
    if done == programs - 1:
        kd_lanes = tl.zeros([256], tl.float32)
        ce_lanes = tl.zeros([256], tl.float32)
        for start in range(0, programs, 256):
            index = start + tl.arange(0, 256)
            inside = index < programs
            # Bypass the L1 cache, which does not see the stores of other programs.
            kd_lanes += tl.load(partials + 2 * index, inside, 0.0, cache_modifier=".cg")
            ce_lanes += tl.load(partials + 2 * index + 1, inside, 0.0, cache_modifier=".cg")
        store_losses(tl.sum(kd_lanes, 0), tl.sum(ce_lanes, 0), scales, outputs, 0, True)
        tl.store(ticket, 0)


@triton.jit
def store_losses(kd, ce, scales, outputs, rows, inside):
    """Store both parts and alpha * kd + (1 - alpha) * ce, where factor 0 drops an infinite one."""
    alpha, kd_scale, ce_scale = scales
    kd *= kd_scale
    ce *= ce_scale
    loss = tl.where(alpha == 0, 0.0, alpha * kd) + tl.where(alpha == 1, 0.0, (1 - alpha) * ce)
    tl.store(outputs[0] + rows, loss, inside)
    tl.store(outputs[1] + rows, kd, inside)
    tl.store(outputs[2] + rows, ce, inside)
