"""Choose the attention kernel by capability, never by timing, and run it.

On CUDA, xFormers runs if its dispatcher finds an operator for the shape and dtype, otherwise
PyTorch's kernel. On a CPU, the kernel of this package runs for short sequences, otherwise
PyTorch's. xFormers is imported only for CUDA devices.

Shapes: B batch, T tokens, H heads, d head width.
"""

from __future__ import annotations

import logging
import re
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import register_flop_formula

from dmkd_fast.denoisers import kernels
from dmkd_fast.runtime.errors import invalid, one_line, warn_once

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
    shape = (num_tokens, num_heads, head_dim)
    operator, reason = "", "it runs on CUDA only"
    if device.type == "cuda" and name in ("auto", "xformers"):
        operator, reason = find_xformers(device, dtype, *shape)
    short = device.type == "cpu" and kernels.has_short_attention(dtype, head_dim)
    if name == "auto":
        if short and num_tokens <= MOST_SHORT_TOKENS[torch.cpu._is_amx_tile_supported()]:
            return "short"
        if device.type == "cuda" and not operator:
            warn_once(
                "attention: scaled_dot_product_attention of PyTorch runs in the denoiser, as "
                f"xFormers finds no operator: {reason}"
            )
        return "xformers" if operator else "sdpa"
    what = f"{num_heads} heads of {head_dim} in {dtype} on {device.type}"
    if name == "xformers" and not operator:
        expected = f"a kernel that can run {what}, where xFormers finds none ({reason})"
        raise invalid("attention", "xformers", expected, "set attention=auto")
    if name == "short" and not short:
        raise invalid("attention", "short", f"a kernel that can run {what}", "set attention=auto")
    return name


def describe(
    kind: Attention,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_tokens: int,
    num_heads: int,
    head_dim: int,
) -> str:
    """Return the kernel name and the operator that its library chooses, as `xformers fa2F-pt`.

    Args:
        kind: Kernel name as `resolve` returns it.
        device: Device of the tensors.
        dtype: Dtype of query, key and value.
        num_tokens: Sequence length, T.
        num_heads: Number of heads, H.
        head_dim: Width of one head, d.
    """
    if kind == "xformers":
        return f"xformers {find_xformers(device, dtype, num_tokens, num_heads, head_dim)[0]}"
    if kind == "sdpa":
        parts = _sample(device, dtype, num_tokens, num_heads, head_dim)
        query, key, value = (part.transpose(1, 2) for part in parts)
        choice = torch._fused_sdp_choice(query, key, value)
        return f"sdpa {SDPBackend(choice).name.lower()}"
    return kind


def find_xformers(
    device: torch.device, dtype: torch.dtype, num_tokens: int, num_heads: int, head_dim: int
) -> tuple[str, str]:
    """Ask xFormers' dispatcher which operator it runs for such inputs.

    Operators that the dispatcher does not try may support the inputs and are still not used.

    Returns:
        The name of the operator and an empty text, or an empty name and the reason.
    """
    # xFormers warns about extensions built for another torch; `resolve` says what follows from it.
    logging.getLogger("xformers").setLevel(logging.ERROR)
    try:
        from xformers.ops import fmha
        from xformers.ops.fmha.dispatch import _dispatch_fw

        query, key, value = _sample(device, dtype, num_tokens, num_heads, head_dim)
        inputs = fmha.Inputs(query=query, key=key, value=value)
        inputs.validate_inputs()
        return str(_dispatch_fw(inputs, needs_gradient=False).NAME), ""
    except NotImplementedError as error:  # the dispatcher's answer: inputs, then reasons
        reasons = dict.fromkeys(re.findall(r"(?m)^ {4}(\S.*)", str(error)))
        return "", "; ".join(reasons)[:300] or one_line(error)
    except Exception as error:  # missing, or built for another torch: of any kind
        return "", one_line(error)


def _sample(
    device: torch.device, dtype: torch.dtype, num_tokens: int, num_heads: int, head_dim: int
) -> tuple[Tensor, ...]:
    """Return query, key and value (2, T, H, d) with the strides that `attend` gives to them."""
    qkv = torch.empty(2, num_tokens, 3, num_heads, head_dim, device=device, dtype=dtype)
    return qkv.unbind(2)


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
