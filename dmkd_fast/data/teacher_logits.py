"""Teacher logits of fixed views of generated images, in a parquet file beside each shard.

    shard-000000.logits.parquet    one row per image of shard-000000.tar, in order

Beside `id`, a file has one column of fixed-size binary values for each array of an image, in
little-endian C order: `logits` (V, C) float16, or for the K largest ones `values` (V, K) float16,
`indices` (V, K) uint16 (int32 above 65,536 classes) and `logsumexp` (V,) float32. Pages hold plain
values without compression, so that a row is a range of bytes. The manifest has the SHA-256 of each
row. View v of image i has the crop of (seed, i, v).

Shapes: V views an image, C classes, K largest logits, n images.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from dmkd_fast.data.listing import SourceError
from dmkd_fast.runtime import files

MOST_VIEWS = 1024
_GROUP_BYTES, _MOST_ROWS = 2**24, 4096
_AGAIN = "run the same dmkd generate again, which makes damaged shards again"


class LogitsPlan(BaseModel):
    """What is stored of the teacher's logits, and the views that they are of."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    views_per_image: int = Field(ge=1, le=MOST_VIEWS)
    top_k: int | None = Field(ge=1)
    """Number of the largest logits; None: the logits of all classes."""
    temperature: float | None
    """Temperature at which the sums over all classes were taken (with `top_k`), and at which
    several teachers were averaged. None: the logits depend on no temperature."""
    views: dict[str, Any]
    """Settings of the crops and flips: scale, ratio, pad, flip."""

    def arrays(self, num_classes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of each array of an image, by the name of its column."""
        views = self.views_per_image
        if self.top_k is None:
            return {"logits": ("<f2", (views, num_classes))}
        index = "<u2" if num_classes <= 2**16 else "<i4"
        return {
            "values": ("<f2", (views, self.top_k)),
            "indices": (index, (views, self.top_k)),
            "logsumexp": ("<f4", (views,)),
        }

    def bytes_per_image(self, num_classes: int) -> int:
        """Return the bytes of an image's arrays."""
        return sum(_widths(self.arrays(num_classes)).values())


class LogitsWriter:
    """Write the logits of one shard; the file is complete after `close`.

    Args:
        path: File to write.
        arrays: Dtype and shape of each array, as from `LogitsPlan.arrays`.
    """

    def __init__(self, path: Path, arrays: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, widths = path, _widths(arrays)
        self._rows_per_group = min(_MOST_ROWS, max(1, _GROUP_BYTES // sum(widths.values())))
        fields = [pa.field("id", pa.int64(), nullable=False)]
        fields += [pa.field(name, pa.binary(w), nullable=False) for name, w in widths.items()]
        self._schema, self._rows = pa.schema(fields), list[dict[str, Any]]()
        self._file = pq.ParquetWriter(
            path,
            self._schema,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            data_page_size=2**30,
        )

    def add(self, image_id: int, row: dict[str, bytes]) -> str:
        """Append the arrays of an image, and return their SHA-256."""
        self._rows.append({"id": image_id, **row})
        if len(self._rows) == self._rows_per_group:
            self._flush()
        return hashlib.sha256(b"".join(row.values())).hexdigest()

    def close(self) -> None:
        """Write the rest and flush the file to disk."""
        self._flush()
        self._file.close()
        files.sync(self.path)

    def discard(self) -> None:
        """Close and remove an unfinished file."""
        with contextlib.suppress(OSError):  # closing writes, which fails on a full disk
            self._file.close()
        self.path.unlink(missing_ok=True)

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            table = pa.Table.from_pylist(self._rows, schema=self._schema)
            self._file.write_table(table, row_group_size=len(self._rows))
        self._rows = []


class LogitsFile:
    """Read single images from the logits of one shard, whose bytes stay on disk.

    The file is opened by the first read.

    Args:
        path: File that a `LogitsWriter` wrote.
        arrays: Dtype and shape of each array, as from `LogitsPlan.arrays`.
        hashes: SHA-256 of each row.
    """

    def __init__(
        self, path: Path, arrays: dict[str, tuple[str, tuple[int, ...]]], hashes: Sequence[str]
    ) -> None:
        self.path, self._arrays, self._hashes = path, arrays, hashes
        self._starts: list[int] = []  # first row of each row group
        self._groups: list[dict[str, np.ndarray]] = []

    def read(self, row: int) -> dict[str, np.ndarray]:
        """Return the arrays of an image, checked against the manifest.

        Raises:
            SourceError: The file cannot be read, or its bytes differ from those that were written.
        """
        if not self._groups:
            self._open()
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        place = row - self._starts[group]
        data = {name: values[place].tobytes() for name, values in self._groups[group].items()}
        if hashlib.sha256(b"".join(data.values())).hexdigest() != self._hashes[row]:
            raise SourceError(
                f"{self.path}: the bytes of row {row} are not those of the manifest; {_AGAIN}"
            )
        return {
            name: np.frombuffer(data[name], dtype).reshape(shape)
            for name, (dtype, shape) in self._arrays.items()
        }

    def _open(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        starts, groups, start = [], [], 0
        try:
            facts = pq.read_metadata(self.path)
            for number in range(facts.num_row_groups):
                group = facts.row_group(number)
                columns = (group.column(i) for i in range(group.num_columns))
                found = {column.path_in_schema: column for column in columns}
                starts.append(start)
                groups.append(
                    {
                        name: _mapped(self.path, found[name], group.num_rows, width)
                        for name, width in _widths(self._arrays).items()
                    }
                )
                start += group.num_rows
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:120]
            raise SourceError(f"{self.path}: damaged ({reason}); {_AGAIN}") from None
        if start != len(self._hashes):
            raise SourceError.invalid(self.path, f"{start} rows", str(len(self._hashes)), _AGAIN)
        self._starts, self._groups = starts, groups


def _mapped(path: Path, column: Any, rows: int, width: int) -> np.ndarray:
    """Map the values of one column of a row group, (rows, width) uint8.

    They are the last bytes of the column's only page.
    """
    size = column.total_compressed_size
    if column.compression != "UNCOMPRESSED" or column.physical_type != "FIXED_LEN_BYTE_ARRAY":
        raise ValueError("compressed, or of another type")
    offset = column.data_page_offset + size - rows * width
    if not 0 <= column.data_page_offset <= offset:
        raise ValueError("of another width")
    return np.memmap(path, np.uint8, "r", offset, (rows, width))


def _widths(arrays: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, int]:
    """Return the bytes of each array of an image."""
    return {
        name: np.dtype(dtype).itemsize * math.prod(shape) for name, (dtype, shape) in arrays.items()
    }
