"""Builds the C++ extension; everything else about the package is in pyproject.toml.

Without torch or a C++ compiler the package installs all the same and says on first use what it
lacks. The binary uses the stable ABIs of Python and libtorch: one wheel for all of them.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

SOURCES = sorted(str(p) for p in Path("csrc").glob("*.cpp"))
# Reductions marked `omp simd` may be reordered; nothing else about floating point is relaxed, and
# multiply-adds are fused only where the source says so.
FLAGS = [
    "-O3",
    "-std=c++20",
    "-fopenmp-simd",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    # Messages name csrc/FILE, not where it was built.
    f"-fmacro-prefix-map={Path(__file__).resolve().parent}/=",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DPy_LIMITED_API=0x030b0000",
]


def extension() -> dict[str, object]:
    """Arguments for setup() that build the extension, or none with a line on why not."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler.split()[0]) is None:
        print(
            f"dmkd_fast: no C++ compiler ({compiler}): installing without the CPU kernels and "
            "without torch.compile on the CPU",
            file=sys.stderr,
        )
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print(
            "dmkd_fast: torch is not installed: installing without the CPU kernels", file=sys.stderr
        )
        return {}
    module = CppExtension("dmkd_fast._C", SOURCES, extra_compile_args=FLAGS, py_limited_api=True)
    module.optional = True  # A failed build is reported and left out.
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extension())  # type: ignore[arg-type]
