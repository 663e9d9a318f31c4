"""What the package needs: torch and numpy for the loss, Linux for nothing, public names of torch.

Names of torch that begin with an underscore may change in any release. Each one in use is checked
here, so that the first test run on a new torch tells which one has changed.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
IMPORTED_AS = {
    "pyyaml": "yaml",
    "pillow": "PIL",
    "nvidia-dali-cuda130": "nvidia.dali",
    "mlflow-skinny": "mlflow",
}
SCRIPT = """
import builtins, importlib, importlib.abc, importlib.util, os, pkgutil, sys

BLOCKED = {"resource", "fcntl", *sys.argv[1:]}
is_blocked = True


class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if is_blocked and any(name == b or name.startswith(b + ".") for b in BLOCKED):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)


def without_proc(event, arguments):
    if is_blocked and event == "open" and str(arguments[0]).startswith("/proc"):
        raise FileNotFoundError(arguments[0])


sys.meta_path.insert(0, Blocker())
sys.addaudithook(without_proc)
del os.sched_getaffinity
for name in BLOCKED & set(sys.modules):
    del sys.modules[name]

import torch
import dmkd_fast
from dmkd_fast import kd_loss

logits = torch.randn(8, 5, requires_grad=True)
kd_loss(logits, torch.randn(8, 5), torch.arange(8) % 5, alpha=0.5).backward()
assert logits.grad.abs().sum() > 0
assert not BLOCKED & set(sys.modules), BLOCKED & set(sys.modules)

# Other libraries may import what they like; no module of this package does on import.
is_blocked, original = False, builtins.__import__


def checked(name, globals=None, *arguments, **options):
    place = (globals or {}).get("__name__", "")
    assert name not in ("resource", "fcntl") or not place.startswith("dmkd_fast"), place
    return original(name, globals, *arguments, **options)


builtins.__import__ = checked
for module in pkgutil.walk_packages(dmkd_fast.__path__, "dmkd_fast."):
    if module.name.endswith(("__main__", "_C")) or "triton" in module.name:
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:  # the framework of an integration, which is not installed
        assert ".integrations." in module.name and "dmkd_fast" not in error.name, module.name
"""


def test_the_loss_needs_torch_and_numpy_alone_and_no_module_needs_linux_on_import() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    used = ["distill", "text", "tensorboard", "dali", "xformers"]
    requirements = project["dependencies"] + [r for extra in used for r in optional[extra]]
    names = [requirement.partition(">=")[0] for requirement in requirements]
    blocked = [IMPORTED_AS.get(name, name) for name in names if name not in ("torch", "numpy")]
    assert {"safetensors", "pydantic", "yaml", "nvidia.dali"} <= set(blocked)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *blocked], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_library_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    requirements = project["dependencies"] + [r for some in optional.values() for r in some]
    declared = {requirement.partition(">=")[0] for requirement in requirements}
    declared = {IMPORTED_AS.get(name, name).partition(".")[0] for name in declared}
    # Parts of torch (triton on CUDA) and of pydantic.
    known = declared | set(sys.stdlib_module_names) | {"dmkd_fast", "triton", "pydantic_core"}
    for path in sorted((ROOT / "dmkd_fast").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.partition(".")[0] in known, f"{path}: {name} is not declared"


def test_the_lowest_versions_that_are_claimed_are_those_that_are_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ("distill", "text", "tensorboard", "onnx")
    claimed = project["dependencies"] + [
        r for extra in extras for r in project["optional-dependencies"][extra]
    ]
    lines = (ROOT / "constraints" / "lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    for requirement in claimed:
        name, _, lowest = requirement.partition(">=")
        numbers = tested.pop(name).split(".")
        given = lowest.split(".")
        assert numbers == given + ["0"] * (len(numbers) - len(given)), requirement
    assert not tested
    makefile = (ROOT / "Makefile").read_text()
    assert f'".[{",".join(extras)}]"' in makefile


def test_the_constraints_for_cuda_pair_xformers_with_the_torch_that_it_is_built_for() -> None:
    lines = (ROOT / "constraints" / "cuda-xformers.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert set(pinned) == {"torch", "torchvision", "xformers"}
    built = files("xformers").joinpath("cpp_lib.json") if find_spec("xformers") else None
    if built is None or version("xformers") != pinned["xformers"]:
        pytest.skip("another xFormers is installed, or none")
    theirs = json.loads(built.read_text())["version"]
    assert theirs["torch"].partition("+")[0] == pinned["torch"] and theirs["cuda"] // 100 == 12


@pytest.mark.slow
def test_make_test_xformers_passes_in_an_environment_of_its_own() -> None:
    done = subprocess.run(
        ["make", "test-xformers"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def private_names_in_use() -> set[str]:
    """Dotted names that begin with `torch.` and have a part that begins with one underscore."""
    found = set()
    for path in (ROOT / "dmkd_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                dotted = ast.unparse(node)
                names = [dotted] if dotted.replace(".", "").isidentifier() else []
            for name in names:
                is_private = any(p[0] == "_" != p[1:2] for p in name.split(".") if p)
                if name.startswith("torch.") and is_private:
                    found.add(name)
    return found - {"torch._C"}  # a part of longer names


def foreach() -> None:
    ours, theirs = [torch.zeros(3), torch.zeros(2, 2)], [torch.ones(3), torch.ones(2, 2)]
    torch._foreach_copy_(ours, theirs)
    moves = torch._foreach_sub(theirs, ours)
    torch._foreach_mul_(moves, torch.tensor(0.5))
    torch._foreach_add_(ours, list(moves))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def amp() -> None:
    for value, found in ((2.0, 0.0), (float("inf"), 1.0)):
        gradient, found_inf = torch.full((3,), value), torch.zeros(1)
        torch._amp_foreach_non_finite_check_and_unscale_([gradient], found_inf, torch.tensor([0.5]))
        assert found_inf.item() == found and (found or gradient.tolist() == [1.0] * 3)
        scale, tracker = torch.tensor([8.0]), torch.zeros(1, dtype=torch.int32)
        torch._amp_update_scale_(scale, tracker, found_inf, 2.0, 0.5, 1)
        assert scale.item() == (4.0 if found else 16.0)


def cpu_features() -> None:
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)
    assert isinstance(torch.cpu._is_amx_tile_supported(), bool)


def functorch() -> None:
    def active(x: torch.Tensor) -> torch.Tensor:
        assert torch._C._are_functorch_transforms_active()
        return x

    torch.vmap(active)(torch.zeros(2))
    assert not torch._C._are_functorch_transforms_active()


def dispatch_state() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        pass

    assert torch._C._len_torch_dispatch_stack() == 0
    with Mode():
        assert torch._C._len_torch_dispatch_stack() == 1
    assert not torch._C._autograd._profiler_enabled()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert torch._C._autograd._profiler_enabled()


def dispatch_keys() -> None:
    def keys(x: torch.Tensor) -> int:
        return int(torch._C._dispatch_keys(x).raw_repr())

    plain = torch.zeros(2, dtype=torch.complex64)
    assert keys(plain) == keys(torch.ones(3)) != keys(plain.conj())
    with torch.inference_mode():
        assert keys(torch.zeros(2)) != keys(plain)


def stores() -> None:
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    store = TCPStore("127.0.0.1", 0, 1, True)
    PrefixStore("a", store).set("key", "value")
    assert store.get("a/key") == b"value"


def triton() -> None:
    from torch.utils._triton import has_triton

    assert isinstance(has_triton(), bool)


def inductor() -> None:
    from torch._inductor import config

    assert isinstance(config.deterministic, bool)


def dispatch_mode() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Names():
        assert not bool(torch.zeros(1) > 0)
    assert "_local_scalar_dense" in names


def dynamo_counters() -> None:
    from torch._dynamo.utils import counters

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    before = counters["stats"]["unique_graphs"]
    torch.compile(doubled, backend="eager")(torch.zeros(2))
    assert counters["stats"]["unique_graphs"] == before + 1
    assert sum(counters["graph_break"].values()) >= 0


def attention_choice() -> None:
    from torch.nn.attention import SDPBackend

    x = torch.zeros(2, 4, 16, 8)
    assert SDPBackend(torch._fused_sdp_choice(x, x, x)) in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.MATH,
    )


def fused_products() -> None:
    x, weight, bias = torch.randn(4, 8), torch.randn(8, 16), torch.randn(16)
    made = torch._addmm_activation(bias, x, weight, use_gelu=True)
    expected = torch.nn.functional.gelu(x @ weight + bias, approximate="tanh")
    torch.testing.assert_close(made, expected, atol=1e-3, rtol=1e-3)
    rows, columns = torch.ones(16, 32, device="meta"), torch.ones(64, 32, device="meta")
    halves = [rows.to(torch.float8_e4m3fn), columns.to(torch.float8_e4m3fn).t()]
    scales = torch.ones(16, 1, device="meta"), torch.ones(1, 64, device="meta")
    product = torch._scaled_mm(*halves, *scales, out_dtype=torch.bfloat16)
    assert product.shape == (16, 64) and product.dtype == torch.bfloat16


def trees() -> None:
    from torch.utils._pytree import tree_leaves, tree_map_only

    tree = (1, {"a": torch.zeros(2)})
    moved = tree_map_only(torch.Tensor, lambda t: t + 1, tree)
    assert moved[0] == 1 and [type(leaf) for leaf in tree_leaves(moved)] == [int, torch.Tensor]


CANARIES = {
    "torch._addmm_activation": fused_products,
    "torch._scaled_mm": fused_products,
    "torch.utils._pytree.tree_leaves": trees,
    "torch.utils._pytree.tree_map_only": trees,
    "torch._fused_sdp_choice": attention_choice,
    "torch._C._are_functorch_transforms_active": functorch,
    "torch._C._dispatch_keys": dispatch_keys,
    "torch._C._len_torch_dispatch_stack": dispatch_state,
    "torch._C._autograd": dispatch_state,
    "torch._C._autograd._profiler_enabled": dispatch_state,
    "torch._C._distributed_c10d.PrefixStore": stores,
    "torch._C._distributed_c10d.TCPStore": stores,
    "torch._foreach_copy_": foreach,
    "torch._foreach_sub": foreach,
    "torch._foreach_mul_": foreach,
    "torch._foreach_add_": foreach,
    "torch._amp_foreach_non_finite_check_and_unscale_": amp,
    "torch._amp_update_scale_": amp,
    "torch.cpu._is_avx512_bf16_supported": cpu_features,
    "torch.cpu._is_amx_tile_supported": cpu_features,
    "torch.utils._triton.has_triton": triton,
    "torch._inductor.config": inductor,
    "torch.utils._python_dispatch.TorchDispatchMode": dispatch_mode,
    "torch._dynamo.utils.counters": dynamo_counters,
}


@pytest.mark.parametrize("name", CANARIES)
def test_a_private_name_of_torch_still_means_what_it_did(name: str) -> None:
    CANARIES[name]()


def test_every_private_name_of_torch_in_use_has_a_canary() -> None:
    assert private_names_in_use() == set(CANARIES)
