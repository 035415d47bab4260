"""Policy files: read, refused in one line, and found by their model in the folder of those that start by themselves."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from tasks.settings import Mistake, Settings
from validations.policy import Policy, PolicyError, read

Own = tuple[Path, str, Policy]
"""A model's policy: its file, the text, and what it says."""


@dataclass(frozen=True, slots=True)
class Policies:
    """The policy folder: what can be used, by model; the models that have a file which cannot, and why; and every
    problem in words, also of files whose model cannot be told.
    """

    usable: Mapping[str, Own]
    refused: Mapping[str, str]
    problems: Sequence[str]


def text_of(path: Path, what: str) -> str:
    """The text of a file that people write. Raises `Mistake` where it cannot be read."""
    try:
        return path.read_text()
    except OSError as error:
        raise Mistake(f"the {what} {path} cannot be read: {error.strerror}", code=2) from error
    except UnicodeDecodeError as error:
        raise Mistake(f"the {what} {path} is not text in UTF-8", code=2) from error


def read_policy(path: Path, model: str | None = None) -> tuple[str, Policy]:
    """The text of a policy file, and the policy. Raises `Mistake` where it cannot be read or is not `model`'s."""
    text = text_of(path, "policy")
    try:
        policy = read(text, path.name)
    except PolicyError as error:
        raise Mistake(str(error), code=2) from error
    if model is not None and policy.model != model:
        raise Mistake(f"{path.name} is the policy of {policy.model}, not of {model}: name the right one", code=2)
    return text, policy


def policies_of(settings: Settings) -> Policies:
    """The policies in `settings.policy_folder`, one file (`*.yaml`, `*.yml`) per model. A folder that does not exist
    has none, and a broken file hides no other.
    """
    folder = settings.policy_folder
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml") and path.name[0] != ".")
    except FileNotFoundError:
        return Policies({}, {}, ())
    except OSError as error:
        return Policies({}, {}, (f"the policy folder {folder} cannot be read: {error.strerror}",))
    usable, refused, problems = dict[str, Own](), dict[str, str](), list[str]()
    files: dict[str, list[str]] = {}
    for path in paths:
        model, found = _known(path)
        if isinstance(found, str):
            problems.append(f"{found} (in {folder})")
        if model:
            files.setdefault(model, []).append(path.name)
            if isinstance(found, str):
                refused[model] = problems[-1]
            else:
                usable[model] = (path, *found)
    for model, names in files.items():
        if len(names) > 1:
            refused[model] = f"{model} has {len(names)} policies in {folder}, {' and '.join(names)}: keep one"
            problems.append(refused[model])
    return Policies({model: own for model, own in usable.items() if model not in refused}, refused, problems)


def policy_of(settings: Settings, model: str) -> Own | None:
    """The policy by which promotions of `model` start by themselves; None where there is none. Raises `Mistake` where
    its file cannot be used, or where it has two.
    """
    found = policies_of(settings)
    if model in found.refused:
        raise Mistake(found.refused[model], code=2)
    return found.usable.get(model)


def _known(path: Path) -> tuple[str, tuple[str, Policy] | str]:
    """A file's model ("" where that cannot be told), and its text and policy or why it cannot be used."""
    try:
        stat = path.stat()
    except OSError as error:
        return "", f"the policy {path.name} cannot be read: {error.strerror}"
    return _read(path, (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))


@lru_cache(maxsize=256)
def _read(path: Path, stamp: tuple[int, int, int]) -> tuple[str, tuple[str, Policy] | str]:  # noqa: ARG001
    # Who watches looks for ever: a file is read again when its stamp is another one.
    try:
        text, policy = read_policy(path)
    except Mistake as error:
        return _model(path), str(error)
    return policy.model, (text, policy)


def _model(path: Path) -> str:
    """The model that a broken file speaks of, as far as can be told."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return ""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError:
        found = re.search(r"""^model:[ ]*["']?([^"'#\n]+)""", text, re.MULTILINE)
        return found[1].strip() if found else ""
    return str(data.get("model") or "") if isinstance(data, dict) else ""
