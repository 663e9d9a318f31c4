"""Kill training runs at random moments and check that their results do not change.

    python tests/helpers/kill_server.py FOLDER SIGNAL COUNT SEED

The parent imports everything once and runs no tensor operation, so that forking it is safe. Each
child is one process of a run and resumes from a checkpoint if there is one. Runs are killed until
COUNT signals have hit. With SIGNAL = MIXED the kind of each signal is random, and each time a
second process is started on the same run at a random moment. The last line is JSON: cases,
failures, the longest wait for an exit.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy
import torch
import torch._dynamo  # Optimizers import it, metrics the next; so no child has to.
import torch.utils.tensorboard
from run_state import fingerprint, rows
from small_jobs import build_distiller

from dmkd_fast.jobs import run_dir
from dmkd_fast.runtime.errors import UserError

# Dropout makes torch's generator matter; every step starts a checkpoint if none is in flight.
SETTINGS = {"dropout": 0.3, "checkpoint_every_s": 0.0, "log_every_steps": 7, "ema_decay": 0.9}
STOPPED, REFUSED = 130, 2
# A second process is refused at once: these runs may end within the time that it would wait.
run_dir._LOOK_S = 0.0


def child(run: Path, seed: int, ready: int) -> int:
    """Run one process of a run, which leaves the digests of its final state."""
    torch.set_num_threads(1)
    try:
        with run_dir.locked(run):
            return train(run, seed, ready)
    except UserError:
        os.write(ready, b"!")
        return REFUSED


def train(run: Path, seed: int, ready: int) -> int:
    """Train to the end or until a signal, alone in the run directory."""
    distiller = build_distiller(run, seed=seed, **SETTINGS)
    set_seeds(seed)
    if any((run / "checkpoints").glob("step-*")):
        set_seeds(seed + 1)
        assert not distiller.restore().notes
    os.write(ready, b"!")
    try:
        distiller.fit()
    except KeyboardInterrupt:
        (run / "stopped_at").write_text(str(distiller.step), encoding="ascii")
        return STOPPED
    end = {"state": fingerprint(distiller), "rows": rows(run)}
    (run / "end.json").write_text(json.dumps(end), encoding="utf-8")
    return 0


def set_seeds(seed: int) -> None:
    """Seed all generators, since Python reseeds its own in every forked child."""
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)


def start(run: Path, seed: int, count: int = 1) -> list[int]:
    """Fork children at the same time and wait until each is about to train, or is refused."""
    pids, waits = [], []
    for _ in range(count):
        wait, ready = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(wait)
                code = child(run, seed, ready)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(ready)
        pids.append(pid)
        waits.append(wait)
    for wait in waits:
        os.read(wait, 1)
        os.close(wait)
    return pids


def start_two(run: Path, seed: int) -> int:
    """Start two processes at once; check that one is refused, and return the other's id."""
    pids = start(run, seed, 2)
    while True:
        for loser, winner in (pids, pids[::-1]):
            ended, status = os.waitpid(loser, os.WNOHANG)
            if ended:
                assert os.waitstatus_to_exitcode(status) == REFUSED, status
                return winner
        time.sleep(0.001)


def is_refused(run: Path, seed: int, first: int) -> bool:
    """Start a second process; return whether it was refused. It may run if the first ended."""
    code = os.waitstatus_to_exitcode(os.waitpid(start(run, seed)[0], 0)[1])
    if code == 0:
        info = os.waitid(os.P_PID, first, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        assert info is not None, "two processes trained at the same time"
    else:
        assert code == REFUSED, code
    return code == REFUSED


def main(folder: Path, name: str, count: int, seed: int) -> dict[str, object]:
    """Kill runs until `count` signals have hit; return the values of the last line."""
    chance = random.Random(seed)
    whole = folder / "whole"
    pid = start(whole, seed)[0]
    began = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    length = time.monotonic() - began
    expected = json.loads((whole / "end.json").read_text(encoding="utf-8"))
    hits, runs, longest, refused = 0, 0, 0.0, 0
    signals: dict[str, int] = {}
    failures: list[str] = []
    while hits < count:
        runs += 1
        run = folder / f"run{runs}"
        before = hits
        code = -1
        while code != 0:
            kind, together = name, name == "MIXED" and chance.random() < 0.5
            pid = start_two(run, seed) if together else start(run, seed)[0]
            refused += together
            if hits < count:
                began, moment = time.monotonic(), chance.uniform(0, length)
                if name == "MIXED":
                    kind = chance.choice(("KILL", "TERM", "HUP"))
                    if not together:
                        time.sleep(chance.uniform(0, moment))
                        refused += is_refused(run, seed, pid)
                time.sleep(max(0, began + moment - time.monotonic()))
                os.kill(pid, getattr(signal, f"SIG{kind}"))
            asked = time.monotonic()
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            took = time.monotonic() - asked
            if code == 0:  # The run finished before the signal, or got none.
                length *= 0.9 if hits < count else 1
                break
            if code == STOPPED:
                hits, longest = hits + 1, max(longest, took)
                signals[kind] = signals.get(kind, 0) + 1
                at = (run / "stopped_at").read_text(encoding="ascii")
                newest = max((run / "checkpoints").glob("step-*")).name
                if took > 5 or int(newest.removeprefix("step-").split(".")[0]) != int(at):
                    failures.append(f"{run.name}: {took:.1f} s, {newest} after step {at}")
            elif code == -signal.SIGKILL:
                hits += 1
                signals[kind] = signals.get(kind, 0) + 1
            elif code not in (
                -signal.SIGTERM,
                -signal.SIGHUP,
            ):  # Outside training, a signal just ends the process.
                return {"cases": hits, "failures": [*failures, f"{run.name}: exit code {code}"]}
        end = json.loads((run / "end.json").read_text(encoding="utf-8"))
        if end != expected:
            parts = [k for k, v in expected["state"].items() if end["state"].get(k) != v]
            parts += ["stats.jsonl"] if end["rows"] != expected["rows"] else []
            failures += [f"{run.name}: {', '.join(parts[:5])}"] * max(1, hits - before)
        shutil.rmtree(run)
    return {
        "cases": hits,
        "failures": failures,
        "runs": runs,
        "longest_exit_s": longest,
        "signals": signals,
        "refused": refused,
    }


if __name__ == "__main__":
    arguments = sys.argv[1:]
    result = main(Path(arguments[0]), arguments[1], int(arguments[2]), int(arguments[3]))
    print(json.dumps(result))
    sys.exit(bool(result["failures"]))
