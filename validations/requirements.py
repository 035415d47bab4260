"""Whether the packages that a model asks for are those that are installed where it will be served."""

import json
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import yaml
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

_MEND = "install it where the model is served, or serve with TITLESHOT_ENV_MANAGER=uv"
_INCLUDED = 5
"""Files that include files (`-r`): one is usual."""


def conflicts(model: Path, *, python: bool = False) -> list[str]:
    """What the model's requirements.txt asks for and this environment has not: one sentence each, with the mend.

    A missing package, a version outside of the specifier, a package that came from elsewhere than the URL asked
    for, a line that cannot be read. Markers are evaluated here; options (indexes, hashes) say where packages come
    from, and are skipped. Extras and what packages themselves ask for are not followed. With `python`, another
    major or minor version of Python than python_env.yaml names is a conflict too: pickles and bytecode depend on
    it, other formats do not.
    """
    if not (model / "requirements.txt").is_file():
        return ["it has no requirements.txt, so nobody knows what it needs: log it with `pip_requirements=[...]`"]
    found = [conflict for line in _lines(model, "requirements.txt") if (conflict := _conflict(line))]
    other = other_python(model)
    return [*found, f"{other}: {_MEND}"] if python and other else found


def other_python(model: Path) -> str:
    """How the Python of the model's python_env.yaml differs from this one in major or minor version, or empty."""
    try:
        said = yaml.safe_load((model / "python_env.yaml").read_text())
        wanted = str(said["python"])
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        return ""
    asked = wanted.split(".")[:2]
    if asked == platform.python_version().split(".")[: len(asked)]:
        return ""
    return f"it was made with Python {wanted[:20]}, and Python {platform.python_version()} is here"


def _lines(model: Path, name: str, depth: int = 0) -> Iterator[str]:
    """The requirements of one file, those that it includes in place; without comments and options."""
    path = (model / name).resolve()
    if not path.is_relative_to(model.resolve()) or not path.is_file() or depth > _INCLUDED:
        yield f"-r {name}"
        return
    text = re.sub(r"\\\r?\n", " ", path.read_text(errors="replace"))
    for raw in text.splitlines():
        line = re.sub(r"(^|\s)#.*", "", raw).strip()
        included = re.match(r"(?:-r|-c|--requirement|--constraint)[\s=]*(\S+)", line)
        if included and not line.startswith(("-c", "--constraint")):
            yield from _lines(model, included[1], depth + 1)
        elif line and (not line.startswith("-") or re.match(r"(-e|--editable)\b", line)):
            yield re.split(r"\s--?(?:hash|config-settings|global-option)", line)[0].strip()


def _conflict(line: str) -> str:  # noqa: PLR0911 - one way out per kind of conflict
    """What speaks against one requirement; empty where it is met."""
    shown = line[:120]
    if line.startswith("-r "):
        return f"it includes {shown[3:]}, which is not among its files: log the model with that file's lines"
    try:
        wanted = Requirement(_wheel(line))
    except InvalidRequirement:
        return f"'{shown}' cannot be compared with what is installed: name the package, as in `name==1` or `name @ URL`"
    if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
        return ""
    try:
        found = metadata.distribution(wanted.name)
    except metadata.PackageNotFoundError:
        return f"'{shown}' is wanted, and {wanted.name} is not installed: {_MEND}"
    if wanted.url is not None:
        came = _from(found, wanted.url)
        return "" if came else f"{wanted.name} is installed, but not from {wanted.url[:100]}: {_MEND}"
    if wanted.specifier.contains(found.version, prereleases=True):
        return ""
    return f"'{shown}' is wanted, and {wanted.name} {found.version} is installed: {_MEND}"


def _wheel(line: str) -> str:
    """A wheel's path or URL names package and version; any other line is returned as it is."""
    try:
        name, version, _, _ = parse_wheel_filename(line.rpartition("/")[2].partition("#")[0])
    except InvalidWheelFilename:
        return line
    return line if " @ " in line else f"{name}=={version}"


def _from(found: metadata.Distribution, url: str) -> bool:
    """Whether `found` was installed from `url`, as pip and uv record it (PEP 610)."""
    recorded = json.loads(found.read_text("direct_url.json") or "{}")
    address, _, revision = re.sub(r"^\w+\+", "", url.partition("#")[0]).partition("@")
    if "@" in address.partition("://")[2].partition("/")[0] or not recorded:
        return False
    commit = recorded.get("vcs_info", {})
    same = recorded.get("url", "").removesuffix(".git") == address.removesuffix(".git")
    return same and (not revision or revision in (commit.get("requested_revision"), commit.get("commit_id")))
