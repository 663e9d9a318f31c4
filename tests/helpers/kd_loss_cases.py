"""The divergences that tests go through, and logits for them."""

from __future__ import annotations

import torch
from torch import Tensor

from dmkd_fast.loss.divergences import NAMES

FORMS = [
    *NAMES,
    {"jsd": {"beta": 0.1}},
    {"jsd": {"beta": 0.9}},
    {"alpha_beta": {"alpha": 0.5, "beta": 0.5}},
    {"alpha_beta": {"alpha": 1.0, "beta": 1.5}},
    {"dkd": {"alpha": 2.0, "beta": 0.5}},
    {"dist": {"beta": 2.0, "gamma": 0.0}},
    {"forward_kl": 0.5, "reverse_kl": 0.5},
    {"dkd": {"weight": 0.3, "beta": 2.0}, "jsd": 0.7},
    {"dist": 0.5, "alpha_beta": 0.25},
]


def logits(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, spread: float = 3.0
) -> Tensor:
    return (spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def ids_for(form: str | dict, rows: int, classes: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(classes, (rows,), generator=generator) if "dkd" in form else None
