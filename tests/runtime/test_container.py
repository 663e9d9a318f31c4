"""What cgroups leave of a machine's memory and CPUs, read from made-up /proc and /sys trees."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dmkd_fast.runtime import container

MIB = 2**20
GROUP = "sys/fs/cgroup"
V2 = {"proc/self/cgroup": "0::/job/task\n"}
V1 = {"proc/self/cgroup": "9:memory:/job/task\n4:cpu,cpuacct:/job/task\n3:name=systemd:/\n"}


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)


def tree(root: Path, files: dict[str, object]) -> Path:
    """A machine with 4 GiB available, and these files."""
    meminfo = "MemTotal:  8388608 kB\nMemAvailable:    4194304 kB\nHugePages_Total:   0\n"
    for name, text in ({"proc/meminfo": meminfo} | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
    return root


@pytest.mark.parametrize(
    ("files", "left_mib"),
    [
        (V2, 4096),
        (V2 | {f"{GROUP}/job/task/memory.max": "max\n"}, 4096),
        (
            V2
            | {
                f"{GROUP}/job/task/memory.max": 900 * MIB,
                f"{GROUP}/job/task/memory.current": 300 * MIB,
            },
            600,
        ),
        (
            V2
            | {
                f"{GROUP}/job/task/memory.max": 900 * MIB,
                f"{GROUP}/job/task/memory.high": 500 * MIB,
                f"{GROUP}/job/task/memory.current": 300 * MIB,
            },
            200,
        ),
        # The parent's limit is smaller; the root's own file is a container's.
        (
            V2
            | {
                f"{GROUP}/job/task/memory.max": 900 * MIB,
                f"{GROUP}/job/memory.max": 700 * MIB,
                f"{GROUP}/job/memory.current": 600 * MIB,
            },
            100,
        ),
        (V2 | {f"{GROUP}/memory.max": 50 * MIB}, 50),
        (V2 | {f"{GROUP}/unified/job/memory.max": 60 * MIB}, 60),
        # Page cache can be dropped; shared memory cannot.
        (
            V2
            | {
                f"{GROUP}/job/memory.max": 900 * MIB,
                f"{GROUP}/job/memory.current": 800 * MIB,
                f"{GROUP}/job/memory.stat": f"anon 1\nactive_file {100 * MIB}\n"
                f"inactive_file {200 * MIB}\nshmem {99 * MIB}\n",
            },
            400,
        ),
        (V2 | {f"{GROUP}/job/memory.max": 100 * MIB, f"{GROUP}/job/memory.current": 800 * MIB}, 0),
        (V1 | {f"{GROUP}/memory/job/task/memory.limit_in_bytes": 9223372036854771712}, 4096),
        (
            V1
            | {
                f"{GROUP}/memory/job/memory.limit_in_bytes": 900 * MIB,
                f"{GROUP}/memory/job/memory.usage_in_bytes": 800 * MIB,
                f"{GROUP}/memory/job/memory.stat": "inactive_file 1\n"
                f"total_inactive_file {70 * MIB}\nactive_file 1\ntotal_active_file 0\n",
            },
            170,
        ),
        # A container of version 1 sees the host's path, and its own group at the top.
        (V1 | {f"{GROUP}/memory/memory.limit_in_bytes": 300 * MIB}, 300),
        ({"proc/self/cgroup": "0::/../..\n", f"{GROUP}/memory.max": 70 * MIB}, 70),
        ({"proc/self/cgroup": "nonsense\n", f"{GROUP}/memory.max": 70 * MIB}, 4096),
        (V2 | {f"{GROUP}/job/memory.max": "many"}, 4096),
        (V2 | {f"{GROUP}/job/memory.max": 70 * MIB, f"{GROUP}/job/memory.stat": "odd line\n"}, 70),
    ],
)
def test_available_memory_is_the_smallest_limit_on_the_way_to_the_root(
    tmp_path: Path, files: dict[str, object], left_mib: int
) -> None:
    assert container.available_bytes(tree(tmp_path, files)) == left_mib * MIB


@pytest.mark.parametrize(
    ("files", "count"),
    [
        (V2, 8),
        (V2 | {f"{GROUP}/job/task/cpu.max": "max 100000\n"}, 8),
        (V2 | {f"{GROUP}/job/task/cpu.max": "300000 100000\n"}, 3),
        (V2 | {f"{GROUP}/job/task/cpu.max": "390000 100000\n"}, 3),
        (V2 | {f"{GROUP}/job/task/cpu.max": "50000 100000\n"}, 1),
        (V2 | {f"{GROUP}/job/task/cpu.max": "900000 100000\n"}, 8),
        (
            V2
            | {f"{GROUP}/job/task/cpu.max": "400000 100000", f"{GROUP}/job/cpu.max": "80000 40000"},
            2,
        ),
        (V2 | {f"{GROUP}/cpu.max": "5 0"}, 8),
        (V2 | {f"{GROUP}/cpu.max": "5"}, 8),
        (
            V1
            | {
                f"{GROUP}/cpu/job/cpu.cfs_quota_us": "-1",
                f"{GROUP}/cpu/job/cpu.cfs_period_us": "1",
            },
            8,
        ),
        (
            V1
            | {
                f"{GROUP}/cpu/job/cpu.cfs_quota_us": "200000",
                f"{GROUP}/cpu/job/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        (
            V1
            | {
                f"{GROUP}/cpu,cpuacct/cpu.cfs_quota_us": "500000",
                f"{GROUP}/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            5,
        ),
    ],
)
def test_cpus_are_the_smallest_quota_on_the_way_to_the_root(
    tmp_path: Path, files: dict[str, object], count: int
) -> None:
    assert container.num_cpus(tree(tmp_path, files)) == count


def test_affinity_counts_where_it_is_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree(tmp_path, V2 | {f"{GROUP}/cpu.max": "600000 100000"})
    assert container.num_cpus(root) == 6
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5})
    assert container.num_cpus(root) == 2


def test_limit_of_the_address_space_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = 100 * MIB // resource.getpagesize()
    root = tree(tmp_path, {"proc/self/statm": f"{pages} 5 5 5 0 5 0\n"})
    monkeypatch.setattr(resource, "getrlimit", lambda _: (130 * MIB, resource.RLIM_INFINITY))
    assert container.available_bytes(root) == 30 * MIB


def test_without_proc_nothing_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    assert container.available_bytes(tmp_path) == physical
    assert container.num_cpus(tmp_path) == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    assert container.num_cpus(tmp_path) == os.cpu_count()


def test_reading_is_cheap() -> None:
    started = time.process_time()
    for _ in range(20):
        container.available_bytes()
        container.num_cpus()
    assert time.process_time() - started < 0.2


def test_a_real_address_space_limit_is_seen() -> None:
    code = (
        "import resource; from dmkd_fast.runtime import container\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "print(container.available_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 2**30
