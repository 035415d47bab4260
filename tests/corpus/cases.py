"""What a case of the corpus is, and the words in which signatures are written there."""

from dataclasses import dataclass
from typing import Any

MENDS = ("keep", "make", "compute", "log", "convert", "give", "add", "order", "map")
"""A breaking message says how to mend it after a colon, beginning with one of these."""


@dataclass(frozen=True)
class Case:
    """One change from champion to challenger. `says` stands in the message of a breaking one."""

    name: str
    old: Any
    new: Any
    breaking: bool
    says: str = ""
    extra: Any = None

    def __str__(self) -> str:
        return f"{'breaking' if self.breaking else 'harmless'}: {self.name}"


def breaks(name: str, old: Any, new: Any, says: str, extra: Any = None) -> Case:
    return Case(name, old, new, True, says, extra)


def harmless(name: str, old: Any, new: Any, extra: Any = None) -> Case:
    return Case(name, old, new, False, "", extra)


def column(name: str | None, kind: Any = "double", *, required: bool = True) -> dict[str, Any]:
    spec = dict(kind) if isinstance(kind, dict) else {"type": kind}
    return {**spec, "required": required} if name is None else {**spec, "name": name, "required": required}


def optional(name: str, kind: Any = "double") -> dict[str, Any]:
    return column(name, kind, required=False)


def typed(kind: Any) -> dict[str, Any]:
    return kind if isinstance(kind, dict) else {"type": kind}


def array(of: Any) -> dict[str, Any]:
    return {"type": "array", "items": typed(of)}


def mapping(of: Any) -> dict[str, Any]:
    return {"type": "map", "values": typed(of)}


def record(**properties: Any) -> dict[str, Any]:
    """An object; a name that ends in _ is optional."""
    return {
        "type": "object",
        "properties": {
            name.rstrip("_"): {**typed(kind), "required": not name.endswith("_")} for name, kind in properties.items()
        },
    }


def tensor(dtype: str, *shape: int, name: str | None = None) -> dict[str, Any]:
    spec = {"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": list(shape)}}
    return spec if name is None else {**spec, "name": name}


def param(name: str, kind: Any, default: Any, shape: list[int] | None = None) -> dict[str, Any]:
    return {"name": name, "default": default, "shape": shape, **typed(kind)}


def takes(*inputs: Any) -> dict[str, Any]:
    """A signature by its inputs."""
    return {"inputs": list(inputs), "outputs": [tensor("float64", -1, 2)], "params": None}


def gives(*outputs: Any) -> dict[str, Any]:
    """A signature by its outputs."""
    return {"inputs": [column("a")], "outputs": list(outputs), "params": None}


def tuned(*params: Any) -> dict[str, Any]:
    """A signature by its params."""
    return {"inputs": [column("a")], "outputs": [column(None, "double")], "params": list(params) or None}
