"""Run the C++ operators under address and undefined-behavior sanitizers, in another Python.

`build` compiles csrc/ with both sanitizers. `run` runs a script in a Python whose `dmkd_fast` uses
that build, limited to one instruction set. A std::vector reports reads beyond its size, not only
beyond its capacity. csrc/scalar_types.h checks masked instructions, which sanitizers cannot see.

    python tests/helpers/sanitized.py LIBRARY SCRIPT ARGUMENTS...   (started by `run`)
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import runpy
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-D_GLIBCXX_SANITIZE_VECTOR",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DPy_LIMITED_API=0x030b0000",
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-include",
    str(Path(__file__).with_name("sanitized_cpu.h")),
]


def build(folder: Path, *, csrc: Path = ROOT / "csrc") -> Path:
    """Compile the operators with sanitizers and return the path of the library."""
    from torch.utils import cpp_extension

    includes = [
        f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_paths()["include"])
    ]

    def compile(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run(["g++", *FLAGS, *includes, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, sorted(csrc.glob("*.cpp"))))
    library = folder / "_C.abi3.so"
    torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu"]
    link = ["g++", "-shared", *FLAGS, *objects, *torch_libraries, "-o", library]
    subprocess.run(link, check=True)
    return library


def run(
    library: Path, script: Path, *arguments: str, instruction_set: str = "avx512_bf16"
) -> subprocess.CompletedProcess[str]:
    """Run a Python script with the sanitized operators; a fault ends it with a report."""
    # The sanitizer finds the functions that throw exceptions only if libstdc++ is loaded first.
    preloaded = (
        subprocess.run(
            ["g++", f"-print-file-name={name}"], check=True, text=True, capture_output=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    )
    environment = os.environ | {
        "LD_PRELOAD": " ".join(os.path.realpath(path) for path in preloaded),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:malloc_context_size=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "DMKD_INSTRUCTION_SET": instruction_set,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
    }
    return subprocess.run(
        [sys.executable, __file__, library, script, *arguments],
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )


def instruction_sets() -> Iterator[str]:
    """Yield the instruction sets that this CPU can run, named as in `run`."""
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    for name, needed in (
        ("scalar", set()),
        ("avx2", {"avx2", "fma"}),
        ("avx512", avx512),
        ("avx512_bf16", avx512 | {"avx512_bf16"}),
    ):
        if needed <= flags:
            yield name


def _main(path: str, script: str, *arguments: str) -> None:
    import torch as torch  # loads the libraries that the operators need

    loader = importlib.machinery.ExtensionFileLoader("dmkd_fast._C", path)
    spec = importlib.util.spec_from_loader("dmkd_fast._C", loader)
    assert spec is not None
    sys.modules["dmkd_fast._C"] = importlib.util.module_from_spec(spec)
    loader.exec_module(sys.modules["dmkd_fast._C"])
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    _main(*sys.argv[1:])
