"""Compute dtypes to run a test in: a CPU without bfloat16 instructions takes 9 times as long."""

from __future__ import annotations

import pytest
import torch

from dmkd_fast.runtime.device import cpu_has_bf16

_SLOW = pytest.mark.slow
BFLOAT16 = pytest.param(torch.bfloat16, marks=[] if cpu_has_bf16() else _SLOW)
BOTH = [torch.float32, BFLOAT16]
NATIVE_FIRST = [pytest.param(torch.float32, marks=_SLOW if cpu_has_bf16() else []), BFLOAT16]
"""The dtype that a job would have here; the other one is slow."""
