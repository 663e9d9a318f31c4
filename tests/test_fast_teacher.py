"""The teacher's fast copy gives the teacher's logits and leaves the teacher alone."""

from __future__ import annotations

import pytest
import torch
from conftest import small_classifier

from dmkd_fast import models
from dmkd_fast.assets import resolve

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_the_fast_teacher_gives_the_teachers_logits(dtype: torch.dtype, tolerance: float) -> None:
    teacher, _ = models.load_classifier(resolve("embedded:fashion_mnist/strong"), CPU)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    fast = models.for_inference(teacher, dtype)
    assert not [m for m in fast.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(p.requires_grad for p in fast.parameters())
    images = torch.randn(64, 1, 28, 28)
    with torch.no_grad():
        expected, got = teacher(images), fast(images.to(dtype)).float()
    assert (got - expected).abs().max() < tolerance * expected.abs().max()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_a_teacher_that_cannot_be_traced_still_teaches() -> None:
    class Branching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_classifier()

        def forward(self, views: torch.Tensor) -> torch.Tensor:
            return self.inner(views) if float(views.sum()) < 1e9 else views

    teacher = Branching().eval()
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        got = models.for_inference(teacher, torch.float32)(images)
        torch.testing.assert_close(got, teacher(images))
