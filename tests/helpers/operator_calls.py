"""Make random calls of every C++ operator; compare them with the eager definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from draws import BF16, F16, F32, F64, MOST, Call, Draw, check
from kd_loss_calls import kd_backward, kd_forward, kd_one_pass
from torch import Tensor

from dmkd_fast.denoisers import kernels
from dmkd_fast.rng import philox
from dmkd_fast.runtime import native
from dmkd_fast.views.ops import DTYPES as VIEW_DTYPES
from dmkd_fast.views.ops import views
from dmkd_fast.views.reference import reference_boxes, reference_views

OPS = torch.ops.dmkd_fast


def view_inputs(draw: Draw) -> tuple[list[Tensor], dict]:
    count, channels, height, width = draw.sizes(4, low=1)
    height, width = min(height, 8192), min(width, 8192)
    if draw.random() < 0.7:
        channels = draw.choice((1, 3))
    pad = draw.choice((0, 0, 1, 5, 40))
    rows = draw.randrange(0, 6)
    most = max(1, int((draw.room / (channels * max(1, rows))) ** 0.5))
    size = draw.randint(1, max(1, round(min(most, 8192) * draw.random() ** 2)))
    image = channels * height * width
    gap = draw.choice((0, 0, 1, 7))
    offset = draw.choice((0, 1, 2, 3))
    memory = torch.randint(0, 256, (offset + count * (image + gap) - gap,), dtype=torch.uint8)
    strides = [image + gap, height * width, width, 1]
    for axis, n in enumerate((count, channels, height, width)):
        if n == 1 and draw.random() < 0.3:  # with one element, any stride is dense
            strides[axis] = draw.choice((1, 5, 1000))
    if draw.random() < 0.1:
        strides[0], count = 0, draw.randint(1, 5)
    slots = memory.as_strided((count, channels, height, width), strides, offset)
    room = torch.tensor([height, width]) + 2 * pad
    extent = (torch.rand(rows, 2) ** 2 * room).long() + 1
    extent = torch.minimum(extent, room)
    if size <= room.min():
        extent[::3] = size
    start = (torch.rand(rows, 2) * (room - extent + 1)).long() - pad
    boxes = draw.place(torch.cat((start, extent), 1).int())
    if boxes.numel() and not torch.equal(boxes, torch.cat((start, extent), 1).int()):
        boxes = torch.cat((start, extent), 1).int()  # repeated rows may lie outside
    inputs = [
        slots,
        draw.place(torch.randint(0, count, (rows,))),
        boxes,
        draw.place(torch.rand(rows) < 0.5),
    ]
    mean, std = draw.place(torch.rand(channels)), draw.place(torch.rand(channels) + 0.2)
    return inputs, {"size": size, "pad": pad, "mean": mean, "std": std}


def compare_views(inputs: list[Tensor], named: dict, dtype: torch.dtype) -> Callable:
    def compare(got: Tensor) -> None:
        expected = reference_views(*inputs, **named, dtype=F64)
        limit = 2e-6 / named["std"][:, None, None].double()
        check(got, expected, {F32: 0, F16: 2**-11, BF16: 2**-8}[dtype], limit)

    return compare


def call_views(draw: Draw) -> Call:
    inputs, named = view_inputs(draw)
    dtype = draw.choice(VIEW_DTYPES)
    return lambda: views(*inputs, **named, dtype=dtype), compare_views(inputs, named, dtype)


def call_views_out(draw: Draw) -> Call:
    inputs, named = view_inputs(draw)
    dtype = draw.choice(VIEW_DTYPES)
    size, channels, rows = named["size"], inputs[0].shape[1], len(inputs[1])
    offset = draw.choice((0, 1, 2, 3))
    memory = torch.full((offset + rows * size * size * channels,), 7, dtype=dtype)
    strides = (size * size * channels, 1, size * channels, channels)
    out = memory.as_strided((rows, channels, size, size), strides, offset)

    def compare(got: Tensor) -> None:
        compare_views(inputs, named, dtype)(got)
        assert (memory[:offset] == 7).all(), "wrote before out"

    return lambda: views(*inputs, **named, dtype=dtype, out=out), compare


def call_view_boxes(draw: Draw) -> Call:
    rows = draw.randrange(0, 300 if draw.room == MOST else 5000)
    ids = draw.place(torch.randint(0, 2**62, (rows,)))
    uses = draw.place(torch.randint(0, 2**24, (rows,)))
    height, width = draw.randint(1, 8192), draw.randint(1, draw.choice((40, 8192)))
    area = sorted(draw.randint(1, 2**24) for _ in range(2))
    shape = sorted(draw.randint(-(2**27), 2**27 - 1) // draw.choice((1, 50)) for _ in range(2))
    spare = draw.randint(1, height), draw.randint(1, width)
    arguments = (
        draw.randrange(2**63),
        ids,
        uses,
        height,
        width,
        draw.choice((0, 4, 8192)),
        *area,
        *shape,
        *spare,
        draw.choice((0, 1, 10)),
        draw.random(),
    )

    def compare(got: tuple[Tensor, Tensor]) -> None:
        for a, b in zip(got, reference_boxes(*arguments), strict=True):
            assert torch.equal(a, b)

    return lambda: OPS.view_boxes(*arguments), compare


def call_normal(draw: Draw) -> Call:
    rows, count = draw.sizes(2)
    ids = draw.place(torch.randint(0, 2**62, (rows,)))
    seed, step = draw.randrange(2**63), draw.randrange(2**24)

    def compare(got: Tensor) -> None:
        assert torch.equal(got, philox.normal_reference(seed, ids, step, count))

    return lambda: philox.normal(seed, ids, step=step, count=count), compare


def call_gelu(draw: Draw) -> Call:
    shape, dtype = draw.sizes(draw.randint(1, 4)), draw.choice((F32, BF16))
    x, bias = draw.floats(shape, dtype), draw.floats(shape[-1:], dtype)

    def compare(got: Tensor) -> None:
        expected = kernels._eager_gelu(x.double(), bias.double())
        check(got, expected, *((2e-6, 2e-6) if dtype == F32 else (2**-7, 2**-8)))

    return lambda: kernels.gelu_tanh(x, bias), compare


def call_residual_norm(draw: Draw) -> Call:
    (images, tokens, columns), dtype = draw.sizes(3), draw.choice((F32, BF16))
    x, branch = (draw.floats((images, tokens, columns), dtype, dense=True) for _ in range(2))
    rows = []
    for _ in range(3):  # dense columns, images any step apart
        step = columns + draw.choice((0, 0, 5)) if draw.random() < 0.9 else 0
        offset = draw.choice((0, 1, 3))
        memory = torch.randn(offset + max(0, (images - 1) * step + columns)).to(dtype)
        inner = 1 if columns > 1 or draw.random() < 0.7 else 9
        rows.append(memory.as_strided((images, columns), (step, inner), offset))
    gate, shift, scale = rows
    bias = draw.floats((columns,), dtype, dense=True) if draw.random() < 0.5 else None
    alone = draw.random() < 0.3

    def run() -> Any:
        if alone:
            return kernels.modulated_norm(x, shift, scale, eps=1e-5)
        return kernels.residual_norm(x, branch, bias, gate, shift, scale, eps=1e-5)

    def compare(got: Any) -> None:
        total = x if alone else got[0]
        if not x.numel():
            return
        normed = kernels._eager_norm(total.double(), shift.double(), scale.double(), 1e-5)
        # The rounding of the mean matters where all columns are almost equal.
        size = total.double().abs().amax(-1, keepdim=True)
        deviation = total.double().std(-1, correction=0, keepdim=True)
        noise_of = 4e-7 * size / (deviation**2 + 1e-5).sqrt() * (1 + scale.double()[:, None].abs())
        unit = 4e-6 if dtype == F32 else 2**-7
        noise_of = noise_of.clamp_max(1e3) * (2 if dtype == F32 else 20)
        check(got if alone else got[1], normed, unit, unit + noise_of)
        if not alone:
            added = branch.double() + (0 if bias is None else bias.double())
            check(got[0], x.double() + gate.double()[:, None] * added, unit, unit)

    return run, compare


def call_attention(draw: Draw) -> Call:
    kind = draw.random()
    if kind < 0.4:  # few tokens with wide heads, and many tokens
        tokens = draw.choice((1, 4, 16, 17, 64, 1024 if draw.room > MOST else 65))
        d = draw.choice((32, 64, 96, 98, 128, 256, 1152 if tokens < 64 else 2))
        images, heads = draw.randint(0, 2), 1
    else:
        images, tokens, heads, half = draw.sizes(4)
        tokens, d = min(tokens, 1024), 2 * min(half, 2048)
        # The eager definition computes all scores at once, so their number is limited too.
        images = min(images, max(1, draw.room // max(1, heads * tokens * (tokens + d))))
        heads = min(heads, max(1, draw.room // max(1, images * tokens * (tokens + d))))
    dtype = draw.choice((F32, BF16) if HAS_BFLOAT16 else (F32,))
    shape = (images, tokens, 3, heads, d)
    qkv = draw.floats(shape, dtype, dense=True)
    bias = draw.floats((3 * heads * d,), dtype, dense=True) if draw.random() < 0.5 else None

    def compare(got: Tensor) -> None:
        if qkv.numel():
            packed = qkv if bias is None else qkv + bias.view(qkv.shape[2:])  # rounded once
            expected = kernels._eager_attention(packed.double(), None)
            top = packed.double().abs().max().item()
            check(
                got,
                expected,
                *((1e-5, 1e-5 * max(1, top)) if dtype == F32 else (2**-6, 2**-6 * max(1, top))),
            )

    return lambda: OPS.short_attention(qkv, bias), compare


def has_bfloat16() -> bool:
    """Whether attention accepts bfloat16, which a limited instruction set does not."""
    try:
        OPS.short_attention(torch.zeros(1, 1, 3, 1, 2, dtype=BF16), None)
    except RuntimeError:
        return False
    return True


HAS_AVX512 = native.INSTRUCTION_SET == "avx512"
HAS_BFLOAT16 = HAS_AVX512 and has_bfloat16()
OPERATORS: dict[str, Callable[[Draw], Call]] = {
    "kd_loss_forward": kd_forward,
    "kd_loss_backward": kd_backward,
    "kd_loss_forward_backward": kd_one_pass,
    "views": call_views,
    "views_out": call_views_out,
    "view_boxes": call_view_boxes,
    "normal": call_normal,
    "gelu_tanh": call_gelu,
    "residual_norm": call_residual_norm,
} | ({"short_attention": call_attention} if HAS_AVX512 else {})
