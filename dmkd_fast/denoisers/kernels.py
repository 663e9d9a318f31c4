"""What stands between a transformer's matrix products and takes as long as they do on a CPU.

The definitions here are what runs on CUDA, where the compiler fuses them, and
without the extension; CPU kernels are in csrc/transformer_cpu.cpp. Biases of the products are added
here, in the same pass. For inference only: no gradients.
B images, T tokens, D width, H heads, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dmkd_fast.runtime import native

_LIBRARY = torch.library.Library("dmkd_fast", "FRAGMENT")
_LIBRARY.define("gelu_tanh(Tensor input, Tensor bias) -> Tensor")
_LIBRARY.define(
    "residual_norm(Tensor x, Tensor? branch, Tensor? bias, Tensor? gate, Tensor shift, "
    "Tensor scale, float eps) -> (Tensor, Tensor)"
)
_LIBRARY.define("short_attention(Tensor qkv, Tensor? bias) -> Tensor")


def gelu_tanh(values: Tensor, bias: Tensor) -> Tensor:
    """`F.gelu(values + bias, approximate="tanh")`, (..., C) and (C,), float32 or bfloat16."""
    if values.device.type != "cpu":  # An opaque operator would keep the compiler from fusing it.
        return _eager_gelu(values, bias)
    result: Tensor = torch.ops.dmkd_fast.gelu_tanh(values, bias)
    return result


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """`layer_norm(x) * (1 + scale) + shift`: (B, T, D), (B, D), (B, D) -> (B, T, D)."""
    if x.device.type != "cpu":
        return _eager_norm(x, shift, scale, eps)
    result: Tensor = torch.ops.dmkd_fast.residual_norm(x, None, None, None, shift, scale, eps)[1]
    return result


def residual_norm(
    x: Tensor, branch: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor, scale: Tensor, *,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The residual sum and its modulated norm, in one pass.

    Args:
        x, branch: (B, T, D), float32 or bfloat16.
        bias: (D,), of the product that made `branch`; None for none.
        gate, shift, scale: (B, D), one row per image.
        eps: Of the norm.

    Returns:
        x + gate * (branch + bias), and `modulated_norm` of that; (B, T, D) each.
    """
    if x.device.type != "cpu":
        return _eager_residual_norm(x, branch, bias, gate, shift, scale, eps)
    x, normed = torch.ops.dmkd_fast.residual_norm(x, branch, bias, gate, shift, scale, eps)
    return x, normed


def short_attention(qkv: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with q, k, v = qkv + bias, for short sequences on a CPU.

    Args:
        qkv: (B, T, 3, H, d), contiguous, float32 or bfloat16; d even.
        bias: 3 * H * d numbers, or None.

    Returns:
        (B, T, H, d).
    """
    result: Tensor = torch.ops.dmkd_fast.short_attention(qkv, bias)
    return result


def has_short_attention(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether this CPU has the instructions of `short_attention`, and the extension is there."""
    if native.INSTRUCTION_SET != "avx512" or head_dim % 2:
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and bool(torch.cpu._is_avx512_bf16_supported())
    )


def _eager_gelu(values: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(values + bias, approximate="tanh")


def _eager_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def _eager_residual_norm(
    x: Tensor, branch: Tensor | None, bias: Tensor | None, gate: Tensor | None, shift: Tensor,
    scale: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if branch is None or gate is None:
        return x.new_empty(0), _eager_norm(x, shift, scale, eps)
    x = x + gate[:, None] * (branch if bias is None else branch + bias)
    return x, _eager_norm(x, shift, scale, eps)


def _eager_attention(qkv: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        qkv = qkv + bias.view(qkv.shape[2:])
    query, key, value = qkv.transpose(1, 3).unbind(2)  # (B, H, T, d)
    scores = (query @ key.transpose(-1, -2)).float() * qkv.shape[-1] ** -0.5  # (B, H, T, T)
    return (scores.softmax(-1).to(qkv.dtype) @ value).transpose(1, 2).contiguous()


_LIBRARY.impl("gelu_tanh", _eager_gelu, "CompositeExplicitAutograd")
_LIBRARY.impl("residual_norm", _eager_residual_norm, "CompositeExplicitAutograd")
_LIBRARY.impl("short_attention", _eager_attention, "CompositeExplicitAutograd")
torch.library.register_fake(
    "dmkd_fast::gelu_tanh",
    lambda values, bias: torch.empty_like(values, memory_format=torch.contiguous_format),
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
