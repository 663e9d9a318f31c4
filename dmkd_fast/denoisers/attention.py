"""Which attention kernel runs, chosen once by capability, never by timing.

On CUDA xformers where its operators take shape and dtype, else PyTorch's own; on
a CPU our own for short sequences, else PyTorch's own. B batch, T tokens, H heads, d head width.
xformers is imported only where CUDA tensors are.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dmkd_fast.denoisers import kernels

Attention = Literal["auto", "xformers", "sdpa", "short"]
# One thread, heads of 64, bfloat16 without AMX: 256 tokens 11 ms against 24 of PyTorch's, 1,024
# tokens 26 against 56. With AMX PyTorch's has tiles that ours does not use.
MOST_SHORT_TOKENS = {True: 128, False: 1024}


def resolve(
    name: Attention, *, device: torch.device, dtype: torch.dtype, num_tokens: int, num_heads: int,
    head_dim: int,
) -> Attention:  # fmt: skip
    """Turn "auto" into what this device can run for these shapes; check other names.

    Raises:
        ValueError: The named kernel cannot run here.
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
        raise ValueError(
            f"attention: got {name}, which is not installed or cannot run {num_heads} heads of "
            f"{head_dim} in {dtype} on {device.type}; set attention=auto"
        )
    return name


def attend(qkv: Tensor, bias: Tensor | None, kind: Attention) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with q, k, v = qkv + bias: (B, T, 3, H, d) -> (B, T, H, d)."""
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
    """Whether an operator of xformers is installed and supports these inputs."""
    # Its warning about extensions built for another torch says nothing about the operators used.
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


# One opaque operator, so that torch.compile does not trace into xformers' Python.
_LIBRARY = torch.library.Library("dmkd_fast", "FRAGMENT")
_LIBRARY.define("xformers_attention(Tensor query, Tensor key, Tensor value) -> Tensor")
_LIBRARY.impl("xformers_attention", _xformers, "CUDA")
torch.library.register_fake(
    "dmkd_fast::xformers_attention",
    lambda query, key, value: torch.empty_like(query, memory_format=torch.contiguous_format),
    lib=_LIBRARY,
)
