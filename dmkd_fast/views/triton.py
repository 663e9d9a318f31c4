"""Triton kernels that render views and draw crops and flips on CUDA.

`views/ops.py` imports this module when the first CUDA tensor arrives. The kernels reproduce
`views/reference.py`: weights are ratios of integers, and the final arithmetic is rounded in the
same way, so a crop of the view's size has the same bits as on a CPU. Nothing waits for the device:
a view whose index or box is out of range reads nothing and is NaN.

Shapes: B rows, c channels, H x W pixels of a slot, S side of a view.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmkd_fast.rng import philox
from dmkd_fast.rng.triton import MOST
from dmkd_fast.runtime.operators import Launch
from dmkd_fast.views.reference import EXP2 as EXP2_
from dmkd_fast.views.reference import new_views

NUM_WARPS = 4
BYTES = 16  # bytes of a view per thread: one store of 128 bits
ROWS = 128  # crops per program of `boxes_kernel`

STREAM = tl.constexpr(philox.STREAM_VIEWS << 24)
EXP0, EXP1, EXP2, EXP3, EXP4, EXP5 = map(tl.constexpr, EXP2_)


@triton.jit
def _first(place, length, support, SIZE: tl.constexpr):
    """Return the first pixel of a crop that pixel `place` of the view depends on."""
    low = (2 * place + 1) * length - 2 * support - SIZE
    return tl.where(low < 0, 0, low // (2 * SIZE) + 1)


@triton.jit
def _weight(pixel, place, length, support, SIZE: tl.constexpr):
    """Return the weight of a crop's pixel in pixel `place` of the view, as an integer."""
    gap = tl.abs((2 * pixel + 1) * SIZE - (2 * place + 1) * length)
    return tl.where(pixel < length, tl.maximum(2 * support - gap, 0), 0)


@triton.jit
def render_kernel(
    out,
    slots,
    indices,
    boxes,
    flips,
    mean,
    std,
    num_slots,
    slot_stride,
    height,
    width,
    pad,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Render BLOCK numbers of one view per program.

    Grid: (B, ...), whose second and third axis together count the sections of a view.
    """
    row = tl.program_id(0).to(tl.int64)
    section = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    element = section * BLOCK + tl.arange(0, BLOCK)
    channel, pixel = element % CHANNELS, element // CHANNELS
    i, j = pixel // SIZE, pixel % SIZE
    j = tl.where(tl.load(flips + row) != 0, SIZE - 1 - j, j)

    index = tl.load(indices + row)
    top, left = tl.load(boxes + 4 * row), tl.load(boxes + 4 * row + 1)
    rows, columns = tl.load(boxes + 4 * row + 2), tl.load(boxes + 4 * row + 3)
    is_valid = (index >= 0) & (index < num_slots) & (rows > 0) & (columns > 0)
    is_valid &= (top >= -pad) & (top <= height + pad - rows)
    is_valid &= (left >= -pad) & (left <= width + pad - columns)

    tall = tl.where(20 * rows > 23 * SIZE, rows, SIZE)
    wide = tl.where(20 * columns > 23 * SIZE, columns, SIZE)
    taps_down = tl.where(is_valid, tl.where(tall == SIZE, 2, 2 * rows // SIZE + 2), 0)
    taps_right = tl.where(is_valid, tl.where(wide == SIZE, 2, 2 * columns // SIZE + 2), 0)
    first_y, first_x = _first(i, rows, tall, SIZE), _first(j, columns, wide, SIZE)
    total_y = tl.zeros((BLOCK,), tl.int32)
    for k in range(taps_down):
        total_y += _weight(first_y + k, i, rows, tall, SIZE)
    total_x = tl.zeros((BLOCK,), tl.int32)
    for k in range(taps_right):
        total_x += _weight(first_x + k, j, columns, wide, SIZE)
    total_y, total_x = total_y.to(tl.float32), total_x.to(tl.float32)

    base = slots + index * slot_stride
    plane = channel * height * width
    inside = element < SIZE * SIZE * CHANNELS
    value = tl.zeros((BLOCK,), tl.float32)
    for k in range(taps_down):
        down = _weight(first_y + k, i, rows, tall, SIZE)
        weight_y = tl.div_rn(down.to(tl.float32), total_y)
        y = top + first_y + k
        is_lit = inside & (down > 0) & (y >= 0) & (y < height)
        line = tl.zeros((BLOCK,), tl.float32)
        for m in range(taps_right):
            across = _weight(first_x + m, j, columns, wide, SIZE)
            x = left + first_x + m
            read = is_lit & (across > 0) & (x >= 0) & (x < width)
            byte = tl.load(base + (plane + y * width + x), mask=read, other=0)
            line += tl.div_rn(across.to(tl.float32), total_x) * byte.to(tl.float32)
        value += weight_y * line
    value = tl.div_rn(value, 255.0) - tl.load(mean + channel)
    value = tl.div_rn(value, tl.load(std + channel))
    value = tl.where(is_valid, value, float("nan"))
    start = out + row * (SIZE * SIZE * CHANNELS)
    tl.store(start + element, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _side(root, power):
    fraction = power & 0xFFFFFF
    factor = EXP4 + ((EXP5 * fraction) >> 24)
    factor = EXP3 + ((factor * fraction) >> 24)
    factor = EXP2 + ((factor * fraction) >> 24)
    factor = EXP1 + ((factor * fraction) >> 24)
    factor = EXP0 + ((factor * fraction) >> 24)
    factor = factor << ((power >> 24) + 8)
    return tl.floor(root * factor.to(tl.float64) * 8.881784197001252e-16 + 0.5).to(
        tl.int64
    )  # 2^-50


@triton.jit
def _top(word):
    return (word >> 8).to(tl.int64)


@triton.jit
def _uniform(word):
    return ((word >> 8).to(tl.int32).to(tl.float32) + 0.5) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def _position(uniform, room, anywhere):
    place = tl.floor(uniform * (room + 1).to(tl.float32)).to(tl.int64)
    return tl.where(anywhere, tl.minimum(place, room), room // 2)


@triton.jit
def boxes_kernel(
    boxes,
    flips,
    ids,
    uses,
    count,
    seed,
    height,
    width,
    pad,
    area_low,
    area_high,
    shape_low,
    shape_high,
    spare_height,
    spare_width,
    tries,
    flip,
    ROWS: tl.constexpr,
):
    """Draw the crops and flips of ROWS views per program. Grid: (ceil(B / ROWS),)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    id = tl.load(ids + row, mask=inside, other=0).to(tl.uint64)
    use = tl.load(uses + row, mask=inside, other=0).to(tl.uint32) | STREAM
    low, high = id.to(tl.uint32), (id >> 32).to(tl.uint32)
    zero = tl.zeros((ROWS,), tl.uint32)
    _, _, w2, w3 = tl.philox(seed, low, high, use, zero)
    w4, _, _, _ = tl.philox(seed, low, high, use, zero + 1)
    vertical, horizontal, mirror = _uniform(w2), _uniform(w3), _uniform(w4)
    rows = tl.zeros((ROWS,), tl.int64) + spare_height
    columns = tl.zeros((ROWS,), tl.int64) + spare_width
    found = zero != 0
    for i in range(tries):
        block = tl.where(i == 0, 0, 1 + i // 2)
        v0, v1, v2, v3 = tl.philox(seed, low, high, use, zero + block.to(tl.uint32))
        first, second = tl.where(i % 2 == 1, v2, v0), tl.where(i % 2 == 1, v3, v1)
        area = area_low + (((area_high - area_low) * _top(first)) >> 24)
        shape = shape_low + (((shape_high - shape_low) * _top(second)) >> 24)
        root = tl.sqrt((area * height * width).to(tl.float64))
        new_rows, new_columns = _side(root, -shape), _side(root, shape)
        fits = (new_rows > 0) & (new_rows <= height) & (new_columns > 0) & (new_columns <= width)
        rows = tl.where(fits & ~found, new_rows, rows)
        columns = tl.where(fits & ~found, new_columns, columns)
        found |= fits
    anywhere = found | (tries == 0)
    top = _position(vertical, height + 2 * pad - rows, anywhere) - pad
    left = _position(horizontal, width + 2 * pad - columns, anywhere) - pad
    tl.store(boxes + 4 * row, top.to(tl.int32), mask=inside)
    tl.store(boxes + 4 * row + 1, left.to(tl.int32), mask=inside)
    tl.store(boxes + 4 * row + 2, rows.to(tl.int32), mask=inside)
    tl.store(boxes + 4 * row + 3, columns.to(tl.int32), mask=inside)
    tl.store(flips + row, (mirror < flip).to(tl.uint8), mask=inside)


def views(*inputs: Any) -> Tensor:
    """Run the operator `views`; arguments as in `views/ops.py`."""
    out = new_views(*inputs)
    *tensors, _, pad, _ = inputs
    views_out(out, *tensors, pad)
    return out


def views_out(out: Tensor, *inputs: Any) -> None:
    """Run the operator `views_out`, which writes into `out`; arguments as in `views/ops.py`."""
    if out.numel():
        plan_views(out, *inputs).run()


def view_boxes(seed: int, ids: Tensor, uses: Tensor, *recipe: Any) -> tuple[Tensor, Tensor]:
    """Run the operator `view_boxes`; arguments as in `reference_boxes`."""
    boxes = ids.new_empty((len(ids), 4), dtype=torch.int32)
    flips = ids.new_empty((len(ids),), dtype=torch.bool)
    if len(ids):
        plan_boxes(boxes, flips, seed, ids, uses, *recipe).run()
    return boxes, flips


def plan_views(
    out: Tensor,
    slots: Tensor,
    indices: Tensor,
    boxes: Tensor,
    flips: Tensor,
    mean: Tensor,
    std: Tensor,
    pad: int,
) -> Launch:
    """Prepare the kernel launch that renders views into `out`."""
    count, channels, size, _ = out.shape
    height, width = slots.shape[2:]
    numbers = channels * size * size
    block = 32 * NUM_WARPS * BYTES // out.element_size()
    arguments = (
        out,
        slots,
        indices.contiguous(),
        boxes.contiguous(),
        flips.contiguous().view(torch.uint8),
        mean.contiguous(),
        std.contiguous(),
        len(slots),
        slots.stride(0),
        height,
        width,
        pad,
    )
    constants = {"SIZE": size, "CHANNELS": channels, "BLOCK": block}
    sections = triton.cdiv(numbers, block)
    grid = (count, min(sections, MOST), triton.cdiv(sections, MOST))
    return Launch(render_kernel, arguments, constants, grid, NUM_WARPS)


def plan_boxes(
    boxes: Tensor, flips: Tensor, seed: int, ids: Tensor, uses: Tensor, *recipe: Any
) -> Launch:
    """Prepare the kernel launch that draws crops and flips into `boxes` and `flips`."""
    arguments = (
        boxes,
        flips.view(torch.uint8),
        ids.contiguous(),
        uses.contiguous(),
        len(ids),
        seed,
        *recipe,
    )
    return Launch(
        boxes_kernel, arguments, {"ROWS": ROWS}, (triton.cdiv(len(ids), ROWS),), NUM_WARPS
    )
