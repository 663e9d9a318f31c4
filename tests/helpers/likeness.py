"""Find networks that start from common initial weights."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity


def likeness(one: nn.Module, other: nn.Module) -> float:
    """Largest cosine between weights of two networks, in standard deviations of unrelated ones.

    Weights of convolutions and linear layers are compared, from their first number on.
    """
    pairs = [
        (a[:n], b[:n])
        for a in _weights(one)
        for b in _weights(other)
        if (n := min(len(a), len(b))) >= 64
    ]
    return max(float(cosine_similarity(a, b, dim=0).abs()) * len(a) ** 0.5 for a, b in pairs)


def _weights(network: nn.Module) -> list[Tensor]:
    return [p.detach().flatten() for p in network.parameters() if p.dim() > 1]
