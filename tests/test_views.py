"""Views: against torchvision, and replayable."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from dmkd_fast import Views
from dmkd_fast.ops import reference


def photos(count: int = 3, channels: int = 3, size: int = 40) -> torch.Tensor:
    """Smooth random images, as photos are."""
    torch.manual_seed(0)
    coarse = torch.rand(count, channels, size // 4, size // 4) * 255
    fine = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return fine.clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(("box", "size"), [
    ((0, 0, 40, 40), 40), ((3, 5, 30, 28), 30), ((0, 0, 40, 40), 16), ((8, 2, 31, 37), 17),
    ((10, 10, 12, 9), 28),
])  # fmt: skip
@pytest.mark.parametrize("flip", [False, True])
def test_equals_torchvision_with_the_same_crop(box: tuple, size: int, flip: bool) -> None:
    slots = photos()
    got = reference.views(
        slots, torch.tensor([1]), torch.tensor([box], dtype=torch.int32), torch.tensor([flip]),
        size=size, pad=0, mean=torch.zeros(3), std=torch.ones(3), dtype=torch.float32,
    )  # fmt: skip
    shrinks = [side / size > 1.15 for side in box[2:]]
    expected = tv.resized_crop(
        slots[1].float() / 255, *box, size=[size, size], antialias=any(shrinks)
    )
    if flip:
        expected = tv.hflip(expected)
    torch.testing.assert_close(got[0], expected, rtol=0, atol=2e-5)


def test_moved_crop_shows_black_beyond_the_image() -> None:
    slots = torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)
    got = reference.views(
        slots, torch.tensor([0]), torch.tensor([[-1, 2, 4, 4]], dtype=torch.int32), torch.tensor([False]),
        size=4, pad=2, mean=torch.zeros(1), std=torch.ones(1), dtype=torch.float32,
    )  # fmt: skip
    expected = torch.zeros(4, 4)
    expected[1:, :2] = 1
    assert torch.equal(got[0, 0], expected)


def make(**changes: object) -> Views:
    settings: dict[str, object] = {"size": 28, "pad": 2, "mean": (0.3,), "std": (0.4,), "seed": 5}
    return Views(**(settings | changes))  # type: ignore[arg-type]


def test_a_view_is_fixed_by_seed_id_and_use() -> None:
    slots = photos(6, 1, 28)
    ids, uses = torch.tensor([40, 41, 40, 42]), torch.tensor([0, 3, 1, 0])
    indices = torch.tensor([2, 3, 2, 5])
    together = make()(slots, indices, ids, uses)
    for row in range(4):
        one = slice(row, row + 1)
        alone = make()(slots, indices[one], ids[one], uses[one])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-6)
    moved = make()(slots.flip(0), 5 - indices, ids, uses)
    assert torch.equal(moved, together)
    assert not torch.equal(make(seed=6)(slots, indices, ids, uses), together)


def test_pad_and_crop_reaches_every_offset_equally_often() -> None:
    ids = torch.arange(20_000)
    boxes, flips = make().parameters(ids, torch.zeros_like(ids), 28, 28)
    for axis in (0, 1):
        offsets, counts = boxes[:, axis].unique(return_counts=True)
        assert offsets.tolist() == [-2, -1, 0, 1, 2]
        assert (counts - 4000).abs().max() < 5 * (20_000 * 0.2 * 0.8) ** 0.5
    assert abs(flips.float().mean() - 0.5) < 5 * 0.5 / 20_000**0.5


def test_random_resized_crops_stay_inside_with_areas_in_range() -> None:
    ids = torch.arange(5000)
    views = make(pad=0, scale=(0.25, 0.5), ratio=(0.75, 4 / 3))
    boxes, _ = views.parameters(ids, torch.zeros_like(ids), 32, 32)
    top, left, rows, columns = boxes.unbind(1)
    assert top.min() >= 0 and left.min() >= 0
    assert (top + rows).max() <= 32.001 and (left + columns).max() <= 32.001
    area = rows * columns / 1024
    assert 0.23 <= area.min() < 0.27 and 0.48 < area.max() <= 0.53


def test_whole_is_the_normalised_image_in_channels_last() -> None:
    slots = photos(2, 3, 28)
    views = make(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    got = views.whole(slots, torch.tensor([1, 0]))
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    expected = (slots[[1, 0]].float() / 255 - mean) / std
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)
