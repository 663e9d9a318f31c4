"""Check this machine: versions, kernels, GPU, decoders, disk, memory, CPUs, loopback."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import ipaddress
import os
import platform
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import torch

from dmkd_fast import __version__
from dmkd_fast.jobs.inspect.findings import Finding, ok, wrong
from dmkd_fast.runtime import container, distributed, native
from dmkd_fast.runtime.device import can_compile

# Least free memory and disk with which any shipped config runs.
LEAST_MEMORY, LEAST_DISK = 2**30, 2**30
INSTRUCTION_SETS = ("none", "scalar", "avx2", "avx512")
CAPABILITIES = {"AVX2": "avx2", "AVX512": "avx512"}
LISTENS = "0A"
PROC, DRIVER = Path("/proc/self"), Path("/proc/driver/nvidia/version")


def examine(folder: Path) -> Iterator[Finding]:
    """Yield the findings about this machine.

    Args:
        folder: Folder whose disk is checked.
    """
    yield versions()
    yield processor()
    yield extension()
    yield gpu()
    yield compiler()
    yield decoders()
    yield disk(folder, LEAST_DISK)
    yield memory()
    yield loopback()


def versions() -> Finding:
    """Check the versions of the packages that the command line needs."""
    found, bad = [f"dmkd_fast {__version__}", f"python {platform.python_version()}"], []
    for name, least in _requirements():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            bad.append(f"{name} is missing")
            continue
        found.append(f"{name} {version}")
        if _numbers(version) < _numbers(least):
            bad.append(f"{name} {version} is older than {least}")
    if bad:
        means = "the command line needs them"
        return wrong("versions", ", ".join(bad), means, "pip install 'dmkd_fast[distill]'")
    return ok("versions", ", ".join(found))


def processor() -> Finding:
    """Describe instruction sets, and how many CPUs the process may use."""
    facts = {
        "bfloat16 products": torch.cpu._is_avx512_bf16_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    names = [torch.backends.cpu.get_cpu_capability(), *(n for n, has in facts.items() if has)]
    usable, present = container.num_cpus(), os.cpu_count() or 1
    limit = "" if usable == present else f" of {present}, the limit of the container or affinity"
    return ok("processor", f"{platform.machine()}, {', '.join(names)}; {usable} CPUs{limit}")


def extension() -> Finding:
    """Check that the C++ kernels are loaded, and for the instruction set of this CPU."""
    have = native.INSTRUCTION_SET
    best = CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), have)
    means = "operators run slower on a CPU than they could"
    if have == "none":
        return wrong(
            "extension",
            f"not loaded ({native.WHY_MISSING})",
            "operators run their eager definitions on a CPU, several times slower",
            "install dmkd_fast again where there is a C++20 compiler",
        )
    if have in INSTRUCTION_SETS and INSTRUCTION_SETS.index(have) < INSTRUCTION_SETS.index(best):
        do = "install dmkd_fast again with a newer compiler"
        return wrong("extension", f"{have} kernels on a CPU with {best}", means, do)
    return ok("extension", f"{have} kernels loaded")


def gpu() -> Finding:
    """Describe the GPUs; a driver that PyTorch cannot use is wrong."""
    if torch.cuda.is_available():
        names = [
            f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
            for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
        driver = "of unknown version"
        with contextlib.suppress(OSError):
            found = re.search(r"  (\d+\.[\d.]+)  ", DRIVER.read_text(encoding="ascii"))
            driver = found[1] if found else driver
        text = f"CUDA {torch.version.cuda}, driver {driver}"
        old = [name for name in names if float(name.rpartition(" ")[2]) < 8]
        if old:
            means = "the kernels of dmkd_fast are untested below compute capability 8.0"
            return wrong("GPU", "; ".join(old), means, "use device=cpu or a newer GPU")
        return ok("GPU", f"{text}; {'; '.join(names)}")
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return wrong(
            "GPU",
            f"present, but not usable by torch {torch.__version__}",
            "everything runs on the CPU",
            "update the driver, or install a torch built for CUDA and the driver's version",
        )
    return ok("GPU", "none; networks run on the CPU")


def compiler() -> Finding:
    """Describe whether torch.compile works here."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    able = [device for device in devices if can_compile(device)]
    if "cuda" in devices and "cuda" not in able:
        means = "denoiser and student run slower on the GPU"
        lacks = "Triton, a C compiler or Python.h is missing for the GPU"
        return wrong("torch.compile", lacks, means, "install what is missing")
    return ok("torch.compile", f"possible on {', '.join(able)}" if able else "not possible here")


def decoders() -> Finding:
    """Describe what decodes image files."""
    names = {"nvidia.dali": "DALI", "torchvision": "torchvision", "PIL": "Pillow"}
    found = [name for module, name in names.items() if _is_installed(module)]
    return ok("decoders", ", ".join(found) or "none; only idx files can be read")


def disk(folder: Path, need: int, *, name: str = "disk") -> Finding:
    """Check the free space and the permissions of a folder that may not exist yet.

    Args:
        folder: Folder for the results.
        need: Bytes that will be written.
        name: Name of the finding.
    """
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    means, do = "checkpoints cannot be written", "set run_dir to another disk"
    if not os.access(place, os.W_OK | os.X_OK):
        return wrong(name, f"{place} is not writable", means, do)
    if free < need:
        what = f"{_gib(free)} free on the disk of {place}, {_gib(need)} needed"
        return wrong(name, what, means, f"free some space, or {do}")
    return ok(name, f"{_gib(free)} free, {_gib(need)} needed")


def memory(root: Path = container.ROOT) -> Finding:
    """Check the memory that limits of the container leave to this process.

    Args:
        root: Folder that holds /proc and /sys.
    """
    left = container.available_bytes(root)
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{_gib(left)} available of {_gib(installed)} installed"
    if left < LEAST_MEMORY:
        return wrong(
            "memory",
            text,
            f"the shipped configs need {_gib(LEAST_MEMORY)}, and the kernel ends a process that "
            "takes more than the limit of its container",
            "raise the limit or end other processes",
        )
    return ok("memory", text)


def loopback() -> Finding:
    """Check that ranks can meet on loopback, and that nothing listens beyond it."""
    try:
        with distributed.listener(0, backlog=1) as server:
            host, port = server.getsockname()
            open_to_all = [] if ipaddress.ip_address(host).is_loopback else [f"{host}:{port}"]
            socket.create_connection((distributed.LOOPBACK, port), timeout=5).close()
            open_to_all = [*dict.fromkeys([*open_to_all, *listening_beyond_loopback()])]
    except OSError as error:
        means = "several ranks on this machine cannot meet"
        return wrong("loopback", f"no connection ({error})", means, "bring up interface lo")
    if open_to_all:
        return wrong(
            "loopback",
            f"this process listens on {', '.join(open_to_all)}",
            "other machines can reach it, and may take part in the training",
            f"bind to {distributed.LOOPBACK} only",
        )
    return ok("loopback", "reachable, and nothing of this process listens beyond it")


def listening_beyond_loopback(proc: Path = PROC) -> list[str]:
    """Return the addresses other than loopback on which this process listens (Linux only).

    Args:
        proc: Folder with the descriptors and the network tables of this process.
    """
    own, found = set(), []
    with contextlib.suppress(OSError):
        for link in (proc / "fd").iterdir():
            with contextlib.suppress(OSError):
                own.add(os.readlink(link))
        for table in ("tcp", "tcp6"):
            with contextlib.suppress(OSError):
                for line in (proc / "net" / table).read_text(encoding="ascii").splitlines()[1:]:
                    _, local, _, state, *rest = line.split()
                    if state == LISTENS and f"socket:[{rest[5]}]" in own:
                        found.append(local)
    addresses = [(_address(local.partition(":")[0]), int(local[-4:], 16)) for local in found]
    return [f"{host}:{port}" for host, port in addresses if not host.is_loopback]


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Read an address of /proc/net/tcp: hexadecimal words in the byte order of this machine."""
    words = [bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = getattr(address, "ipv4_mapped", None)
    return address if mapped is None else mapped


def _requirements() -> Iterator[tuple[str, str]]:
    """Yield name and lowest version of each package that the command line needs."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("dmkd_fast") or ():
            found, _, extra = line.partition(";")
            parts = re.fullmatch(r"([\w.-]+)>=([\d.]+)", found.strip())
            if parts and ("extra" not in extra or "distill" in extra):
                yield parts[1], parts[2]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def _is_installed(module: str) -> bool:
    with contextlib.suppress(ImportError, ValueError):
        return importlib.util.find_spec(module) is not None
    return False


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
