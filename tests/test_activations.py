"""The transformer's elementwise kernels against PyTorch's, extremes included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dmkd_fast.ops.activations import gelu_tanh, scaled_softmax

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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 31, 32, 33, 49, 256, 1000])
def test_softmax_for_every_tail(dtype: torch.dtype, columns: int) -> None:
    x = (torch.randn(7, 3, columns) * 8).to(dtype)
    got = scaled_softmax(x, 0.37)
    expected = (0.37 * x.double()).softmax(-1)
    assert got.shape == x.shape and got.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    assert (got.double() - expected).abs().max() <= tolerance
    assert not torch.equal(x, got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [3, 16, 49])
def test_softmax_of_extremes(dtype: torch.dtype, columns: int) -> None:
    x = torch.randn(5, columns).to(dtype)
    x[0, 1] = -INF
    x[1, 1] = NAN
    x[2] = -INF
    x[3, 0], x[3, 1] = 1e30, -1e30
    expected = x.float().softmax(-1).to(dtype)
    torch.testing.assert_close(scaled_softmax(x, 1.0), expected, equal_nan=True)


def test_strided_inputs_and_other_thread_counts_give_the_same_bits() -> None:
    x, bias = torch.randn(64, 6, 49, 49).bfloat16(), torch.randn(49).bfloat16()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((gelu_tanh(x, bias), scaled_softmax(x, 0.2)))
    finally:
        torch.set_num_threads(before)
    for gelu, softmax in results[1:]:
        assert torch.equal(gelu, results[0][0]) and torch.equal(softmax, results[0][1])
    strided = x.transpose(2, 3)
    assert torch.equal(gelu_tanh(strided, bias), gelu_tanh(strided.contiguous(), bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 49, 768])
def test_gelu_adds_the_bias_for_every_tail(dtype: torch.dtype, columns: int) -> None:
    x, bias = torch.randn(9, columns).to(dtype), torch.randn(columns).to(dtype)
    expected = F.gelu(x.double() + bias.double(), approximate="tanh")
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert (gelu_tanh(x, bias).double() - expected).abs().max() < tolerance


@pytest.mark.parametrize("name", ["gelu_tanh", "scaled_softmax", "normal"])
def test_operators_pass_opcheck(name: str) -> None:
    op = getattr(torch.ops.dmkd_fast, name)
    cases = {
        "gelu_tanh": [
            (torch.randn(4, 5), torch.randn(5)),
            (torch.randn(2, 3).bfloat16(), torch.randn(3).bfloat16()),
        ],
        "scaled_softmax": [(torch.randn(4, 5), 0.5), (torch.randn(2, 3, 7).bfloat16(), 2.0)],
        "normal": [(3, torch.arange(4), 0, 10), (0, torch.arange(1), 5, 1)],
    }
    for arguments in cases[name]:
        torch.library.opcheck(op.default, arguments)
