"""Checkpoints: whole or not there, every damage noticed, nothing lost to a full disk."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import restore, save
from dying_os import CountingOs, DyingOs, FailingOs, PowerlessOs
from rings import new_ring
from safetensors.torch import load_file

from dmkd_fast.checkpoint import step_folders
from dmkd_fast.checkpoint.manager import CheckpointManager, Restored
from dmkd_fast.ring.storage import BlockFiles
from dmkd_fast.runtime import files, model_files


class State:
    """A tensor and a number that say together at which step they were."""

    def __init__(self) -> None:
        self.weight, self.count = torch.zeros(700), 0

    def at(self, count: int) -> State:
        self.weight.fill_(count)
        self.count = count
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight.copy_(state["weight"])
        self.count = state["count"]


class SmallRun:
    """A ring of four blocks whose pixels are a function of the id, and a state beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state, self.writer = folder, State(), files.Writer()
        self.ring = new_ring(
            capacity_images=16, image_shape=(1, 4, 4), block_images=4, min_fill_images=4
        )
        self.manager = CheckpointManager(folder / "checkpoints", every_s=0, keep=2)
        self.writer = self.manager.writer
        self.blocks = BlockFiles(self.ring, folder / "blocks", self.writer, remakes=[self.make])
        self.objects = {"ring": self.blocks, "state": self.state}

    def make(self, ids: torch.Tensor, labels: torch.Tensor, *, out: torch.Tensor) -> None:
        out.copy_((ids * 7 + labels)[:, None, None, None].expand_as(out))

    def advance(self, step: int, *, num_blocks: int) -> None:
        for _ in range(num_blocks):
            block = self.ring.reserve()
            ids = torch.arange(4) + self.ring.num_inserted
            self.make(ids, ids % 3, out=block.images)
            self.ring.commit(block, ids=ids, labels=ids % 3)
            self.blocks.append()
        self.state.at(step)

    def save(self) -> Path:
        try:
            return self.manager.finish(self.state.count, self.objects)
        finally:
            self.blocks.drop_unused(lambda: self.manager.describe("ring"))
            self.writer.close()

    def restore(self) -> Restored:
        return self.manager.restore(self.objects)

    def facts(self) -> tuple[int, float, int, int]:
        """Step (twice), images made, their sum: all from one moment, or it is a mix."""
        ids = self.ring.ids[: self.ring.num_filled]
        expected = torch.zeros_like(self.ring.images[: len(ids)])
        if len(ids):
            self.make(ids, self.ring.labels[: len(ids)], out=expected)
        assert torch.equal(self.ring.images[: len(ids)], expected)
        assert self.state.weight.unique().tolist() in ([self.state.count], [0.0])
        total = int(self.ring.images[: len(ids)].long().sum())
        return self.state.count, float(self.state.weight[0]), self.ring.num_inserted, total


def two_checkpoints(folder: Path) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A run saved at steps 1 and 2, with blocks 0-3 and 2-5; what it was then."""
    run = SmallRun(folder)
    run.advance(1, num_blocks=4)
    run.save()
    old = run.facts()
    run.advance(2, num_blocks=2)
    run.save()
    return old, run.facts()


def test_files_are_plain_safetensors_and_sums(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.arange(6).to(dtype).reshape(2, 3) for dtype in model_files.NAMES
    } | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "odd": torch.ones(3).bool()}
    files.write(tmp_path / "all.safetensors", model_files.file_parts(tensors))
    loaded = load_file(tmp_path / "all.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value), name
    path = save(tmp_path, 3, {"state": State().at(3)})
    command = ["sha256sum", "--check", "--strict", step_folders.SUMS]
    assert subprocess.run(command, cwd=path, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    "power",
    [True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["unflushed lost", "unflushed kept"],
)
def test_a_crash_at_any_call_leaves_the_old_state_or_the_new_one(
    tmp_path: Path,
    power: bool,
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record_property("claim", "crash at every I/O call of a save: old or new state, never a mix")
    old, new = two_checkpoints(tmp_path / "counted")
    seen, at, code = [], 0, 9
    while code == 9:
        folder, attic = tmp_path / f"run{at}", tmp_path / f"attic{at}"
        attic.mkdir()
        run = SmallRun(folder)
        run.advance(1, num_blocks=4)
        run.save()
        pid = os.fork()
        if pid == 0:  # Only small copies and file calls from here on: safe after a fork.
            code = 1
            try:
                files.os = PowerlessOs(at, attic) if power else DyingOs(at)  # type: ignore[assignment]
                run.manager.keep = 1
                run.advance(2, num_blocks=2)
                run.save()
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        again = SmallRun(folder)
        assert again.restore().notes == again.blocks.notes == [], at
        seen.append(again.facts())
        assert seen[-1] in (old, new), at
        # The next save works, and sweeps up what the crash left.
        again.advance(3, num_blocks=1)
        again.save()
        assert not list(folder.rglob(".*")), at
        assert SmallRun(folder).restore().step == 3
        at += 1
        shutil.rmtree(folder)
    assert code == 0
    assert seen[0] == old and seen[-1] == new and seen == sorted(seen)
    record_property("cases", at)
    assert at > 25


@pytest.mark.parametrize("error", [errno.ENOSPC, pytest.param(errno.EROFS, marks=pytest.mark.slow)])
def test_a_disk_that_fails_at_any_call_costs_only_the_new_checkpoint(
    tmp_path: Path, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    old, new = two_checkpoints(folder)
    at, failed = 0, True
    while failed:
        shutil.rmtree(folder)
        run = SmallRun(folder)
        run.advance(1, num_blocks=4)
        run.save()
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", FailingOs(at, error))
            run.advance(2, num_blocks=2)
            try:
                run.save()
                failed = False
            except files.SaveError as problem:
                text = str(problem)
                assert os.strerror(error) in text and "\n" not in text and "step-000000002" in text
        again = SmallRun(folder)
        assert again.restore().notes == []
        if failed:
            assert not list(folder.rglob(".*"))
            assert again.facts() == old
            run.save()  # The disk is well again: blocks that failed are written now.
            again = SmallRun(folder)
            again.restore()
        assert again.facts() == new
        at += 1
    assert at > 15


def flip_bit(data: bytearray, chance: random.Random) -> None:
    place = chance.randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8


def truncate(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def zero_page(data: bytearray, chance: random.Random) -> None:
    start = 4096 * chance.randrange(-(-len(data) // 4096))
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))


@pytest.mark.parametrize(
    "count", [20, pytest.param(200, marks=pytest.mark.slow)], ids=lambda n: f"{n}"
)
def test_every_damaged_file_is_noticed_and_the_checkpoint_before_is_used(
    tmp_path: Path, count: int, record_property: Callable[[str, object], None]
) -> None:
    record_property("claim", "damaged checkpoints: all noticed, the one before used, or remade")
    record_property("cases", count)
    whole, folder, chance = tmp_path / "whole", tmp_path / "run", random.Random(count)
    old, new = two_checkpoints(whole)
    names = [f"checkpoints/step-000000002/{name}" for name in step_folders.FILES]
    names += [f"blocks/block-00000000{number}.safetensors" for number in (3, 4)]
    for case in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        path = folder / names[case % len(names)]
        before = path.read_bytes()
        kind = chance.choice([flip_bit, truncate, zero_page, None, "gone"])
        data = bytearray(before)
        if kind is None:  # An older file in its place.
            older = {
                "checkpoints": path.parent.parent / "step-000000001" / path.name,
                "blocks": path.parent / "block-000000001.safetensors",
            }
            data = bytearray(older[path.relative_to(folder).parts[0]].read_bytes())
        elif kind == "gone":
            data = bytearray()
        else:
            while data == before:
                kind(data, chance)
        path.write_bytes(data)
        if kind == "gone":
            path.unlink()
        run = SmallRun(folder)
        notes = run.restore().notes + run.blocks.notes
        assert len(notes) == 1 and path.name in notes[0], (case, notes)
        assert run.facts() == (new if "blocks" in notes[0] else old), case
        # The run goes on, and what it saves next is whole.
        run.advance(3, num_blocks=1)
        run.save()
        again = SmallRun(folder)
        assert again.restore() == (3, []) and again.blocks.notes == []
        assert again.facts() == run.facts()


def test_blocks_that_cannot_be_made_again_send_back_to_a_checkpoint_without_them(
    tmp_path: Path,
) -> None:
    old, _ = two_checkpoints(tmp_path)
    (tmp_path / "blocks/block-000000005.safetensors").unlink()
    run = SmallRun(tmp_path)
    run.blocks.remakes = [lambda ids, labels, *, out: out.fill_(9)]
    notes = run.restore().notes
    assert len(notes) == 1 and "block-000000005.safetensors is missing" in notes[0]
    assert "made again bit for bit" in notes[0] and "step-000000001 is used" in notes[0]
    assert run.facts() == old
    # Both need block 3: then there is nothing to go back to.
    (tmp_path / "blocks/block-000000003.safetensors").unlink()
    run = SmallRun(tmp_path)
    run.blocks.remakes = [lambda ids, labels, *, out: out.fill_(9)]
    with pytest.raises(ValueError, match=r"no whole checkpoint .*block-000000003") as problem:
        run.restore()
    assert "\n" not in str(problem.value)


def test_an_older_checkpoint_in_the_place_of_a_newer_one_is_noticed(tmp_path: Path) -> None:
    old, _ = two_checkpoints(tmp_path)
    newest = tmp_path / "checkpoints" / "step-000000002"
    shutil.rmtree(newest)
    shutil.copytree(newest.with_name("step-000000001"), newest)
    run = SmallRun(tmp_path)
    notes = run.restore().notes
    assert "it is step-000000001 in another place" in notes[0]
    assert run.facts() == old


def test_damaged_checkpoints_stay_until_a_whole_one_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    state = State()
    for step in (1, 2):
        save(folder, step, {"state": state.at(step)})
    intact = (folder / "step-000000001" / step_folders.REST).read_bytes()
    for step in (1, 2):
        (folder / f"step-00000000{step}" / step_folders.REST).write_bytes(b"{}")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        restore(folder, {"state": state})
    assert [p.name for p in sorted(folder.iterdir())] == ["step-000000001", "step-000000002"]
    (folder / "step-000000001" / step_folders.REST).write_bytes(intact)
    assert restore(folder, {"state": state}).step == 1
    hidden = folder / ".step-000000002.damaged"
    assert hidden.is_dir()
    # Later saves count only whole ones, and take the damaged one's name.
    save(folder, 2, {"state": state.at(2)})
    assert [p.name for p in sorted(folder.iterdir())] == ["step-000000001", "step-000000002"]


def test_strides_come_back_as_they_were(tmp_path: Path) -> None:
    base = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    saved = {
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "one_channel": torch.ones(8, 1, 3, 3).as_strided((8, 1, 3, 3), (9, 1, 3, 1)),
        "volume": base[None].contiguous(memory_format=torch.channels_last_3d),
        "transposed": base.permute(3, 1, 0, 2),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
    }
    sparse = {"expanded": torch.ones(3, 1).expand(3, 4), "columns": base[..., ::2]}

    class Holder:
        state: dict[str, Any]

        def state_dict(self) -> dict[str, Any]:
            return saved | sparse

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.state = state

    holder = Holder()
    save(tmp_path, 1, {"holder": holder})
    restore(tmp_path, {"holder": holder})
    for name, value in (saved | sparse).items():
        assert torch.equal(holder.state[name], value), name
        expected = value if name in saved else value.contiguous()
        assert holder.state[name].stride() == expected.stride(), name


def test_a_second_checkpoint_at_a_step_comes_after_the_first(tmp_path: Path) -> None:
    state = State()
    names = [save(tmp_path, 5, {"state": state.at(5)}, keep=20).name for _ in range(12)]
    assert names[:3] == ["step-000000005", "step-000000005.1", "step-000000005.2"]
    state.count = 77
    save(tmp_path, 5, {"state": state}, keep=2)
    again = State()
    restore(tmp_path, {"state": again})
    assert again.count == 77
    for count in range(78, 83):  # The oldest are gone: their names must not come back.
        state.count = count
        save(tmp_path, 5, {"state": state}, keep=2)
        restore(tmp_path, {"state": again})
        assert again.count == count
    left = {"step-000000005.16", "step-000000005.17"}
    assert {p.name for p in tmp_path.iterdir()} == left


def test_other_objects_are_refused_in_one_line(tmp_path: Path) -> None:
    save(tmp_path, 1, {"model": torch.nn.Linear(2, 2)})
    for objects in ({"model": torch.nn.Linear(3, 2)}, {"student": torch.nn.Linear(2, 2)}):
        with pytest.raises(ValueError, match=r"step-000000001: .*resume") as problem:
            restore(tmp_path, objects)
        assert "\n" not in str(problem.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


def test_training_goes_on_while_its_copy_is_written(tmp_path: Path) -> None:
    state, gate = State().at(1), threading.Event()
    manager = CheckpointManager(tmp_path, every_s=0)
    manager.writer.submit(gate.wait)  # A slow disk.
    assert manager.is_due()
    manager.start(1, {"state": state})
    assert not manager.is_due(), "one in flight is enough"
    state.at(2)
    assert not any(tmp_path.iterdir())
    gate.set()
    manager.finish(2, {"state": state})
    manager.writer.close()
    shutil.rmtree(tmp_path / "step-000000002")
    again = State()
    restore(tmp_path, {"state": again})
    assert again.count == 1 and bool((again.weight == 1).all())


def test_the_writer_reports_what_a_job_raised_and_goes_on() -> None:
    before = set(threading.enumerate())
    writer = files.Writer()
    failed, fine = writer.submit(lambda: 1 // 0), writer.submit(lambda: 7)
    with pytest.raises(ZeroDivisionError):
        failed.result()
    assert fine.result() == 7
    writer.close()
    assert set(threading.enumerate()) <= before


def test_bytes_are_flushed_before_names_show(tmp_path: Path, monkeypatch: Any) -> None:
    counting = CountingOs()
    monkeypatch.setattr(files, "os", counting)
    save(tmp_path, 1, {"state": State()})
    calls = counting.calls
    assert calls.count("fsync") == 6  # three files, their folder, and the one around it twice
    assert "fsync" in calls[calls.index("rename") :]
    assert calls[calls.index("rename") - 1] == "fsync"
