"""Operators between the matrix products of a transformer: gelu, residual and norm, attention.

On a CPU, these operators can take about as long as the products if they are not fused. The CPU
kernels are in csrc/transformer_cpu.cpp and csrc/transformer_avx512.cpp. The Python definitions here
run on CUDA, where torch.compile fuses them, and on a CPU without the extension. The operators also
add the biases of the products, in the same pass. On CUDA, the products of query, key, value and
hidden units add their biases at their own end, where gelu runs too. For inference only: no
gradients.

Shapes: B images, T tokens, D width, H heads, d head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dmkd_fast.runtime import native

_MOST_E4M3 = 448.0  # largest number of float8_e4m3fn
_LIBRARY = torch.library.Library("dmkd_fast", "FRAGMENT")
_LIBRARY.define("gelu_tanh(Tensor input, Tensor bias) -> Tensor")
_LIBRARY.define("linear_gelu(Tensor input, Tensor weight, Tensor bias) -> Tensor")
_LIBRARY.define(
    "residual_norm(Tensor x, Tensor? branch, Tensor? bias, Tensor? gate, Tensor shift, "
    "Tensor scale, float eps) -> (Tensor, Tensor)"
)
_LIBRARY.define("short_attention(Tensor qkv, Tensor? bias) -> Tensor")


def gelu_tanh(values: Tensor, bias: Tensor) -> Tensor:
    """Compute `F.gelu(values + bias, approximate="tanh")`.

    Args:
        values: (..., C), float32 or bfloat16.
        bias: (C,).
    """
    if values.device.type != "cpu":  # torch.compile cannot fuse an opaque operator
        return _eager_gelu(values, bias)
    result: Tensor = torch.ops.dmkd_fast.gelu_tanh(values, bias)
    return result


def linear_gelu(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `F.gelu(F.linear(values, weight, bias), approximate="tanh")`.

    On CUDA, one product does all of it. torch.compile would take it apart, hence the operator.

    Args:
        values: (..., C).
        weight: (D, C).
        bias: (D,).

    Returns:
        (..., D).
    """
    if values.device.type == "cpu":
        return gelu_tanh(F.linear(values, weight), bias)
    result: Tensor = torch.ops.dmkd_fast.linear_gelu(values, weight, bias)
    return result


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to 8-bit floating-point numbers (e4m3), each row with a scale of its own.

    Args:
        values: (..., C).

    Returns:
        (..., C) float8_e4m3fn and scales (..., 1) float32. Their product is close to `values`.
    """
    wide = values.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / _MOST_E4M3
    return (wide / scale).to(torch.float8_e4m3fn), scale


def fp8_linear(values: Tensor, weight: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
    """Compute `F.linear` of rows that are rounded to 8 bits and a weight that has been.

    On a CPU, the product of the rounded numbers runs in float32, to see what rounding changes.

    Args:
        values: (..., C), bfloat16 on CUDA.
        weight: `quantize_rows` of a weight (D, C); C and D divisible by 16.
        bias: (D,), or None.

    Returns:
        (..., D), in the dtype of `values`.
    """
    rows, scale = quantize_rows(values.flatten(0, -2))
    columns, column_scale = weight
    if values.device.type == "cpu":
        product = F.linear(rows.float(), columns.float()) * scale * column_scale.t()
        product = (product if bias is None else product + bias).to(values.dtype)
    else:
        product = torch._scaled_mm(
            rows,
            columns.t(),
            scale_a=scale,
            scale_b=column_scale.t(),
            bias=bias,
            out_dtype=values.dtype,
            use_fast_accum=True,
        )
    result: Tensor = product.unflatten(0, values.shape[:-1])
    return result


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """Compute `layer_norm(x) * (1 + scale) + shift`.

    Args:
        x: (B, T, D), float32 or bfloat16.
        shift, scale: (B, D), one row per image.
        eps: Epsilon of the norm.

    Returns:
        (B, T, D).
    """
    if x.device.type != "cpu":
        return _eager_norm(x, shift, scale, eps)
    result: Tensor = torch.ops.dmkd_fast.residual_norm(x, None, None, None, shift, scale, eps)[1]
    return result


def residual_norm(
    x: Tensor,
    branch: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute a residual sum and its modulated norm in one pass.

    Args:
        x, branch: (B, T, D), float32 or bfloat16.
        bias: Bias of the product that made `branch`, (D,); None if it has none.
        gate, shift, scale: (B, D), one row per image.
        eps: Epsilon of the norm.

    Returns:
        The sum x + gate * (branch + bias) and its `modulated_norm`, (B, T, D) each.
    """
    if x.device.type != "cpu":
        return _eager_residual_norm(x, branch, bias, gate, shift, scale, eps)
    x, normed = torch.ops.dmkd_fast.residual_norm(x, branch, bias, gate, shift, scale, eps)
    return x, normed


def short_attention(qkv: Tensor, bias: Tensor | None) -> Tensor:
    """Compute attention of short sequences on a CPU.

    The result is softmax(q k^T / sqrt(d)) v, with q, k, v = qkv + bias.

    Args:
        qkv: (B, T, 3, H, d), contiguous, float32 or bfloat16; d even.
        bias: 3 * H * d numbers, or None.

    Returns:
        (B, T, H, d).
    """
    result: Tensor = torch.ops.dmkd_fast.short_attention(qkv, bias)
    return result


def has_short_attention(dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether the extension has attention for this CPU, dtype and head width."""
    if native.INSTRUCTION_SET != "avx512" or head_dim % 2:
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and bool(torch.cpu._is_avx512_bf16_supported())
    )


def _eager_gelu(values: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(values + bias, approximate="tanh")


def _eager_linear_gelu(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(values, weight, bias), approximate="tanh")


def _cuda_linear_gelu(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # On CUDA, this gelu is the tanh approximation; on a CPU, it is the exact one.
    rows = torch._addmm_activation(bias, values.flatten(0, -2), weight.t(), use_gelu=True)
    result: Tensor = rows.unflatten(0, values.shape[:-1])
    return result


def _eager_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def _eager_residual_norm(
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    if branch is None or gate is None:
        return x.new_empty(0), _eager_norm(x, shift, scale, eps)
    x = x + gate[:, None] * (branch if bias is None else branch + bias)
    return x, _eager_norm(x, shift, scale, eps)


def _eager_attention(qkv: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        qkv = qkv + bias.view(qkv.shape[2:])
    query, key, value = qkv.transpose(1, 3).unbind(2)  # (B, H, T, d)
    scores = (query @ key.transpose(-1, -2)).float() * qkv.shape[-1] ** -0.5  # (B, H, T, T)
    mixed: Tensor = scores.softmax(-1).to(qkv.dtype) @ value
    return mixed.transpose(1, 2).contiguous()


_LIBRARY.impl("gelu_tanh", _eager_gelu, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_gelu", _eager_linear_gelu, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_gelu", _cuda_linear_gelu, "CUDA")
_LIBRARY.impl("residual_norm", _eager_residual_norm, "CompositeExplicitAutograd")
_LIBRARY.impl("short_attention", _eager_attention, "CompositeExplicitAutograd")
torch.library.register_fake(
    "dmkd_fast::gelu_tanh",
    lambda values, bias: torch.empty_like(values, memory_format=torch.contiguous_format),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "dmkd_fast::linear_gelu",
    lambda values, weight, bias: values.new_empty((*values.shape[:-1], len(weight))),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "dmkd_fast::residual_norm",
    lambda x, branch, bias, gate, shift, scale, eps: (
        x.new_empty(0) if branch is None else torch.empty_like(x),
        torch.empty_like(x),
    ),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "dmkd_fast::short_attention",
    lambda qkv, bias: qkv.new_empty((*qkv.shape[:2], *qkv.shape[3:])),
    lib=_LIBRARY,
)


@register_flop_formula(torch.ops.dmkd_fast.short_attention)
def _attention_flops(qkv_shape: list[int], *_: object, **__: object) -> int:
    images, tokens, heads, head_dim = (qkv_shape[i] for i in (0, 1, 3, 4))
    return 4 * images * heads * tokens * tokens * head_dim


@register_flop_formula(torch.ops.dmkd_fast.linear_gelu)
def _linear_gelu_flops(
    values_shape: list[int], weight_shape: list[int], *_: object, **__: object
) -> int:
    return 2 * math.prod(values_shape) * weight_shape[0]
