"""Report a run to MLflow: `distill("job.yaml", on_row=rows("kd"))`.

The extra [trackers] has the library. Without a server it writes to the folder or database that
`mlflow.set_tracking_uri` names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlflow


def rows(experiment: str, **options: Any) -> Callable[[dict[str, Any]], object]:
    """Start a run with the arguments of `mlflow.start_run`, and return a function for `on_row`."""
    mlflow.set_experiment(experiment)
    mlflow.start_run(**options)
    return lambda row: mlflow.log_metrics(row, step=row["views"])
