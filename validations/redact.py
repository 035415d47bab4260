"""What may be kept of a request or an answer: the values of named fields are blotted out.

Pure. A name is a column, a key at any depth (`email`, `address.city`), or a path inside a row of an answer (`[1]`,
`prediction`, `scores[*]`). What cannot be read is blotted out whole, since nobody knows what it holds.
"""

import re
from collections.abc import Iterable
from typing import Any

import orjson

from validations.compare import parsed

REDACTED = "[redacted]"


class Redaction:
    """Blots out the fields called `names`; false where there are none."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = frozenset(names)
        self._ends = tuple("." + name for name in self._names if not name.startswith("["))

    def __bool__(self) -> bool:
        return bool(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def request(self, body: bytes, most: int) -> str:
        """The first `most` characters of a request, as text."""
        return self._text(body, most, rows=False)

    def answer(self, status: int, body: bytes, most: int) -> str:
        """The first `most` characters of an answer, as text. An error's words may hold anything: nothing is left."""
        if self and status >= 300:
            return REDACTED
        return self._text(body, most, rows=True)

    def rows(self, rows: list[Any]) -> list[Any]:
        """The predictions of an answer, row by row."""
        return [self._walk(row, "prediction" if "prediction" in self._names else "") for row in rows] if self else rows

    def _text(self, body: bytes, most: int, *, rows: bool) -> str:
        if not self:
            return body[: 4 * most].decode(errors="replace")[:most]
        try:
            data = parsed(body)
            if rows and isinstance(data, dict) and isinstance(data.get("predictions"), list):
                data = {**self._walk({**data, "predictions": None}, ""), "predictions": self.rows(data["predictions"])}
            elif rows:
                data = self.rows(data) if isinstance(data, list) else self.rows([data])[0]
            else:
                data = self._walk(data, "")
            return orjson.dumps(data).decode()[:most]
        except (ValueError, TypeError, RecursionError):
            return REDACTED

    def _named(self, path: str) -> bool:
        return any(p in self._names or p.endswith(self._ends) for p in (path, re.sub(r"\[\d+\]", "[*]", path)))

    def _walk(self, value: Any, path: str) -> Any:
        if path and self._named(path):
            return REDACTED
        if isinstance(value, dict):
            return self._object(value, path)
        if isinstance(value, list):
            return [self._walk(inner, f"{path}[{at}]") for at, inner in enumerate(value)]
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            try:
                return orjson.dumps(self._walk(parsed(value), path)).decode()
            except (ValueError, TypeError):
                return REDACTED if any(name.split(".")[-1] in value for name in self._names) else value
        return value

    def _object(self, value: dict[str, Any], path: str) -> dict[str, Any]:
        walked = {key: self._walk(inner, f"{path}.{key}" if path else key) for key, inner in value.items()}
        columns, data = value.get("columns"), value.get("data")
        if isinstance(columns, list) and isinstance(data, list):
            # MLflow's `dataframe_split`: names and values stand apart.
            walked |= {"columns": columns, "data": [self._row(columns, row, path) for row in data]}
        return walked

    def _row(self, columns: list[Any], row: Any, path: str) -> Any:
        if not isinstance(row, list) or len(row) > len(columns):
            return REDACTED
        return [
            self._walk(value, f"{path}.{column}" if path else str(column))
            for column, value in zip(columns, row, strict=False)
        ]
