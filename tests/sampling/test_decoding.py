"""Decoders of large images in tiles, and decoders that overflow in float16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sampler_cases import make
from small_jobs import TinyDenoiser, sampler_from, tiny_sampler
from small_models import dit_folder
from torch import Tensor, nn

from dmkd_fast.config.networks import DenoiserConfig
from dmkd_fast.jobs.images import open_denoiser
from dmkd_fast.runtime import errors
from dmkd_fast.runtime.errors import NotFiniteError, UserError
from dmkd_fast.sampling.sampler import check_broken, wide_dtype
from dmkd_fast.sampling.tiling import TiledDecoder


class Enlarge(nn.Module):
    """A decoder of which each pixel depends on one cell alone, and that records its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, latents: Tensor) -> Tensor:
        self.seen.append(tuple(latents.shape[2:]))
        return latents.repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.mark.parametrize(
    ("cells", "tile"), [((16, 16), 32), ((17, 40), 32), ((33, 9), 64), ((8, 31), 32)], ids=str
)
def test_tiles_of_a_local_decoder_give_the_whole_image(cells: tuple[int, int], tile: int) -> None:
    whole = Enlarge()
    shapes = {"latent_shape": (3, *cells), "image_shape": (3, 4 * cells[0], 4 * cells[1])}
    tiled = TiledDecoder(whole, tile, **shapes)  # type: ignore[arg-type]
    latents = torch.randn(2, 3, *cells)
    torch.testing.assert_close(tiled(latents), whole(latents), rtol=1e-5, atol=1e-6)
    sides = tuple(min(side, tile // 4) for side in cells)
    assert set(whole.seen[:-1]) == {sides}  # one shape, so that it compiles once
    starts = [
        places[i + 1].start - places[i].start
        for places in tiled.places
        for i in range(len(places) - 1)
    ]
    assert max(starts, default=0) <= tile // 4 * 3 // 4


def test_tiles_are_blended_where_they_overlap() -> None:
    class Marks(nn.Module):
        def forward(self, latents: Tensor) -> Tensor:
            return latents.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8)

    tiled = TiledDecoder(Marks(), 8, latent_shape=(1, 8, 14), image_shape=(1, 8, 14))
    latents = torch.zeros(1, 1, 8, 14)
    latents[..., 8:] = 8.0
    row = tiled(latents)[0, 0, 0]
    assert (
        row[:6].eq(row[0]).all()
        and row[8:].eq(row[-1]).all()
        and row[0] < row[6] < row[7] < row[-1]
    )


@pytest.mark.parametrize("tile", [30, 28])
def test_tiles_that_do_not_fit_are_refused(tile: int) -> None:
    with pytest.raises(UserError, match=r"decoder_tile: got .*, expected a multiple of 4, 32"):
        TiledDecoder(Enlarge(), tile, latent_shape=(3, 64, 64), image_shape=(3, 256, 256))


@pytest.mark.slow
def test_the_setting_tiles_larger_images_only(tmp_path: Path) -> None:
    folder = dit_folder(tmp_path / "dit", sample_size=64)  # images of 128 x 128 pixels
    images = []
    for tile in (None, 64, 128):
        config = DenoiserConfig(path=str(folder), decoder_tile=tile)
        opened = open_denoiser(config, torch.device("cpu"))
        assert isinstance(opened.decoder, TiledDecoder) == (tile == 64)
        sampler = sampler_from(**vars(opened), count=1, micro_batch_images=4)
        images.append(make(sampler, torch.arange(4), 1000).int())
    assert torch.equal(images[0], images[2]) and images[0].shape == (4, 3, 128, 128)
    assert 0 < (images[0] - images[1]).abs().float().mean() < 8


def test_tiles_for_a_pixel_model_are_refused() -> None:
    config = DenoiserConfig(path="embedded:fashion_mnist/denoiser", decoder_tile=64)
    with pytest.raises(UserError, match="decoder_tile: got 64, expected none for a model of pix"):
        open_denoiser(config, torch.device("cpu"))


class Overflowing(nn.Module):
    """A decoder whose activations are too large for float16, though its images are not."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.weight = factor, nn.Parameter(torch.ones(1))

    def forward(self, latents: Tensor) -> Tensor:
        return latents * self.weight * self.factor * self.factor / self.factor / self.factor / 3


def half_sampler(factor: float = 1e5**0.5 * 10, **changes: Any) -> Any:
    decoder = Overflowing(factor)
    return tiny_sampler(decoder=decoder, image_shape=(1, 8, 8), dtype=torch.float16, **changes)


def test_a_decoder_that_overflows_in_float16_is_switched(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "_warned", set())
    sampler = half_sampler()
    images = make(sampler, torch.arange(20), 4)
    check_broken(int(sampler.num_broken), sampler.num_made)
    assert sampler.num_made == 32 and images.float().std() > 20
    assert caplog.messages == [
        "decoder: 16 of 16 images overflow in float16; they are decoded in bfloat16"
    ]
    assert sampler.denoiser.decoder.weight.dtype == torch.float16  # other samplers may use it
    again = half_sampler()  # a resumed run begins with other images, and decides alike
    assert torch.equal(make(again, torch.arange(16, 20), 4), images[16:])
    assert len(caplog.messages) == 1


def test_without_bfloat16_the_decoder_runs_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert wide_dtype(torch.device("cuda")) == torch.float32
    assert wide_dtype(torch.device("cpu")) == torch.bfloat16


def test_a_decoder_that_does_not_overflow_stays(caplog: pytest.LogCaptureFixture) -> None:
    sampler = half_sampler(factor=2.0)
    make(sampler, torch.arange(16), 4)
    assert sampler._decoder is sampler.denoiser.decoder and not caplog.messages


def test_a_denoiser_that_overflows_is_still_an_error() -> None:
    module = TinyDenoiser()
    module.mix.weight.data.fill_(6e4)
    sampler = half_sampler(module=module)
    make(sampler, torch.arange(16), 4)
    assert sampler._decoder is sampler.denoiser.decoder
    with pytest.raises(NotFiniteError, match="set dtype=bfloat16"):
        check_broken(int(sampler.num_broken), sampler.num_made)


def test_other_dtypes_make_no_image_to_find_out() -> None:
    calls = []
    sampler = tiny_sampler(decoder=Overflowing(2.0), image_shape=(1, 8, 8), dtype=torch.bfloat16)
    sampler._module.register_forward_pre_hook(lambda *_: calls.append(1))
    make(sampler, torch.arange(16), 4)
    assert len(calls) == sampler.steps.count
