"""Doubling by phases against doubling, then convolving."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
import torch.nn.functional as F
from compute_dtypes import BOTH
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dmkd_fast.denoisers.upsampling import UpsampleConv, double_by_phases


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (3, 8, 4, 2)])
def test_phases_equal_convolving_the_doubled_image(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(1)
    conv = nn.Conv2d(shape[1], 6, 3, padding=1, bias=bias).double()
    x = torch.randn(shape, dtype=torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        expected = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        torch.testing.assert_close(UpsampleConv(conv)(x), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", BOTH)
def test_a_decoder_keeps_its_images(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    kl = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    for vae in (kl, diffusers.AutoencoderTiny().eval()):
        fast = copy.deepcopy(vae)
        before = sum(isinstance(m, nn.Upsample | Upsample2D) for m in fast.decoder.modules())
        double_by_phases(fast.decoder, Upsample2D)
        made = [m for m in fast.decoder.modules() if isinstance(m, UpsampleConv)]
        assert len(made) == before > 0
        assert not any(isinstance(m, nn.Upsample | Upsample2D) for m in fast.decoder.modules())
        z = torch.randn(2, 4, 8, 8)
        with torch.no_grad():
            exact = copy.deepcopy(vae).double().decode(z.double()).sample
            theirs = vae.to(dtype).decode(z.to(dtype)).sample.double()
            ours = fast.to(dtype).decode(z.to(dtype)).sample.double()
        error, allowed = ((x - exact).square().mean().sqrt() for x in (ours, theirs))
        assert error <= 1.3 * allowed + 1e-6


def test_what_does_not_fit_is_left_alone() -> None:
    net = nn.Sequential(
        nn.Upsample(scale_factor=2),
        nn.Conv2d(3, 3, 1),
        nn.Upsample(scale_factor=3),
        nn.Conv2d(3, 3, 3, padding=1),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(3, 3, 3, padding=1),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
    )
    double_by_phases(net, Upsample2D)
    assert not any(isinstance(m, UpsampleConv) for m in net.modules())


def test_phases_on_cuda_keep_device_dtype_and_layout() -> None:
    """Fake CUDA tensors: nothing is computed, but every operator checks where its inputs are."""
    fast = UpsampleConv(nn.Conv2d(8, 6, 3, padding=1)).half()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for name, value in [*fast.named_parameters()]:
            del fast._parameters[name]
            setattr(fast, name, mode.from_tensor(value.detach()).to("cuda"))
        x = torch.empty(2, 8, 5, 7, dtype=torch.float16, device="cuda")
        got = fast(x.contiguous(memory_format=torch.channels_last))
    assert (got.device.type, got.dtype, got.shape) == ("cuda", torch.float16, (2, 6, 10, 14))
    assert got.is_contiguous(memory_format=torch.channels_last)
