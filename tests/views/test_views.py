"""Views: against torchvision per image, and replayable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms.v2 import functional as tv

from dmkd_fast import InputSpec, Views, ViewSpec
from dmkd_fast.views.ops import views as operator
from dmkd_fast.views.reference import _position, reference_views


def photos(count: int = 3, channels: int = 3, size: int = 40) -> torch.Tensor:
    """Smooth random images, as photos are."""
    torch.manual_seed(0)
    coarse = torch.rand(count, channels, size // 4, size // 4) * 255
    fine = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return fine.clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 40, 40), 40),
        ((3, 5, 30, 28), 30),
        ((0, 0, 40, 40), 16),
        ((8, 2, 31, 37), 17),
        ((10, 10, 12, 9), 28),
    ],
)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("views", [reference_views, operator])
def test_equals_torchvision_with_the_same_crop(
    box: tuple, size: int, flip: bool, views: Callable[..., Tensor]
) -> None:
    """Within 2e-5 of the pixel range: torchvision's own float32 positions are that far off."""
    slots = photos()
    got = views(
        slots,
        torch.tensor([1]),
        torch.tensor([box], dtype=torch.int32),
        torch.tensor([flip]),
        size=size,
        pad=0,
        mean=torch.zeros(3),
        std=torch.ones(3),
        dtype=torch.float32,
    )
    shrinks = [side / size > 1.15 for side in box[2:]]
    expected = tv.resized_crop(
        slots[1].float() / 255, *box, size=[size, size], antialias=any(shrinks)
    )
    if flip:
        expected = tv.hflip(expected)
    torch.testing.assert_close(got[0], expected, rtol=0, atol=2e-5)


def test_moved_crop_shows_black_beyond_the_image() -> None:
    slots = torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)
    got = operator(
        slots,
        torch.tensor([0]),
        torch.tensor([[-1, 2, 4, 4]], dtype=torch.int32),
        torch.tensor([False]),
        size=4,
        pad=2,
        mean=torch.zeros(1),
        std=torch.ones(1),
        dtype=torch.float32,
    )
    expected = torch.zeros(4, 4)
    expected[1:, :2] = 1
    assert torch.equal(got[0, 0], expected)


def make(pad: int = 2, seed: int = 5, **changes: Any) -> Views:
    of_form = {"size", "mean", "std", "dtype", "device"}
    form = {"size": 28, "mean": (0.3,), "std": (0.4,)}
    spec = ViewSpec(**(form | {k: v for k, v in changes.items() if k in of_form}))
    crops = {k: v for k, v in changes.items() if k not in of_form}
    return Views(spec, pad=pad, seed=seed, **crops)


def test_a_view_is_fixed_by_seed_id_and_use() -> None:
    slots = photos(6, 1, 28)
    ids, uses = torch.tensor([40, 41, 40, 42]), torch.tensor([0, 3, 1, 0])
    indices = torch.tensor([2, 3, 2, 5])
    together = make()(slots, indices, ids, uses)
    for row in range(4):
        one = slice(row, row + 1)
        alone = make()(slots, indices[one], ids[one], uses[one])
        assert torch.equal(alone[0], together[row])
    moved = make()(slots.flip(0), 5 - indices, ids, uses)
    assert torch.equal(moved, together)
    assert not torch.equal(make(seed=6)(slots, indices, ids, uses), together)


def test_a_uniform_number_that_rounds_to_one_stays_inside() -> None:
    largest = ((torch.tensor([2**24 - 1]).float() + 0.5) * 2.0**-24).clone()
    assert largest == 1  # 24 bits and a half do not fit float32
    assert _position(largest, torch.tensor([4]), torch.tensor([True])) == 4


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


def test_whole_is_the_normalized_image_in_channels_last() -> None:
    slots = photos(2, 3, 28)
    views = make(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    got = views.whole(slots, torch.tensor([1, 0]))
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    expected = (slots[[1, 0]].float() / 255 - mean) / std
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_crops_are_distributed_as_torchvision_draws_them() -> None:
    """Each number of a crop, by Kolmogorov and Smirnov's distance; also where few crops fit."""
    settings = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}
    count = 4000
    torch.manual_seed(0)
    for height, width in ((256, 256), (90, 200), (60, 300)):
        image = torch.empty(1, height, width)
        theirs = torch.tensor(
            [
                v1.RandomResizedCrop.get_params(
                    image, list(settings["scale"]), list(settings["ratio"])
                )
                for _ in range(count)
            ]
        )
        ids = torch.arange(count)
        views = make(pad=0, size=224, **settings)
        ours, _ = views.parameters(ids, torch.zeros_like(ids), height, width)
        for column in range(4):
            values = torch.cat((ours[:, column], theirs[:, column])).unique()
            below = [(x[:, column] <= values[:, None]).double().mean(1) for x in (ours, theirs)]
            # Exceeded once in a thousand times by equal distributions.
            assert (below[0] - below[1]).abs().max() < 1.95 * (2 / count) ** 0.5, (width, column)


def test_parameters_of_known_views_never_change() -> None:
    """Written down once: a change here breaks every replay."""
    ids, uses = torch.tensor([0, 7, 2**40, 3]), torch.tensor([0, 3, 99, 1])
    views = make(pad=0, size=224, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    boxes, flips = views.parameters(ids, uses, 256, 256)
    assert boxes.tolist() == [
        [51, 64, 159, 133],
        [8, 34, 138, 148],
        [42, 75, 135, 158],
        [12, 2, 200, 245],
    ]
    assert flips.tolist() == [False, False, False, True]
    boxes, flips = make(pad=4, size=32).parameters(ids, uses, 32, 32)
    assert boxes[:, :2].tolist() == [[0, 0], [-4, -2], [-1, 2], [-2, -3]]
    assert flips.tolist() == [False, False, False, True]


def test_compiled_parameters_and_views_have_the_same_bits() -> None:
    torch.compiler.reset()
    slots, ids, uses = photos(6, 1, 28), torch.tensor([40, 41, 40, 42]), torch.tensor([0, 3, 1, 0])
    for views in (make(), make(scale=(0.3, 1.0), ratio=(0.5, 2.0))):
        compiled = torch.compile(views, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(slots, ids % 6, ids, uses), views(slots, ids % 6, ids, uses))


def test_each_network_gets_its_own_size_and_normalisation_of_the_same_crop() -> None:
    slots = photos(4, 3, 40)
    indices, uses = torch.tensor([3, 0, 1]), torch.tensor([0, 1, 2])
    ours = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    views = make(size=32, pad=0, scale=(0.3, 1.0), **ours)
    boxes, flips = views.parameters(indices, uses, 40, 40)
    spec = ViewSpec(size=16, mean=(0.1,) * 3, std=(0.5,) * 3, dtype=torch.bfloat16)
    teacher = views.render(slots, indices, boxes, flips, spec)
    assert teacher.dtype == torch.bfloat16 and teacher.shape == (3, 3, 16, 16)
    alone = make(
        size=16, pad=0, scale=(0.3, 1.0), mean=(0.1,) * 3, std=(0.5,) * 3, dtype=torch.bfloat16
    )
    assert torch.equal(teacher, alone(slots, indices, indices, uses))
    assert torch.equal(
        views.render(slots, indices, boxes, flips), views(slots, indices, indices, uses)
    )
    assert torch.equal(views.whole(slots, indices, spec), alone.whole(slots, indices))


def test_a_size_keeping_crop_of_an_oblong_image_is_all_of_it() -> None:
    ids = torch.arange(500)
    boxes, _ = make(pad=2).parameters(ids, ids, 20, 30)
    assert (boxes[:, 2:] == torch.tensor([20, 30])).all()
    assert boxes[:, :2].unique().tolist() == [-2, -1, 0, 1, 2]


def test_out_is_written_in_place() -> None:
    slots, ids = photos(6, 1, 28), torch.arange(6)
    out = torch.empty(6, 1, 28, 28).to(memory_format=torch.channels_last)
    assert make()(slots, ids, ids, ids, out=out) is out
    assert torch.equal(out, make()(slots, ids, ids, ids))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale": (0.5, 2.0)}, r"scale: got \(0.5, 2.0\)"),
        ({"scale": (0.5, 0.4)}, "low <= high"),
        ({"ratio": (0.0, 1.0)}, "ratio: got"),
        ({"pad": -1}, "pad: got -1, expected 0 to 8192"),
        ({"pad": 8193}, "pad: got 8193"),
        ({"flip": 1.5}, "flip: got 1.5"),
        ({"size": 0}, "size: got 0"),
        ({"std": (0.0,)}, "mean, std: got"),
        ({"mean": (0.1, 0.2)}, "mean, std: got"),
        (
            {"mean": (123.675,), "std": (58.395,)},
            "divide numbers of pixel values in .0, 255. by 255",
        ),
        ({"mean": (0.5,), "std": (58.395,)}, "by 255"),
        ({"mean": (-0.1,)}, "by 255"),
        ({"mean": (float("nan"),)}, "mean: got nan"),
        ({"seed": -1}, "seed: got -1"),
        ({"dtype": torch.int32}, "dtype: got torch.int32"),
        ({"size": 8193}, "size: got 8193"),
        ({"scale": (0.5,)}, "scale: got .0.5,., expected two numbers"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**changes)


def test_means_at_both_ends_of_the_range_are_taken() -> None:
    """timm has means of 0 and 0.5 with standard deviations of 1 and 0.5."""
    for mean, std in ((0.0, 1.0), (1.0, 1.0), (0.5, 0.5)):
        assert make(mean=(mean,), std=(std,)).spec.mean.tolist() == [mean]
        assert InputSpec(size=8, mean=(mean,), std=(std,)).num_channels == 1
    with pytest.raises(ValueError, match="by 255"):
        InputSpec(size=8, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))


def test_uses_that_would_repeat_earlier_views_are_refused() -> None:
    ids = torch.arange(2)
    views = make()
    views.parameters(ids, torch.tensor([0, 2**24 - 1]), 28, 28)
    for use in (2**24, -1):
        with pytest.raises(ValueError, match=f"uses: got {use}, expected 0 to 16777215"):
            views.parameters(ids, torch.tensor([0, use]), 28, 28)
    with pytest.raises(ValueError, match=r"uses: got \(3,\) torch.int64"):
        views.parameters(ids, torch.zeros(3, dtype=torch.int64), 28, 28)


@pytest.mark.parametrize(
    ("height", "width"), [(100, 500), (500, 100), (60, 300), (301, 60), (97, 10)]
)
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.5, 1.0), (1.5, 2.0), (0.3, 0.4), (0.05, 0.1)])
def test_the_spare_crop_is_torchvisions(
    height: int, width: int, ratio: tuple[float, float]
) -> None:
    """No crop fits: with most of the area asked for, each image is cut to the nearest ratio."""
    ids = torch.arange(200)
    views = make(pad=0, size=32, scale=(0.999, 1.0), ratio=ratio)
    ours, _ = views.parameters(ids, torch.zeros_like(ids), height, width)
    image = torch.empty(1, height, width)
    theirs = torch.tensor(
        [v1.RandomResizedCrop.get_params(image, [0.999, 1.0], list(ratio)) for _ in range(50)]
    )
    if not ratio[0] <= width / height <= ratio[1]:
        assert len(theirs.unique(dim=0)) == 1
        assert ours.unique(dim=0).tolist() == theirs[:1].tolist()
