"""Keep the embeddings of many prompts in a file, and those of one micro-batch on the device.

Shapes: B micro-batch, P prompts, with the empty one last if the model has a null class.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dmkd_fast.runtime import files
from dmkd_fast.runtime.errors import warn_once
from dmkd_fast.runtime.model_files import keep_in_cache

# Embeddings of fewer bytes stay on the device, where no copy is needed.
LEAST_BYTES = 2**28
TABLES = ("prompts", "pooled", "mask")
"""Names of the buffers with one row per prompt, in all families."""


class PromptBank:
    """The tables of a module with one row a prompt.

    Args:
        module: Module of a text-to-image family. Its tables are cut to their last row.
        tables: Tables by the name of their buffer, (P, ...) each.
    """

    def __init__(self, module: nn.Module, tables: Mapping[str, Tensor]) -> None:
        self.tables = {(module, name): table for name, table in _mapped(tables).items()}
        """Tables by their module and the name of their buffer."""
        for (_, name), table in self.tables.items():
            setattr(module, name, nn.Buffer(table[-1:].clone()))

    def joined(self, other: PromptBank) -> PromptBank:
        """Return a bank of the modules of both, which get the same prompts."""
        both = copy.copy(self)
        both.tables = self.tables | other.tables
        return both

    @property
    def numbers_per_prompt(self) -> int:
        """How many numbers the embeddings of one prompt are."""
        return sum(table[0].numel() for table in self.tables.values())

    def resize(self, count: int) -> None:
        """Give the modules room for `count` prompts, before the last row of the tables."""
        for (module, name), table in self.tables.items():
            held = getattr(module, name)
            if len(held) != count + 1:
                rows = held[-1:].expand(count + 1, *table.shape[1:]).clone()
                setattr(module, name, nn.Buffer(rows))

    def fill(self, indices: Tensor) -> None:
        """Copy the prompts of one micro-batch to the first rows of the modules.

        Args:
            indices: Prompts, (B,) int64 on the CPU, at most as many as `resize` made room for.
        """
        for (module, name), table in self.tables.items():
            held = getattr(module, name)
            # The order of a micro-batch is kept: its image i has row i.
            held[: len(indices)].copy_(table[indices])


def take_bank(
    module: nn.Module, num_rows: int, *, least_bytes: int | None = None
) -> PromptBank | None:
    """Return the prompts of a module as a bank, if they are too many for a device.

    Args:
        module: Module of a text-to-image family.
        num_rows: Number of prompts, with the empty one if the model has a null class.
        least_bytes: Bytes of the smallest bank; None: `LEAST_BYTES`.
    """
    tables = {
        name: table.cpu()
        for name, table in module.named_buffers(recurse=False)
        if name in TABLES and len(table) == num_rows
    }
    least_bytes = LEAST_BYTES if least_bytes is None else least_bytes
    if sum(table.nbytes for table in tables.values()) < least_bytes:
        return None
    return PromptBank(module, tables)


def _mapped(tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tables, mapped from a file in the cache folder where it can be written."""
    digest = hashlib.sha256()
    for name in sorted(tables):
        digest.update(name.encode())
        digest.update(tables[name].contiguous().view(torch.uint8).numpy().data)
    path = files.cache_folder() / f"bank-{digest.hexdigest()[:32]}.safetensors"
    try:
        if not path.is_file():
            keep_in_cache(path, tables)
        return dict(load_file(path))
    except Exception as error:  # a full disk, or a file that another program damaged
        files.discard(path)  # the next job writes it again
        warn_once(f"{path.parent}: cannot map prompts from there ({error}); they stay in memory")
        return dict(tables)
