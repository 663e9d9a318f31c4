"""Serve runs of several ranks, forked from one process that has imported everything.

    python tests/helpers/rank_server.py

Each line of input is a request in JSON. The answer is a line of JSON: how each rank ended, and what
it left in `end-RANK.json`. The server replaces torchrun: it assigns the ranks, ends the others when
one has failed, and can kill one rank or signal all at a given time. It runs no tensor operation
itself, so that forking is safe.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy
import torch
import torch._dynamo  # Optimizers import it, metrics the next; so no child has to.
import torch.utils.tensorboard
from dying_os import FailingOs
from run_state import fingerprint, rows
from small_jobs import build_distiller, sampler_of
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from dmkd_fast import ImageSet, cli
from dmkd_fast.data.listing import SourceError
from dmkd_fast.jobs import distill as distill_job
from dmkd_fast.jobs import run_dir
from dmkd_fast.runtime import distributed, files
from dmkd_fast.runtime.errors import NotFiniteError
from dmkd_fast.training import scoring
from dmkd_fast.training.distiller import Distiller

# Dropout makes torch's generators matter.
SETTINGS = {"dropout": 0.3, "log_every_steps": 7, "ema_decay": 0.9, "max_grad_norm": 1.0}
assert distill_job  # Imported here so that no child has to import it for the command line.


def child(request: dict[str, Any], rank: int) -> int:
    """Run one rank of a run and return its exit code."""
    torch.set_num_threads(1)
    if "command" in request:
        return cli.main(request["command"])
    run, seed = Path(request["run"]), request.get("seed", 0)
    mine = distributed.join()
    kind = UnreadableSet if rank == request.get("unreadable") else ImageSet
    test_set = random_set(kind) if request.get("tests") else None
    distiller = build_distiller(
        run,
        seed=seed,
        ranks=mine,
        test_set=test_set,
        checkpoint_every_s=request.get("every_s", 1e9),
        accumulate=request.get("accumulate", 1),
        **SETTINGS,
    )
    set_seeds(mine.seed(seed))
    left: dict[str, Any] = {"images": {}, "reductions": 0}
    network = distiller.student.network
    if "accumulate" in request and isinstance(network, DistributedDataParallel):

        def reduce(group: Any, bucket: Any) -> Any:
            left["reductions"] += 1
            return allreduce_hook(group, bucket)

        reduce.__annotations__.clear()  # DDP rejects annotations that are strings.
        network.register_comm_hook(network.process_group, reduce)
    if rank == request.get("broken"):
        weight = next(sampler_of(distiller)._module.parameters())
        weight.data.fill_(float("nan"))
    if run_dir.has_checkpoint(run):
        set_seeds(mine.seed(seed) + 1)
        try:
            left["restored"] = distiller.restore()
        except ValueError as error:
            (run / f"end-{rank}.json").write_text(json.dumps({"error": str(error)}))
            return 2
    watch(distiller, request, rank, left["images"])
    (run / f"ready-{rank}").touch()
    code = 0
    try:
        left["totals"] = distiller.fit()
    except KeyboardInterrupt:
        code = 130
    except (NotFiniteError, SourceError) as error:
        (run / f"end-{rank}.json").write_text(json.dumps({"error": str(error)}))
        return 3
    left |= {"step": distiller.step, "state": fingerprint(distiller), "rows": rows(run)}
    weights = torch.cat([p.detach().flatten() for p in distiller.student.model.parameters()])
    left["weights"] = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
    if test_set is not None:
        whole = scoring.measure(
            distiller.student.average.module,
            test_set.batches([distiller.targets.input]),
            input=distiller.targets.input,
            num_classes=4,
        )
        left["scores"] = whole.result()
    (run / f"end-{rank}.json").write_text(json.dumps(left), encoding="utf-8")
    return code


def watch(distiller: Distiller, request: dict[str, Any], rank: int, images: dict[int, str]) -> None:
    """Record all images; stop, die or simulate a full disk at the step that is requested."""
    step, commit = distiller.train_step, distiller.ring.commit
    saved = distiller.run_dir / "checkpoints" / (f"rank-{rank}" if rank else "")

    def watched_step() -> torch.Tensor:
        loss = step()
        if [distiller.step, rank] == request.get("stop_at"):
            signal.raise_signal(signal.SIGTERM)
        if [distiller.step, rank] == request.get("kill_at"):
            signal.raise_signal(signal.SIGKILL)
        if rank == request.get("full_disk"):
            while distiller.step == 4 and not any(saved.glob("step-*")):
                time.sleep(0.01)  # Wait for one checkpoint, even on a busy machine.
            full = 5 <= distiller.step < 20
            files.os = FailingOs(0, 28) if full else os  # type: ignore[assignment]
        return loss

    def watched_commit(block: Any, *, ids: torch.Tensor, labels: torch.Tensor) -> None:
        commit(block, ids=ids, labels=labels)
        for image_id, image in zip(ids.tolist(), block.images, strict=True):
            images[image_id] = hashlib.sha256(image.numpy().tobytes()).hexdigest()

    distiller.train_step = watched_step  # type: ignore[method-assign]
    distiller.ring.commit = watched_commit  # type: ignore[method-assign]


class UnreadableSet(ImageSet):
    """A test set whose first image cannot be decoded."""

    def batches(self, *args: Any, **kwargs: Any) -> Any:
        yield from ()
        raise SourceError("a.png: got no image, expected one; replace it")


def random_set(kind: type[ImageSet] = ImageSet) -> ImageSet:
    """Make 101 random images; 101 is prime, so no smaller number of ranks divides it."""
    generator = torch.Generator().manual_seed(1)
    return kind(
        images=torch.randint(0, 256, (101, 1, 8, 8), generator=generator).to(torch.uint8),
        labels=torch.randint(0, 4, (101,), generator=generator),
        class_names=tuple("abcd"),
    )


def set_seeds(seed: int) -> None:
    """Seed all generators, since Python reseeds its own in every forked child."""
    torch.manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)


def start(request: dict[str, Any], world_size: int, restarts: int) -> dict[int, int]:
    """Fork all ranks and return the rank of each process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = {}
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                output = Path(request["run"]) / f"output-{rank}.txt"
                output.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(handle, 1)
                os.dup2(handle, 2)
                if world_size > 1:
                    names = (
                        "RANK",
                        "LOCAL_RANK",
                        "WORLD_SIZE",
                        "LOCAL_WORLD_SIZE",
                        "MASTER_PORT",
                        "TORCHELASTIC_RESTART_COUNT",
                    )
                    values = (rank, rank, world_size, world_size, port, restarts)
                    os.environ.update(zip(names, map(str, values), strict=True))
                code = child(request, rank)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        pids[pid] = rank
    return pids


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """Run all ranks until they end.

    `kill` lists pairs [rank, seconds], one for each start: the rank is killed so many seconds after
    all ranks were ready. `term` sends SIGTERM to all ranks after so many seconds. `restarts` limits
    how often all ranks are started again after one has failed.
    """
    run, world_size = Path(request["run"]), request.get("world_size", 2)
    restarts, hits = 0, 0
    while True:
        for old in run.glob("ready-*"):
            old.unlink()
        pids = start(request, world_size, restarts)
        codes: dict[int, int] = {}
        victims: set[int] = set()
        ready, asked, failed = 0.0, 0.0, 0.0
        while len(codes) < world_size:
            time.sleep(0.002)
            now = time.monotonic()
            for pid, rank in pids.items():
                if rank not in codes:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        codes[rank] = os.waitstatus_to_exitcode(status)
            alive = [pid for pid, rank in pids.items() if rank not in codes]
            if any(codes.values()) and not failed and not asked:
                failed = now
                for pid in alive:
                    os.kill(pid, signal.SIGTERM)
            if failed and now - failed > 10:
                for pid in alive:
                    os.kill(pid, signal.SIGKILL)
            if not ready and len(list(run.glob("ready-*"))) == world_size:
                ready = now
            due = bool(ready and request.get("kill")) and now - ready > request["kill"][0][1]
            if due and not victims:  # Kill one rank per start.
                victim, _ = request["kill"].pop(0)
                for pid in [p for p in alive if pids[p] == victim]:
                    os.kill(pid, signal.SIGKILL)
                    victims.add(victim)
            if ready and not asked and "term" in request and now - ready > request["term"]:
                asked = now
                for pid in alive:
                    os.kill(pid, signal.SIGTERM)
        # A rank that had already ended when it was killed does not count as hit.
        hits += sum(codes[victim] == -signal.SIGKILL for victim in victims)
        if not any(codes.values()) or restarts == request.get("restarts", 0):
            break
        restarts += 1
    took = time.monotonic() - asked if asked else 0.0
    ends = {}
    for rank in range(world_size):
        path = run / f"end-{rank}.json"
        ends[str(rank)] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    outputs = [path.read_text(encoding="utf-8") for path in sorted(run.glob("output-*"))]
    return {
        "codes": [codes[rank] for rank in range(world_size)],
        "ends": ends,
        "took": took,
        "hits": hits,
        "restarts": restarts,
        "outputs": outputs,
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
