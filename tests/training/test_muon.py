"""Muon: its update, which parameters get it, skipped steps, and memory formats."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmkd_fast.training.optim import Muon, is_matrix, orthogonalize


def iterated(matrix: Tensor) -> Tensor:
    """The published iteration, step by step on the matrix itself, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(32, 288), (288, 32), (10, 128), (64, 64), (4, 4)])
def test_the_update_is_the_published_iteration(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonalize(matrix)
    torch.testing.assert_close(found.double(), iterated(matrix), rtol=0, atol=2e-5)
    if shape[0] != shape[1]:
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.6 and values.max() < 1.25


def test_an_update_whose_singular_values_span_eight_decades() -> None:
    torch.manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(n, 48))[0] for n in (48, 200))
    matrix = left @ torch.diag(torch.logspace(0, -8, 48)) @ right.T
    torch.testing.assert_close(orthogonalize(matrix).double(), iterated(matrix), rtol=0, atol=1e-3)
    assert torch.equal(orthogonalize(torch.zeros(5, 6)), torch.zeros(5, 6))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64, 32, 3, 3), True),
        ((10, 128), True),
        ((64, 48, 5), True),
        ((64,), False),
        ((), False),
        ((64, 1, 3, 3), False),  # depthwise
        ((1, 197, 768), False),  # position embedding
        ((3, 300), False),  # nearly a vector
        ((4, 512), True),
        ((4, 513), False),
        ((0, 5), False),
        ((8, 2000), False),
    ],
)
def test_matrices_are_orthogonalized_and_others_are_not(shape: Any, expected: bool) -> None:
    assert is_matrix(torch.empty(shape)) is expected
    parameter = nn.Parameter(torch.empty(shape))
    (group,) = Muon([parameter], 0.1, weight_decay=0.5).param_groups
    assert group["orthogonal"] is expected
    assert group["weight_decay"] == (0.5 if parameter.ndim > 1 else 0.0)


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(4, 40, 3, bias=False), nn.BatchNorm2d(40), nn.Flatten(), nn.Linear(160, 6)
    )


def take(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(16, 4, 4, 4)).square().mean().backward()
        optimizer.step()


def test_steps_equal_those_written_out() -> None:
    """Momentum, Nesterov, scale of the update, decoupled decay; AdamW for vectors."""
    model, lr, momentum, decay = net(), 0.02, 0.8, 0.3
    twin = copy.deepcopy(model)
    take(model, Muon(model.parameters(), lr, momentum=momentum, weight_decay=decay), range(4))
    matrices = [p for p in twin.parameters() if p.ndim > 1]
    vectors = [p for p in twin.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(vectors, lr, betas=(momentum, 0.99), weight_decay=0, foreach=False)
    averages = [torch.zeros_like(p) for p in matrices]
    for step in range(4):
        torch.manual_seed(step)
        twin.zero_grad()
        twin(torch.randn(16, 4, 4, 4)).square().mean().backward()
        adamw.step()
        with torch.no_grad():
            for p, average in zip(matrices, averages, strict=True):
                assert p.grad is not None
                average.mul_(momentum).add_(p.grad, alpha=1 - momentum)
                mixed = (1 - momentum) * p.grad + momentum * average
                update = iterated(mixed.flatten(1)).float().view(p.shape)
                scale = 0.2 * math.sqrt(max(p.shape[0], p[0].numel()))
                p.mul_(1 - lr * decay).sub_(update, alpha=lr * scale)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_memory_format_changes_neither_steps_nor_what_is_resumed() -> None:
    plain, last = net(), net().to(memory_format=torch.channels_last)
    one, two = (Muon(m.parameters(), 0.02, weight_decay=0.1) for m in (plain, last))
    take(plain, one, range(3))
    take(last, two, range(3))
    torch.testing.assert_close(last[0].weight, plain[0].weight, rtol=1e-4, atol=1e-5)
    # A state of other strides than the weights', as a file may bring it.
    again = copy.deepcopy(last)
    state = copy.deepcopy(two.state_dict())
    for values in state["state"].values():
        values["exp_avg"] = values["exp_avg"].contiguous()
    three = Muon(again.parameters(), 0.02, weight_decay=0.1)
    three.load_state_dict(state)
    take(last, two, range(3, 6))
    take(again, three, range(3, 6))
    assert all(
        torch.equal(*pair) for pair in zip(last.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.0])
def test_a_step_that_is_skipped_changes_nothing(bad: float) -> None:
    model = net()
    optimizer: Any = Muon(model.parameters(), 0.02, weight_decay=0.1)
    optimizer.found_inf = torch.zeros(())
    for number in range(3):
        take(model, optimizer, range(1))
        for p in model.parameters():
            assert p.grad is not None
            p.grad.mul_(bad)
        before = copy.deepcopy([*model.parameters(), optimizer.state_dict()["state"]])
        optimizer.found_inf.fill_(1.0)
        optimizer.step()
        optimizer.found_inf.zero_()
        after = [*model.parameters(), optimizer.state_dict()["state"]]
        *weights, state = before
        assert all(torch.equal(*pair) for pair in zip(weights, after[:-1], strict=True)), number
        for key, values in state.items():
            assert all(torch.equal(values[name], after[-1][key][name]) for name in values)


def test_a_matrix_that_does_not_fit_is_decayed_like_one() -> None:
    depthwise = nn.Parameter(torch.ones(8, 1, 3, 3))
    twin = nn.Parameter(torch.ones(8, 1, 3, 3))
    mine = Muon([depthwise], 0.02, momentum=0.8, weight_decay=0.3)
    plain = torch.optim.AdamW([twin], 0.02, betas=(0.8, 0.99), weight_decay=0.3, foreach=False)
    for p, optimizer in ((depthwise, mine), (twin, plain)):
        for step in range(3):
            p.grad = torch.full_like(p, 1.0 + step)
            optimizer.step()
    torch.testing.assert_close(depthwise, twin)


def test_a_huge_gradient_leaves_finite_weights() -> None:
    weight = nn.Parameter(torch.ones(32, 288))
    weight.grad = torch.full_like(weight, 1e19)
    Muon([weight], 0.02).step()
    assert torch.equal(weight, torch.ones(32, 288))


def test_gradients_are_divided_by_the_scale_of_a_grad_scaler() -> None:
    model, twin = net(), net()
    one: Any = Muon(model.parameters(), 0.02)
    other = Muon(twin.parameters(), 0.02)
    take(twin, other, range(1))
    torch.manual_seed(0)
    (1024.0 * model(torch.randn(16, 4, 4, 4)).square().mean()).backward()
    one.grad_scale = torch.tensor(1024.0)
    one.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_loaded_state_is_on_the_device_of_its_parameter() -> None:
    """Also the step counts, which a fused optimizer reads there."""
    source = Muon([nn.Parameter(torch.zeros(8))], 0.1)
    target = Muon([nn.Parameter(torch.zeros(8, device="meta"))], 0.1)
    target.load_state_dict(source.state_dict())
    (values,) = target.state.values()
    assert {value.device.type for value in values.values()} == {"meta"}


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    model = net()
    optimizer = Muon(model.parameters(), 0.02, weight_decay=0.1)
    take(model, optimizer, range(1))
    before = copy.deepcopy(list(model.parameters()))
    model[0].weight.grad = None
    optimizer.step()
    assert torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[3].weight, before[4])


def test_a_closure_is_called_with_gradients() -> None:
    model = net()
    optimizer = Muon(model.parameters(), 0.02)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4, 4, 4)).square().mean()
        loss.backward()
        return loss

    before = model[3].weight.detach().clone()
    assert optimizer.step(closure).item() > 0
    assert not torch.equal(model[3].weight, before)
