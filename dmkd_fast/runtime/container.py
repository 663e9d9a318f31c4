"""CPUs and memory that this process may use: the machine's, less what its cgroups leave.

A container sees the whole machine in /proc/meminfo, while the kernel ends it at
the limit of its cgroup (version 1 or 2). A limit of any group between the process and the root
holds, so the smallest counts. Files that are missing or unreadable set no limit.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def num_cpus(root: Path = ROOT) -> int:
    """CPUs that this process may keep busy: by affinity and by cgroup quota, at least 1.

    Args:
        root: Where /proc and /sys are.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    for group in _groups(root, "cpu"):
        version_1 = _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        words = _words(group / "cpu.max") or version_1  # microseconds of CPU time, of wall time
        if len(words) == 2 and all(word.isdigit() for word in words) and words[1] != "0":
            # One thread for a fraction of a CPU would be throttled, and all others wait for it.
            count = min(count, int(words[0]) // int(words[1]))
    return max(1, count)


def available_bytes(root: Path = ROOT) -> int:
    """Memory of the host that this process can still have, page cache that can be dropped included.

    Args:
        root: Where /proc and /sys are.
    """
    left = [_free_bytes(root), *(_left_in(group) for group in _groups(root, "memory"))]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        pages = _number(root / "proc/self/statm") or 0
        left.append(address_space - pages * resource.getpagesize())
    return max(0, min(count for count in left if count is not None))


def _free_bytes(root: Path) -> int:
    with contextlib.suppress(OSError, KeyError, ValueError):
        return 1024 * _table(root / "proc/meminfo")["MemAvailable"]
    return os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()  # macOS: all there is


def _left_in(group: Path) -> int | None:
    """Bytes below the limits of one cgroup, None if it has none."""
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    limits = [limit for name in names if (limit := _number(group / name)) is not None]
    used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
    if not limits:
        return None
    cache = 0
    with contextlib.suppress(OSError, ValueError):
        table = _table(group / "memory.stat")
        total = "total_" if "total_inactive_file" in table else ""  # version 1: with its children
        cache = sum(table.get(f"{total}{kind}_file", 0) for kind in ("active", "inactive"))
    return min(limits) - max(0, used - cache)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's cgroups that may limit `controller`, each with all its ancestors.

    Inside a container the path may be that of the host, of which only the top is mounted.
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
    """The first word of a file if it is a number, as "max" is not."""
    words = _words(path)
    return int(words[0]) if words and words[0].isdigit() else None


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    rows = (line.replace(":", " ").split() for line in path.read_text("ascii").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}
