"""PyTorch operators that render views of slots, and the checked function `views`.

A CPU runs C++ (csrc/views_cpu.cpp, csrc/view_boxes_cpu.cpp). CUDA runs Triton (`views/triton.py`),
imported on first use. Other devices, and installations without these kernels, run the eager
definitions in `views/reference.py`.

Shapes: N slots, B rows, c channels, H x W pixels of a slot, S side of a view.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dmkd_fast.runtime.errors import invalid
from dmkd_fast.runtime.operators import check_own_memory, cuda_kernel, warn_if_eager
from dmkd_fast.views.reference import new_views, reference_boxes, reference_views

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_SIDE = 8192  # so that 32-bit products of two sides do not overflow in the CUDA kernel

_NAMES = ("slots", "indices", "boxes", "flips", "mean", "std")
_INPUTS = ", ".join(f"Tensor {name}" for name in _NAMES)
_LIBRARY = torch.library.Library("dmkd_fast", "FRAGMENT")
_LIBRARY.define(f"views({_INPUTS}, SymInt size, int pad, ScalarType dtype) -> Tensor")
_LIBRARY.define(f"views_out(Tensor(a!) out, {_INPUTS}, int pad) -> ()")
_LIBRARY.define(
    "view_boxes(int seed, Tensor ids, Tensor uses, int height, int width, int pad, int area_low, "
    "int area_high, int shape_low, int shape_high, int spare_height, int spare_width, int tries, "
    "float flip) -> (Tensor boxes, Tensor flips)"
)


def views(
    slots: Tensor,
    indices: Tensor,
    boxes: Tensor,
    flips: Tensor,
    *,
    size: int,
    pad: int,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Gather, crop, resize (bilinear, antialiased), flip, normalize and cast in one pass.

    Equals `reference_views`: crop, then torchvision's `resize`. Each axis is antialiased only where
    the crop shrinks by a factor of more than 1.15.

    Args:
        slots: (N, c, H, W) uint8 images, each slot dense.
        indices: (B,) int64 slot numbers.
        boxes: (B, 4) int32: top, left, height, width in pixels. A box may reach up to `pad` pixels
            beyond the image, where all is black.
        flips: (B,) bool, whether to flip horizontally.
        size: Side of a view, in pixels.
        pad: Width of the black border, in pixels.
        mean, std: (c,) float32, of pixel values in [0, 1].
        dtype: Dtype of the views: float32, float16 or bfloat16.
        out: (B, c, size, size) channels_last of `dtype`, to write the result into. It must not
            share memory with an input.

    Returns:
        (B, c, size, size) of `dtype`, channels_last.

    Raises:
        TypeError, UserError: The dtype, shape, device or layout of a tensor is wrong.
        IndexError: An index or a box is out of range (a RuntimeError under torch.compile). On CUDA
            an error would mean waiting for the device; such a view reads nothing and is NaN.
    """
    inputs = (slots, indices, boxes, flips, mean, std)
    _check(inputs, size, pad)
    if dtype not in DTYPES:
        raise TypeError(f"dtype: got {dtype}, expected float32, float16 or bfloat16")
    if out is None:
        result: Tensor = _naming_bad_rows(torch.ops.dmkd_fast.views, *inputs, size, pad, dtype)
        return result
    shape = (len(indices), slots.shape[1], size, size)
    if out.shape != shape or out.dtype != dtype or out.device != slots.device:
        got = f"{tuple(out.shape)} {out.dtype} on {out.device}"
        raise invalid("out", got, f"{shape} {dtype} on {slots.device}")
    if not out.is_contiguous(memory_format=torch.channels_last):
        raise invalid("out", "another layout", "memory_format=torch.channels_last")
    check_own_memory(out, dict(zip(_NAMES, inputs, strict=True)))
    _naming_bad_rows(torch.ops.dmkd_fast.views_out, out, *inputs, pad)
    return out


def _naming_bad_rows(operator: Callable[..., Any], *arguments: Any) -> Any:
    """Call an operator, and turn its RuntimeError about a bad row into an IndexError of one line.

    C++ operators can only throw RuntimeError.
    """
    if torch.compiler.is_compiling():
        return operator(*arguments)
    try:
        return operator(*arguments)
    except RuntimeError as error:
        found = re.search(r"((?:indices|boxes): got .* in row .*, expected .*)", str(error))
        if found is None:
            raise
        raise IndexError(found[1]) from None


def _check(inputs: Sequence[Tensor], size: int, pad: int) -> None:
    slots, indices, *_ = inputs
    if slots.ndim != 4 or 0 in slots.shape[1:]:
        raise invalid("slots", f"shape {tuple(slots.shape)}", "(N, c, H, W)")
    if not slots[0:1].is_contiguous():
        got = f"strides {slots.stride()}"
        raise invalid("slots", got, "dense images", "call .contiguous()")
    rows, channels = indices.shape[0] if indices.ndim == 1 else "B", slots.shape[1]
    forms = (
        (torch.uint8, slots.shape),
        (torch.int64, (rows,)),
        (torch.int32, (rows, 4)),
        (torch.bool, (rows,)),
        (torch.float32, (channels,)),
        (torch.float32, (channels,)),
    )
    for name, tensor, (dtype, shape) in zip(_NAMES, inputs, forms, strict=True):
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, expected {dtype}")
        if tensor.shape != shape:
            expected = str(tuple(shape)).replace("'", "")
            raise invalid(name, f"shape {tuple(tensor.shape)}", expected)
        if tensor.device != slots.device:
            raise invalid(name, tensor.device, f"{slots.device}, as slots")
    if not 1 <= size <= MAX_SIDE or size * size * slots.shape[1] >= 2**31:
        raise invalid("size", size, f"1 to {MAX_SIDE} and less than 2**31 numbers in a view")
    if max(slots.shape[2:]) > MAX_SIDE or slots.shape[1:].numel() >= 2**31:
        got = f"images of {tuple(slots.shape[1:])}"
        raise invalid("slots", got, f"sides of at most {MAX_SIDE} and less than 2**31 bytes")
    if not 0 <= pad <= MAX_SIDE:
        raise invalid("pad", pad, f"0 to {MAX_SIDE}")


def _eager_views(slots: Tensor, *rest: Any) -> Tensor:
    warn_if_eager(slots)
    if slots.device.type == "cpu":
        indices, boxes, *_, pad, _ = rest
        raise_for_bad_rows(slots, indices, boxes, pad)
    return reference_views(slots, *rest)


def raise_for_bad_rows(slots: Tensor, indices: Tensor, boxes: Tensor, pad: int) -> None:
    """Raise the error of the C++ kernel for a bad index or box, for the eager definition."""
    height, width = slots.shape[2:]
    bad = (indices < 0) | (indices >= len(slots))
    if bad.any():
        row = int(bad.int().argmax())
        raise IndexError(
            f"indices: got {int(indices[row])} in row {row}, expected 0 to {len(slots) - 1}"
        )
    starts, extents = boxes.long().split(2, dim=1)
    limits = torch.tensor([height + pad, width + pad])
    bad = ((starts < -pad) | (extents < 1) | (starts + extents > limits)).any(1)
    if bad.any():
        row = int(bad.int().argmax())
        top, left, rows, columns = boxes[row].tolist()
        raise IndexError(
            f"boxes: got top {top}, left {left}, height {rows}, width {columns} in row {row}, "
            f"expected it to lie in the {height} x {width} image and its border of {pad}"
        )


def _eager_views_out(out: Tensor, *inputs: Any) -> None:
    *tensors, pad = inputs
    out.copy_(_eager_views(*tensors, out.shape[-1], pad, out.dtype))


def _fake_view_boxes(seed: int, ids: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    boxes = ids.new_empty((ids.shape[0], 4), dtype=torch.int32)
    return boxes, ids.new_empty(ids.shape, dtype=torch.bool)


_TRITON = "dmkd_fast.views.triton"
for _name, _eager, _fake in (
    ("views", _eager_views, new_views),
    ("views_out", _eager_views_out, lambda out, *_: None),
    ("view_boxes", reference_boxes, _fake_view_boxes),
):
    _LIBRARY.impl(_name, _eager, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, cuda_kernel(_TRITON, _name, _eager), "CUDA")
    torch.library.register_fake(f"dmkd_fast::{_name}", _fake, lib=_LIBRARY)
