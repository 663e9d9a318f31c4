"""Triton kernels of kd_loss: `tile` for short rows, `two_pass` and `columns` for long rows.

`loss/triton_launch.py` chooses tiles and launches the kernels. The arithmetic is that of the C++
kernel (csrc/scalar_types.h), in float32 for any input dtype. Row offsets are 64-bit. The program
that finishes last adds up the results of all programs in their order, so the same launch always
gives the same bits.
Shapes: B rows, C classes; a tile is ROWS x BLOCK.
"""

# mypy: disallow-untyped-defs=False
# Triton compiles these functions and passes its own types, so they are not annotated.

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _divergence(p, q, d, offset):
    """Return p * (expm1(-d) + d) and q - p, both exact as d -> 0; 0 * log 0 is 0.

    `offset` is the common part of all d of the row. If it is large, a small d is the difference of
    large numbers, and its rounding error exceeds that of q - p, which is then used directly.
    """
    series = tl.full(d.shape, -1.98756289e-4, tl.float32)
    series = tl.fma(series, d, 1.39819970e-3)
    series = tl.fma(series, d, -8.33345205e-3)
    series = tl.fma(series, d, 4.16657962e-2)
    series = tl.fma(series, d, -0.166666657)
    series = tl.fma(series, d, 0.5)
    pd = p * d
    near = pd * (d * series)
    far = q - p
    is_near = tl.abs(d) < 0.5
    term = tl.where(is_near, near, far + pd)
    limit = tl.where(tl.abs(offset) < 1, 0.5, 0.0)
    return tl.where(p == 0, q, term), tl.where(tl.abs(d) < limit, near - pd, far)


@triton.jit
def _log1p(x):
    """Return log(1 + x) for x > -1.

    A series is used near x = 0, where the absolute error of tl.log, 2e-7, is largest relative to
    the result.
    """
    z = x / (2 + x)
    z2 = z * z
    near = 2 * z * (1 + z2 * (0.33333333 + z2 * (0.2 + z2 * (0.14285714 + z2 * 0.11111111))))
    return tl.where(tl.abs(x) < 0.25, near, tl.log(1 + x))


@triton.jit
def _finish(kd, ce, partials, ticket, loss_out, kd_out, ce_out, alpha, kd_scale, ce_scale):
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
        kd_sum = tl.sum(kd_lanes, 0) * kd_scale
        ce_sum = tl.sum(ce_lanes, 0) * ce_scale
        tl.store(loss_out, _mix(kd_sum, ce_sum, alpha))
        tl.store(kd_out, kd_sum)
        tl.store(ce_out, ce_sum)
        tl.store(ticket, 0)


@triton.jit
def _mix(kd, ce, alpha):
    """Return alpha * kd + (1 - alpha) * ce, where a term with factor 0 adds 0 even if infinite."""
    return tl.where(alpha == 0, 0.0, alpha * kd) + tl.where(alpha == 1, 0.0, (1 - alpha) * ce)


@triton.jit
def tile(
    student,
    teacher,
    target,
    weight,
    upstream,
    grad,
    num_rows,
    classes_by_vec,
    student_by_vec,
    teacher_by_vec,
    target_stride,
    grad_by_vec,
    weight_stride,
    upstream_stride,
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
    WITH_LOSS: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    PER_ROW: tl.constexpr,
    TARGET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Process whole rows in registers, each read once.

    TARGET: 0 none, 1 class ids, 2 probabilities. Sizes and strides named `..._by_vec` are divided
    by VEC, as is `target_stride` for probabilities.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    num_classes = classes_by_vec * VEC
    rows64 = rows.to(tl.int64)
    factor = tl.full([ROWS], 1.0, tl.float32)
    if HAS_WEIGHT:
        factor = tl.load(weight + rows64 * weight_stride, rows < num_rows, 0.0)
    counts = (rows < num_rows) & (factor != 0)
    inside = counts[:, None] & (cols < num_classes)[None, :]
    s_at = student + rows64[:, None] * (student_by_vec * VEC) + cols[None, :]
    t_at = teacher + rows64[:, None] * (teacher_by_vec * VEC) + cols[None, :]
    s = tl.load(s_at, inside, -float("inf")).to(tl.float32)
    t = tl.load(t_at, inside, -float("inf")).to(tl.float32)
    s_max = tl.max(s, 1)
    t_max = tl.max(t, 1)
    scale2 = inverse_temperature * LOG2E
    s_exp = tl.exp2((s - s_max[:, None]) * scale2)
    t_exp = tl.exp2((t - t_max[:, None]) * scale2)
    s_sum = tl.sum(s_exp, 1)
    t_sum = tl.sum(t_exp, 1)
    # Sum the differences of the exponentials: the difference of the two sums would be less exact.
    ratio = tl.sum(s_exp - t_exp, 1) / t_sum
    ratio = tl.where(tl.abs(ratio) < 0.5, ratio, s_sum / t_sum - 1)
    offset = (s_max - t_max) * inverse_temperature + _log1p(ratio)
    q = s_exp * (1 / s_sum)[:, None]
    p = t_exp * (1 / t_sum)[:, None]
    d = tl.fma(
        t - s,
        tl.full(s.shape, inverse_temperature, tl.float32),
        tl.broadcast_to(offset[:, None], s.shape),
    )
    terms, differences = _divergence(p, q, d, offset[:, None])

    up = factor * grad_scale
    if HAS_UPSTREAM:
        up *= tl.load(upstream + rows64 * upstream_stride, rows < num_rows, 0.0)
    out = differences * (up * (alpha * kd_scale * inverse_temperature))[:, None]
    ce = tl.zeros([ROWS], tl.float32)
    if TARGET != 0:
        kept = 1 - smoothing
        spread = smoothing / num_classes
        exp1 = tl.exp2((s - s_max[:, None]) * LOG2E)
        sum1 = tl.sum(exp1, 1)
        log_sum = tl.log(sum1)
        if TARGET == 1:
            ids = tl.load(target + rows64 * target_stride, counts, 0)
            known = (ids >= 0) & (ids < num_classes)
            at_id = student + rows64 * (student_by_vec * VEC) + ids
            # An id out of range makes the loss nan; an error would have to wait for the device.
            s_id = tl.load(at_id, counts & known, float("nan")).to(tl.float32)
            ce = kept * (log_sum - (s_id - s_max))
            if smoothing != 0:
                gap = tl.sum(tl.where(inside, s_max[:, None] - s, 0.0), 1)
                ce += spread * (gap + num_classes * log_sum)
            share = tl.where(cols[None, :] == ids[:, None], kept + spread, spread)
            mass = tl.full([ROWS], 1.0, tl.float32)
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
    if WITH_LOSS:
        kd = tl.where(counts, factor * tl.sum(terms, 1), 0.0)
        ce = tl.where(counts, factor * ce, 0.0)
        if PER_ROW:
            tl.store(loss_out + rows64, _mix(kd * kd_scale, ce * ce_scale, alpha), rows < num_rows)
            tl.store(kd_out + rows64, kd * kd_scale, rows < num_rows)
            tl.store(ce_out + rows64, ce * ce_scale, rows < num_rows)
        else:
            _finish(
                tl.sum(kd, 0),
                tl.sum(ce, 0),
                partials,
                ticket,
                loss_out,
                kd_out,
                ce_out,
                alpha,
                kd_scale,
                ce_scale,
            )


@triton.jit
def two_pass(
    student,
    teacher,
    target,
    weight,
    upstream,
    grad,
    num_rows,
    classes_by_vec,
    student_by_vec,
    teacher_by_vec,
    target_stride,
    grad_by_vec,
    weight_stride,
    upstream_stride,
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
    WITH_LOSS: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    PER_ROW: tl.constexpr,
    TARGET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Process one long row per program: first maxima and sums, then loss and gradient.

    The second pass runs backward, because the blocks read last are still in the cache.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    num_classes = classes_by_vec * VEC
    s_row = student + row * (student_by_vec * VEC)
    t_row = teacher + row * (teacher_by_vec * VEC)
    factor = tl.full([], 1.0, tl.float32)
    if HAS_WEIGHT:
        factor = tl.load(weight + row * weight_stride)
    # The loops read nothing of a row that does not count.
    limit = tl.where(factor != 0, num_classes, 0)
    scale2 = inverse_temperature * LOG2E
    kept = 1 - smoothing
    spread = smoothing / num_classes
    s_max = -3.0e38  # finite, so that a block of -inf leaves exp2(-inf) = 0
    t_max = -3.0e38
    s_sum = 0.0
    t_sum = 0.0
    sum1 = 0.0
    mass = 0.0
    for start in range(0, limit, BLOCK):
        cols = start + lanes
        inside = cols < num_classes
        s = tl.load(s_row + cols, inside, -float("inf"), eviction_policy="evict_last")
        t = tl.load(t_row + cols, inside, -float("inf"), eviction_policy="evict_last")
        s = s.to(tl.float32)
        t = t.to(tl.float32)
        s_top = tl.maximum(s_max, tl.max(s, 0))
        t_top = tl.maximum(t_max, tl.max(t, 0))
        s_sum *= tl.exp2((s_max - s_top) * scale2)
        t_sum *= tl.exp2((t_max - t_top) * scale2)
        s_sum += tl.sum(tl.exp2((s - s_top) * scale2), 0)
        t_sum += tl.sum(tl.exp2((t - t_top) * scale2), 0)
        if TARGET != 0:
            sum1 *= tl.exp2((s_max - s_top) * LOG2E)
            sum1 += tl.sum(tl.exp2((s - s_top) * LOG2E), 0)
        if TARGET == 2:
            at = target + row * (target_stride * VEC) + cols
            share = tl.load(at, inside, 0.0).to(tl.float32) * kept + spread
            mass += tl.sum(tl.where(inside, share, 0.0), 0)
        s_max = s_top
        t_max = t_top

    offset = (s_max - t_max) * inverse_temperature + _log1p((s_sum - t_sum) / t_sum)
    up = factor * grad_scale
    if HAS_UPSTREAM:
        up *= tl.load(upstream + row * upstream_stride)
    kl_factor = up * (alpha * kd_scale * inverse_temperature)
    ce_factor = up * ((1 - alpha) * ce_scale)
    s_inverse = 1 / s_sum
    t_inverse = 1 / t_sum
    log_sum = tl.log(sum1)
    ce = 0.0
    ids = tl.full([], -1, tl.int64)
    if TARGET == 1:
        mass = 1.0
        ids = tl.load(target + row * target_stride)
        known = (ids >= 0) & (ids < num_classes) & (limit > 0)
        s_id = tl.load(s_row + ids, known, float("nan")).to(tl.float32)
        ce = kept * (log_sum - (s_id - s_max))
    if WITH_LOSS:
        # The kernel `columns` reads these in the backward pass.
        tl.store(stats + row * 7 + 0, s_max)
        tl.store(stats + row * 7 + 1, s_sum)
        tl.store(stats + row * 7 + 2, t_max)
        tl.store(stats + row * 7 + 3, t_sum)
        tl.store(stats + row * 7 + 4, offset)
        tl.store(stats + row * 7 + 5, sum1)
        tl.store(stats + row * 7 + 6, mass)
    kd_lanes = tl.zeros([BLOCK], tl.float32)
    ce_lanes = tl.zeros([BLOCK], tl.float32)
    blocks = tl.cdiv(num_classes, BLOCK)
    for block in range(0, blocks):
        cols = (blocks - 1 - block) * BLOCK + lanes
        inside = (cols < num_classes) & (limit > 0)
        s = tl.load(s_row + cols, inside, -float("inf"), eviction_policy="evict_first")
        t = tl.load(t_row + cols, inside, -float("inf"), eviction_policy="evict_first")
        s = s.to(tl.float32)
        t = t.to(tl.float32)
        q = tl.exp2((s - s_max) * scale2) * s_inverse
        p = tl.exp2((t - t_max) * scale2) * t_inverse
        d = tl.fma(
            t - s,
            tl.full(s.shape, inverse_temperature, tl.float32),
            tl.full(s.shape, offset, tl.float32),
        )
        terms, differences = _divergence(p, q, d, offset)
        kd_lanes += tl.where(inside, terms, 0.0)
        out = differences * kl_factor
        if TARGET != 0:
            if TARGET == 1:
                share = tl.where(cols == ids, kept + spread, spread)
                if smoothing != 0:
                    ce_lanes += tl.where(inside, spread * (log_sum - (s - s_max)), 0.0)
            else:
                at = target + row * (target_stride * VEC) + cols
                share = tl.load(at, inside, 0.0).to(tl.float32) * kept + spread
                costs = share * (log_sum - (s - s_max))
                ce_lanes += tl.where(inside & (share != 0), costs, 0.0)
            out += (tl.exp2((s - s_max) * LOG2E) * (mass / sum1) - share) * ce_factor
        if WITH_GRAD:
            value = tl.where(limit > 0, out, 0.0)
            at = grad + row * (grad_by_vec * VEC) + cols
            tl.store(at, value.to(grad.dtype.element_ty), cols < num_classes)
    if WITH_LOSS:
        kd = tl.where(limit > 0, factor * tl.sum(kd_lanes, 0), 0.0)
        ce = tl.where(limit > 0, factor * (ce + tl.sum(ce_lanes, 0)), 0.0)
        if PER_ROW:
            tl.store(loss_out + row, _mix(kd * kd_scale, ce * ce_scale, alpha))
            tl.store(kd_out + row, kd * kd_scale)
            tl.store(ce_out + row, ce * ce_scale)
        else:
            _finish(kd, ce, partials, ticket, loss_out, kd_out, ce_out, alpha, kd_scale, ce_scale)


@triton.jit
def columns(
    student,
    teacher,
    target,
    weight,
    upstream,
    grad,
    num_rows,
    classes_by_vec,
    student_by_vec,
    teacher_by_vec,
    target_stride,
    grad_by_vec,
    weight_stride,
    upstream_stride,
    inverse_temperature,
    alpha,
    kd_scale,
    ce_scale,
    smoothing,
    grad_scale,
    stats,
    TARGET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the gradient of one block of columns of one row from the `stats` of `two_pass`."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    num_classes = classes_by_vec * VEC
    factor = tl.full([], 1.0, tl.float32)
    if HAS_WEIGHT:
        factor = tl.load(weight + row * weight_stride)
    limit = tl.where(factor != 0, num_classes, 0)
    inside = (cols < num_classes) & (limit > 0)
    s_max = tl.load(stats + row * 7 + 0)
    s_sum = tl.load(stats + row * 7 + 1)
    t_max = tl.load(stats + row * 7 + 2)
    t_sum = tl.load(stats + row * 7 + 3)
    offset = tl.load(stats + row * 7 + 4)
    sum1 = tl.load(stats + row * 7 + 5)
    mass = tl.load(stats + row * 7 + 6)
    s_at = student + row * (student_by_vec * VEC) + cols
    t_at = teacher + row * (teacher_by_vec * VEC) + cols
    s = tl.load(s_at, inside, -float("inf")).to(tl.float32)
    t = tl.load(t_at, inside, -float("inf")).to(tl.float32)
    scale2 = inverse_temperature * LOG2E
    q = tl.exp2((s - s_max) * scale2) * (1 / s_sum)
    p = tl.exp2((t - t_max) * scale2) * (1 / t_sum)
    d = tl.fma(
        t - s,
        tl.full(s.shape, inverse_temperature, tl.float32),
        tl.full(s.shape, offset, tl.float32),
    )
    _, differences = _divergence(p, q, d, offset)
    up = factor * grad_scale
    if HAS_UPSTREAM:
        up *= tl.load(upstream + row * upstream_stride)
    out = differences * (up * (alpha * kd_scale * inverse_temperature))
    if TARGET != 0:
        kept = 1 - smoothing
        spread = smoothing / num_classes
        if TARGET == 1:
            ids = tl.load(target + row * target_stride)
            share = tl.where(cols == ids, kept + spread, spread)
        else:
            at = target + row * (target_stride * VEC) + cols
            share = tl.load(at, inside, 0.0).to(tl.float32) * kept + spread
        out += (tl.exp2((s - s_max) * LOG2E) * (mass / sum1) - share) * (
            up * ((1 - alpha) * ce_scale)
        )
    value = tl.where(limit > 0, out, 0.0)
    at = grad + row * (grad_by_vec * VEC) + cols
    tl.store(at, value.to(grad.dtype.element_ty), cols < num_classes)
