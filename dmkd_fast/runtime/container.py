"""Find the CPUs and memory that this process may use: those of the machine within cgroup limits.

A container sees the whole machine in /proc/meminfo, but the kernel enforces the limits of its
cgroups (version 1 or 2). The limits of all groups between the process and the root apply, so the
smallest one counts. Files that are missing or unreadable set no limit.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def num_cpus(root: Path = ROOT) -> int:
    """Return the number of CPUs that affinity and cgroup quota allow, at least 1.

    Args:
        root: Folder that holds /proc and /sys.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    for group in _groups(root, "cpu"):
        version_1 = _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        words = _words(group / "cpu.max") or version_1  # CPU time and wall time in microseconds
        if len(words) == 2 and all(word.isdigit() for word in words) and words[1] != "0":
            # Rounded down, since a thread on a fraction of a CPU is throttled and delays the rest.
            count = min(count, int(words[0]) // int(words[1]))
    return max(1, count)


def available_bytes(root: Path = ROOT) -> int:
    """Return the bytes of host memory that this process can still get, droppable cache included.

    Args:
        root: Folder that holds /proc and /sys.
    """
    import resource  # Unix only

    left = [_free_bytes(root), *(_left_in(group) for group in _groups(root, "memory"))]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        pages = _number(root / "proc/self/statm") or 0
        left.append(address_space - pages * resource.getpagesize())
    return max(0, min(count for count in left if count is not None))


def _free_bytes(root: Path) -> int:
    with contextlib.suppress(OSError, KeyError, ValueError):
        return 1024 * _table(root / "proc/meminfo")["MemAvailable"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # macOS: all physical memory


def _left_in(group: Path) -> int | None:
    """Return the bytes left below the memory limits of one cgroup; None if it has no limit."""
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    limits = [limit for name in names if (limit := _number(group / name)) is not None]
    used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
    if not limits:
        return None
    cache = 0
    with contextlib.suppress(OSError, ValueError):
        table = _table(group / "memory.stat")
        total = "total_" if "total_inactive_file" in table else ""  # version 1: children included
        cache = sum(table.get(f"{total}{kind}_file", 0) for kind in ("active", "inactive"))
    return min(limits) - max(0, used - cache)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroups for `controller`, and of all their ancestors.

    Inside a container the path may be the path on the host, of which only the top is mounted.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, names, place = line.split(":", 2)
            if names and controller not in names.split(","):
                continue
            parts = [part for part in PurePosixPath(place).parts if part not in ("/", "..")]
            mounts = (names, controller) if names else ("", "unified")
            for mount in dict.fromkeys(mounts):
                top = root / "sys/fs/cgroup" / mount
                for depth in range(len(parts) + 1):
                    yield top.joinpath(*parts[:depth])


def _words(path: Path) -> list[str]:
    with contextlib.suppress(OSError, ValueError):
        return path.read_text(encoding="ascii").split()
    return []


def _number(path: Path) -> int | None:
    """Return the first word of a file if it is a number; the word "max" is not."""
    words = _words(path)
    return int(words[0]) if words and words[0].isdigit() else None


def _table(path: Path) -> dict[str, int]:
    """Read a file whose lines hold a name and a number."""
    rows = (line.replace(":", " ").split() for line in path.read_text("ascii").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}
