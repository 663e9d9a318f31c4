"""Tools of all measurements: interleaved timing, rows, goals, environment, results files."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dmkd_fast.runtime.device import peak_memory_mib

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
RESULTS = ROOT / "benchmarks" / "results"
NOTES = "notes.json"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A figure to reach; a missed goal is reported and is no error."""

    value: float
    goal: float
    met: bool


@dataclass(kw_only=True)
class Report:
    """Rows and goals of one measurement, printed as its last line and recorded."""

    bench: str
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the command that the figures depend on; see `recorded`."""
    device: torch.device | None = None
    """Device that was measured; None: the GPU if there is one."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    goals: dict[str, Goal] = field(default_factory=dict)
    num_saved: int = 0
    """Number of the first rows that results/BENCH.jsonl has already."""

    def at_least(self, name: str, value: float, goal: float) -> None:
        """Note a goal that is met at `goal` or above."""
        self.goals[name] = Goal(value=round(value, 4), goal=goal, met=value >= goal)

    def at_most(self, name: str, value: float, goal: float) -> None:
        """Note a goal that is met at `goal` or below."""
        self.goals[name] = Goal(value=round(value, 4), goal=goal, met=value <= goal)

    def finish(self, *, record: bool) -> None:
        """Print the JSON line; with `record`, append the rows to results/BENCH.jsonl."""
        if record:
            self.save()
        goals = {name: asdict(goal) for name, goal in self.goals.items()}
        line = {"bench": self.bench, "rows": self.rows, "goals": goals, **self._stamp()}
        print(json.dumps(line))

    def save(self) -> None:
        """Append the rows to results/BENCH.jsonl that are not there yet."""
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"{self.bench}.jsonl").open("a", encoding="utf-8") as file:
            for row in self.rows[self.num_saved :]:
                file.write(json.dumps({**row, **self._stamp()}) + "\n")
        self.num_saved = len(self.rows)

    def _stamp(self) -> dict[str, Any]:
        return {"arguments": self.arguments, "environment": environment(self.device)}


def time_interleaved(
    arms: Mapping[str, Callable[[], object]], *, n: int, warmup: int = 3, at_least_s: float = 0.0
) -> dict[str, dict[str, float]]:
    """Time each arm n times, one after the other in turn, so that drift hits all alike.

    Args:
        arms: Calls to time.
        n: Number of timings of each arm.
        warmup: Calls of each arm that are not timed.
        at_least_s: Time of each arm, all its timings together, if one call a timing takes less.
            Each timing is then the mean of many calls, whose number follows from one more call.

    Returns:
        For each arm: median_ms, p20_ms, p80_ms of one call, n. Warm-up calls (compilation) are not
        timed.
    """
    for arm in arms.values():
        for _ in range(warmup):
            arm()
    # Not the number of timings: a short arm would repeat the long ones as often.
    calls = {
        name: max(1, math.ceil(1e3 * at_least_s / n / _mean_ms(arm, 1))) if at_least_s else 1
        for name, arm in arms.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in arms}
    order = list(arms)
    for _ in range(n):
        for name in order:
            samples[name].append(_mean_ms(arms[name], calls[name]))
        # Another arm leaves caches and heap to each arm in the next round.
        order = [*order[1:], order[0]]
    return {name: summary(values) for name, values in samples.items()}


def _mean_ms(arm: Callable[[], object], calls: int) -> float:
    """Return milliseconds of one of several calls in a row."""
    _wait()
    start = time.perf_counter()
    for _ in range(calls):
        arm()
    _wait()
    return 1e3 * (time.perf_counter() - start) / calls


def summary(values_ms: list[float]) -> dict[str, float]:
    """Return the median, the 20th and 80th percentile, and the number of samples."""
    ordered = sorted(values_ms)
    low, high = (ordered[round(part * (len(ordered) - 1))] for part in (0.2, 0.8))
    return {
        "median_ms": round(statistics.median(ordered), 5),
        "p20_ms": round(low, 5),
        "p80_ms": round(high, 5),
        "n": len(ordered),
    }


@contextmanager
def peak_mib(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yield a function that returns the peak memory of the work inside, once the work is done.

    On CUDA, this counts tensors beyond those that existed before. On a CPU, it is the peak of the
    process so far.
    """
    if device.type != "cuda":
        yield lambda: round(peak_memory_mib(), 1)
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    peaks: list[float] = []
    yield lambda: peaks[0]
    torch.cuda.synchronize(device)
    peaks.append(round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1))


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Return the machine, versions and commit of a row."""
    on_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    state = {"gpu": gpu_state()} if on_gpu else {}
    return {
        **state,
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU {_cpu_name()}",
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "peak_memory_mib": round(peak_memory_mib()),
    }


GPU_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "power.draw",
    "temperature.gpu",
)


def gpu_state() -> dict[str, Any]:
    """Return driver, clocks (MHz), power cap (W), temperature and other processes of the GPU.

    Empty where nvidia-smi does not answer.
    """
    index = str(torch.cuda.current_device())
    facts = _nvidia_smi(f"--query-gpu={','.join(GPU_FIELDS)}", "--id", index)
    if not facts:
        return {}
    found: dict[str, Any] = dict(zip(GPU_FIELDS, facts[0].split(", "), strict=False))
    pids = {int(line) for line in _nvidia_smi("--query-compute-apps=pid", "--id", index)}
    return found | {"other_processes": len(pids - {os.getpid()})}


def _nvidia_smi(*arguments: str) -> list[str]:
    """Return the lines that nvidia-smi answers to a query; none where it fails."""
    command = ["nvidia-smi", *arguments, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def arguments(
    name: str, description: str, *, selects: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Make a parser with the arguments that every measurement takes.

    Args:
        name: Name of the measurement.
        description: Help text.
        selects: Arguments that choose which rows are measured and change no row.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=description)
    parser.add_argument("--record", action="store_true", help="append the rows to results/")
    parser.set_defaults(selects=selects)
    return parser


# Arguments that say where files are and what is printed.
NEUTRAL = frozenset({"record", "data", "work", "one", "point", "memory", "device", "figure"})


def recorded(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that figures depend on, as each row records them."""
    left_out = {*NEUTRAL, "selects", *options.selects}
    kept = {name: value for name, value in vars(options).items() if name not in left_out}
    as_json: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return as_json


def read_rows(bench: str) -> list[dict[str, Any]]:
    """Return all recorded rows of a measurement, oldest first, with their notes.

    Recorded lines are never changed. Facts that became known later (marks of superseded rows,
    arguments) are in results/notes.json by line number, counted from 1.
    """
    path = RESULTS / f"{bench}.jsonl"
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    notes = RESULTS / NOTES
    known = json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else {}
    for note in known.get(bench, []):
        fields = {name: value for name, value in note.items() if name != "lines"}
        for lines in note["lines"]:
            first, last = lines if isinstance(lines, list) else (lines, lines)
            for i in range(first - 1, last):
                rows[i] = fields | rows[i]
    return rows


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cpu_name() -> str:
    name = platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            name = " ".join(line.partition(":")[2].split())
            break
    return f"{name} ({_instructions()})"


def _instructions() -> str:
    """Return the widest instructions. CPUs of one name differ in them, and so in what is fast."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "AVX512-BF16"
    return torch.backends.cpu.get_cpu_capability()


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def run_parts(bench: object, names: Iterable[str]) -> int:
    """Run methods of a measurement; return 1 if one failed, whose error is printed."""
    failed = 0
    for name in names:
        try:
            getattr(bench, name)()
        except Exception:  # Minutes of a rented GPU must not be lost for one part.
            traceback.print_exc()
            failed = 1
    return failed
