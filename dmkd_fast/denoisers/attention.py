"""Choose the attention kernel by capability, never by timing, and run it.

On CUDA, xFormers runs if its operators support the shape and dtype, otherwise PyTorch's kernel. On
a CPU, the kernel of this package runs for short sequences, otherwise PyTorch's. xFormers is
imported only for CUDA devices.

Shapes: B batch, T tokens, H heads, d head width.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dmkd_fast.denoisers import kernels
from dmkd_fast.runtime.errors import UserError

Attention = Literal["auto", "xformers", "sdpa", "short"]
# Longest sequence for the kernel of this package, by whether the CPU has AMX. PyTorch's kernel uses
# AMX tiles, and ours does not.
MOST_SHORT_TOKENS = {True: 128, False: 1024}


def resolve(
    name: Attention,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_tokens: int,
    num_heads: int,
    head_dim: int,
) -> Attention:
    """Resolve "auto" to a kernel that can run here, and check any other name.

    Args:
        name: Kernel name or "auto".
        device: Device of the tensors.
        dtype: Dtype of query, key and value.
        num_tokens: Sequence length, T.
        num_heads: Number of heads, H.
        head_dim: Width of one head, d.

    Raises:
        UserError: The named kernel cannot run here.
    """
    xformers = device.type == "cuda" and _xformers_takes(
        device, dtype, num_tokens, num_heads, head_dim
    )
    short = device.type == "cpu" and kernels.has_short_attention(dtype, head_dim)
    if name == "auto":
        if short and num_tokens <= MOST_SHORT_TOKENS[torch.cpu._is_amx_tile_supported()]:
            return "short"
        return "xformers" if xformers else "sdpa"
    if (name == "xformers" and not xformers) or (name == "short" and not short):
        raise UserError(
            f"attention: got {name}, which is not installed or cannot run {num_heads} heads of "
            f"{head_dim} in {dtype} on {device.type}; set attention=auto"
        )
    return name


def attend(qkv: Tensor, bias: Tensor | None, kind: Attention) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v for q, k, v = qkv + bias.

    Args:
        qkv: (B, T, 3, H, d).
        bias: 3 * H * d numbers, or None.
        kind: Kernel name as `resolve` returns it.

    Returns:
        (B, T, H, d).
    """
    if kind == "short":
        return kernels.short_attention(qkv, bias)
    if bias is not None:
        qkv = qkv + bias.view(qkv.shape[2:])
    query, key, value = qkv.unbind(2)  # (B, T, H, d)
    if kind == "xformers":
        result: Tensor = torch.ops.dmkd_fast.xformers_attention(query, key, value)
        return result
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, H, T, d)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _xformers_takes(
    device: torch.device, dtype: torch.dtype, num_tokens: int, num_heads: int, head_dim: int
) -> bool:
    """Return whether xFormers is installed and supports these inputs."""
    # xFormers warns about extensions built for another torch, which may not concern this operator.
    logging.getLogger("xformers").setLevel(logging.ERROR)
    try:
        from xformers.ops import fmha
    except ImportError:
        return False
    sample = torch.empty(1, num_tokens, num_heads, head_dim, device=device, dtype=dtype)
    inputs = fmha.Inputs(query=sample, key=sample, value=sample)
    return any(not operator.not_supported_reasons(inputs) for operator in fmha.ALL_FW_OPS)


def _xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    result: Tensor = memory_efficient_attention(query, key, value)
    return result.contiguous()


# An opaque operator keeps torch.compile from tracing into the Python code of xFormers.
_LIBRARY = torch.library.Library("dmkd_fast", "FRAGMENT")
_LIBRARY.define("xformers_attention(Tensor query, Tensor key, Tensor value) -> Tensor")
_LIBRARY.impl("xformers_attention", _xformers, "CUDA")
torch.library.register_fake(
    "dmkd_fast::xformers_attention",
    lambda query, key, value: torch.empty_like(query, memory_format=torch.contiguous_format),
    lib=_LIBRARY,
)


@register_flop_formula(torch.ops.dmkd_fast.xformers_attention)
def _xformers_flops(query_shape: list[int], *_: object, **__: object) -> int:
    images, tokens, heads, head_dim = query_shape
    return 4 * images * heads * tokens * tokens * head_dim
