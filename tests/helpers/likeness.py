"""Find networks that start from common initial weights."""

from __future__ import annotations

from torch import nn
from torch.nn.functional import cosine_similarity


def likeness(one: nn.Module, other: nn.Module) -> float:
    """Largest cosine between weights of two networks, in standard deviations of unrelated ones."""
    pairs = [
        (a.flatten()[:n], b.flatten()[:n])
        for a in one.parameters()
        for b in other.parameters()
        if (n := min(a.numel(), b.numel())) >= 64 and a.std() > 0 and b.std() > 0
    ]
    return max(float(cosine_similarity(a, b, dim=0).abs()) * len(a) ** 0.5 for a, b in pairs)
