"""Teacher logits kept beside the ring's images.

Stands on floor 1; private to the ring. N slots, B views, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LogitCache:
    """One row of logits per slot, and whether it is valid.

    Args:
        num_slots: N.
        num_logits: C.
        dtype: float16 or float32.
        device: Of the ring.

    Raises:
        ValueError: Another dtype.
    """

    def __init__(
        self, num_slots: int, num_logits: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        if dtype not in (torch.float16, torch.float32):
            raise ValueError(f"logits_dtype: got {dtype}, expected float16 or float32; change it")
        self.rows = torch.zeros((num_slots, num_logits), dtype=dtype, device=device)
        self.valid = torch.zeros(num_slots, dtype=torch.bool, device=device)

    def store(self, indices: Tensor, is_there: Tensor, logits: Tensor) -> None:
        """Keep rows of logits where `is_there` says so, without asking the host.

        Args:
            indices: (B,) int64 slots. If one comes twice, either row may stay.
            is_there: (B,) bool.
            logits: (B, C).

        Raises:
            ValueError: The logits have another shape.
        """
        expected = (len(indices), self.rows.shape[1])
        if logits.shape != expected:
            raise ValueError(
                f"logits: got shape {tuple(logits.shape)}, expected {expected}; store one row per "
                "drawn image"
            )
        kept = self.rows[indices]
        self.rows[indices] = torch.where(is_there[:, None], logits.to(kept.dtype), kept)
        self.valid[indices] = is_there | self.valid[indices]
