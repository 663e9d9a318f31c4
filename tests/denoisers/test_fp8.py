"""Products in 8 bits: rounding, emulation, what CUDA's product takes, where it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sampler_cases import dit_sampler, make
from small_jobs import CONFIG, SHORT
from small_models import small_dit
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.fake_cuda import pretended
from dmkd_fast import Denoiser
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.denoisers.dit import Product, lean_dit
from dmkd_fast.denoisers.kernels import fp8_linear, quantize_rows
from dmkd_fast.jobs import resolve
from dmkd_fast.jobs.inspect.flops import generator_flops
from dmkd_fast.jobs.parts import prepare
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.sampling.graph import compiled
from dmkd_fast.sampling.step import advance


def test_each_row_is_rounded_by_its_own_scale() -> None:
    torch.manual_seed(0)
    values = torch.randn(6, 5, 64) * torch.logspace(-6, 3, 6)[:, None, None]
    rounded, scale = quantize_rows(values)
    back = rounded.float() * scale
    # Three bits after the point, or half of the smallest number, 2^-9 of the scale.
    assert ((back - values).abs() <= values.abs() / 16 + scale * 2**-10).all()
    torch.testing.assert_close(back.abs().amax(-1), values.abs().amax(-1), rtol=1e-6, atol=0)
    assert scale.shape == (6, 5, 1) and scale.dtype == torch.float32


def test_rounding_of_zeros_and_of_values_that_are_not_finite() -> None:
    values = torch.ones(4, 32)
    values[0], values[1, 3], values[2, 3] = 0, float("nan"), float("inf")
    rounded, scale = quantize_rows(values)
    back = rounded.float() * scale
    assert torch.equal(back[0], values[0]) and torch.equal(back[3], values[3])
    assert back[1].isnan().all() and back[2].isnan().any()


def test_the_emulation_multiplies_the_rounded_numbers() -> None:
    torch.manual_seed(0)
    values = torch.randn(2, 7, 48).bfloat16()
    weight, bias = torch.randn(32, 48), torch.randn(32).bfloat16()
    rows, columns = quantize_rows(values), quantize_rows(weight)
    wide = [(rounded.double() * scale.double()) for rounded, scale in (rows, columns)]
    for added in (None, bias):
        expected = F.linear(*wide) + (0 if added is None else added.double())
        got = fp8_linear(values, columns, added)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), expected, atol=0.05, rtol=0.01)
        plain = F.linear(values.double(), weight.double()) + expected - F.linear(*wide)
        error = (got.double() - plain).norm() / plain.norm()
        assert 0.005 < error < 0.06


@pytest.mark.parametrize("rows", [1, 512])
def test_cuda_gets_the_layouts_and_scales_that_its_product_takes(rows: int) -> None:
    """PyTorch's own checks of shapes, strides and dtypes run on fake CUDA tensors."""
    with FakeTensorMode(), torch.device("cuda"):
        values = torch.empty(2, rows, 48, dtype=torch.bfloat16)
        weight = quantize_rows(torch.empty(32, 48))
        got: Any = fp8_linear(values, weight, torch.empty(32, dtype=torch.bfloat16))
        assert got.shape == (2, rows, 32) and got.dtype == torch.bfloat16
        assert got.device.type == "cuda"


def test_a_dit_in_8_bits_is_close_and_compiles_to_one_graph_for_its_blocks() -> None:
    lean: Any = lean_dit(small_dit())
    sampler = dit_sampler(module=lean, count=2)
    work = generator_flops(sampler.denoiser)
    plain = sampler.trajectory(torch.arange(4), torch.arange(4))[-1]
    lean.use_fp8()
    assert generator_flops(sampler.denoiser) == work and work[0]
    rounded = sampler.trajectory(torch.arange(4), torch.arange(4))[-1]
    assert 1e-4 < (rounded - plain).norm() / plain.norm() < 0.1
    eager = make(sampler, torch.arange(4), 1000)
    parts: list[int] = []

    def backend(traced: Any, _: object) -> Any:
        parts.append(sum(isinstance(part, torch.fx.GraphModule) for part in traced.modules()))
        return traced

    lean.shares_block_graph = True
    torch.compiler.reset()
    sampler._advance = compiled(advance, backend=backend)
    assert torch.equal(make(sampler, torch.arange(4), 1000), eager)
    # The step and one block, or with torch 2.10 each of its two.
    assert parts == [2 if torch.torch_version.TorchVersion(torch.__version__) >= (2, 14) else 3]


def test_a_width_that_no_product_takes_is_refused() -> None:
    lean: Any = lean_dit(small_dit(attention_head_dim=12))
    with pytest.raises(
        UserError, match="experimental_fp8: got a DiT of width 24, expected a width"
    ):
        lean.use_fp8()


def test_fp8_is_refused_in_one_line_where_the_device_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserError, match=r"^sampler\.experimental_fp8: got true on cpu, expected"):
        resolve.check_fp8(torch.device("cpu"), torch.bfloat16)
    with pretended():
        gpu = torch.device("cuda", 0)
        with pytest.raises(UserError, match=r"capability 8\.0, expected a GPU of 8\.9 or more"):
            resolve.check_fp8(gpu, torch.bfloat16)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        with pytest.raises(UserError, match="dtype float16, expected bfloat16; set dtype=bfloat16"):
            resolve.check_fp8(gpu, torch.float16)
        resolve.check_fp8(gpu, torch.bfloat16)


def test_the_setting_is_checked_before_anything_is_loaded_and_reaches_the_denoiser(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = [*SHORT, "sampler.experimental_fp8=true", "dtype=bfloat16"]
    missing = [*wanted, "denoiser.path=no/such/folder"]
    with pytest.raises(UserError, match=r"^sampler\.experimental_fp8: got true on cpu"):
        prepare(load_config(DistillConfig, CONFIG, missing))
    monkeypatch.setattr(resolve, "check_fp8", lambda *_: None)
    _, parts = prepare(load_config(DistillConfig, CONFIG, wanted))
    assert isinstance(parts.origin, Denoiser)
    products = [m for m in parts.origin.module.modules() if isinstance(m, Product)]
    assert len(products) == 20 and all(m.fp8_weight is not None for m in products)
