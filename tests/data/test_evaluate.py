"""Real test sets: read right, each image counted once, and the same scores as a plain loop."""

from __future__ import annotations

import gzip
import math
import shutil
import struct
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from real_sets import COLOUR, encoded, picture, write_shard
from test_set_cases import CPU, all_of, torchvision_of
from torch import Tensor, nn

from dmkd_fast import InputSpec, measure, open_set
from dmkd_fast.data import test_sets
from dmkd_fast.training import scoring

GREY = InputSpec(size=16, mean=(0.4,), std=(0.3,), interpolation="bicubic")


@pytest.mark.parametrize(
    "spec",
    [
        COLOUR,
        GREY,
        InputSpec(size=17, mean=(0.5,) * 3, std=(0.5,) * 3),
        InputSpec(size=48, mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=0.9, interpolation="bicubic"),
    ],
    ids=lambda s: f"{s.size}-{s.interpolation}",
)
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_images_are_prepared_as_torchvision_prepares_them(
    spec: InputSpec, kind: str, request: pytest.FixtureRequest
) -> None:
    images = open_set(request.getfixturevalue(kind), CPU)
    views, labels = all_of(images, spec)
    assert views.shape == (23, spec.num_channels, spec.size, spec.size)
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert isinstance(images, test_sets.EncodedSet)
    assert labels.tolist() == [item.label for item in images.items]
    expected = torch.stack([torchvision_of(item, spec) for item in images.items])
    levels = (views - expected).abs() * torch.tensor(spec.std)[:, None, None] * 255
    # DALI repeats the outermost pixels where torchvision renormalizes the filter: a few levels in
    # the outermost rows. Elsewhere one level of rounding, a few where bicubic overshoots.
    assert levels.mean() < 0.5
    inner = levels[..., 3:-3, 3:-3]
    assert inner.max() <= (1.01 if spec.interpolation == "bilinear" else 8)


def test_folder_and_shards_hold_the_same_images(folder: Path, shards: Path) -> None:
    counts = []
    for place in (folder, shards):
        views, labels = all_of(open_set(place, CPU), COLOUR)
        keys = sorted(zip(views.double().sum((1, 2, 3)).tolist(), labels.tolist(), strict=True))
        counts.append(keys)
    assert counts[0] == counts[1]


class ByColour(nn.Module):
    """A classifier whose answer depends on every pixel."""

    def __init__(self, channels: int = 3, size: int = 24, num_classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(13)
        self.head = nn.Linear(channels * size * size, num_classes)
        self.norm = nn.BatchNorm1d(num_classes)

    def forward(self, views: Tensor) -> Tensor:
        return self.norm(self.head(views.flatten(1)))


def test_scores_equal_those_of_a_plain_loop_over_pil_images(folder: Path) -> None:
    images, model = open_set(folder, CPU), ByColour()
    found = measure(model, images.batches([COLOUR]), input=COLOUR, num_classes=3)
    assert model.training  # put back
    assert isinstance(images, test_sets.EncodedSet)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(torchvision_of(i, COLOUR)[None]) for i in images.items])
    labels = torch.tensor([i.label for i in images.items])
    margins = logits.sort(dim=1).values[:, -2:].diff(dim=1)
    assert margins.min() > 0.02  # so that a level of rounding cannot turn an answer
    hits = (logits.argmax(1) == labels).double()
    assert found.result()["top1"] == hits.mean().item() and found.num_images == 23
    confidence = logits.softmax(1).amax(1)
    bins = (confidence * 15).long().clamp_max(14)
    gaps = [float((hits - confidence)[bins == b].sum()) for b in range(15)]
    assert found.result()["ece"] == pytest.approx(sum(map(abs, gaps)) / 23, abs=2e-3)
    for label, row in enumerate(found.by_class()):
        mine = labels == label
        assert row == {"images": int(mine.sum()), "top1": hits[mine].mean().item(), "top5": 1.0}


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
def test_each_image_is_counted_once_whatever_the_batch_and_the_ranks(
    folder: Path, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_sets, "batch_images", lambda inputs: 4)  # 23 is no multiple
    images, model = open_set(folder, CPU), ByColour()
    total = scoring.Scores(3)
    seen = []
    for rank in range(world_size):
        part = {"rank": rank, "world_size": world_size}
        if rank < 23:
            seen += all_of(images, COLOUR, **part)[0].double().sum((1, 2, 3)).tolist()
        total.sums += measure(
            model, images.batches([COLOUR], **part), input=COLOUR, num_classes=3
        ).sums  # what an all-reduce does
    whole = measure(model, images.batches([COLOUR]), input=COLOUR, num_classes=3)
    assert total.num_images == len(seen) == len(set(seen)) == 23
    assert total.by_class() == whole.by_class()
    assert total.result() == pytest.approx(whole.result(), abs=1e-6)


def test_networks_of_other_sizes_get_the_same_image_from_one_decoding(folder: Path) -> None:
    other = InputSpec(size=12, mean=(0.1,) * 3, std=(0.9,) * 3)
    images = open_set(folder, CPU)
    together = list(images.batches([COLOUR, other, COLOUR]))
    for spec in (COLOUR, other):
        assert torch.equal(torch.cat([v[spec] for v, _ in together]), all_of(images, spec)[0])


def test_agreement_and_teacher_are_counted_over_batches() -> None:
    torch.manual_seed(0)
    logits, judged, labels = torch.randn(50, 8), torch.randn(50, 8), torch.randint(0, 8, (50,))
    scores = scoring.Scores(8)
    for part in torch.arange(50).split(7):
        scores.add(logits[part], labels[part], judged[part])
    result = scores.result()
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    assert result["top5"] == pytest.approx(top5)
    same = (logits.argmax(1) == judged.argmax(1)).float().mean().item()
    assert result["agreement"] == pytest.approx(same)
    right = (judged.argmax(1) == labels).float().mean().item()
    assert result["teacher_top1"] == pytest.approx(right)
    whole = scoring.Scores(8)
    whole.add(logits, labels, judged)
    assert whole.result() == pytest.approx(result)
    with pytest.raises(ValueError, match=r"model: got logits of shape \(2, 3\).*8 classes"):
        scores.add(torch.zeros(2, 3), labels[:2])


def test_idx_images_are_cut_as_image_files_are(tmp_path: Path) -> None:
    """The same pixels as idx and as PNG: one level of rounding apart at most."""
    pixels = np.stack([np.asarray(picture(s, 40, 40).convert("L")) for s in range(6)])
    for kind, values in (("images-idx3", pixels), ("labels-idx1", np.arange(6, dtype=np.uint8))):
        header = struct.pack(">HBB", 0, 8, values.ndim)
        header += struct.pack(f">{values.ndim}I", *values.shape)
        (tmp_path / f"t10k-{kind}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    for label in range(6):
        (tmp_path / "png" / str(label)).mkdir(parents=True)
        Image.fromarray(pixels[label]).save(tmp_path / "png" / str(label) / "0.png")
    spec = InputSpec(size=24, mean=(0.4,), std=(0.5,), crop_pct=0.8)
    raw, files = (all_of(open_set(p, CPU), spec)[0] for p in (tmp_path, tmp_path / "png"))
    assert ((raw - files) * 0.5 * 255).abs()[..., 2:-2, 2:-2].max() <= 1.01
    same = InputSpec(size=40, mean=(0.4,), std=(0.5,))
    expected = (torch.from_numpy(pixels).float()[:, None] / 255 - 0.4) / 0.5
    assert torch.equal(all_of(open_set(tmp_path, CPU), same)[0], expected)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(31, 33, 28), (33, 31, 28), (30, 35, 29), (31, 40, 31), (29, 29, 28), (32, 47, 32)],
)
def test_the_center_is_cut_where_torchvision_cuts_it(height: int, width: int, size: int) -> None:
    from torchvision.transforms.functional import center_crop

    pixels = torch.arange(2 * height * width).remainder(251).view(2, 1, height, width).byte()
    short = min(height, width)
    spec = InputSpec(size=size, mean=(0.0,), std=(1.0,), crop_pct=size / (short + 0.5))
    assert spec.short_side == short  # so nothing is resized
    views = test_sets.prepare(pixels, spec)
    assert torch.equal((views * 255).round().byte(), center_crop(pixels, [size, size]))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resized_images_have_whole_levels(interpolation: Any) -> None:
    from torchvision.transforms.functional import InterpolationMode, resize

    pixels = torch.randint(
        0, 256, (3, 1, 37, 45), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    spec = InputSpec(size=24, mean=(0.0,), std=(1.0,), interpolation=interpolation)
    levels = test_sets.prepare(pixels, spec) * 255
    assert (levels - levels.round()).abs().max() < 1e-4  # as a decoded file of that size has
    whole = resize(pixels, [24, 29], InterpolationMode(interpolation), antialias=True).float()
    left = round((29 - 24) / 2)
    assert (levels - whole[..., left : left + 24]).abs().max() < 1.001


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_a_set_in_memory_without_overlap(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_sets, "batch_images", lambda inputs: 4)
    values = torch.arange(23)
    images = test_sets.ImageSet(
        images=values.byte()[:, None, None, None].expand(-1, 1, 4, 4),
        labels=values * 3,
        class_names=(),
    )
    spec, seen = InputSpec(size=4, mean=(0.0,), std=(1.0,)), []
    for rank in range(world_size):
        views, labels = all_of(images, spec, rank=rank, world_size=world_size)
        found = (views[:, 0, 0, 0] * 255).round().long()
        assert found.tolist() == list(range(rank, 23, world_size))
        assert torch.equal(labels, found * 3)
        seen += found.tolist()
    assert sorted(seen) == list(range(23))


def test_idx_files_beyond_the_memory_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, shape in (("images-idx3", (50, 40, 40)), ("labels-idx1", (50,))):
        header = struct.pack(">HBB", 0, 8, len(shape)) + struct.pack(f">{len(shape)}I", *shape)
        (tmp_path / f"t10k-{name}-ubyte").write_bytes(header + bytes(math.prod(shape)))
    assert len(open_set(tmp_path, CPU)) == 50
    monkeypatch.setattr(test_sets, "available_bytes", lambda device: 79_999)
    with pytest.raises(ValueError, match="got 80000 bytes, expected at most the 79999 of free"):
        open_set(tmp_path, CPU)
    monkeypatch.setattr(test_sets, "available_bytes", lambda device: 80_000)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] can't allocate memory")

    monkeypatch.setattr(test_sets.torch, "empty", fail)
    with pytest.raises(ValueError, match="images-idx3-ubyte: memory is used up"):
        open_set(tmp_path, CPU)


def test_batches_are_500_small_images_or_as_many_as_fit() -> None:
    for channels, size, count in (
        (1, 28, 500),
        (3, 224, 111),
        (3, 105, 500),
        (3, 106, 497),
        (3, 5000, 1),
    ):
        spec = InputSpec(size=size, mean=(0.5,) * channels, std=(0.5,) * channels)
        assert test_sets.batch_images([GREY, spec]) == count


def test_class_lists_give_the_order(folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "names.txt"
    listed.write_text("cat\nant\nbee\n")
    images = open_set(folder, CPU, classes=listed)
    assert images.class_names == ("cat", "ant", "bee")
    by_path = {i.path: i.label for i in images.items}  # type: ignore[union-attr]
    assert all(("cat", "ant", "bee")[label] in path for path, label in by_path.items())


def mistakes(root: Path, what: str) -> dict[str, Any]:
    """Makes one broken set; returns further arguments of `open_set`."""
    jpeg, _ = encoded(0)
    if what == "loose":
        (root / "a").mkdir()
        (root / "a" / "0.jpg").write_bytes(jpeg)
        (root / "1.jpg").write_bytes(jpeg)
    elif what == "empty class":
        (root / "a").mkdir()
    elif what.startswith("classes"):
        for name in ("a", "b"):
            (root / name).mkdir()
            (root / name / "0.jpg").write_bytes(jpeg)
        names = {"classes missing": "a\nb\nc\n", "classes extra": "a\n", "classes twice": "a\na\n"}
        (root / "list.txt").write_text(names.get(what, ""))
        return {"classes": root / ("none.txt" if what == "classes none" else "list.txt")}
    elif what == "no label":
        write_shard(root / "0.tar", [("0.jpg", jpeg), ("0.cls", b"0"), ("1.jpg", jpeg)])
    elif what == "no image":
        write_shard(root / "0.tar", [("0.jpg", jpeg), ("0.cls", b"0"), ("1.cls", b"1")])
    elif what == "odd label":
        write_shard(root / "0.tar", [("0.jpg", jpeg), ("0.cls", b"ant")])
    elif what == "high label":
        write_shard(root / "0.tar", [("0.jpg", jpeg), ("0.cls", b"9")])
        return {"num_classes": 3}
    elif what == "link":
        with tarfile.open(root / "0.tar", "w") as tar:
            info = tarfile.TarInfo("0.jpg")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
    elif what == "cut tar":
        write_shard(root / "0.tar", [("0.jpg", jpeg * 40), ("0.cls", b"0")])
        data = (root / "0.tar").read_bytes()
        (root / "0.tar").write_bytes(data[:700])
    elif what == "no tar":
        (root / "0.tar").write_bytes(b"this is not a tar" * 99)
    elif what == "file":
        shutil.rmtree(root)
    return {}


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("file", "no such folder"),
        ("nothing", "got no idx files, class folders or .tar shards"),
        ("loose", "1.jpg: got an image without a label"),
        ("empty class", "a: got no images"),
        ("classes missing", "no folder for class 'c', which the list of classes has"),
        ("classes extra", "folder 'b', which the list of classes does not have"),
        ("classes twice", "got 2 lines, 1 of them different"),
        ("classes empty", "got 0 lines"),
        ("classes none", "none.txt: no such file"),
        ("no label", "0.tar: 1: got an image without label"),
        ("no image", "0.tar: 1: got a label without image"),
        ("odd label", "got b'ant', expected a class number"),
        ("high label", "0.cls|got class 9, expected 0 to 2"),
        ("link", "0.jpg: a link or cut short"),
        ("cut tar", "link or cut short|damaged"),
        ("no tar", "0.tar: damaged"),
    ],
)
def test_a_broken_set_ends_in_one_clear_line(what: str, words: str, tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    more = mistakes(root, what)
    with pytest.raises(ValueError, match=words) as raised:
        open_set(root, CPU, **more)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", ["cut jpeg", "garbage", "cut png", "empty"])
def test_the_damaged_image_is_named(damage: str, folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(folder, root)
    data = {
        "cut jpeg": encoded(0)[0][:400],
        "garbage": b"no image" * 50,
        "cut png": encoded(1)[0][:300],
        "empty": b"",
    }[damage]
    (root / "bee" / "010.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=r"bee/010\.jpg: (damaged|not an image|got 0 bytes)"):
        list(open_set(root, CPU).batches([COLOUR]))


def test_networks_and_images_must_agree_on_channels(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"channels: got networks for images with \[1, 3\]"):
        list(open_set(folder, CPU).batches([COLOUR, GREY]))
    flat = test_sets.ImageSet(
        images=torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
        labels=torch.zeros(2, dtype=torch.int64),
        class_names=("a",),
    )
    with pytest.raises(ValueError, match=r"images with \[3\] channels and images with 1"):
        list(flat.batches([COLOUR]))
    five = InputSpec(size=8, mean=(0.5,) * 5, std=(0.5,) * 5)
    with pytest.raises(ValueError, match="5 channels, expected 1 or 3"):
        list(open_set(folder, CPU).batches([five]))


def test_without_dali_test_sets_are_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_set(folder, CPU)
    expected, labels = all_of(images, COLOUR)
    monkeypatch.setitem(sys.modules, "nvidia", None)
    found, same = all_of(images, COLOUR)
    levels = (found - expected).abs() * torch.tensor(COLOUR.std)[:, None, None] * 255
    assert levels.max() < 1.01 and torch.equal(labels, same)


def test_without_pillow_one_line_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ValueError, match=r"takes Pillow .*pip install pillow"):
        list(open_set(folder, CPU).batches([COLOUR]))


def test_float32_is_not_rounded_to_tf32_while_a_classifier_is_measured() -> None:
    seen: list[tuple[str, str]] = []

    class Watched(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append((matmul.fp32_precision, conv.fp32_precision))
            return images.flatten(1)[:, :4]

    cudnn: Any = torch.backends.cudnn
    matmul, conv = torch.backends.cuda.matmul, cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    spec = InputSpec(size=2, mean=(0.5,), std=(0.5,))
    batches = [({spec: torch.zeros(3, 1, 2, 2)}, torch.tensor([0, 1, 2]))]
    try:
        matmul.fp32_precision = conv.fp32_precision = "tf32"
        scoring.measure(Watched(), batches, input=spec, num_classes=4)
        assert seen == [("ieee", "ieee")]
        assert (matmul.fp32_precision, conv.fp32_precision) == ("tf32", "tf32")
    finally:
        matmul.fp32_precision, conv.fp32_precision = before
