"""Two elementwise pieces of a transformer that PyTorch runs far below memory speed on a CPU.

Stands on floor 1. On CUDA, and without the extension, PyTorch's own operators run; the CPU kernels
are in csrc/activations_cpu.cpp. For inference only: no gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmkd_fast.ops import extension as extension

_LIBRARY = torch.library.Library("dmkd_fast", "FRAGMENT")
_LIBRARY.define("gelu_tanh(Tensor input, Tensor bias) -> Tensor")
_LIBRARY.define("scaled_softmax(Tensor input, float scale) -> Tensor")


def gelu_tanh(values: Tensor, bias: Tensor) -> Tensor:
    """`F.gelu(values + bias, approximate="tanh")`, (..., C) and (C,), float32 or bfloat16."""
    if values.device.type != "cpu":  # An opaque operator would keep the compiler from fusing it.
        return _eager_gelu(values, bias)
    result: Tensor = torch.ops.dmkd_fast.gelu_tanh(values, bias)
    return result


def scaled_softmax(scores: Tensor, scale: float) -> Tensor:
    """`(scale * scores).softmax(-1)`, float32 inside: (..., C) float32 or bfloat16 -> same."""
    result: Tensor = torch.ops.dmkd_fast.scaled_softmax(scores, scale)
    return result


def _eager_gelu(values: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(values + bias, approximate="tanh")


def _eager_softmax(scores: Tensor, scale: float) -> Tensor:
    return (scale * scores.float()).softmax(-1).to(scores.dtype)


_LIBRARY.impl("gelu_tanh", _eager_gelu, "CompositeExplicitAutograd")
_LIBRARY.impl("scaled_softmax", _eager_softmax, "CompositeExplicitAutograd")
torch.library.register_fake(
    "dmkd_fast::gelu_tanh",
    lambda values, bias: torch.empty_like(values, memory_format=torch.contiguous_format),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "dmkd_fast::scaled_softmax",
    lambda scores, scale: torch.empty_like(scores, memory_format=torch.contiguous_format),
    lib=_LIBRARY,
)
