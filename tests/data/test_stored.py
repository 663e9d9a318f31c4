"""Images from shards: the same run as online, exact passes and resume, following."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_files import encode, random_images, write_shards
from small_jobs import build_distiller, fit_until, tiny_sampler

from dmkd_fast import Distiller, LabelStream
from dmkd_fast.data.listing import SourceError
from dmkd_fast.data.sources import FileSource, ShardSource
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
