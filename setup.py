"""Build the C++ extension; everything else about the package is in pyproject.toml.

Without torch, without a C++ compiler, or where the compiler fails, the package installs without the
extension, with one warning. The binary uses the stable ABIs of Python and libtorch: one wheel for
all their versions.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from setuptools import setup

# Reductions marked `omp simd` may be reordered; nothing else about floating point is relaxed, and
# multiply-adds are fused only where the source says so.
FLAGS = [
    "-O3",
    "-g0",
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


def warn(reason: object) -> None:
    """Say what an installation without the extension lacks."""
    text = " ".join(str(reason).split())[:300]
    print(
        f"dmkd_fast: warning: installing without the CPU kernels and without torch.compile on the "
        f"CPU, because the C++ extension was not built: {text}",
        file=sys.stderr,
    )


def extension() -> dict[str, Any]:
    """Return the arguments of setup() that build the extension; none without torch."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        warn(error)
        return {}

    class OptionalBuild(BuildExtension):
        """Build the extension, or warn; torch's own class raises even where it is optional."""

        def run(self) -> None:
            try:
                super().run()
            except (Exception, SystemExit) as error:
                warn(error)

    csrc = Path("csrc")
    module = CppExtension(
        "dmkd_fast._C",
        sorted(str(path) for path in csrc.glob("*.cpp")),
        depends=sorted(str(path) for path in csrc.glob("*.h")),
        extra_compile_args=FLAGS,
        py_limited_api=True,
        optional=True,  # editable installs do not miss the file
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": OptionalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extension())
