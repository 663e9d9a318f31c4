"""Compile the loss's Triton kernels for GPUs that are absent, and inspect the machine code.

The launches are those that `loss/triton_launch.py` plans (`aot_views.py`: `views/triton.py`); only
the launching is left out. Registers, spills and memory accesses are read from the machine code.
After a deliberate change of a kernel or of Triton's version, write the golden file again with

    python tests/helpers/aot.py
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dmkd_fast.loss import ops, triton_launch, triton_long
from dmkd_fast.loss.divergences import terms_of

GOLDEN = Path(__file__).parents[1] / "golden" / "kd_loss_kernels.json"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
CLASSES = (100, 1000, 1003, 21841, 32000, 128256)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = ("forward", "one_pass", "backward", "one_pass_target")
# Divergences beside forward KL, in one pass; "standardized" is forward KL of standardized logits.
DIVERGENCES = ("reverse_kl", "jsd", "alpha_beta", "total_variation", "dkd", "standardized", "two")
FAMILY_CASES = ((80, 90, 100), (1000, 32000), ("float32", "bfloat16"))
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
BATCH = 256


def all_cases() -> list[tuple[int, int, str, str]]:
    """List all cases: (architecture, classes, dtype, kind)."""
    plain = [(a, c, d, k) for a in ARCHITECTURES for c in CLASSES for d in DTYPES for k in KINDS]
    return plain + list(itertools.product(*FAMILY_CASES, DIVERGENCES))


def key(case: tuple[int, int, str, str]) -> str:
    architecture, classes, dtype, kind = case
    return f"sm_{architecture} C={classes} {dtype} {kind}"


def plan(classes: int, dtype: str, kind: str) -> triton_launch.Launch:
    """Plan the launch of the kernel of this kind for a batch."""
    student = torch.empty(BATCH, classes, dtype=DTYPES[dtype])
    has_target = kind in ("one_pass_target", "dkd")
    target = torch.zeros(BATCH, dtype=torch.int64) if has_target else None
    weight = torch.empty(BATCH) if target is not None else None
    alpha = 1.0 if kind == "dkd" else 0.9
    numbers = (4.0, alpha, 1.0, 1.0, 0.1)
    problem = ops.Problem(student, student, target, weight, *numbers, *extra_of(kind))
    grad, stats = torch.empty_like(student), torch.empty(BATCH, ops.NUM_STATS)
    if kind == "backward":
        return triton_launch.plan_backward(problem, grad, torch.tensor(1.0), stats)
    results = (*[torch.empty(())] * 3, stats)
    ticket = torch.zeros(1, dtype=torch.int32)
    gradient = None if kind == "forward" else grad
    return triton_launch.plan_losses(problem, gradient, None, 1.0, results, ticket)


def extra_of(kind: str) -> tuple:
    """Return the extra arguments of the operators for a kind, none for forward KL."""
    if kind not in DIVERGENCES:
        return ()
    names = {"standardized": "forward_kl", "two": {"forward_kl": 0.5, "jsd": 0.5}}
    return None, terms_of(names.get(kind, kind)), kind == "standardized"


def build(case: tuple[int, int, str, str]) -> dict[str, Any]:
    """Compile one case; return registers, spills, shared memory, and accesses by bit width."""
    architecture, *rest = case
    return inspect(plan(*rest), architecture)


def inspect(launch: triton_launch.Launch, architecture: int) -> dict[str, Any]:
    """Compile any launch; return the same facts as `build`."""
    usage, code = machine_code(launch, architecture)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, shared, local = map(int, found.groups())
    return {
        "registers": registers,
        "spills": stack + local + len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared": shared,
        "warps": launch.num_warps,
        **{name: _widths(code, name) for name in ("LDG", "STG")},
    }


def machine_code(launch: triton_launch.Launch, architecture: int) -> tuple[str, str]:
    """Compile any launch; return the compiler's report of resources, and the instructions."""
    compiled = triton.compile(
        _source(launch), target=GPUTarget("cuda", architecture, 32), options=launch.options
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        code = _tool("nvdisasm", "-c", cubin.name)
    return usage, code


def expected_accesses(case: tuple[int, int, str, str]) -> dict[str, tuple[int, int]]:
    """Return, for loads and stores of logits, their width in bits and number per thread."""
    _, classes, dtype, kind = case
    launch = plan(classes, dtype, kind)
    constants = launch.constants
    size = DTYPES[dtype].itemsize
    per_thread = constants.get("ROWS", 1) * constants["BLOCK"] // (32 * launch.num_warps)
    # A vector is never longer than the part of the tile that a thread holds.
    vector = min(constants["VEC"], per_thread)
    reads = 4 if launch.kernel is triton_long.two_pass and len(launch.grid) == 1 else 2
    accesses = {"LDG": (8 * size * vector, reads * per_thread // vector)}
    if kind != "forward":
        accesses["STG"] = (8 * size * vector, per_thread // vector)
    return accesses


def _source(launch: triton_launch.Launch) -> ASTSource:
    """Describe a kernel, specialized on divisibility by 16 as Triton's launcher does it."""
    signature, constants, attributes = {}, dict(launch.constants), {}
    for index, (name, value) in enumerate(
        zip(launch.kernel.arg_names, launch.arguments, strict=False)
    ):
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            divides = value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            signature[name] = "constexpr" if value == 1 else "i32" if value < 2**31 else "i64"
            if value == 1:
                constants[name] = 1
            divides = value % 16 == 0 and value != 1
        else:
            signature[name], divides = "fp32", False
        if divides:
            attributes[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(launch.constants, "constexpr")
    return ASTSource(launch.kernel, signature, constants, attributes)


def _widths(code: str, instruction: str) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*)", code):
        parts = modifiers.split(".")
        if "STRONG" in parts:  # of the reduction, not of the logits
            continue
        width = next((p for p in parts if p in ("128", "64", "U16", "U8", "S16")), "32")
        counts[width.strip("US")] += 1
    return dict(sorted(counts.items()))


def _tool(name: str, *arguments: str) -> str:
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    write(GOLDEN, {key(case): build(case) for case in all_cases()})


def write(path: Path, results: dict[str, Any]) -> None:
    """Write a golden file with one line for each build."""
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in results.items()]
    head = f'"triton": {json.dumps(triton.__version__)}'
    path.write_text("{\n" + ",\n".join([head, *lines]) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
