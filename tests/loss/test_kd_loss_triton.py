"""The CUDA kernels without a GPU: interpreter against float64, machine code against a golden file.

Marked cuda: the same promises on a GPU (benchmarks/gpu.sh runs them).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import aot
import triton

from dmkd_fast import kd_loss, kd_loss_and_grad
from dmkd_fast.loss import ops

HERE = Path(__file__).parents[1] / "helpers"
# Relative errors on a GPU, whose exponentials and logarithms are less exact, and on its stand-in.
OF_LOSS, OF_GRAD = (5e-6, 3e-6) if torch._C._cuda_getDeviceCount() > 0 else (2e-6, 1e-6)
GOLDEN = json.loads(aot.GOLDEN.read_text(encoding="utf-8"))
# What every change compiles; the whole matrix is marked slow.
QUICK = [
    c
    for c in aot.all_cases()
    if c[2] == "bfloat16"
    and c[3] != "forward"
    and ((c[0] in (80, 100) and c[1] in (1000, 1003, 128256)) if c[3] in aot.KINDS else c[0] == 90)
]


def interpreted(*arguments: str, file: Path = HERE / "interpreted_kd_loss.py") -> str:
    """Run the interpreter's tests in a process of their own; what they printed."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, str(file), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done.stdout + done.stderr if done.returncode else "passed: " + done.stdout


@pytest.mark.slow
def test_interpreted_kernels_keep_their_promises() -> None:
    output = interpreted("-m", "not slow")
    assert output.startswith("passed"), output
    assert " passed" in output and "skipped" not in output


@pytest.mark.slow
def test_interpreted_kernels_reach_beyond_32_bit_offsets() -> None:
    output = interpreted("-m", "slow")
    assert output.startswith("passed") and "1 passed" in output, output


def check(case: tuple[int, int, str, str]) -> None:
    built = aot.build(case)
    assert built["spills"] == 0, f"{aot.key(case)} spills: {built}"
    for name, (width, count) in aot.expected_accesses(case).items():
        got = built[name].get(str(width), 0)
        assert got >= count, f"{aot.key(case)}: {name} of {width} bits: {built[name]}, want {count}"
    if GOLDEN["triton"] == triton.__version__:
        assert built == GOLDEN[aot.key(case)], aot.key(case)


@pytest.mark.parametrize("case", QUICK, ids=aot.key)
def test_machine_code_is_as_recorded(case: tuple[int, int, str, str]) -> None:
    check(case)


@pytest.mark.slow
def test_whole_matrix_of_machine_code_is_as_recorded() -> None:
    for case in aot.all_cases():
        check(case)


@pytest.mark.slow
def test_widest_tile_needs_no_spills() -> None:
    for kind in ("one_pass", "one_pass_target", *aot.DIVERGENCES):
        for architecture in (80, 90, 100) if kind.startswith("one_pass") else (90,):
            case = (architecture, aot.triton_launch.MAX_TILE, "float32", kind)
            assert aot.build(case)["spills"] == 0, case


def test_golden_file_covers_the_matrix_and_shows_wide_access() -> None:
    assert set(GOLDEN) == {"triton", *map(aot.key, aot.all_cases())}
    for case in aot.all_cases():
        recorded = GOLDEN[aot.key(case)]
        assert recorded["spills"] == 0
        width, count = aot.expected_accesses(case)["LDG"]
        assert recorded["LDG"][str(width)] >= count
        if case[1] in (1000, 32000, 128256):
            assert width == 128, aot.key(case)


# A wrong kernel must be noticed: each line is changed in a copy, and the copy's tests must fail.
MUTATIONS = {
    "mask of columns": ("tile", "(cols < num_classes)[None, :]", "(cols < BLOCK)[None, :]"),
    "row weight": ("tile", "up = factor * grad_scale", "up = grad_scale"),
    "zero times infinity": ("math", "return tl.where(p == 0, q, term), ", "return term, "),
    "branch near zero": ("math", "is_near = tl.abs(d) < 0.5", "is_near = tl.abs(d) < 0.0"),
    "rescaled sum": ("long", "t_sum *= tl.exp2((t_max - t_top) * scale2)", "t_sum *= 1.0"),
    "ticket": ("math", "if done == programs - 1:", "if done == programs - 2:"),
    "label smoothing": ("tile", "kept + spread, spread)", "kept, spread)"),
    "target's mass": ("tile", "share = tl.where(inside, share, 0.0)", "pass"),
    "sum of slopes": ("tile", "grad = slopes - q * tl.sum(slopes, 1)[:, None]", "grad = slopes"),
    "third sweep": ("long", "total += tl.sum(slopes, 0)", "total += 0.0"),
    "beta": ("math", "q_share = (1 - FIRST) * q", "q_share = FIRST * q"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_kernel_is_noticed(name: str, tmp_path: Path) -> None:
    file, old, new = MUTATIONS[name]
    module = f"dmkd_fast.loss.triton_{file}"
    source = Path(ops.__file__).with_name(f"triton_{file}.py").read_text(encoding="utf-8")
    assert old in source
    (tmp_path / "mutant.py").write_text(source.replace(old, new, 1), encoding="utf-8")
    runner = tmp_path / "run.py"
    runner.write_text(
        "import sys, importlib, pytest\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import dmkd_fast.loss\n"
        "mutant = importlib.import_module('mutant')\n"
        f"sys.modules[{module!r}] = dmkd_fast.loss.triton_{file} = mutant\n"
        f"sys.exit(pytest.main([{str(HERE / 'interpreted_kd_loss.py')!r}, '-qx', '-m', 'not slow',"
        " '-p', 'no:cacheprovider']))\n",
        encoding="utf-8",
    )
    output = interpreted(file=runner)
    assert not output.startswith("passed"), f"{name}: nothing noticed"
    assert "1 failed" in output, output  # a test, not the copy's import


def test_each_stream_of_a_device_counts_its_programs_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, zeros = torch.device("cuda", 63), torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *sizes, dtype, device: zeros(*sizes, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tickets = []
    for number in (7, 8, 7):
        stream = SimpleNamespace(cuda_stream=number)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _, stream=stream: stream)
        tickets.append(aot.triton_launch._ticket(device))
    assert tickets[0] is tickets[2] and tickets[0] is not tickets[1]


def on_gpu(dtype: torch.dtype, rows: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(0)
    draw = lambda: 3 * torch.randn(rows, classes, generator=generator, device="cuda")  # noqa: E731
    target = torch.randint(0, classes, (rows,), generator=generator, device="cuda")
    return draw().to(dtype), draw().to(dtype), target


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "classes"), [(256, 100), (256, 1000), (64, 21841), (16, 128256)])
def test_on_a_gpu_the_numbers_are_those_of_the_cpu(
    dtype: torch.dtype, rows: int, classes: int
) -> None:
    student, teacher, target = on_gpu(dtype, rows, classes)
    for hard in (None, target):
        alpha = None if hard is None else 0.5
        leaf = student.clone().requires_grad_()
        loss = kd_loss(leaf, teacher, hard, alpha=alpha)
        (2 * loss).backward()
        fused, grad = kd_loss_and_grad(student, teacher, hard, alpha=alpha, grad_scale=2.0)
        cpu = None if hard is None else hard.cpu()
        exact, exact_grad = kd_loss_and_grad(
            student.double().cpu(), teacher.double().cpu(), cpu, alpha=alpha, grad_scale=2.0
        )
        for value in (loss, fused):
            torch.testing.assert_close(value.double().cpu(), exact, rtol=OF_LOSS, atol=0)
        relative = {torch.float32: OF_GRAD, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
        # Half a step of float16's smallest numbers, which gradients of many classes are.
        least = 2**-25 * grad.numel() ** 0.5 if dtype == torch.float16 else 0.0
        for value in (leaf.grad, grad):
            error = (value.double().cpu() - exact_grad).norm()
            assert error < relative * exact_grad.norm() + least


@pytest.mark.cuda
def test_on_a_gpu_repeats_are_bitwise_equal_and_nothing_waits() -> None:
    student, teacher, target = on_gpu(torch.float32, 4096, 1000)
    first = kd_loss_and_grad(student, teacher, target, alpha=0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        leaf = student.clone().requires_grad_()
        mask = target > 3
        for _ in range(10):
            loss, grad = kd_loss_and_grad(student, teacher, target, alpha=0.5)
            kd_loss(leaf, teacher, target, alpha=0.5, mask=mask).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(loss, first[0]) and torch.equal(grad, first[1])


@pytest.mark.cuda
@pytest.mark.parametrize("classes", [1000, 32000])
def test_on_a_gpu_a_step_can_be_captured_in_a_graph(classes: int) -> None:
    student, teacher, _ = on_gpu(torch.bfloat16, 256, classes)
    out = torch.empty_like(student)
    kd_loss_and_grad(student, teacher, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, _ = kd_loss_and_grad(student, teacher, out=out)
    for seed in range(3):
        student.copy_(torch.randn_like(student) * (seed + 1))
        graph.replay()
        expected, grad = kd_loss_and_grad(student, teacher)
        assert torch.equal(loss, expected) and torch.equal(out, grad)


@pytest.mark.cuda
@pytest.mark.slow
def test_on_a_gpu_offsets_exceed_32_bits() -> None:
    rows, classes = 2_200_000, 1000
    student = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    _, grad = kd_loss_and_grad(student, student.flip(0), reduction="sum")
    _, last = kd_loss_and_grad(student[-5:], student[:5].flip(0), reduction="sum")
    assert torch.equal(grad[-5:], last)
