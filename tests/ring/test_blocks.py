"""Block files of the ring: written once, kept while somebody needs them, made again if damaged."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dying_os import FailingOs
from rings import new_ring
from safetensors.torch import load_file
from small_jobs import tiny_sampler

from dmkd_fast import LabelStream
from dmkd_fast.checkpoint import step_folders
from dmkd_fast.checkpoint.manager import CheckpointManager, Restored
from dmkd_fast.ring.storage import BlockFiles
from dmkd_fast.runtime import files


class Made:
    """A ring of four blocks of 16, filled by a sampler as a run fills it."""

    def __init__(self, folder: Path) -> None:
        self.ring = new_ring()
        self.sampler, self.labels = tiny_sampler(), LabelStream(4)
        self.manager = CheckpointManager(folder / "checkpoints", every_s=0)
        self.writer = self.manager.writer
        self.blocks = BlockFiles(
            self.ring, folder / "blocks", self.writer, remakes=[self.sampler.sample]
        )

    def add(self, count: int) -> None:
        for _ in range(count):
            block = self.ring.reserve()
            ids, labels = self.labels.peek(16)
            self.sampler.sample(ids, labels, out=block.images)
            self.ring.commit(block, ids=ids, labels=labels)
            self.labels.advance(16)
            self.blocks.append()

    def save(self, step: int) -> Path:
        path = self.manager.finish(step, {"ring": self.blocks, "labels": self.labels})
        self.blocks.drop_unused(lambda: self.manager.describe("ring"))
        self.writer.close()
        return path

    def restore(self) -> Restored:
        return self.manager.restore({"ring": self.blocks, "labels": self.labels})


@pytest.fixture
def make(tmp_path: Path) -> Callable[[], Made]:
    return lambda: Made(tmp_path)


def numbers(folder: Path) -> list[int]:
    return sorted(int(p.stem.removeprefix("block-")) for p in (folder / "blocks").glob("block-*"))


def test_each_block_is_written_once_and_holds_its_images(
    tmp_path: Path, make: Callable[[], Made]
) -> None:
    run = make()
    run.add(3)
    run.save(1)
    paths = sorted((tmp_path / "blocks").iterdir())
    before = [(p.stat().st_ino, p.stat().st_mtime_ns) for p in paths]
    path = run.save(2)
    assert [(p.stat().st_ino, p.stat().st_mtime_ns) for p in paths] == before
    for number, file in enumerate(paths):
        images = load_file(file)["images"]
        assert torch.equal(images, run.ring.images[16 * number : 16 * (number + 1)])
    # The checkpoint itself holds no pixels: 64 x 64 bytes would show.
    assert not any("images" in name for name in load_file(path / step_folders.TENSORS))


def test_files_stay_while_the_ring_or_a_checkpoint_needs_them(
    tmp_path: Path, make: Callable[[], Made]
) -> None:
    run = make()
    run.add(4)
    run.save(1)
    run.add(6)  # 4 and 5 come and go between two checkpoints.
    run.writer.close()
    assert numbers(tmp_path) == [0, 1, 2, 3, 6, 7, 8, 9]
    run.save(2)
    assert numbers(tmp_path) == [0, 1, 2, 3, 6, 7, 8, 9]
    run.add(1)
    run.save(3)  # The first checkpoint goes, and its blocks with it.
    assert numbers(tmp_path) == [6, 7, 8, 9, 10]
    # A killed run leaves files of blocks that its checkpoint does not know.
    run.add(2)
    run.writer.close()
    again = make()
    assert again.restore() == (3, [])
    assert again.ring.num_inserted == 11 * 16
    again.add(1)
    again.save(4)
    assert numbers(tmp_path) == [7, 8, 9, 10, 11]
    assert torch.equal(again.ring.images[48:], run.ring.images[48:])


def test_a_damaged_block_is_made_again_to_the_bit(tmp_path: Path, make: Callable[[], Made]) -> None:
    run = make()
    run.add(6)
    run.save(1)
    images = run.ring.images.clone()
    path = tmp_path / "blocks" / "block-000000003.safetensors"
    intact = path.read_bytes()
    path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 16]))
    again = make()
    assert again.restore() == (1, [])
    assert len(again.blocks.notes) == 1 and path.name in again.blocks.notes[0]
    assert torch.equal(again.ring.images, images)
    again.save(2)
    assert path.read_bytes() == intact


def test_a_half_overwritten_block_is_not_named(tmp_path: Path, make: Callable[[], Made]) -> None:
    run = make()
    run.add(4)
    run.ring.reserve().images[3:].fill_(77)
    run.ring.abort()
    run.save(1)
    again = make()
    again.restore()
    with pytest.raises(RuntimeError, match="half written"):
        again.ring.sample(4)
    again.add(1)
    run.add(1)
    assert torch.equal(again.ring.images, run.ring.images)
    assert torch.equal(again.ring.sample(64).indices, run.ring.sample(64).indices)


def test_a_block_that_could_not_be_written_is_tried_again(
    tmp_path: Path, make: Callable[[], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make()
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", FailingOs(0, errno.ENOSPC))
        run.add(3)
        with pytest.raises(files.SaveError, match="No space left"):
            run.save(1)
    assert not list(tmp_path.rglob("*block-*"))
    run.save(1)
    again = make()
    assert again.restore() == (1, [])
    assert torch.equal(again.ring.images, run.ring.images)


def test_a_resume_leaves_the_files_alone_whose_images_it_did_not_load(
    tmp_path: Path, make: Callable[[], Made]
) -> None:
    """With two guard blocks, block 2 is not in the newer checkpoint, but in the older one."""

    def guarded() -> Made:
        run = make()
        run.ring = run.blocks.ring = new_ring(guard_blocks=2)
        return run

    run = guarded()
    run.add(4)
    run.save(1)
    run.add(1)
    run.save(2)
    path = tmp_path / "blocks" / "block-000000002.safetensors"
    intact = path.read_bytes()
    again = guarded()
    assert again.restore() == (2, [])
    again.add(1)
    again.writer.close()
    assert path.read_bytes() == intact


def test_another_ring_is_refused(make: Callable[[], Made]) -> None:
    run = make()
    run.add(2)
    run.save(1)
    other = make()
    other.ring = new_ring(capacity_images=128)
    other.blocks.ring = other.ring
    with pytest.raises(ValueError, match=r"ring does not fit .*\[16, 64, 1, 8, 8\]"):
        other.restore()


def test_a_damaged_block_of_a_later_phase_is_made_again_by_its_sampler(
    tmp_path: Path, make: Callable[[], Made]
) -> None:
    late = tiny_sampler(count=1, scale=1.0)
    run = make()
    run.add(2)
    run.sampler = late
    run.add(2)
    run.save(1)
    path = tmp_path / "blocks" / "block-000000003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    alone = make()
    with pytest.raises(ValueError, match="could not be made again"):
        alone.restore()
    again = make()
    again.blocks.remakes = [again.sampler.sample, late.sample]
    assert len(again.restore().notes) == 0 and len(again.blocks.notes) == 1
    assert torch.equal(again.ring.images, run.ring.images)
