"""Coordinate the processes (ranks) that train one student together.

`torchrun` starts the processes and sets their ranks in the environment. Each rank has its own
sampler, ring and teacher; only the gradients of the student are shared. Ranks on one machine meet
on loopback, and nothing that they open can be reached from outside.

Control messages are tensors in a gloo group. `gather` exchanges whole texts where a wait does not
matter. `Turns` exchanges one byte per question between steps, and reads it one turn later.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, TCPStore

from dmkd_fast.runtime.errors import UserError, invalid, one_line

LOOPBACK, AGREED = "127.0.0.1", "raised on all ranks"
# For a peer that hangs (a dead one closes its connections and is noticed at once). Long enough for
# the other ranks to wait while one of them compiles.
TIMEOUT = timedelta(seconds=600)
_GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux


class LostRankError(RuntimeError):
    """Error for a rank whose peer has ended or hangs; the message is one line for the user."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Position of this process among the processes of its run; by default the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank among the processes of this machine; also the number of its CUDA device."""
    local_world_size: int = 1
    """Number of processes on this machine."""
    restarts: int = 0
    """How often torchrun has restarted all processes."""
    launch: str = ""
    """Text that identifies one torchrun: equal in all its processes, restarted ones included."""
    control: dist.ProcessGroup | None = field(default=None, repr=False)
    """Process group of the control messages; None for a single process."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the results of the whole run and prints messages."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """Derive a seed for this rank; rank 0 keeps the given seed."""
        return (seed + self.rank * 0x9E3779B97F4A7C15) % 2**63

    def folder(self, folder: Path) -> Path:
        """Return the folder for the files of this rank; for rank 0 it is the given folder."""
        return folder if self.is_first else folder / f"rank-{self.rank}"

    def per_rank(self, name: str, count: int, *, unit: int = 1) -> int:
        """Divide a number equally among the ranks, and return the number of one rank.

        Args:
            name: Name of the setting, for the message.
            count: Number for the whole run.
            unit: Number of which the result must be a multiple.

        Raises:
            UserError: `count` cannot be divided in this way.
        """
        whole = self.world_size * unit
        if count % whole:
            blocks = f" blocks of {unit}" if unit > 1 else ""
            what = f"{count} with {self.world_size} ranks"
            expected = f"a multiple of {whole}, so that all have as many{blocks}"
            raise invalid(name, what, expected, "change it or --nproc-per-node")
        return count // self.world_size

    def gather(self, text: str) -> list[str]:
        """Return the texts of all ranks, in rank order; every rank must call this."""
        if self.control is None:
            return [text]
        data = torch.frombuffer(
            bytearray(text.encode("utf-8", "surrogateescape") or b"\0"), dtype=torch.uint8
        )
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        with _lost_peer():
            dist.all_gather(lengths, torch.tensor([len(data)]), group=self.control)
            longest = max(int(length) for length in lengths)
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(data)] = data
            found = [torch.empty_like(padded) for _ in range(self.world_size)]
            dist.all_gather(found, padded, group=self.control)
        pairs = zip(found, lengths, strict=True)
        return [
            bytes(t[: int(n)].tolist()).rstrip(b"\0").decode("utf-8", "surrogateescape")
            for t, n in pairs
        ]

    @contextlib.contextmanager
    def agreed(self, kind: type[UserError] = UserError) -> Iterator[None]:
        """Raise an error on every rank if a UserError or OSError was raised inside on any rank.

        At the end of the block, all ranks wait for each other.

        Args:
            kind: Class of the error to raise.
        """
        if self.control is None:
            yield
            return
        problem = ""
        try:
            yield
        except (UserError, OSError) as error:
            problem = str(error) or type(error).__name__
        problems = self.gather(problem)
        for rank, text in enumerate(problems):
            if text:
                raised = kind(f"rank {rank}: {text}" if rank else text)
                raised.add_note(AGREED)
                raise raised

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, on the CPU."""
        values = values.detach().cpu()
        if self.control is not None:
            values = values.clone()
            with _lost_peer():
                dist.all_reduce(values, group=self.control)
        return values

    def elsewhere(self, value: float) -> float:
        """Return the sum of the other ranks' values."""
        if self.control is None:
            return 0.0
        return float(self.total(torch.tensor(value, dtype=torch.float64))) - value

    def follow_first(self, tensors: list[Tensor]) -> None:
        """Overwrite tensors, on any device, with their values on rank 0."""
        if self.control is None:
            return
        for tensor in tensors:
            copy = tensor.detach().cpu().contiguous()
            with _lost_peer():
                dist.broadcast(copy, src=0, group=self.control)
            tensor.copy_(copy)

    def parallel(self, module: nn.Module, device: torch.device) -> nn.Module:
        """Wrap a module so that its gradients are averaged over all ranks.

        Parameters are copied from rank 0 once, and buffers before each forward. In a single
        process, or without trainable parameters, the module is returned unchanged.
        """
        if self.control is None or not any(p.requires_grad for p in module.parameters()):
            return module
        group = dist.new_group(backend="nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        # A first convolution on gray images triggers it: its strides are ambiguous, not wrong.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return nn.parallel.DistributedDataParallel(module, process_group=group)


ALONE = Ranks()


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What all ranks do now."""

    save: bool
    """Whether to write a checkpoint."""
    stop: bool
    """Whether to end training."""
    failed: bool
    """Whether some rank could not write the last checkpoint."""


class Turns:
    """Make decisions on all ranks at the same step or block, without waiting for each other.

    At each turn every rank reports its state. At the next turn, all ranks act on what any rank had
    reported. A single process acts on its current state.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._asked: tuple[Tensor, dist.Work] | None = None
        self._has_saved = False

    def next(self, *, due: bool, busy: bool, failed: bool, stop: bool) -> Decision:
        """Report the state of this rank, and return what all ranks do now.

        Args:
            due: Whether it is time for a checkpoint.
            busy: Whether this rank is still writing a checkpoint.
            failed: Whether this rank could not write a checkpoint.
            stop: Whether this process was asked to stop.
        """
        control = self._ranks.control
        if control is None:
            return Decision(save=due, stop=stop, failed=failed)
        seen = self._answers()
        # Reports of the turn that started a checkpoint are older, and must not start another one.
        save = seen[0] and not (seen[1] or seen[2] or seen[3] or self._has_saved)
        self._has_saved = save
        mine = torch.tensor([due, busy, failed, stop], dtype=torch.uint8)
        with _lost_peer():
            work = dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=control, async_op=True)
        assert work is not None
        self._asked = (mine, work)
        return Decision(save=save, stop=seen[3], failed=seen[2])

    def end(self) -> None:
        """Wait for the reports that are still in transit."""
        self._answers()

    def _answers(self) -> list[bool]:
        if self._asked is None:
            return [False] * 4
        (answers, work), self._asked = self._asked, None
        with _lost_peer():
            work.wait()
        return [bool(answer) for answer in answers.tolist()]


def read() -> Ranks:
    """Read the ranks from the environment that torchrun sets, without opening connections."""
    env = os.environ
    if "WORLD_SIZE" not in env or "RANK" not in env:
        return ALONE
    world_size = int(env["WORLD_SIZE"])
    local = int(env.get("LOCAL_WORLD_SIZE", "1"))
    return Ranks(
        rank=int(env["RANK"]),
        world_size=world_size,
        local_rank=int(env.get("LOCAL_RANK", "0")),
        local_world_size=local,
        restarts=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
        launch=_parent() if local == world_size else "run " + env.get("TORCHELASTIC_RUN_ID", ""),
    )


def join() -> Ranks:
    """Connect to the other processes that torchrun has started, if any."""
    ranks = read()
    if ranks.world_size == 1:
        return ranks
    if ranks.local_world_size == ranks.world_size:
        for library in ("GLOO", "NCCL"):  # by default they use the first active interface
            os.environ[f"{library}_SOCKET_IFNAME"] = "lo"
        store = PrefixStore(f"dmkd-{ranks.restarts}", _local_store(ranks))
        dist.init_process_group(
            "gloo", store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=TIMEOUT
        )
    else:
        if (interface := _interface_to(os.environ["MASTER_ADDR"])) is not None:
            for library in ("GLOO", "NCCL"):
                os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface)
        dist.init_process_group("gloo", timeout=TIMEOUT)
    return replace(ranks, control=dist.group.WORLD)


def is_agreed(error: BaseException | None) -> bool:
    """Return whether `agreed` raised this error, or one in its context, on all ranks."""
    while error is not None and AGREED not in getattr(error, "__notes__", ()):
        error = error.__context__
    return error is not None


def use_device(ranks: Ranks, name: str) -> None:
    """Make the CUDA device of this rank the current one; call it before `resolve_device`.

    Args:
        ranks: Position of this process among those of its machine.
        name: Setting `device`: auto, cpu or cuda.

    Raises:
        UserError: There are fewer devices than ranks.
    """
    if name != "cpu" and ranks.local_world_size > 1 and torch.cuda.is_available():
        count = torch.cuda.device_count()
        if ranks.local_world_size > count:
            expected = f"at most the {count} CUDA devices of this machine"
            fix = "lower it or set device=cpu"
            raise invalid("--nproc-per-node", ranks.local_world_size, expected, fix)
        torch.cuda.set_device(ranks.local_rank)


def end_process(code: int) -> NoReturn:
    """Flush stdout and stderr, and end this process at once.

    The normal exit takes Python apart while gloo's threads still run, which sometimes aborts.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def listener(port: int, *, backlog: int) -> socket.socket:
    """Return a socket that listens on loopback only.

    Args:
        port: Port; 0 for any free one.
        backlog: Number of connections that may wait.
    """
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((LOOPBACK, port))
    server.listen(backlog)
    return server


def _local_store(ranks: Ranks) -> TCPStore:
    """Open the store in which the ranks of one machine find each other."""
    port = int(os.environ["MASTER_PORT"])
    fd: int | None = None
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if ranks.is_first and not is_served:
        # By default the store listens on all interfaces, whatever host name it is given.
        fd = listener(port, backlog=ranks.world_size).detach()
    extra: dict[str, Any] = {} if fd is None else {"master_listen_fd": fd}
    return TCPStore(
        LOOPBACK, port, ranks.world_size, fd is not None, TIMEOUT, wait_for_workers=False, **extra
    )


def _interface_to(host: str) -> str | None:
    """Return the network interface that leads to a host; None if the system does not tell.

    Libraries would take the address of this machine's own name, which often is loopback.
    """
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # Sends nothing; chooses the source address.
            address = socket.inet_aton(probe.getsockname()[0])
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                with contextlib.suppress(OSError):  # This interface has no address.
                    if fcntl.ioctl(probe, _GET_ADDRESS, request)[20:24] == address:
                        return name
    except (ImportError, OSError):
        pass
    return None


def _parent() -> str:
    """Return a text that identifies torchrun's process among all that ever ran on this machine."""
    agent = os.getppid()
    try:
        started = Path(f"/proc/{agent}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:  # The first process of a container has no parent in it.
        return ""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return json.dumps([boot, agent, int(started.rpartition(")")[2].split()[19])])


@contextlib.contextmanager
def _lost_peer() -> Iterator[None]:
    """Turn an error of the process group into one line about the other rank."""
    try:
        yield
    except RuntimeError as error:
        reason = one_line(error)
        raise LostRankError(
            f"another rank has ended or hangs ({reason}); this one ends too"
        ) from None
