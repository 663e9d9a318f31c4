"""Types, arithmetic and bit patterns of PTX as NumPy has them (for `ptx_emulator.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from ptx_memory import KernelError
from ptx_program import Instruction

TYPES: dict[str, Any] = {
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "bf16": np.dtype("u2"),
    "f32x2": np.dtype("u8"),
    "pred": np.dtype("?"),
}
WIDTHS = {"%p": np.dtype("?"), "%rs": np.dtype("u2"), "%r": np.dtype("u4"), "%rd": np.dtype("u8")}
TINY = np.finfo(np.float32).tiny

BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "div": np.divide,
    "max": np.fmax,
    "min": np.fmin,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
UNARY: dict[str, Callable[[Any], Any]] = {
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
}
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def immediate(text: str) -> np.uint64:
    """Return the bits of a number in the code."""
    if text.startswith(("0f", "0d")):
        return np.uint64(int(text[2:], 16))
    return np.uint64(int(text.rstrip("U"), 0) % 2**64)


def registers_of(operand: str) -> list[str]:
    """Return the registers of a vector, or the only one."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


def lanes(value: np.ndarray, kind: str) -> np.ndarray:
    """Split two numbers of one register, (n,) -> (n, 2)."""
    return value.view(np.float32).reshape(-1, 2) if kind == "f32x2" else value


def joined(raw: np.ndarray) -> np.ndarray:
    """Read the bytes of each thread as one number, (n, size) -> (n,)."""
    return np.ascontiguousarray(raw).view(f"u{raw.shape[1]}")[:, 0]


def flushed(x: np.ndarray, i: Instruction) -> np.ndarray:
    """Set numbers below the smallest normal one to zero where the instruction does."""
    if "ftz" in i.modifiers and x.dtype == np.float32:
        return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)
    return x


def product(x: np.ndarray, y: np.ndarray, i: Instruction) -> np.ndarray:
    """Multiply; return the low half, the high half or the whole product."""
    if "wide" not in i.modifiers and "hi" not in i.modifiers:
        return x * y
    if x.itemsize != 4:
        raise KernelError("not known")
    wide = x.astype(f"{x.dtype.kind}8") * y
    return wide if "wide" in i.modifiers else (wide >> wide.dtype.type(32)).astype(x.dtype)


def whole(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Cut fractions off, and limit to the type; NaN becomes 0."""
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    inside = np.where((x >= low) & (x < high), x, 0).astype(dtype)
    return np.where(x < low, low, np.where(x >= high, high, inside)).astype(dtype)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, ties to even; return its bits."""
    bits = x.view(np.uint32)
    rounded = (bits + ((bits >> np.uint32(16)) & 1) + np.uint32(0x7FFF)) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)
