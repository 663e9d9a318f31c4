"""The stream protocol without a GPU: PyTorch's CUDA sanitizer judges what the ring really issues.

`torch.cuda`'s streams and events are replaced by ones that report to the sanitizer's engine, and a
dispatch mode reports which slots and which of the ring's tensors each operator reads and writes.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rings import new_ring
from torch import Tensor
from torch.cuda._sanitizer import EventHandler
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fake_cuda import pretended
from dmkd_fast import RingBuffer
from dmkd_fast.checkpoint.step_folders import Snapshot
from dmkd_fast.ring.cuda_sync import ProducerStream, SingleStream, streams_for
from dmkd_fast.ring.storage import BlockFiles
from dmkd_fast.runtime.files import Writer

PRODUCER = 1
MEASURES = ("before_write", "before_commit")  # records there only tell the time


class Event:
    count = 0

    def __init__(self, *, enable_timing: bool) -> None:
        Event.count += 1
        self.number = Event.count

    def query(self) -> bool:
        return False


class Log:
    """The engine, the streams, the memory of the producer, and which calls are left out."""

    def __init__(self, leave_out: Callable[[str, int], bool] = lambda site, number: False) -> None:
        self.engine, self.races = EventHandler(), 0
        self.engine._handle_stream_creation(PRODUCER)
        self.current, self.calls, self._leave_out = 0, [], leave_out
        self.names: dict[int, str] = {}
        self.free: list[str] = []
        self.recorded: dict[int, int] = {}  # call -> event
        self.waited: set[int] = set()  # events
        self.again: set[int] = set()  # calls that wait for an event once more
        self.kept: set[int] = set()
        self.devices: list[torch.device | None] = []  # of which the current stream was asked for

    def is_left_out(self, kind: str) -> bool:
        """Counts a wait or record by the function of `ProducerStream` that makes it."""
        frame = sys._getframe(2)
        while "cuda_sync.py" not in frame.f_code.co_filename or frame.f_code.co_name == "_record":
            assert frame.f_back is not None
            frame = frame.f_back
        site = f"{kind} in {frame.f_code.co_name}"
        if kind == "record" and frame.f_code.co_name in MEASURES:
            return False
        self.calls.append(site)
        return self._leave_out(site, len(self.calls) - 1)

    def kernel(self, reads: set[Any], writes: set[Any], what: str) -> None:
        number = {p: hash(p) for p in reads | writes}
        for pointer in number.values():
            if pointer not in self.engine.tensors_accessed.accesses:
                self.engine._handle_memory_allocation(pointer)
        found = self.engine._handle_kernel_launch(
            self.current,
            {number[p] for p in reads - writes},
            {number[p] for p in writes},
            set(),
            what,
            {pointer: [] for pointer in number.values()},
        )
        self.races += len(found)


class Stream:
    def __init__(self, log: Log, number: int) -> None:
        self.log, self.number = log, number

    def record_event(self, event: Event) -> Event:
        self.log.engine._handle_event_creation(event.number)
        if not self.log.is_left_out("record"):
            self.log.engine._handle_event_record(event.number, self.number)
        self.log.recorded.setdefault(len(self.log.calls) - 1, event.number)
        return event

    def wait_event(self, event: Event) -> None:
        if not self.log.is_left_out("wait"):
            self.log.engine._handle_event_wait(event.number, self.number)
        if event.number in self.log.waited:
            self.log.again.add(len(self.log.calls) - 1)
        self.log.waited.add(event.number)


class Kernels(TorchDispatchMode):
    """Reports what each operator does to the ring's tensors and to the producer's memory."""

    def __init__(self, log: Log, ring: RingBuffer) -> None:
        super().__init__()
        self.log, self.images = log, ring.images
        for name in ("labels", "ids", "uses", "stamps", "_retired"):
            log.names[getattr(ring, name).untyped_storage().data_ptr()] = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        reads: set[Any] = set()
        writes: set[Any] = set()
        for argument, value in zip(func._schema.arguments, args, strict=False):
            is_write = argument.alias_info is not None and argument.alias_info.is_write
            if argument.alias_info is not None and not is_write:
                continue  # a view reads nothing
            values = value if isinstance(value, list | tuple) else [value]
            for tensor in (v for v in values if isinstance(v, Tensor)):
                (writes if is_write else reads).update(self._touched(func, tensor, args))
        if reads or writes:
            self.log.kernel(reads, writes, str(func))
        return result

    def _touched(self, func: Any, tensor: Tensor, args: Any) -> set[Any]:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer != self.images.untyped_storage().data_ptr():
            return {self.log.names[pointer]} if pointer in self.log.names else set()
        if func is torch.ops.aten.index.Tensor:
            return {("slot", s) for s in args[1][0].tolist()}
        first = tensor.storage_offset() // self.images.stride(0)
        return {("slot", s) for s in range(first, first + tensor.shape[0])}


@contextmanager
def fake_streams(log: Log, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.cuda with one stream more than the current one."""

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, log.current = log.current, stream.number
        try:
            yield
        finally:
            log.current = before

    def current_stream(device: torch.device | None = None) -> Stream:
        log.devices.append(device)
        return Stream(log, log.current)

    with patch.context() as p:
        # The engine keeps a stack trace for each access, which takes most of its time.
        no_trace = SimpleNamespace(extract=lambda *_, **__: [])
        stub = SimpleNamespace(StackSummary=no_trace, walk_stack=lambda frame: None)
        p.setattr(torch.cuda._sanitizer, "traceback", stub)
        p.setattr(torch.cuda, "Stream", lambda device: Stream(log, PRODUCER))
        p.setattr(torch.cuda, "current_stream", current_stream)
        p.setattr(torch.cuda, "stream", on)
        p.setattr(torch.cuda, "Event", Event)

        def record_stream(tensor: Tensor, stream: Stream) -> None:
            if not log.is_left_out("record_stream"):
                log.kept.add(tensor.untyped_storage().data_ptr())

        p.setattr(Tensor, "record_stream", record_stream)
        yield


class Run:
    """A ring whose producer has a (fake) stream, driven like `Distiller` does it."""

    def __init__(self, *, guard: int = 1, blocks: int = 5, order: str = "shuffled") -> None:
        self.ring = new_ring(
            capacity_images=blocks * 3,
            image_shape=(1, 1, 2),
            block_images=3,
            samples_per_insert=2,
            min_fill_images=3,
            guard_blocks=guard,
            order=order,
            num_classes=4,
            seed=2,
        )
        self.draws: list[Tensor] = []
        self.log: Log | None = None
        self.next_id = 0

    def on_streams(self, log: Log) -> Kernels:
        self.log = log
        log.kernel(set(), {("slot", s) for s in range(self.ring.capacity)}, "zeros")
        guard = self.ring.plan.guard_blocks
        self.ring._streams = ProducerStream(torch.device("cpu"), guard_blocks=guard)
        return Kernels(log, self.ring)

    def write(self, *, then: str = "commit") -> None:
        block = self.ring.reserve()
        with self.ring.producing():
            ids, labels = self._made(1000), self._made(4)
            block.images.copy_((ids % 251).view(3, 1, 1, 1).expand_as(block.images))
        if then == "abort":
            self.ring.abort()
        elif then == "commit":
            self.ring.commit(block, ids=ids, labels=labels)
            self.next_id += 3
        if self.log is not None:
            for tensor in (ids, labels):
                pointer = tensor.untyped_storage().data_ptr()
                name = self.log.names.pop(pointer)
                # The allocator hands memory out again at once, unless another stream was named;
                # then only after that stream's work, as if it were new.
                if pointer not in self.log.kept or then != "commit":
                    self.log.free.append(name)
                self.log.kept.discard(pointer)

    def _made(self, modulus: int) -> Tensor:
        tensor = torch.arange(self.next_id, self.next_id + 3) % modulus
        if self.log is not None:
            Event.count += 1
            memory = self.log.free.pop() if self.log.free else f"memory {Event.count}"
            self.log.names[tensor.untyped_storage().data_ptr()] = memory
            self.log.kernel(set(), {memory}, "make ids or labels")
        return tensor

    def read(self, count: int) -> None:
        draw = self.ring.sample(count)
        pixels = self.ring.images[draw.indices]
        self.ring.release()
        assert torch.equal(pixels[:, 0, 0, 0].long(), draw.ids % 251)
        self.draws += [draw.indices, draw.ids, draw.uses]

    def save(self) -> dict[str, Any]:
        state = self.ring.state_dict()
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}


def random_run(run: Run, seed: int, moves: int) -> None:
    pick = random.Random(seed)
    saved: dict[str, Any] | None = None
    for _ in range(moves):
        move = pick.choice(["write"] * 6 + ["read"] * 8 + ["abort", "save", "load", "save open"])
        if move == "write":
            run.write()
        elif move == "abort":
            run.write(then="abort")
        elif move == "read" and run.ring.num_inserted:
            run.read(pick.randint(1, 9))
        elif move == "save":
            saved = run.save()
        elif move == "save open":
            run.write(then="leave open")
            saved = run.save()
            run.ring.abort()
        elif move == "load" and saved is not None:
            run.write(then="leave open")
            run.ring.load_state_dict(saved)
            run.next_id = run.ring.num_inserted


def check_schedules(count: int, patch: pytest.MonkeyPatch) -> None:
    for seed in range(count):
        settings = {
            "guard": 1 + seed % 3,
            "blocks": 5,
            "order": ("shuffled", "equal", "uniform", "balanced")[seed % 4],
        }
        plain = Run(**settings)  # type: ignore[arg-type]
        random_run(plain, seed, 40)
        log = Log()
        with fake_streams(log, patch):
            run = Run(**settings)  # type: ignore[arg-type]
            with run.on_streams(log):
                random_run(run, seed, 40)
        assert log.races == 0, seed
        assert len(log.calls) > 20
        assert all(torch.equal(a, b) for a, b in zip(plain.draws, run.draws, strict=True))
        for name in ("images", "ids", "labels", "uses"):
            assert torch.equal(getattr(plain.ring, name), getattr(run.ring, name))


def test_random_schedules_have_no_race_and_draw_as_one_stream_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_schedules(16, monkeypatch)


@pytest.mark.slow
def test_a_thousand_schedules_have_no_race(monkeypatch: pytest.MonkeyPatch) -> None:
    check_schedules(1000, monkeypatch)


def dense_run(log: Log, patch: pytest.MonkeyPatch) -> range:
    """Each event is needed here: one gather of everything per block, and no slack.

    Returns:
        Numbers of the calls made after the ring was full and before the last block.
    """
    with fake_streams(log, patch):
        run = Run(guard=1, blocks=4)
        with run.on_streams(log):
            for _ in range(5):
                run.write()
                run.read(run.ring.blocks.num_drawable)
            before = len(log.calls)
            for _ in range(6):
                run.write()
                run.read(run.ring.blocks.num_drawable)
            run.write(then="leave open")
            saved = run.save()
            run.ring.abort()
            run.write()
            run.read(9)
            run.write(then="leave open")
            run.ring.load_state_dict(saved)
            for _ in range(3):
                last = len(log.calls)
                run.write()
                run.read(9)
    return range(before, last)


def test_every_wait_and_record_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Log()
    numbers = dense_run(whole, monkeypatch)
    assert whole.races == 0
    sites = set(whole.calls)
    assert sites == {
        "record in __init__",
        "record in producing",
        "record in after_gather",
        "record_stream in before_commit",
        "wait in before_write",
        "wait in before_commit",
        "record in _restart",
        "wait in join",
    }
    for site in sites:
        without = Log(lambda s, n, site=site: s == site)
        dense_run(without, monkeypatch)
        assert without.races > 0, f"nobody needs: {site}"
    # Each single call counts once the ring is full, but for events that nobody waits for (a gather
    # before a save, which waits for more) and second waits for one (nothing was read in between).
    unused = {n for n, event in whole.recorded.items() if event not in whole.waited}
    singles = [n for n in numbers if n not in unused | whole.again]
    assert len(singles) > 30
    for number in singles:
        without = Log(lambda s, n, number=number: n == number)
        dense_run(without, monkeypatch)
        assert without.races > 0, f"nobody needs call {number}: {whole.calls[number]}"


def test_a_gather_that_was_not_released_stops_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log()
    with fake_streams(log, monkeypatch):
        run = Run()
        with run.on_streams(log):
            run.write()
            run.ring.sample(3)
            with pytest.raises(RuntimeError, match=r"call release\(\) first"):
                run.write()


def test_the_current_stream_is_that_of_the_device_of_the_ring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a ring on a GPU that is not the current one would order the wrong streams."""
    log = Log()
    with fake_streams(log, monkeypatch):
        run = Run()
        with run.on_streams(log):
            random_run(run, 1, 40)
    assert {"wait in join", "record in _restart", "record in after_gather"} < set(log.calls)
    assert set(log.devices) == {torch.device("cpu")}


@pytest.mark.parametrize("kind", ["block files", "checkpoint"])
def test_a_copy_to_the_host_is_waited_for_on_the_device_that_it_comes_from(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams: list[torch.device] = []
    with pretended(), monkeypatch.context() as patch:
        ring, writer = new_ring(device="cuda"), Writer()
        block = ring.reserve()
        ring.commit(block, ids=torch.arange(16).cuda(), labels=torch.zeros(16).long().cuda())
        patch.setattr(torch.cuda, "current_stream", lambda device: device)
        patch.setattr(torch.cuda.Event, "record", lambda _, stream: streams.append(stream))
        if kind == "checkpoint":
            Snapshot(0, {"ring": ring}).wait()
        else:
            BlockFiles(ring, tmp_path, writer, remakes=[]).append()
            writer.close()
    assert streams == [torch.device("cuda", 0)]


def test_the_producer_has_its_own_stream_exactly_on_cuda_with_a_guard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert isinstance(new_ring(guard_blocks=1)._streams, SingleStream)
    with fake_streams(Log(), monkeypatch):
        for device, guard, kind in (
            ("cpu", 0, SingleStream),
            ("cpu", 1, SingleStream),
            ("cuda", 0, SingleStream),
            ("cuda", 1, ProducerStream),
        ):
            assert type(streams_for(torch.device(device), guard_blocks=guard)) is kind


@pytest.mark.parametrize("guard", [1, 3])
def test_a_writer_waits_for_gathers_of_its_own_slots_and_not_for_the_newest(
    guard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots stop being drawn `guard` commits before they are written again."""
    streams: Any = ProducerStream.__new__(ProducerStream)
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    streams._stream = SimpleNamespace(wait_event=waited.append, record_event=lambda event: None)
    streams._waits, streams._was_joined = [], False
    streams._left = deque([0] * guard, maxlen=guard)
    for number in range(1, 8):  # a gather, then a commit, then the next write
        streams._read = number
        streams.after_commit()
        streams.before_write()
    assert waited == [max(0, number - guard + 1) for number in range(1, 8)]


class TimedEvent:
    """An event on a device whose clock is `now`, in seconds."""

    now, unread = 0.0, 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        TimedEvent.unread += 1

    def record(self) -> None:
        self.at = TimedEvent.now

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: TimedEvent) -> float:
        TimedEvent.unread -= 1
        return 1e3 * (end.at - self.at)


def test_without_overlap_a_gpu_measures_the_waits_and_the_host_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = SimpleNamespace(record_event=lambda event: event.record())
    devices: list[torch.device] = []

    def current_stream(device: torch.device) -> Any:
        devices.append(device)
        return stream

    monkeypatch.setattr(torch.cuda, "Event", TimedEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    device = torch.device("cuda", 1)
    streams = streams_for(device, guard_blocks=0)
    for _ in range(200):  # The host takes no time; the device works on what it was given.
        TimedEvent.now += 0.25
        with streams.producing():
            TimedEvent.now += 3
        assert TimedEvent.unread < 80  # Events that have passed do not pile up.
    assert streams.waits_s() == {"producer": 50.0, "consumer": 600.0}
    assert streams.waits_s() == {"producer": 0.0, "consumer": 0.0}
    assert set(devices) == {device}
