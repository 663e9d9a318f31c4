"""Single image files in place of shards: layouts, scaling, orders, and files that are damaged."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as vision
from PIL import Image
from shard_files import encode, random_images

from dmkd_fast.data.listing import SourceError
from dmkd_fast.data.sources import FileSource, find_kind, open_files
from dmkd_fast.data.stored import ImageDecoder, StoredImages

SHAPE = (1, 8, 8)


def save(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def read_all(source: FileSource, shape: tuple[int, int, int], **changes: Any) -> torch.Tensor:
    reader = StoredImages(source, ImageDecoder(shape, **changes), ring_images=4096, show=False)
    ids = torch.arange(source.num_images)
    out = torch.empty((len(ids), *shape), dtype=torch.uint8)
    return reader.read(ids, ids, out=out)


def files_of(folder: Path, classes: int, names: Sequence[str] = ()) -> FileSource:
    named = tuple(names) or tuple(str(i) for i in range(classes))
    return open_files(folder, find_kind(folder), num_classes=classes, class_names=named)


@pytest.mark.parametrize("channels", [1, 3])
def test_image_folder_is_pixel_equal_to_pillow(tmp_path: Path, channels: int) -> None:
    colors, _ = random_images(12, (9, 7, 3))
    greys = colors[..., 0]
    for i in range(11):  # eleven classes: "10" sorts before "2"
        save(tmp_path / str(i) / "x.png", encode(greys[i] if channels == 1 else colors[i]))
    save(tmp_path / "3" / "y.PNG", encode(greys[11]))
    if channels == 3:
        palette, file = Image.fromarray(colors[0]).quantize(7), io.BytesIO()
        palette.save(file, "PNG")
        save(tmp_path / "4" / "z.png", file.getvalue())
        save(tmp_path / "5" / "z.jpg", encode(colors[1], "JPEG", quality=95))
    source = files_of(tmp_path, 11)
    images = read_all(source, (channels, 9, 7))
    for i in range(source.num_images):
        path = Path(source.name_of(i))
        assert source.labels_of(np.array([i])) == int(path.parent.name)
        with Image.open(path) as picture:
            expected = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
        mine = images[i].permute(1, 2, 0).numpy().reshape(expected.shape)
        assert np.array_equal(mine, expected), path


@pytest.mark.parametrize("below", ["", "a", "s2_st100/part0"])
def test_the_papers_layout_is_read(tmp_path: Path, below: str) -> None:
    images, _ = random_images(6, (8, 8, 3))
    for i in range(6):
        save(tmp_path / below / f"class_{i * 7}_seed_{i}_num_{i % 2}.png", encode(images[i]))
    source = files_of(tmp_path, 100)
    read = read_all(source, (3, 8, 8))
    assert sorted(source.labels_of(np.arange(6))) == [0, 7, 14, 21, 28, 35]
    for i in range(6):
        label = int(source.labels_of(np.array([i]))[0])
        assert np.array_equal(read[i].permute(1, 2, 0).numpy(), images[label // 7])


def test_files_are_shuffled_from_the_first_pass_on(tmp_path: Path) -> None:
    images, _ = random_images(60)
    for i in range(60):
        save(tmp_path / str(i // 20) / f"{i:03d}.png", encode(images[i, 0]))
    reader = StoredImages(files_of(tmp_path, 3), ImageDecoder(SHAPE), ring_images=8, show=False)
    ids, labels = reader.next_block(60)
    assert sorted(ids.tolist()) == list(range(60)) and ids.tolist() != list(range(60))
    assert labels[:20].unique().tolist() == [0, 1, 2]
    reader.advance(60)
    assert sorted(i % 60 for i in reader.next_block(60)[0].tolist()) == list(range(60))


def test_scaling_is_bilinear_and_antialiased_with_a_centre_crop(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pictures = [
        np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
        for size in ((80, 80), (64, 64), (24, 24), (96, 64), (64, 160))
    ]
    for i, pixels in enumerate(pictures):
        save(tmp_path / "0" / f"{i}.png", encode(pixels))
    images = read_all(files_of(tmp_path, 1), (3, 32, 32), resize=True)
    for pixels, mine in zip(pictures, images, strict=True):
        whole = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        scaled = vision.resize(whole, [32], antialias=True)
        expected = vision.center_crop(scaled, [32, 32])
        assert (mine.int() - expected.int()).abs().max() <= 1


def test_images_that_have_the_size_are_not_changed_by_scaling(tmp_path: Path) -> None:
    images, _ = random_images(3, (16, 16))
    for i in range(3):
        save(tmp_path / "0" / f"{i}.png", encode(images[i]))
    read = read_all(files_of(tmp_path, 1), (1, 16, 16), resize=True)
    assert np.array_equal(read[:, 0].numpy(), images)


def test_a_bad_file_is_named_and_the_reader_goes_on(tmp_path: Path) -> None:
    images, _ = random_images(4, (16, 16))
    paths = [tmp_path / "0" / f"{i}.png" for i in range(4)]
    good = [encode(image) for image in images]
    flipped = bytearray(good[2])
    flipped[len(flipped) // 2] ^= 255
    bomb = bytearray(good[2])
    bomb[16:24] = b"\0\1\0\0\0\1\0\0"
    cases = [
        (bytes(flipped), "cannot be decoded"),
        (good[2][:60], "cannot be decoded"),
        (good[2][:20], "expected 1 to"),
        (bytes(bomb), "65536 x 65536"),
        (b"", "got 0 bytes"),
        (b"no picture" * 9, "not an image"),
        (encode(images[0][:9]), "16 x 9 pixels, expected 16 x 16"),
    ]
    for data, words in cases:
        for path, whole in zip(paths, good, strict=True):
            save(path, whole)
        source = files_of(tmp_path, 1)
        reader = StoredImages(source, ImageDecoder((1, 16, 16)), ring_images=9, show=False)
        out, ids = torch.empty((4, 1, 16, 16), dtype=torch.uint8), torch.arange(4)
        paths[2].write_bytes(data)
        with pytest.raises(SourceError, match=words) as error:
            reader.read(ids, ids, out=out)
        assert str(paths[2]) in str(error.value) and "\n" not in str(error.value)
        paths[2].write_bytes(good[2])
        reader.read(ids, ids, out=out)
        assert np.array_equal(out[:, 0].numpy(), images)


@pytest.mark.parametrize(
    ("names", "classes", "class_names", "words"),
    [
        (["0/a.png", "1/a.png"], 3, "", "got 2 class sub-folders, expected 3"),
        (["1/a.png", "2/a.png"], 2, "", "expected the numbers 0 to 1"),
        (["cat/a.png", "dog/a.png"], 2, "cat bird", "for class 'bird', which the test set has"),
        (["cat/a.png", "dog/a.txt"], 1, "", "dog: got no images in a class folder"),
        (["a.png", "b.png"], 2, "", "neither job.json nor"),
        (["class_1_seed_0_num_0.png"], 1, "", "got class 1, expected 0 to 0"),
        (["class_1_seed_0_num_0.png", "other.png"], 9, "", "other.png: expected a file named"),
        (["readme.txt"], 2, "", "neither job.json nor"),
        ([], 2, "", "no such directory"),
    ],
)
def test_classes_that_do_not_fit_are_one_clear_line(
    tmp_path: Path, names: list[str], classes: int, class_names: str, words: str
) -> None:
    images, _ = random_images(1)
    for name in names:
        save(tmp_path / "set" / name, encode(images[0, 0]))
    with pytest.raises(SourceError, match=words) as error:
        files_of(tmp_path / "set", classes, class_names.split())
    assert "\n" not in str(error.value)


def test_named_folders_take_the_order_of_the_class_names(tmp_path: Path) -> None:
    images, _ = random_images(1)
    for name in ("ant", "bee", "cow"):
        save(tmp_path / name / "a.png", encode(images[0, 0]))
    for names, expected in (("cow ant bee", [1, 2, 0]), ("0 1 2", [0, 1, 2])):
        source = files_of(tmp_path, 3, names.split())
        assert source.labels_of(np.arange(3)).tolist() == expected


def test_the_names_of_the_files_are_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, hashed = hashlib.sha256, list[bytes]()

    def noted(data: bytes) -> Any:
        hashed.append(data)
        return own(data)

    monkeypatch.setattr(hashlib, "sha256", noted)
    source = FileSource(tmp_path, ["a.png", "b.png"], [0, 1])
    state = source.state_dict()
    source.load_state_dict(state)
    assert source.state_dict() == state and len(hashed) == 1
    other = FileSource(tmp_path, ["a.png", "c.png"], [0, 1])
    with pytest.raises(SourceError, match="added, removed or renamed"):
        other.load_state_dict(state)
