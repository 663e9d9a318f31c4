"""kd_loss among PyTorch's machinery: opcheck, gradcheck, compile, autocast, GradScaler, DDP."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from textbook import reference_grad
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from dmkd_fast import DistillKL, kd_loss, kd_loss_and_grad
from dmkd_fast.loss import ops
from dmkd_fast.runtime import native


def logits(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, spread: float = 3.0
) -> Tensor:
    return (spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def raw_problems() -> list[tuple]:
    """Arguments of the raw operators: dense, strided, mixed dtypes, empty, masked, with targets."""
    f32, bf16, f64 = torch.float32, torch.bfloat16, torch.float64
    numbers = (4.0, 0.5, 16.0, 1.0, 0.1, None, [], False)
    plain = [
        (logits(r, c, seed=0, dtype=d), logits(r, c, seed=1, dtype=d), None, None, *numbers)
        for r, c, d in (
            (4, 10, f32),
            (1, 1, f32),
            (0, 5, f32),
            (3, 33, bf16),
            (2, 7, f64),
            (2, 7, torch.float16),
        )
    ]
    student, teacher = logits(4, 10, seed=0), logits(4, 10, seed=1)
    ids, soft = torch.arange(4), teacher.softmax(1)
    return [
        *plain,
        (
            student.t().contiguous().t(),
            torch.cat((teacher, teacher), 1)[:, :10],
            None,
            None,
            *numbers,
        ),
        (student.to(bf16), teacher, None, torch.rand(4), *numbers),
        (student, teacher.double(), None, torch.zeros(4, dtype=f64), *numbers),
        (student, teacher, ids, None, *numbers),
        (student, teacher, ids, torch.zeros(4), *numbers),
        (student, teacher, soft, torch.rand(4), *numbers),
    ]


@pytest.mark.parametrize("problem", raw_problems())
def test_raw_operators_pass_opcheck(problem: tuple) -> None:
    student, teacher = problem[:2]
    for per_row in (False, True):
        torch.library.opcheck(ops.forward, (*problem, per_row))
    *_, stats = ops.forward(*problem, False)
    dtype = ops.accumulated_type(student, teacher)
    for upstream in (torch.tensor(2.0, dtype=dtype), torch.rand(len(student)).to(dtype)):
        torch.library.opcheck(ops.backward, (upstream, stats, *problem))
    grad = torch.empty(student.shape, dtype=student.dtype)
    torch.library.opcheck(ops.forward_backward, (grad, None, 2.0, *problem))


@pytest.mark.parametrize("kind", ["none", "ids", "probabilities"])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_gradcheck(kind: str, reduction: str) -> None:
    f64 = torch.float64
    student = logits(5, 7, seed=0, dtype=f64).requires_grad_()
    teacher = logits(5, 7, seed=1, dtype=f64)
    target = {
        "none": None,
        "ids": torch.tensor([0, 6, -100, 2, 3]),
        "probabilities": logits(5, 7, seed=2, dtype=f64).softmax(1),
    }[kind]
    settings = {} if target is None else {"alpha": 0.3, "label_smoothing": 0.1}
    mask = torch.tensor([True, True, True, False, True])
    torch.autograd.gradcheck(
        lambda s: kd_loss(
            s,
            teacher,
            target,
            temperature=2.0,
            reduction=reduction,
            mask=mask,
            row_weight=torch.arange(1.0, 6),
            **settings,
        ),
        (student,),
    )


def test_compiles_as_a_full_graph_for_any_batch() -> None:
    torch.compiler.reset()
    graphs = 0

    def count(module: torch.fx.GraphModule, inputs: list) -> object:
        nonlocal graphs
        graphs += 1
        return module

    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return kd_loss(student, teacher, target, alpha=0.5, temperature=3.0, mask=target > 1)

    counted = torch.compile(loss, fullgraph=True, dynamic=True, backend=count)
    traced = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (8, 9, 17):
        student, teacher = logits(rows, 10, seed=0), logits(rows, 10, seed=1)
        target = torch.arange(rows) % 10
        mine, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
        expected = loss(theirs, teacher, target)
        expected.backward()
        counted(student.clone().requires_grad_(), teacher, target)
        compiled = traced(mine, teacher, target)
        compiled.backward()
        assert torch.equal(compiled, expected) and torch.equal(mine.grad, theirs.grad)
    assert graphs == 1
    one_pass = torch.compile(
        lambda s, t: kd_loss_and_grad(s, t, out=torch.empty_like(s)),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for a, b in zip(one_pass(student, teacher), kd_loss_and_grad(student, teacher), strict=True):
        assert torch.equal(a, b)


def test_under_autocast_the_loss_is_that_of_the_logits_given() -> None:
    model, images = nn.Linear(6, 10), logits(5, 6, seed=0)
    teacher = logits(5, 10, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student = model(images)
        loss = kd_loss(student, teacher)
    assert student.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    expected = (
        kd_loss_and_grad(student.detach(), teacher)[1].float().t() @ images.bfloat16().float()
    )
    torch.testing.assert_close(model.weight.grad, expected, rtol=2e-2, atol=2e-3)


def test_gradients_too_small_for_float16_survive_a_scaled_loss() -> None:
    teacher = logits(4096, 16, seed=0, spread=0.5)
    student = (teacher + 1e-3 * logits(4096, 16, seed=1, spread=1.0)).half()
    teacher = teacher.half()
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    leaf = student.float().requires_grad_()
    optimizer = torch.optim.SGD([leaf], lr=1.0)
    scaler.scale(kd_loss(leaf.half(), teacher)).backward()
    exact = reference_grad(student.double(), teacher.double(), temperature=4.0) / 4096
    unscaled = leaf.grad.double() / 65536
    assert (unscaled - exact).norm() < 1e-3 * exact.norm()
    _, one_pass = kd_loss_and_grad(student, teacher, grad_scale=scaler._scale)
    assert torch.equal(one_pass.float(), leaf.grad)
    _, rounded_first = kd_loss_and_grad(student, teacher)
    assert (rounded_first.double() - exact).norm() > 0.1 * exact.norm()  # what must not happen
    scaler.step(optimizer)
    scaler.update()


def test_inputs_keep_their_values_and_versions() -> None:
    student, teacher = logits(5, 10, seed=0).requires_grad_(), logits(5, 10, seed=1)
    target, weight, mask = torch.arange(5), torch.rand(5), torch.ones(5, dtype=torch.bool)
    inputs = (student, teacher, target, weight, mask)
    before = [(t.detach().clone(), t._version) for t in inputs]
    kd_loss(student, teacher, target, alpha=0.5, row_weight=weight, mask=mask).backward()
    kd_loss_and_grad(student, teacher, target, alpha=0.5, row_weight=weight, mask=mask)
    for tensor, (values, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor.detach(), values) and tensor._version == version
    out = torch.empty(5, 10)
    version = out._version
    kd_loss_and_grad(student, teacher, out=out)
    assert out._version > version


def test_evaluation_saves_nothing() -> None:
    student, teacher = logits(5, 10, seed=0).requires_grad_(), logits(5, 10, seed=1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        with torch.no_grad():
            loss = kd_loss(student, teacher)
        assert not loss.requires_grad and not kd_loss(student.detach(), teacher).requires_grad
        assert not saved
        kd_loss(student, teacher)
        assert saved


def test_double_backward_and_function_transforms_say_that_they_are_not_there() -> None:
    student, teacher = logits(5, 10, seed=0).requires_grad_(), logits(5, 10, seed=1)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(kd_loss(student, teacher), student, create_graph=True)
    student = student.detach()
    ones = torch.ones_like(student)
    loss = lambda s: kd_loss(s, teacher)  # noqa: E731
    for call in (
        lambda: torch.func.grad(loss)(student),
        lambda: torch.func.jvp(loss, (student,), (ones,)),
        lambda: torch.func.jvp(lambda t: kd_loss(student, t), (teacher,), (ones,)),
        lambda: torch.func.jvp(lambda s: kd_loss_and_grad(s, teacher)[0], (student,), (ones,)),
        lambda: torch.func.vmap(loss)(torch.stack((student, student))),
    ):
        with pytest.raises(NotImplementedError, match="only reverse mode works"):
            call()
    half = torch.tensor(0.5)
    for given in (
        {"teacher_logits": teacher},
        {"student_logits": student},
        {"temperature": half},
        {"row_weight": torch.ones(5)},
        {"num_items": half},
        {"target": teacher.softmax(1)},
        {"alpha": half},
    ):
        plain = {"student_logits": student, "teacher_logits": teacher}
        if "target" in given or "alpha" in given:
            plain |= {"target": student.softmax(1), "alpha": 0.5}
        ((name, value),) = given.items()
        with forward_ad.dual_level():
            kd_loss(**plain)  # another part of the program may use forward mode
            dual = forward_ad.make_dual(value, torch.ones_like(value))
            with pytest.raises(NotImplementedError, match="only reverse mode works"):
                kd_loss(**(plain | {name: dual}))


class Seen(TorchDispatchMode):
    """Record the names of all operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(native.loss_and_gradient is None, reason="needs the extension and torch 2.14")
def test_only_plain_calls_go_past_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, target = logits(5, 10, seed=0), logits(5, 10, seed=1), torch.arange(5)
    direct, problems = native.loss_and_gradient, []
    monkeypatch.setattr(native, "loss_and_gradient", lambda p: problems.append(p) or direct(p))

    def results(teacher: Tensor = teacher) -> tuple[Tensor, ...]:
        leaf = student.clone().requires_grad_()
        loss = kd_loss(leaf, teacher, target, alpha=0.5)
        loss.backward()
        return loss.detach(), leaf.grad, *kd_loss_and_grad(student, teacher, target, alpha=0.5)

    def assert_same(found: tuple[Tensor, ...], calls: int) -> None:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert len(problems) == calls

    expected = results()
    assert torch.equal(expected[0], expected[2]) and torch.equal(expected[1], expected[3])
    with torch.inference_mode():
        inferred = teacher.clone()
    assert_same(results(inferred), 4)
    name = "dmkd_fast::kd_loss_forward_backward"
    with Seen() as seen:
        assert_same(results(), 4)
    assert seen.names.count(name) == 2
    with torch.profiler.profile() as profile:
        assert_same(results(), 4)
    assert [event.name for event in profile.events()].count(name) == 2
    assert_same(results(torch._neg_view(-teacher)), 4)  # its memory holds other numbers
    monkeypatch.setattr(native, "loss_and_gradient", None)
    assert_same(results(), 4)


@pytest.mark.skipif(native.row_weights is None, reason="needs the extension and torch 2.14")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_weights_past_the_dispatcher_are_those_of_the_operator(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct, calls = native.row_weights, []
    monkeypatch.setattr(native, "row_weights", lambda *a: calls.append(a) or direct(*a))
    logits_of_both = logits(5, 10, seed=0).requires_grad_(), logits(5, 10, seed=1, dtype=dtype)
    ids, mask = torch.tensor([3, -100, 0, 7, -100]), torch.arange(5) != 2
    weight, items = torch.arange(5.0).to(dtype), torch.tensor(7.0, dtype=dtype)
    given = itertools.product((None, ids), (None, mask), (None, weight), (None, items), (0, 1))
    cases = [(*tensors, -100, bool(is_counted)) for *tensors, is_counted in given]
    operator = torch.ops.dmkd_fast.kd_loss_row_weights.default
    for number, mode in enumerate((contextlib.nullcontext, torch.inference_mode), 1):
        with mode():
            for case in cases:
                found = ops.row_weights(*logits_of_both, *case)
                assert found.dtype == dtype
                assert torch.equal(found, operator(*logits_of_both, *case))
        assert len(calls) == number * len(cases)
    with Seen() as seen:
        again = ops.row_weights(*logits_of_both, *case)
    assert seen.names.count("dmkd_fast::kd_loss_row_weights") == 1 and torch.equal(again, found)
    assert len(calls) == 2 * len(cases)


DDP = """
import os, torch
import torch.distributed as dist
from torch import nn
from dmkd_fast import kd_loss
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = nn.Linear(6, 10)
images, teacher = torch.randn(8, 6), torch.randn(8, 10)
target = torch.tensor([1, 2, -100, 4, 5, -100, -100, 8])
whole = nn.Linear(6, 10)
whole.load_state_dict(model.state_dict())
kd_loss(whole(images), teacher, target, alpha=0.5).backward()
parallel = nn.parallel.DistributedDataParallel(model)
mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
count = (target[mine] != -100).sum()
dist.all_reduce(count)
# DDP averages gradients; the sum over ranks is wanted.
loss = kd_loss(parallel(images[mine]), teacher[mine], target[mine], alpha=0.5, num_items=count)
(loss * world).backward()
torch.testing.assert_close(model.weight.grad, whole.weight.grad, rtol=1e-5, atol=1e-7)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo's threads, which the wrapped model still holds, may abort an ending process
"""


@pytest.mark.slow
def test_two_ranks_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(DDP, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--local-addr=127.0.0.1",
        str(script),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_offsets_beyond_32_bits() -> None:
    """In a process of its own: memory is reserved for 2.8 billion elements, little is touched."""
    code = """
import torch
from dmkd_fast import kd_loss_and_grad
step = 700_000_000
student, teacher, out = (
    torch.empty(4 * step, dtype=torch.bfloat16).as_strided((4, 1000), (step, 1)) for _ in range(3))
small = torch.randn(2, 4, 1000).bfloat16()
student.copy_(small[0]); teacher.copy_(small[1])
loss, grad = kd_loss_and_grad(student, teacher, out=out)
expected, expected_grad = kd_loss_and_grad(*small)
assert torch.equal(loss, expected) and torch.equal(grad, expected_grad)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_student_trains_with_the_module() -> None:
    torch.manual_seed(0)
    teacher, student = nn.Linear(8, 5), nn.Linear(8, 5)
    optimizer, loss_fn = torch.optim.SGD(student.parameters(), lr=0.5), DistillKL(2.0)
    images = torch.randn(64, 8)
    with torch.no_grad():
        teacher_logits = teacher(images)
    losses = []
    for _ in range(200):
        loss = loss_fn(student(images), teacher_logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]
