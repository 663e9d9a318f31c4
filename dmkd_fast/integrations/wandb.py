"""Report a run to Weights & Biases: `distill("job.yaml", on_row=rows(project="kd"))`.

The extra [trackers] has the library. `mode="offline"` writes files only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import wandb


def rows(**options: Any) -> Callable[[dict[str, Any]], None]:
    """Start a run with the arguments of `wandb.init`, and return a function for `on_row`."""
    run = wandb.init(**options)
    # Else a row would be kept back until the next one.
    return lambda row: run.log(row, step=row["views"], commit=True)
