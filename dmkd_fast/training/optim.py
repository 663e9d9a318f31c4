"""Optimizers that can skip a step: their construction, Muon, and the learning rate.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); Liu et al.,
"Muon is scalable for LLM training" (arXiv 2502.16982), on the scale of its update.
"""

from __future__ import annotations

import ctypes
import difflib
import inspect
import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dmkd_fast.checkpoint.state import split_state
from dmkd_fast.runtime.device import exact_float32
from dmkd_fast.runtime.errors import invalid
from dmkd_fast.training.schedule import TIMM, Schedule

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x^3 and x^5. The map moves every singular value towards 1, small ones fast."""
ITERATIONS = 5
RMS = 0.2
"""Root mean square of an update at learning rate 1, about that of AdamW."""
LONGEST = 128
SMALLEST = 4
"""Ratio of the sides above, and shorter side below which a matrix is left to AdamW."""


def build_optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """Build a fused SGD or AdamW, Muon, or an optimizer of timm, without weight decay on vectors.

    The state of the fused ones is allocated here, as zeros: if the first step were skipped
    (`found_inf`), SGD would otherwise keep uninitialized momentum, and a lack of memory would show
    only during training.

    Raises:
        UserError: timm does not have the optimizer, or it needs second derivatives.
    """
    if schedule.name.startswith(TIMM):
        return _of_timm(model, schedule)
    momentum = schedule.momentum
    parameters = [p for p in model.parameters() if p.requires_grad]
    if schedule.name == "muon":
        decay = schedule.weight_decay
        return Muon(parameters, schedule.lr, momentum=momentum, weight_decay=decay)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if schedule.name == "adamw":
        made = torch.optim.AdamW(groups, lr=schedule.lr, betas=(momentum, 0.99), fused=True)
        for p in parameters:
            made.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        return made
    nesterov = schedule.nesterov and momentum > 0
    sgd = torch.optim.SGD(groups, lr=schedule.lr, momentum=momentum, nesterov=nesterov, fused=True)
    if momentum > 0:
        for p in parameters:
            sgd.state[p] = {"momentum_buffer": torch.zeros_like(p)}
    return sgd


def _of_timm(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    import timm.optim

    optim: Any = timm.optim
    name, known = schedule.name.removeprefix(TIMM), optim.list_optimizers()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        fix = f"did you mean {TIMM}{close[0]}?" if close else ""
        raise invalid("optim.name", schedule.name, "an optimizer of timm.optim", fix)
    info = optim.get_optimizer_info(name)
    options: dict[str, Any] = {}
    if info.second_order:
        expected = "an optimizer that needs no second derivatives"
        raise invalid("optim.name", schedule.name, expected, "choose another")
    if info.has_betas:
        kind = optim.get_optimizer_class(name, bind_defaults=False)
        betas = inspect.signature(kind).parameters.get("betas")
        if betas is not None and isinstance(betas.default, tuple):
            options["betas"] = (schedule.momentum, *betas.default[1:])
    options |= {"weight_decay": schedule.weight_decay, "momentum": schedule.momentum}
    made: torch.optim.Optimizer = optim.create_optimizer_v2(model, name, lr=schedule.lr, **options)
    return made


def check_settings(name: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose settings a checkpoint cannot keep.

    Args:
        name: Setting or argument that the optimizer comes from, for the message.
        optimizer: Optimizer with parameter groups.

    Raises:
        UserError: A setting is neither a tensor nor what JSON can hold.
    """
    for group in optimizer.param_groups:
        for key, value in group.items():
            try:
                json.dumps(None if key == "params" else split_state(value, key, {}, set()))
            except (TypeError, ValueError):
                got = f"{type(optimizer).__name__} with {key}={value!r:.60}"
                expected = "settings that a checkpoint can keep, such as numbers and texts"
                raise invalid(name, got, expected, "choose another optimizer") from None


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, times its `lr_scale` if it has one.

    On CUDA it is rounded to float32, since captured steps read it from the device as such.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if any(p.is_cuda for p in group["params"][:1]):
            group["lr"] = ctypes.c_float(group["lr"]).value


def is_matrix(parameter: Tensor) -> bool:
    """Return whether Muon's update fits a parameter.

    It does not fit vectors, depthwise kernels, position embeddings and matrices that are nearly
    vectors.
    """
    if parameter.ndim < 2 or parameter.numel() == 0 or min(parameter.shape[:2]) == 1:
        return False
    rows = parameter.shape[0]
    columns = parameter.numel() // rows
    short, long = min(rows, columns), max(rows, columns)
    return short >= SMALLEST and long <= LONGEST * short


def orthogonalize(matrix: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Move the singular values of a matrix (n, m) to between about 0.7 and 1.2, times `scale`.

    Each iteration multiplies the matrix X by a polynomial of its Gram matrix X X^T. These factors
    commute. So the iterations take place on the square matrices alone, of the shorter side, and
    the long one is multiplied twice in all. Its norm is the root of the Gram matrix's trace.

    Returns:
        A float32 matrix (n, m).
    """
    x = matrix.float()
    if x.shape[0] > x.shape[1]:
        return orthogonalize(x.mT, scale).mT
    gram = x @ x.mT
    squares = gram.diagonal().sum().clamp_min(1e-14)
    gram = torch.where(squares.isfinite(), gram / squares, 0)  # of a huge matrix: no update
    total = factor = _factor(gram)
    for _ in range(ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        total = factor @ total
    update: Tensor = (total * (scale * squares.rsqrt())) @ x
    return update


def _factor(gram: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal().add_(a)
    return factor  # a + b G + c G^2


class Muon(torch.optim.Optimizer):
    """Muon for matrices, and fused AdamW for vectors and whatever else Muon does not fit.

    As fused optimizers do, it reads on the device whether a step is to be skipped, from
    `found_inf`, and divides gradients by `grad_scale` if it is set. So no step waits for the
    device, and steps can be captured as a CUDA graph.

    Args:
        parameters: Parameters to optimize.
        lr: Learning rate, a number.
        momentum: Momentum, and beta1 of AdamW.
        beta2: Decay of AdamW's second moment.
        weight_decay: Decoupled weight decay, for parameters of two and more dimensions.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        *,
        momentum: float = 0.9,
        beta2: float = 0.99,
        weight_decay: float = 0.0,
    ) -> None:
        every = list(parameters)
        kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {
            (is_orthogonal, is_decayed): []
            for is_orthogonal, is_decayed in ((True, True), (False, True), (False, False))
        }
        for p in every:
            kinds[is_matrix(p), p.ndim > 1].append(p)
        groups = [
            {
                "params": chosen,
                "orthogonal": is_orthogonal,
                "weight_decay": weight_decay if is_decayed else 0.0,
                "capturable": False,
                "fused": True,  # loading a state then moves step counts to the device
            }
            for (is_orthogonal, is_decayed), chosen in kinds.items()
            if chosen
        ]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "beta2": beta2})
        # Zeros from the start: a skipped first step would leave memory without a value.
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"exp_avg": torch.zeros_like(p)}
                if not group["orthogonal"]:
                    self.state[p] |= {
                        "exp_avg_sq": torch.zeros_like(p),
                        "step": torch.zeros((), device=p.device),
                    }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient, unless `found_inf` is not 0.

        Returns:
            What `closure` returns, which is called first, with gradients.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        found: Tensor | None = getattr(self, "found_inf", None)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        for group in self.param_groups:
            chosen = [p for p in group["params"] if p.grad is not None]
            if grad_scale is not None:
                for p in chosen:
                    p.grad.div_(grad_scale)
            is_cuda = any(p.is_cuda for p in chosen)
            with exact_float32() if is_cuda else nullcontext():
                if group["orthogonal"]:
                    for p in chosen:
                        self._orthogonal_step(p, group, found)
                elif chosen:
                    self._adamw_step(chosen, group, found)
        return value

    def _orthogonal_step(self, p: Tensor, group: dict[str, Any], found: Tensor | None) -> None:
        grad, average = p.grad, self.state[p]["exp_avg"]
        assert grad is not None
        rate, weight = group["lr"], 1 - group["momentum"]
        if found is not None:
            is_taken = (found == 0).float()
            # The gradient of a step that is skipped may be NaN, which weight 0 would not remove.
            grad = torch.where(found == 0, grad, 0)
            rate, weight = is_taken * rate, (is_taken * weight).to(p.dtype)
        average.lerp_(grad, weight)
        mixed = grad.lerp(average, group["momentum"])
        scale = rate * (RMS * max(p.shape[0], p.numel() // p.shape[0]) ** 0.5)
        # Columns as they lie in memory, whose order makes no difference to Muon.
        is_last = p.ndim == 4 and not p.is_contiguous()
        rows = mixed.permute(0, 2, 3, 1) if is_last else mixed
        update = orthogonalize(rows.flatten(1), scale).reshape(rows.shape)
        update = update.permute(0, 3, 1, 2) if is_last else update
        p.mul_(1 - rate * group["weight_decay"]).sub_(update)

    def _adamw_step(
        self, chosen: list[Tensor], group: dict[str, Any], found: Tensor | None
    ) -> None:
        states = [self.state[p] for p in chosen]
        adamw(
            chosen,
            [p.grad for p in chosen if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            capturable=group["capturable"],
            found_inf=found,
            amsgrad=False,
            beta1=group["momentum"],
            beta2=group["beta2"],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )
