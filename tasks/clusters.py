"""The file that describes clusters: read, and refused in one line."""

import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deployments.kubernetes.cluster import Cluster
from tasks.policies import text_of
from tasks.settings import Mistake, Settings
from validations.policy import place_of
from validations.units import nearest


class Clusters(BaseModel):
    """What the file holds: `clusters`, a list; the first one is meant where none is named."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clusters: tuple[Cluster, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _named_once(self) -> "Clusters":
        names = [one.name for one in self.clusters]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two clusters are called '{twice}': give each a `name` of its own")
        return self


def clusters(settings: Settings) -> tuple[Cluster, ...]:
    """The clusters of the settings; none where there is no file. Raises `Mistake` where it cannot be used."""
    path = settings.clusters_file
    return () if path is None else read_clusters(path)


def cluster(settings: Settings) -> Cluster | None:
    """The cluster that is meant: the region's, the one that TITLESHOT_CLUSTER names, or the first that is no region;
    None where there is none. Raises `Mistake` for a name that no cluster has.
    """
    found, wanted = clusters(settings), settings.region or settings.cluster
    if wanted is None:
        return next((one for one in found if not one.region), None)
    kind = "cluster" if settings.region is None else "region"
    for one in found:
        if one.name == wanted and one.region == (settings.region is not None):
            return one
        if one.name == wanted:
            mend = "name it with --region or in TITLESHOT_REGION" if one.region else "`region: true` makes it one"
            raise Mistake(f"the cluster '{wanted}' is {'a' if one.region else 'no'} region: {mend}", code=2)
    names = [one.name for one in found if one.region or kind == "cluster"]
    mend = "TITLESHOT_CLUSTER" if kind == "cluster" else "--region, TITLESHOT_REGION or the policy's `waves`"
    raise Mistake(
        f"there is no {kind} '{wanted}' in {settings.clusters_file or 'any file of clusters'}"
        f"{nearest(wanted, names)} (there are: {', '.join(names) or 'none'}): mend {mend}",
        code=2,
    )


def read_clusters(path: Path) -> tuple[Cluster, ...]:
    """The clusters of one file. Raises `Mistake`, with file, line and the nearest right word."""
    text = text_of(path, "file of clusters")
    try:
        tree, data = yaml.compose(text), yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        raise Mistake(
            f"{path.name}{place}: not YAML: {getattr(error, 'problem', None) or 'cannot be read'}", code=2
        ) from error
    if not isinstance(data, dict):
        raise Mistake(f"{path.name}: a file of clusters is a mapping with `clusters:`, a list of them", code=2)
    try:
        return Clusters.model_validate(data).clusters
    except ValidationError as error:
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        where = [part for part in first["loc"] if part != "[key]"]
        raise Mistake(f"{path.name}:{place_of(tree, where)}{_sentence(first)}", code=2) from error


def _sentence(error: Any) -> str:
    loc = error["loc"]
    if error["type"] == "extra_forbidden":
        return f"unknown word '{loc[-1]}'{nearest(str(loc[-1]), _words(loc[:-1]))}"
    if error["type"] == "missing":
        return f"`{loc[-1]}` is missing"
    return str(error["msg"]).removeprefix("Value error, ")


def _words(loc: tuple[int | str, ...]) -> list[str]:
    """The words that may stand where `loc` points to."""
    kind: Any = Clusters
    for part in loc:
        if isinstance(part, str) and isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(part)
            kind = _model(field.annotation) if field is not None else None
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _model(annotation: Any) -> Any:
    """The model inside of a tuple, a mapping or an optional one."""
    if get_origin(annotation) in (Union, types.UnionType, tuple) or get_args(annotation):
        found = (_model(one) for one in get_args(annotation))
        return next((one for one in found if isinstance(one, type) and issubclass(one, BaseModel)), None)
    return annotation
