"""Procedural images are a function of (seed, id), of any shape, all different and never blank."""

from __future__ import annotations

import pytest
import torch

from dmkd_fast import LabelStream
from dmkd_fast.sampling import priors
from dmkd_fast.sampling.priors import PriorImages


def drawn(
    ids: torch.Tensor, shape: tuple[int, int, int] = (1, 28, 28), seed: int = 0
) -> torch.Tensor:
    out = torch.empty(len(ids), *shape, dtype=torch.uint8)
    PriorImages(LabelStream(1, seed=seed), shape).write(ids, ids, out, progress=0.5)
    return out


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 33, 33)])
def test_an_image_is_a_function_of_seed_and_id(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.tensor([5, 0, 2**40 + 3, *range(100, 300)])
    images = drawn(ids, shape)
    for place in (0, 1, 2, 3, 150):
        assert torch.equal(drawn(ids[place : place + 1], shape)[0], images[place])
    monkeypatch.setattr(priors, "TOGETHER", 10**9)
    assert torch.equal(drawn(ids.flip(0), shape).flip(0), images)
    assert (drawn(ids, shape, seed=1) != images).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2), (2, 5, 9), (3, 7, 7), (9, 64, 64)])
def test_images_have_any_number_of_channels_and_any_size(shape: tuple[int, int, int]) -> None:
    images = drawn(torch.arange(40), shape)
    assert images.shape == (40, *shape) and len(images.flatten(1).unique(dim=0)) > 20


def test_images_are_different_and_cover_all_levels() -> None:
    images = drawn(torch.arange(2_000))
    flat = images.flatten(1).float()
    assert len(flat.unique(dim=0)) > 1_990
    assert (flat.amax(1) - flat.amin(1) < 26).float().mean() < 0.05  # a tenth of the levels
    assert 40 < flat.mean() < 140 and images.unique().numel() == 256
    # About half of them are symmetric, half on black.
    mirrored = (images == images.flip(-1)).flatten(1).all(dim=1).float().mean()
    black = ((images == 0).flatten(1).float().mean(1) > 0.05).float().mean()
    assert abs(mirrored - priors.MIRRORED) < 0.05 and 0.4 < black < 0.75


def test_channels_differ_in_color() -> None:
    images = drawn(torch.arange(200), (3, 16, 16)).float()
    assert (images[:, 0] - images[:, 1]).abs().mean() > 20


def test_ranks_take_turns_and_a_state_continues_the_stream() -> None:
    streams = [PriorImages(LabelStream(1, rank=r, world_size=2), (1, 8, 8)) for r in range(2)]
    found = []
    for _ in range(2):
        for stream in streams:
            ids, labels = stream.next_block(3)
            found += ids.tolist()
            assert not labels.any()
            stream.advance(3)
    assert found == list(range(12)) and not streams[0].is_exhausted
    again = PriorImages(LabelStream(1), (1, 8, 8))
    again.load_state_dict(streams[0].state_dict())
    assert again.next_block(1)[0].tolist() == [12]
    (rewrite,) = again.rewrites
    lost = torch.empty(2, 1, 8, 8, dtype=torch.uint8)
    rewrite(torch.tensor([7, 3]), torch.zeros(2, dtype=torch.int64), out=lost)
    assert torch.equal(lost, drawn(torch.tensor([7, 3]), (1, 8, 8)))
