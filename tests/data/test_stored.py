"""Images from disk: the same run as online, exact passes and resume, following, other layouts."""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as vision
from PIL import Image
from shard_files import encode, random_images, write_shards
from small_jobs import build_distiller, fit_until, tiny_sampler

from dmkd_fast import Distiller, LabelStream
from dmkd_fast.data.listing import SourceError
from dmkd_fast.data.sources import FileSource, ShardSource, find_kind, open_files
from dmkd_fast.data.stored import ImageDecoder, StoredImages
from dmkd_fast.runtime.distributed import Ranks
from dmkd_fast.runtime.errors import UserError

Make = Callable[..., Distiller]
SHAPE = (1, 8, 8)


def stored(folder: Path, **changes: Any) -> StoredImages:
    settings: dict[str, Any] = {"ring_images": 64, "show": False}
    return StoredImages(ShardSource(folder), ImageDecoder(SHAPE), **(settings | changes))


def generated(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The images that `make_distiller` makes online."""
    ids = torch.arange(count)
    labels = LabelStream(4).labels_of(ids)
    images = torch.empty((count, *SHAPE), dtype=torch.uint8)
    return tiny_sampler().sample(ids, labels, out=images).numpy(), labels.numpy()


def weights(distiller: Distiller) -> list[torch.Tensor]:
    return [
        *distiller.student.model.state_dict().values(),
        *distiller.student.average.module.state_dict().values(),
    ]


def same(a: Distiller, b: Distiller) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def test_offline_training_is_online_training_bit_for_bit(
    make_distiller: Make, tmp_path: Path
) -> None:
    write_shards(tmp_path / "set", *generated(200), per_shard=48)
    online, from_disk = make_distiller(), make_distiller(images=stored(tmp_path / "set"))
    assert online.fit()["generated_images"] == 160
    from_disk.fit()
    assert same(online, from_disk)
    assert torch.equal(online.ring.images, from_disk.ring.images)
    assert torch.equal(online.ring.ids, from_disk.ring.ids)


@pytest.fixture(scope="module", params=[40, 96])  # fits into the ring of 64; does not
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Distiller]:
    """Shards, and a finished run that has read them."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_shards(folder / "set", *generated(request.param), per_shard=16)
    whole = build_distiller(folder / "run", images=stored(folder / "set"))
    whole.fit()
    return folder / "set", whole


@pytest.mark.parametrize(
    "stop_at",
    [
        pytest.param(1, marks=pytest.mark.slow),
        7,
        pytest.param(23, marks=pytest.mark.slow),
        pytest.param(39, marks=pytest.mark.slow),
    ],
)
def test_resumed_run_ends_like_an_uninterrupted_one(
    make_distiller: Make, undisturbed: tuple[Path, Distiller], stop_at: int
) -> None:
    shards, whole = undisturbed
    broken = make_distiller(images=stored(shards))
    fit_until(broken, stop_at)
    again = make_distiller(run_dir=broken.run_dir, images=stored(shards))
    again.restore()
    again.fit()
    assert same(whole, again) and torch.equal(whole.ring.ids, again.ring.ids)
    assert again.images.state_dict() == whole.images.state_dict()


def test_a_set_that_fits_is_inserted_once_and_drawn_to_the_end(
    make_distiller: Make, tmp_path: Path
) -> None:
    images, labels = random_images(48)
    write_shards(tmp_path / "set", images, labels, 16)
    distiller = make_distiller(num_views=3200, images=stored(tmp_path / "set"))
    totals = distiller.fit()
    ring = distiller.ring
    assert ring.num_inserted == 48 and totals["views"] == 3200  # 4 per insert would be 192
    assert ring.ids[:48].tolist() == list(range(48))
    assert np.array_equal(ring.images[:48].numpy(), images)
    uses = ring.uses[:48]
    assert uses.sum() == 3200 and uses.min() >= 3200 / 48 - 8


def test_every_pass_has_each_image_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    images, labels = random_images(40)
    write_shards(tmp_path, images, labels, 16)
    reader = stored(tmp_path)
    ids, classes = [], []
    for _ in range(25):  # five passes in blocks of 8
        some, their = reader.next_block(8)
        reader.advance(8)
        ids += some.tolist()
        classes += their.tolist()
    assert len(set(ids)) == 200  # never the same id twice, so no view twice
    passes = [[i % 40 for i in ids[k : k + 40]] for k in range(0, 200, 40)]
    assert all(sorted(p) == list(range(40)) for p in passes)
    assert passes[0] == list(range(40)) and len({tuple(p) for p in passes}) == 5
    assert classes == [labels[i % 40] for i in ids]
    other = stored(tmp_path, seed=1)
    other.advance(40)
    assert other.next_block(40)[0].tolist() != ids[40:80]


def test_blocks_cross_the_border_of_passes(tmp_path: Path) -> None:
    images, labels = random_images(10)
    write_shards(tmp_path, images, labels, 4)
    reader = stored(tmp_path)
    ids, classes = reader.next_block(32)
    assert sorted(i % 10 for i in ids[10:20].tolist()) == list(range(10))
    out = torch.empty((32, *SHAPE), dtype=torch.uint8)
    reader.read(ids, classes, out=out)
    assert np.array_equal(out.numpy(), images[ids.numpy() % 10])


def test_following_takes_shards_as_they_come_and_resumes_in_that_order(tmp_path: Path) -> None:
    images, labels = random_images(40)
    write_shards(tmp_path, images, labels, 8, [1])
    reader = stored(tmp_path)
    assert reader.next_block(8)[0].tolist() == list(range(8, 16))
    reader.advance(8)
    write_shards(tmp_path, images, labels, 8, [4])
    assert reader.next_block(8)[0].tolist() == list(range(32, 40))
    reader.advance(4)
    state = reader.state_dict()
    write_shards(tmp_path, images, labels, 8, [0, 2, 3])
    rest = reader.next_block(28)[0].tolist()
    assert rest == [*range(36, 40), *range(8), *range(16, 32)] and not reader.is_exhausted
    again = stored(tmp_path)
    assert again.next_block(8)[0].tolist() == list(range(8))  # what a new run would read first
    again.load_state_dict(state)
    assert again.next_block(28)[0].tolist() == rest
    again.advance(28)
    assert again.is_exhausted


def test_a_follower_waits_only_when_the_limiter_forbids_sampling(
    make_distiller: Make, tmp_path: Path
) -> None:
    images, labels = random_images(160)
    write_shards(tmp_path / "set", images, labels, 16, [0, 1])
    distiller = make_distiller(images=stored(tmp_path / "set", wait_s=60))
    next_block, allowed, waited, wanted = distiller.images.next_block, [], [], threading.Event()

    def watched(count: int) -> Any:
        allowed.append(not distiller.ring.must_insert(distiller.schedule.batch_size))
        if len(allowed) == 3:  # more than there is at the start
            wanted.set()
        started = time.monotonic()
        result = next_block(count)
        waited.append(time.monotonic() - started)
        return result

    distiller.images.next_block = watched  # type: ignore[method-assign]

    def generate() -> None:
        assert wanted.wait(60)
        for number in (5, 2, 3, 9, 8, 4, 7, 6):
            time.sleep(0.05)
            write_shards(tmp_path / "set", images, labels, 16, [number])

    farm = threading.Thread(target=generate)
    farm.start()
    totals = distiller.fit()
    farm.join()
    assert totals["generated_images"] == 160 and totals["views"] == 640
    assert not any(allowed)
    reader = distiller.images
    assert isinstance(reader, StoredImages) and reader.waits
    assert totals["waited_s"] == round(sum(reader.waits), 1)
    assert sum(reader.waits) == pytest.approx(sum(waited), abs=0.5)
    assert reader.source.first_pass is not None
    assert Counter(reader.source.first_pass.tolist()) == Counter(range(160))


def test_a_follower_whose_generators_are_gone_saves_and_says_so(
    make_distiller: Make, tmp_path: Path
) -> None:
    images, labels = random_images(160)
    write_shards(tmp_path / "set", images, labels, 16, [0, 1])
    stuck = make_distiller(images=stored(tmp_path / "set", wait_s=0.6))
    with pytest.raises(SourceError, match=r"32 of 160 images .* none came for 0\.6 s"):
        stuck.fit()
    assert stuck.num_views == 4 * 32
    write_shards(tmp_path / "set", images, labels, 16, range(2, 10))
    again = make_distiller(run_dir=stuck.run_dir, images=stored(tmp_path / "set"))
    whole = make_distiller(images=stored(tmp_path / "set"))
    again.restore()
    again.fit()
    whole.fit()
    assert same(again, whole)


def test_a_damaged_image_stops_the_run_with_a_checkpoint(
    make_distiller: Make, tmp_path: Path
) -> None:
    images, labels = random_images(160)
    write_shards(tmp_path / "set", images, labels, 16)
    broken, whole = (make_distiller(images=stored(tmp_path / "set")) for _ in range(2))
    whole.fit()
    tar = tmp_path / "set" / "shard-000006.tar"
    intact = tar.read_bytes()
    tar.write_bytes(intact.replace(encode(images[99, 0]), encode(images[98, 0])[:-1] + b"x"))
    with pytest.raises(SourceError, match=r"shard-000006\.tar: the bytes of 000000099\.png"):
        broken.fit()
    tar.write_bytes(intact)
    again = make_distiller(run_dir=broken.run_dir, images=stored(tmp_path / "set"))
    again.restore()
    again.fit()
    assert same(again, whole)


def test_an_image_that_one_rank_cannot_read_stops_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank reports a problem; this rank, whose images are intact, stops too."""
    write_shards(tmp_path, *random_images(40), 16)
    problems = ["", "shard-000001.tar: damaged"]
    monkeypatch.setattr(Ranks, "gather", lambda _, text: [text, *problems[1:]])
    ranks = Ranks(world_size=2, control=object())  # type: ignore[arg-type]
    reader, out = stored(tmp_path, ranks=ranks), torch.empty((8, *SHAPE), dtype=torch.uint8)
    ids = torch.arange(8)
    for call in (lambda: reader.next_block(8), lambda: reader.write(ids, ids, out, progress=0.0)):
        with pytest.raises(SourceError, match=r"^rank 1: shard-000001\.tar: damaged"):
            call()
    (rewrite,) = reader.rewrites  # One rank alone makes its damaged blocks again.
    rewrite(ids, ids, out=out)


def test_guard_blocks_are_refused_as_stored_images_are_not_read_ahead(
    make_distiller: Make, tmp_path: Path
) -> None:
    write_shards(tmp_path / "set", *random_images(40), 16)
    with pytest.raises(
        UserError, match=r"^guard_blocks: got 1 with images that are stored or .* expected 0"
    ):
        make_distiller(images=stored(tmp_path / "set"), ring={"guard_blocks": 1})


def test_another_directory_is_no_continuation(tmp_path: Path) -> None:
    images, labels = random_images(40)
    write_shards(tmp_path / "a", images, labels, 8)
    write_shards(tmp_path / "b", images, labels, 8, [0, 1])
    write_shards(tmp_path / "c", images[:39], labels, 8)
    state = stored(tmp_path / "a").state_dict()
    with pytest.raises(SourceError, match="shard 2 is gone"):
        stored(tmp_path / "b").load_state_dict(state)
    with pytest.raises(SourceError, match="another number"):
        stored(tmp_path / "c").load_state_dict(state)
    files = FileSource(tmp_path, ["a.png", "b.png"], [0, 1])
    with pytest.raises(SourceError, match="added, removed or renamed"):
        FileSource(tmp_path, ["a.png", "c.png"], [0, 1]).load_state_dict(files.state_dict())


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
