"""A table's columns, read when they are asked for: of a frame in memory, or of a parquet file of any size."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pandas as pd


class Columns:
    """Wraps a frame or the path of a parquet file; `names` are its columns (index left out), `rows` its length.

    Of a file only what `read` asks for is held in memory, so a file larger than the memory can be looked at
    column by column. Raises ValueError, with the path, for what is no parquet file.
    """

    def __init__(self, table: "pd.DataFrame | Path") -> None:
        self._path: Path | None = None
        self._frame = pd.DataFrame()
        if isinstance(table, pd.DataFrame):
            # Requests and suites name columns in JSON, where a name is text.
            self._frame = table.set_axis([str(name) for name in table.columns], axis=1)
            self.rows = len(table)
            self.names = [str(name) for name in table.columns]
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            self._path = table
            try:
                with pq.ParquetFile(table) as file:
                    self.rows = int(file.metadata.num_rows)
                    self.names = [str(name) for name in file.schema_arrow.empty_table().to_pandas().columns]
            except pa.ArrowInvalid as error:
                raise ValueError(f"{table} is no parquet file: {error}") from error
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"the column '{twice}' is there twice: give each column a name of its own")

    def read(self, names: Sequence[str], *, at_most: int | None = None) -> pd.DataFrame:
        """The columns `names`; of more than `at_most` rows a sample of that many, the same rows in every call."""
        if at_most is None or at_most >= self.rows:
            return self._all(names)
        # One by one: of a large file the sample alone is held in memory.
        parts = [self._all([name]).sample(at_most, random_state=0) for name in names]
        return pd.concat(parts, axis=1) if parts else pd.DataFrame()

    def one(self, name: str, *, at_most: int | None = None) -> "pd.Series[Any]":
        """One column, as `read`."""
        return self.read([name], at_most=at_most)[name]

    def without(self, names: Collection[str]) -> list[str]:
        """The columns' names but for `names`."""
        return [name for name in self.names if name not in names]

    def _all(self, names: Sequence[str]) -> pd.DataFrame:
        if self._path is None:
            return self._frame[list(names)]
        return pd.read_parquet(self._path, columns=list(names)).reset_index(drop=True)
