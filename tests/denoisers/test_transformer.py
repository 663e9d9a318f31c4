"""What stands between a transformer's products, against PyTorch's, extremes included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dmkd_fast.denoisers import kernels
from dmkd_fast.denoisers.kernels import (
    gelu_tanh,
    has_short_attention,
    linear_gelu,
    modulated_norm,
    residual_norm,
    short_attention,
)
from dmkd_fast.runtime import native

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_is_as_accurate_as_pytorchs(dtype: torch.dtype) -> None:
    x = torch.cat((torch.linspace(-12, 12, 100_003), torch.randn(1000) * 100)).to(dtype)
    x = x[: 1000 * 101].view(1000, 101)
    expected = F.gelu(x.double(), approximate="tanh")
    ours = (gelu_tanh(x, torch.zeros(101, dtype=dtype)).double() - expected).abs()
    theirs = (F.gelu(x, approximate="tanh").double() - expected).abs()
    assert ours.max() <= 2 * theirs.max() + 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_of_extremes(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, INF, NAN, 3e38, -3e38, 1e-30], dtype=dtype).repeat(9)
    got = gelu_tanh(x, torch.zeros_like(x))
    expected = F.gelu(x, approximate="tanh")
    torch.testing.assert_close(got, expected, equal_nan=True)


def attention_inputs(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    images, tokens, heads, width = shape
    if not has_short_attention(dtype, width):
        pytest.skip("needs a CPU with AVX-512, and AVX512-BF16 for bfloat16")
    torch.manual_seed(sum(shape))
    qkv = 1.5 * torch.randn(images, tokens, 3, heads, width)
    return qkv.to(dtype), torch.randn(3 * heads * width).to(dtype)


def plain_attention(qkv: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's, in the dtype given."""
    query, key, value = (qkv + bias.view(qkv.shape[2:])).transpose(1, 3).unbind(2)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 49, 6, 32),
        (1, 1, 1, 8),
        (1, 5, 1, 2),
        (3, 6, 2, 4),
        (2, 7, 3, 72),
        (1, 16, 2, 16),
        (2, 17, 1, 18),
        (1, 63, 1, 64),
        (1, 64, 2, 80),
        (1, 65, 2, 40),
        (1, 256, 1, 128),
        (0, 4, 2, 8),
    ],
    ids=str,
)
def test_attention_is_as_accurate_as_pytorchs(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    qkv, bias = attention_inputs(dtype, shape)
    expected = plain_attention(qkv.double(), bias.double())
    ours = (short_attention(qkv, bias).double() - expected).abs()
    theirs = (plain_attention(qkv, bias).double() - expected).abs()
    assert ours.shape == expected.shape
    assert (ours <= 2 * theirs.amax() + 1e-6).all() if ours.numel() else True
    without = plain_attention(qkv.double(), torch.zeros_like(bias).double())
    tolerance = 2e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(
        short_attention(qkv, None).double(), without, atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [96, 98, 128, 256, 1152])
def test_attention_takes_heads_much_wider_than_the_sequence(
    dtype: torch.dtype, head_dim: int
) -> None:
    for tokens in (1, 4, 16, 17):
        qkv, bias = attention_inputs(dtype, (2, tokens, 2, head_dim))
        for _ in range(20):  # memory next to the buffers of one call belongs to the next
            got = short_attention(qkv, bias)
        packed = (qkv + bias.view(qkv.shape[2:])).double()
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        expected = plain_attention(packed, torch.zeros_like(bias).double())
        torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_peaked_scores(dtype: torch.dtype) -> None:
    """Scores so far apart that each query sees one key: the weights are 0 and 1 exactly."""
    qkv, _ = attention_inputs(dtype, (1, 20, 1, 20))
    qkv[0, :, 0, 0] = qkv[0, :, 1, 0] = 3e4 * torch.eye(20, dtype=dtype)
    assert torch.equal(short_attention(qkv, None)[0, :, 0], qkv[0, :, 2, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_passes_nan_on_to_its_image_alone(dtype: torch.dtype) -> None:
    qkv, bias = attention_inputs(dtype, (3, 10, 2, 8))
    clean = short_attention(qkv, bias)
    qkv[1, 4, 1, 0, 3] = NAN
    got = short_attention(qkv, bias)
    assert got[1, :, 0].isnan().all()
    assert torch.equal(got[[0, 2]], clean[[0, 2]]) and torch.equal(got[1, :, 1], clean[1, :, 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 31, 192, 1000])
def test_residual_norm_is_as_accurate_as_pytorchs(dtype: torch.dtype, columns: int) -> None:
    torch.manual_seed(columns)
    x, branch = torch.randn(2, 3, 5, columns).to(dtype)
    rows = torch.randn(3, 4, columns).to(dtype)
    gate, shift, scale, bias = rows[:, 0], rows[:, 1], rows[:, 3], rows[0, 2]
    for added in (bias, None):
        wide = [None if p is None else p.double() for p in (branch, added, gate, shift, scale)]
        got = residual_norm(x, branch, added, gate, shift, scale, eps=1e-5)
        eager = kernels._eager_residual_norm(x, branch, added, gate, shift, scale, 1e-5)
        total = x.double() + wide[2][:, None] * (wide[0] + (0 if added is None else wide[1]))
        # The norm is that of the rounded sum, as the next block will see it.
        rounded = got[0].double()
        normed = kernels._eager_norm(rounded, wide[3], wide[4], 1e-5)
        for mine, theirs, expected in zip(got, eager, (total, normed), strict=True):
            allowed = 2 * (theirs.double() - expected).abs().amax() + 1e-6
            assert (mine.double() - expected).abs().amax() <= allowed
    alone = modulated_norm(x, shift, scale, eps=1e-5)
    expected = kernels._eager_norm(x.double(), wide[3], wide[4], 1e-5)
    torch.testing.assert_close(
        alone.double(),
        expected,
        **(
            {"atol": 2e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.01}
        ),
    )


def test_strided_inputs_and_other_thread_counts_give_the_same_bits() -> None:
    x, bias = torch.randn(64, 6, 49, 49).bfloat16(), torch.randn(49).bfloat16()
    y, rows = torch.randn(2, 64, 49, 48).bfloat16(), torch.randn(64, 3, 48).bfloat16()
    qkv = torch.randn(64, 49, 3, 6, 32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                (
                    gelu_tanh(x, bias),
                    short_attention(qkv, None),
                    *residual_norm(y[0], y[1], None, *rows.unbind(1), eps=1e-5),
                )
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    strided = x.transpose(2, 3)
    assert torch.equal(gelu_tanh(strided, bias), gelu_tanh(strided.contiguous(), bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 49, 768])
def test_gelu_adds_the_bias_for_every_tail(dtype: torch.dtype, columns: int) -> None:
    x, bias = torch.randn(9, columns).to(dtype), torch.randn(columns).to(dtype)
    expected = F.gelu(x.double() + bias.double(), approximate="tanh")
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert (gelu_tanh(x, bias).double() - expected).abs().max() < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24)], ids=str)
def test_product_with_gelu_is_the_product_and_then_gelu(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), (torch.randn(40, 24) / 5).to(dtype)
    bias = torch.randn(40).to(dtype)
    expected = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    # The last one is CUDA's; its gelu on a CPU is the exact one, up to 5e-4 away.
    for compute in (linear_gelu, torch.ops.dmkd_fast.linear_gelu, kernels._cuda_linear_gelu):
        tolerance += 5e-4 * (compute is kernels._cuda_linear_gelu)
        got = compute(x, weight, bias)
        assert got.shape == expected.shape and got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
    separate = gelu_tanh(F.linear(x, weight), bias)
    assert torch.equal(linear_gelu(x, weight, bias), separate)  # the CPU's bits
    with FlopCounterMode(display=False) as counter:
        torch.ops.dmkd_fast.linear_gelu(x, weight, bias)
    assert counter.get_total_flops() == 2 * x.numel() * 40


OPCHECKED: dict[str, list[tuple[object, ...]]] = {
    "gelu_tanh": [
        (torch.randn(4, 5), torch.randn(5)),
        (torch.randn(2, 3).bfloat16(), torch.randn(3).bfloat16()),
    ],
    "linear_gelu": [
        (torch.randn(2, 4, 5), torch.randn(3, 5), torch.randn(3)),
        (torch.randn(4, 5).bfloat16(), torch.randn(3, 5).bfloat16(), torch.randn(3).bfloat16()),
    ],
    "short_attention": [
        (torch.randn(2, 5, 3, 2, 4), None),
        (torch.randn(1, 3, 3, 1, 2), torch.randn(6)),
    ],
    "residual_norm": [
        (torch.randn(2, 3, 4), None, None, None, torch.randn(2, 4), torch.randn(2, 4), 1e-5),
        (torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(4), *torch.randn(3, 2, 4), 1e-5),
    ],
    "normal": [(3, torch.arange(4), 0, 10), (0, torch.arange(1), 5, 1)],
}


@pytest.mark.parametrize("name", sorted(OPCHECKED))
def test_operators_pass_opcheck(name: str) -> None:
    for arguments in OPCHECKED[name]:
        torch.library.opcheck(getattr(torch.ops.dmkd_fast, name).default, arguments)


@pytest.mark.parametrize(
    "wrong",
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), None, torch.zeros(2, 4)),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(5), torch.zeros(2, 4)),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), None, torch.zeros(1, 4)),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).bfloat16(), None, torch.zeros(2, 4)),
    ],
    ids=["branch", "bias", "gate", "dtype"],
)
def test_wrong_shapes_are_refused(wrong: tuple[Tensor, Tensor, Tensor | None, Tensor]) -> None:
    row = torch.zeros(2, 4)
    if native.INSTRUCTION_SET == "none":
        pytest.skip("the definition broadcasts; the C++ extension checks")
    with pytest.raises(RuntimeError, match="expected"):
        residual_norm(*wrong, row, row, eps=1e-5)


def test_one_column_may_have_any_stride() -> None:
    x, rows = torch.randn(2, 3, 1), torch.randn(5, 2)
    row = rows.t()[:, :1]  # (2, 1), stride 2 between columns
    assert row.stride(1) != 1
    got = modulated_norm(x, row, row, eps=1e-5)
    assert torch.equal(got, modulated_norm(x, row.clone(), row.clone(), eps=1e-5))


def test_attention_counts_its_arithmetic() -> None:
    with FlopCounterMode(display=False) as counter:
        torch.ops.dmkd_fast.short_attention(torch.zeros(2, 5, 3, 4, 6), None)
    assert counter.get_total_flops() == 2 * 4 * (2 * 5 * 5 * 6 + 2 * 5 * 5 * 6)


def test_the_kernels_are_there_where_the_cpu_has_the_instructions() -> None:
    """Else every test of attention above would be skipped, and the others would test PyTorch."""
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    if native.INSTRUCTION_SET == "none":
        pytest.skip("needs the C++ extension")
    has_avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    assert has_short_attention(torch.float32, 32) == has_avx512
    assert has_short_attention(torch.bfloat16, 32) == (has_avx512 and "avx512_bf16" in flags)
    for name in ("gelu_tanh", "residual_norm", *["short_attention"] * has_avx512):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dmkd_fast::{name}", "CPU"), name
