"""Mixup and cutmix: against their definitions, distributed as they should be, replayable."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dmkd_fast import Mixer
from dmkd_fast.views.mixing import _beta, _uniforms


def views(count: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(count, 3, 20, 16).to(dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mixup_is_the_weighted_mean_with_the_partner(dtype: torch.dtype) -> None:
    mixer, batch = Mixer(mixup_alpha=0.8, seed=3), views(dtype=dtype)
    before = batch.clone()
    for step in range(5):
        mixed, partner, share = mixer(batch, step=step)
        expected = share * batch.double() + (1 - share) * batch.double()[partner]
        limit = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(mixed.double(), expected, rtol=limit, atol=limit)
        assert mixed.dtype == dtype and mixed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, before)


def test_cutmix_pastes_the_partners_square_and_counts_its_pixels() -> None:
    mixer, batch = Mixer(cutmix_alpha=1.0, seed=3), views()
    squares = set()
    for step in range(50):
        mixed, partner, share = mixer(batch, step=step)
        again, square = mixer.parameters(step, 20, 16)
        assert square is not None and again == share
        top, bottom, left, right = square
        inside = torch.zeros(20, 16, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(mixed, torch.where(inside, batch[partner], batch))
        assert share == pytest.approx(1 - inside.float().mean().item(), abs=1e-6)
        assert mixed.is_contiguous(memory_format=torch.channels_last)
        squares.add(square)
    assert len(squares) > 40


def test_cutmix_squares_are_those_of_the_paper() -> None:
    """As torchvision's CutMix draws them: centre anywhere, side sqrt(1 - lambda), cut off."""
    mixer = Mixer(cutmix_alpha=1.0)
    drawn = [mixer.parameters(step, 224, 224) for step in range(4000)]
    shares = np.array([share for share, _ in drawn])
    rng = np.random.default_rng(0)
    lam, places = rng.uniform(size=4000), rng.integers(0, 224, (4000, 2))
    half = (0.5 * np.sqrt(1 - lam) * 224).astype(int)[:, None]
    cut = np.clip(places + half, 0, 224) - np.clip(places - half, 0, 224)
    assert distance(shares, 1 - cut.prod(1) / 224**2) < 0.045


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov and Smirnov's: 4,000 samples each exceed 0.043 once in a thousand times."""
    grid = np.concatenate((a, b))
    below = [np.searchsorted(np.sort(x), grid, side="right") / len(x) for x in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.8, 1.0, 2.0, 20.0])
def test_shares_follow_the_beta_distribution(alpha: float) -> None:
    ours = np.array([_beta(alpha, _uniforms(7, step)) for step in range(4000)])
    assert distance(ours, np.random.default_rng(1).beta(alpha, alpha, 4000)) < 0.045
    assert (ours >= 0).all() and (ours <= 1).all()


def test_partners_are_a_fresh_uniform_permutation_each_step() -> None:
    mixer, cpu = Mixer(mixup_alpha=1.0), torch.device("cpu")
    counts = torch.zeros(5, 5)
    for step in range(3000):
        partner = mixer.partners(step, 5, cpu)
        assert partner.sort().values.tolist() == [0, 1, 2, 3, 4]
        counts[torch.arange(5), partner] += 1
    assert (counts - 600).abs().max() < 5 * (3000 * 0.2 * 0.8) ** 0.5


def test_a_step_is_replayed_exactly_and_differs_from_others() -> None:
    batch = views()
    one = Mixer(mixup_alpha=0.4, cutmix_alpha=1.0, seed=2)(batch, step=2**40)
    two = Mixer(mixup_alpha=0.4, cutmix_alpha=1.0, seed=2)(batch, step=2**40)
    assert torch.equal(one.views, two.views) and torch.equal(one.partner, two.partner)
    assert one.lam == two.lam
    for other, step in ((2, 2**40 + 1), (2, 0), (3, 2**40)):
        mixer = Mixer(mixup_alpha=0.4, cutmix_alpha=1.0, seed=other)
        assert mixer(batch, step=step).lam != one.lam


def test_with_both_each_is_used_half_of_the_time() -> None:
    mixer = Mixer(mixup_alpha=0.4, cutmix_alpha=1.0)
    cuts = sum(mixer.parameters(step, 8, 8)[1] is not None for step in range(4000))
    assert abs(cuts - 2000) < 5 * 4000**0.5 / 2


def test_host_and_device_draw_from_one_generator_without_sharing_numbers() -> None:
    from dmkd_fast.rng import philox

    numbers = _uniforms(9, 5)
    host = torch.tensor([next(numbers) for _ in range(8)])
    steps = torch.tensor([5])
    assert torch.equal(host, philox.uniform(9, steps, step=1, stream=philox.STREAM_MIX, count=8)[0])
    assert not torch.equal(
        host, philox.uniform(9, steps, step=0, stream=philox.STREAM_MIX, count=8)[0]
    )


@pytest.mark.parametrize("alphas", [(0.0, 0.0), (-1.0, 0.0), (0.5, float("nan"))])
def test_bad_alphas_are_refused(alphas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"(mixup|cutmix)_alpha: got"):
        Mixer(mixup_alpha=alphas[0], cutmix_alpha=alphas[1])


def test_an_empty_batch_stays_empty() -> None:
    assert Mixer(mixup_alpha=1.0)(views(0), step=1).views.shape == (0, 3, 20, 16)


def test_mixing_on_cuda_keeps_device_and_dtype() -> None:
    """Fake CUDA tensors: nothing is computed, but nothing may read or leave the device."""
    for settings in ({"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}):
        with FakeTensorMode(allow_non_fake_inputs=True):
            batch = torch.empty(6, 3, 20, 16, dtype=torch.float16, device="cuda")
            mixed, partner, _ = Mixer(**settings, seed=3)(batch, step=4)
        assert mixed.device.type == partner.device.type == "cuda"
        assert mixed.dtype == torch.float16 and mixed.shape == batch.shape


def test_squares_reach_as_far_to_every_side() -> None:
    """arXiv 1905.04899's code: from center - half to center + half, then cut off at the edges."""
    whole = 0
    for step in range(400):
        _, square = Mixer(cutmix_alpha=1.0, seed=4).parameters(step, 40, 31)
        assert square is not None
        for low, high, side in ((*square[:2], 40), (*square[2:], 31)):
            assert 0 <= low <= high <= side
            if low > 0 and high < side:
                assert (high - low) % 2 == 0
                whole += 1
    assert whole > 100


def test_another_seed_gives_other_partners() -> None:
    one, other = (
        torch.stack(
            [Mixer(mixup_alpha=1.0, seed=s).partners(i, 16, torch.device("cpu")) for i in range(4)]
        )
        for s in (0, 1)
    )
    assert not torch.equal(one, other)
