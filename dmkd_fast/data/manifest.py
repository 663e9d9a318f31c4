"""The manifest of a directory of generated images: a parquet file of rows for each shard.

Shapes: n images of a shard.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dmkd_fast.data.listing import SourceError
from dmkd_fast.runtime import files

_AGAIN = "make the shard again"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one row per image, and flush the file to disk.

    Args:
        path: File to write.
        rows: Columns of each image. `logits_sha256` and `prompt` are optional, each in all rows or
            in none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(with_logits="logits_sha256" in rows[0])
    if "prompt" in rows[0]:
        schema = schema.append(pa.field("prompt", pa.string()))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    files.sync(path)


def read(
    path: Path, ids: range, num_classes: int, *, with_logits: bool
) -> tuple[np.ndarray, list[str], list[str]]:
    """Read classes and hashes of a file that must have exactly these ids.

    Args:
        path: File that `write` wrote.
        ids: Image ids of the shard.
        num_classes: Number of classes of the set.
        with_logits: Whether the set has teacher logits.

    Returns:
        Classes (n,) int64, the SHA-256 of each image, and that of its logits, if there are any.

    Raises:
        SourceError: The file is damaged, or of another shard.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["id", "class", "sha256", *["logits_sha256"] * with_logits]
    wanted = [_schema(with_logits=with_logits).field(name) for name in names]
    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows != len(ids):
                got = f"{file.metadata.num_rows} rows"
                raise SourceError.invalid(path, got, f"{len(ids)}", _AGAIN)
            for field in wanted:
                if (kind := file.schema_arrow.field(field.name).type) != field.type:
                    got = f"{kind} for {field.name!r}"
                    raise SourceError.invalid(path, got, f"{field.type}", _AGAIN)
            table = file.read(columns=names)
        if any(table[name].null_count for name in names):
            raise SourceError.invalid(path, "empty fields", "none", _AGAIN)
        found = table["id"].to_numpy()
        labels = table["class"].to_numpy().astype(np.int64)
        hashes = table["sha256"].to_pylist()
        of_logits = table["logits_sha256"].to_pylist() if with_logits else []
    except SourceError:
        raise
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:120]
        raise SourceError(f"{path}: damaged ({reason}); {_AGAIN}") from None
    if list(found) != list(ids) or labels.min() < 0 or labels.max() >= num_classes:
        raise SourceError(f"{path}: ids or classes are not those of the plan; make it again")
    return labels, hashes, of_logits


def _schema(*, with_logits: bool) -> Any:
    import pyarrow as pa

    schema = pa.schema(
        [
            ("id", pa.int64()),
            ("class", pa.int32()),
            ("seed", pa.int64()),
            ("guidance_scale", pa.float32()),
            ("num_steps", pa.int32()),
            ("solver", pa.string()),
            ("denoiser", pa.string()),
            ("revision", pa.string()),
            ("teacher_class", pa.int32()),
            ("teacher_probability", pa.float32()),
            ("shard", pa.string()),
            ("sha256", pa.string()),
        ]
    )
    return schema.append(pa.field("logits_sha256", pa.string())) if with_logits else schema
