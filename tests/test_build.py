"""The build: one abi3 wheel, and an install without compiler or torch that says what it lacks."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=ROOT,
        check=True,
        text=True,
        capture_output=True,
        env=os.environ | environment,
    )


def test_extension_uses_stable_interfaces_only() -> None:
    spec = importlib.util.find_spec("dmkd_fast._C")
    assert spec and spec.origin and spec.origin.endswith("_C.abi3.so")
    symbols = subprocess.run(
        ["nm", "-DC", "--undefined-only", spec.origin], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1] for line in symbols.splitlines() if line.strip()]
    for name in names:
        # at:: and c10:: symbols would tie the binary to one torch release.
        assert not name.startswith(("at::", "c10::", "torch::")), name
    assert any(name.startswith(("aoti_torch", "torch_")) for name in names)


def test_without_a_compiler_setup_goes_on_and_says_so() -> None:
    done = setup("--name", CXX="no-such-compiler")
    assert "without the CPU kernels" in done.stderr and "torch.compile" in done.stderr


@pytest.mark.slow
def test_wheel_is_one_for_all_pythons(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            ".",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            str(tmp_path),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.iterdir()
    assert wheel.name == "dmkd_fast-0.1.0-cp311-abi3-linux_x86_64.whl"
    names = zipfile.ZipFile(wheel).namelist()
    weights = "denoiser/transformer/diffusion_pytorch_model.safetensors"
    for name in ("_C.abi3.so", "assets/manifest.json", f"assets/fashion_mnist/{weights}"):
        assert f"dmkd_fast/{name}" in names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dmkd_fast").rglob("*.py")}
    assert modules <= set(names)
