"""Files of labels that came after the fact: CSV, Parquet or JSON lines with the columns `request_id` and `label`."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from tasks.settings import Mistake

COLUMNS = ("request_id", "label")


def read(path: Path) -> dict[str, Any]:
    """The labels by request id, in the order of the file. Of an id that comes twice the last label counts (labels get
    corrected); rows without a label are left out, since theirs has not come yet.

    Raises `Mistake` for a file that cannot be read, or without these columns.
    """
    readers = {".csv": _csv, ".parquet": _parquet, ".jsonl": _lines, ".ndjson": _lines}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise Mistake(f"{path}: labels come as .csv, .parquet or .jsonl, with the columns request_id and label", code=2)
    labels: dict[str, Any] = {}
    try:
        for request_id, label in reader(path):
            # NaN is no label either.
            if request_id not in (None, "") and label not in (None, "") and label == label:  # noqa: PLR0124
                labels[str(request_id)] = label
    except (OSError, ValueError, csv.Error) as error:
        told = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise Mistake(f"{path} cannot be read as labels: {told}", code=2) from error
    if not labels:
        raise Mistake(f"{path} holds no label: each row needs a request_id and a label", code=2)
    return labels


def _csv(path: Path) -> Iterator[tuple[Any, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        _has_columns(rows.fieldnames or ())
        for row in rows:
            yield row["request_id"], row["label"]


def _parquet(path: Path) -> Iterator[tuple[Any, Any]]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    _has_columns(file.schema_arrow.names)
    for batch in file.iter_batches(columns=list(COLUMNS)):
        ids, labels = (batch.column(name).to_pylist() for name in COLUMNS)
        yield from zip(ids, labels, strict=True)


def _lines(path: Path) -> Iterator[tuple[Any, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object with request_id and label")  # noqa: TRY004 - the file's
            _has_columns(row, f"line {number}: ")
            yield row["request_id"], row["label"]


def _has_columns(found: Iterable[str], where: str = "") -> None:
    missing = [name for name in COLUMNS if name not in found]
    if missing:
        raise ValueError(f"{where}no column '{missing[0]}' (there are: {', '.join(found) or 'none'})")
