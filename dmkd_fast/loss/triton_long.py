"""Triton kernel `two_pass` of kd_loss for long rows.

TERMS are the numbers of `divergences.terms_of`. Row offsets are 64-bit. Shapes: B rows, C classes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dmkd_fast.loss import triton_math as loss_math


@triton.jit
def _seen(x, mean, unit, is_id, STANDARDIZE: tl.constexpr, IS_DKD: tl.constexpr):
    """Return the logits that the divergences see: standardized, for dkd without the target."""
    if STANDARDIZE:
        x = (x - mean) * unit
    return tl.where(is_id, -float("inf"), x) if IS_DKD else x


@triton.jit
def two_pass(
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
    BLOCK: tl.constexpr,
):
    """Process one long row per program, in sweeps over its blocks of columns.

    Arguments are those of `tile`. Maxima and sums come first (for standardized logits after means
    and deviations), then the loss, then the gradient, which forward KL has with the loss. The loss
    runs backward, because the blocks read last are still in the cache. A sum of two divergences may
    not contain dkd. The backward pass of forward KL takes maxima and sums from `stats`, and each of
    its programs one block.
    """
    ONE_SWEEP: tl.constexpr = len(TERMS) == 0 and not STANDARDIZE
    IS_DKD: tl.constexpr = len(TERMS) == 4 and TERMS[0] == loss_math.DKD
    HAS_CE: tl.constexpr = TARGET == 1 or TARGET == 2
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    num_classes = classes_by_vec * VEC
    s_row = student + row * (student_by_vec * VEC)
    t_row = teacher + row * (teacher_by_vec * VEC)
    factor = tl.full([], 1.0, tl.float32)
    if HAS_WEIGHT:
        factor = tl.load(weight + row)
    # The loops read nothing of a row that does not count.
    limit = tl.where(factor != 0, num_classes, 0)
    inverse = inverse_temperature
    kd_factor = 1.0
    if HAS_TEMPERATURES:
        inverse = 1 / tl.load(temperatures + 2 * row)
        kd_factor = tl.load(temperatures + 2 * row + 1)
    scale2 = inverse * loss_math.LOG2E
    kept = 1 - smoothing
    spread = smoothing / num_classes
    ids = tl.full([], -1, tl.int64)
    known = limit > 0
    if TARGET % 2 == 1:
        ids = tl.load(target + row * target_stride)
        known = (ids >= 0) & (ids < num_classes) & (limit > 0)
    s_mean = 0.0
    t_mean = 0.0
    s_unit = 1.0
    t_unit = 1.0
    s_deviation = 1.0
    if STANDARDIZE:
        for start in range(0, limit, BLOCK):
            inside = start + lanes < num_classes
            s_mean += tl.sum(tl.load(s_row + start + lanes, inside, 0.0).to(tl.float32), 0)
            t_mean += tl.sum(tl.load(t_row + start + lanes, inside, 0.0).to(tl.float32), 0)
        s_mean /= num_classes
        t_mean /= num_classes
        s_squares = 0.0
        t_squares = 0.0
        for start in range(0, limit, BLOCK):
            inside = start + lanes < num_classes
            s = tl.load(s_row + start + lanes, inside, 0.0).to(tl.float32) - s_mean
            t = tl.load(t_row + start + lanes, inside, 0.0).to(tl.float32) - t_mean
            s_squares += tl.sum(tl.where(inside, s * s, 0.0), 0)
            t_squares += tl.sum(tl.where(inside, t * t, 0.0), 0)
        s_deviation = tl.sqrt(s_squares / (num_classes - 1))
        s_unit = 1 / (s_deviation + 1e-7)
        t_unit = 1 / (tl.sqrt(t_squares / (num_classes - 1)) + 1e-7)
    top = -3.0e38  # finite, so that a block of -inf leaves exp2(-inf) = 0
    s_max = -3.0e38
    t_max = -3.0e38
    s_sum = 0.0
    t_sum = 0.0
    sum1 = 0.0
    mass = 0.0
    saved = stats + row * 7
    if ONE_SWEEP and LOSS == 0:
        s_max = tl.load(saved)
        s_sum = tl.load(saved + 1)
        t_max = tl.load(saved + 2)
        t_sum = tl.load(saved + 3)
        sum1 = tl.load(saved + 5)
        mass = tl.load(saved + 6)
        top = s_max
        ratio = tl.load(saved + 4)
    else:
        for start in range(0, limit, BLOCK):
            cols = start + lanes
            inside = cols < num_classes
            raw = tl.load(s_row + cols, inside, -float("inf"), eviction_policy="evict_last")
            t = tl.load(t_row + cols, inside, -float("inf"), eviction_policy="evict_last")
            raw = raw.to(tl.float32)
            s = _seen(raw, s_mean, s_unit, cols == ids, STANDARDIZE, IS_DKD)
            t = _seen(t.to(tl.float32), t_mean, t_unit, cols == ids, STANDARDIZE, IS_DKD)
            s_top = tl.maximum(s_max, tl.max(s, 0))
            t_top = tl.maximum(t_max, tl.max(t, 0))
            s_sum *= tl.exp2((s_max - s_top) * scale2)
            t_sum *= tl.exp2((t_max - t_top) * scale2)
            s_sum += tl.sum(tl.exp2((s - s_top) * scale2), 0)
            t_sum += tl.sum(tl.exp2((t - t_top) * scale2), 0)
            if HAS_CE:
                raw_top = tl.maximum(top, tl.max(raw, 0))
                sum1 *= tl.exp2((top - raw_top) * loss_math.LOG2E)
                sum1 += tl.sum(tl.exp2((raw - raw_top) * loss_math.LOG2E), 0)
                top = raw_top
            if TARGET == 2:
                at = target + row * (target_stride * VEC) + cols
                share = tl.load(at, inside, 0.0).to(tl.float32) * kept + spread
                mass += tl.sum(tl.where(inside, share, 0.0), 0)
            s_max = s_top
            t_max = t_top
        ratio = loss_math.log_of_sums(s_sum, t_sum, (s_sum - t_sum) / t_sum)
    up = factor * grad_scale
    if UPSTREAM != 0:
        up *= tl.load(upstream + row * (UPSTREAM == 2))
    kl_factor = up * (alpha * kd_scale * inverse)
    if HAS_TEMPERATURES:
        kl_factor *= kd_factor
    ce_factor = up * ((1 - alpha) * ce_scale)
    s_inverse = 1 / s_sum
    t_inverse = 1 / t_sum
    if IS_DKD:
        alone = (s_sum == 0) | (t_sum == 0)  # no class but the target
        s_inverse = tl.where(alone, 0.0, s_inverse)
        t_inverse = tl.where(alone, 0.0, t_inverse)
    log_sum = tl.log(sum1)
    kd = 0.0
    ce = 0.0
    change = 0.0
    if TARGET % 2 == 1:
        mass = tl.where(known, 1.0, float("nan"))  # as the loss of a class out of range
        s_id = tl.load(s_row + ids, known, float("nan")).to(tl.float32)
        if HAS_CE:
            ce = kept * (log_sum - (s_id - top))
        if IS_DKD:
            t_id = tl.load(t_row + ids, known, float("nan")).to(tl.float32)
            odds = ((t_id - t_mean) * t_unit - t_max) * inverse - tl.log(t_sum)
            excess = ((s_id - s_mean) * s_unit - s_max) * inverse - tl.log(t_sum) - ratio - odds
            own = ((s_id - s_mean) * s_unit - s_max) * inverse - tl.log(s_sum)
            kd, change = loss_math.target_against_rest(odds, excess, own)
            nothing = (s_id - s_id) + (t_id - t_id)  # as with one class: 0 or nan
            kd = tl.where(alone, nothing, kd)
            change = tl.where(alone, nothing, change)
            kd *= TERMS[1] * TERMS[2]
            change *= TERMS[1] * TERMS[2]
    if ONE_SWEEP and LOSS != 0:
        tl.store(saved, s_max)
        tl.store(saved + 1, s_sum)
        tl.store(saved + 2, t_max)
        tl.store(saved + 3, t_sum)
        tl.store(saved + 4, ratio)
        tl.store(saved + 5, sum1)
        tl.store(saved + 6, mass)
    total = 0.0  # sum of slopes; sums of slopes and of q times the standardized logits
    by_slope = 0.0
    by_q = 0.0
    chain = 0.0
    kd_lanes = tl.zeros([BLOCK], tl.float32)
    ce_lanes = tl.zeros([BLOCK], tl.float32)
    blocks = tl.cdiv(num_classes, BLOCK)
    begin = 0
    if ONE_SWEEP and LOSS == 0:
        begin = tl.program_id(1)
        blocks = begin + 1
    for sweep in tl.static_range(2 if WITH_GRAD and not ONE_SWEEP else 1):
        if sweep == 1 and STANDARDIZE:
            chain = (by_slope - total * by_q) / ((num_classes - 1) * s_deviation)
            chain = tl.where(s_deviation > 0, chain, 0.0)
        for block in range(begin, blocks):
            first = block if sweep == 1 else begin + blocks - 1 - block
            cols = first * BLOCK + lanes
            inside = (cols < num_classes) & (limit > 0)
            raw = tl.load(s_row + cols, inside, -float("inf"), eviction_policy="evict_first")
            t = tl.load(t_row + cols, inside, -float("inf"), eviction_policy="evict_first")
            raw = raw.to(tl.float32)
            s = _seen(raw, s_mean, s_unit, cols == ids, STANDARDIZE, IS_DKD)
            t = _seen(t.to(tl.float32), t_mean, t_unit, cols == ids, STANDARDIZE, IS_DKD)
            x = s - s_max
            y = t - t_max
            q = tl.exp2(x * scale2) * s_inverse
            p = tl.exp2(y * scale2) * t_inverse
            d, common = loss_math.log_ratio(s, t, s_max, t_max, ratio, inverse)
            if len(TERMS) == 0:
                terms, slopes = loss_math.divergence(p, q, d, common)
            elif IS_DKD:
                terms, slopes = loss_math.divergence(p, q, d, common)
                slopes = TERMS[1] * TERMS[3] * slopes - change * q
                slopes = tl.where(cols == ids, change, slopes)
                terms = tl.where(cols == ids, 0.0, TERMS[1] * TERMS[3] * terms)
            else:
                log2_q = x * scale2 - tl.log2(s_sum)
                log2_p = y * scale2 - tl.log2(t_sum)
                terms, slopes = loss_math.weighted_parts(TERMS, p, q, d, log2_p, log2_q, common)
            out = slopes
            if not ONE_SWEEP:
                slopes = tl.where(inside, slopes, 0.0)
                if sweep == 0:
                    total += tl.sum(slopes, 0)
                out = slopes - q * total
                if STANDARDIZE:
                    z = tl.where(inside, (raw - s_mean) * s_unit, 0.0)
                    if sweep == 0:
                        by_slope += tl.sum(slopes * z, 0)
                        by_q += tl.sum(tl.where(inside, q * z, 0.0), 0)
                    out = out * s_unit - z * chain
            out *= kl_factor
            if sweep == 0:
                kd_lanes += tl.where(inside, terms, 0.0)
            if HAS_CE:
                if TARGET == 1:
                    share = tl.where(cols == ids, kept + spread, spread)
                    if smoothing != 0 and sweep == 0:
                        ce_lanes += tl.where(inside, spread * (log_sum - (raw - top)), 0.0)
                else:
                    at = target + row * (target_stride * VEC) + cols
                    share = tl.load(at, inside, 0.0).to(tl.float32) * kept + spread
                    costs = share * (log_sum - (raw - top))
                    if sweep == 0:
                        ce_lanes += tl.where(inside & (share != 0), costs, 0.0)
                out += (tl.exp2((raw - top) * loss_math.LOG2E) * (mass / sum1) - share) * ce_factor
            if WITH_GRAD and (ONE_SWEEP or sweep == 1):
                value = tl.where(limit > 0, out, 0.0)
                at = grad + row * (grad_by_vec * VEC) + cols
                tl.store(at, value.to(grad.dtype.element_ty), cols < num_classes)
    if LOSS != 0:
        kd = tl.where(limit > 0, factor * kd_factor * (kd + tl.sum(kd_lanes, 0)), 0.0)
        ce = tl.where(limit > 0, factor * (ce + tl.sum(ce_lanes, 0)), 0.0)
        scales = (alpha, kd_scale, ce_scale)
        outputs = (loss_out, kd_out, ce_out)
        if LOSS == 2:
            loss_math.store_losses(kd, ce, scales, outputs, row, True)
        else:
            loss_math.finish(kd, ce, scales, outputs, partials, ticket)
