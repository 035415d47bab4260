"""Whether a model's files are what was registered, and whether loading them runs code that nobody reviewed.

Nothing is loaded here: `validations.scanner` looks at one file, this at the folder.
"""

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from validations import formats, scanner
from validations.verdict import Measurement, Value

DEEPEST = 32
"""Folders within folders: models need a handful, and a thousand break whatever walks them."""


class Finding(Value):
    """One file (relative to the model's directory) that is unsafe to load, and why. `sha256` (hex) is what a
    policy names to trust it; empty for what is no file.
    """

    path: str
    reason: str
    sha256: str = ""


class Scan(Value):
    """What a look at a model's files found: the unsafe ones, and those that the policy trusts all the same."""

    unsafe: tuple[Finding, ...] = ()
    trusted: tuple[Finding, ...] = ()


def scan(model: Path, trusted: Mapping[str, str] | None = None) -> Scan:
    """Find the files under `model` whose loading may run arbitrary code, that are broken, or that lead out of it.

    Refused: pickles by name (pickle, cloudpickle, dill, joblib, torch) and by content whatever their name,
    anywhere in a file, in zip and tar archives, behind gzip, zlib, bz2 or xz; NumPy files of objects; skops
    files with types other than classes of scikit-learn, NumPy and SciPy; code; Keras layers and TensorFlow
    operations that run it; paths out of the directory, as links or written in a file; devices, pipes and
    misleading names; files that are cut off, that unpack to far more than they are, or that cannot be looked
    into. `trusted` maps paths to the SHA-256 (hex) of files that somebody reviewed: such a file is trusted with
    exactly those bytes. Raises ValueError when `model` is no directory.
    """
    if not model.is_dir():
        raise ValueError(f"there is no model at {model}: download the version first")
    reviewed = trusted or {}
    unsafe, vouched = [], []
    for path, reason in _reasons(model):
        name = path.relative_to(model).as_posix()
        digest = _sha256(path, model)
        finding = Finding(path=formats.shown(name), reason=reason, sha256=digest)
        if name in reviewed and digest and reviewed[name].lower() == digest:
            vouched.append(finding)
        elif name in reviewed:
            other = f"{reason}; the policy trusts other bytes under this name (these have the SHA-256 {digest})"
            unsafe.append(Finding(path=finding.path, reason=other, sha256=digest))
        else:
            unsafe.append(finding)
    return Scan(unsafe=tuple(unsafe), trusted=tuple(vouched))


def measurements(
    *,
    registered: str,
    found: str,
    scanned: Scan,
    example_error: str | None,
    conflicts: Sequence[str] = (),
    unchecked: str = "",
    signature_error: str | None = None,
) -> dict[str, Measurement]:
    """`digest_matches` (0 or 1), `unsafe_files` (count), `answers_example` (0 or 1), `requirement_conflicts`
    (count) and `signature_valid` (0 or 1), all exact.

    `registered` and `found` are digests, computed elsewhere; `example_error` is what the model said when asked
    its input example in a process of its own, None where it answered: its last line becomes the note.
    `unchecked` says why requirements were not compared; `signature_error` is empty for a valid signature, and
    None where none was asked for: then `signature_valid` is left out.
    """
    same = registered == found and bool(registered)
    first = scanned.unsafe[0] if scanned.unsafe else None
    error = "" if example_error is None else _last_line(example_error)
    measured = {
        "digest_matches": Measurement.exact(
            float(same), note="" if same else f"registered {_brief(registered)}, found {_brief(found)}"
        ),
        "unsafe_files": Measurement.exact(
            len(scanned.unsafe),
            where=first.path if first else "",
            note=first.reason if first else _vouched(scanned.trusted),
        ),
        "answers_example": Measurement.exact(float(example_error is None), note=error),
        "requirement_conflicts": Measurement.exact(len(conflicts), note=conflicts[0] if conflicts else unchecked),
    }
    if signature_error is not None:
        measured["signature_valid"] = Measurement.exact(float(not signature_error), note=signature_error)
    return measured


def _vouched(trusted: Sequence[Finding]) -> str:
    return f"trusted by the policy: {', '.join(finding.path for finding in trusted)}" if trusted else ""


def _reasons(model: Path) -> Iterator[tuple[Path, str]]:
    """Every path that something speaks against, in order, and what."""
    root = model.resolve()
    todo = [model]
    while todo:
        path = todo.pop()
        reason = _unsafe(path, root) if path != model else ""
        if not reason and path.is_dir() and not path.is_symlink():
            if len(path.relative_to(model).parts) > DEEPEST:
                reason = f"is a folder more than {DEEPEST} deep, which is not looked into: log the model flatter"
            else:
                todo += sorted((Path(entry) for entry in os.scandir(path)), reverse=True)
        if reason:
            yield path, reason


def _unsafe(path: Path, root: Path) -> str:  # noqa: PLR0911 - one way out per reason
    """Why `path` is unsafe; empty where it is not."""
    try:
        if not path.resolve().is_relative_to(root):
            return "leads out of the model's directory"
    except (OSError, RuntimeError):
        return "leads to itself, or to nowhere"
    odd = scanner.plain_name(path.name)
    if odd:
        return odd
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        # Within the directory: its target is looked at by itself, but may go by a harmless name.
        kind = scanner.pickle_by_name(path.name)
        return f"is a link with a pickle's name ({kind}): log the model without links" if kind else ""
    if stat.S_ISDIR(mode):
        return ""
    if not stat.S_ISREG(mode):
        return "is no regular file"
    try:
        return scanner.reason(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _sha256(path: Path, model: Path) -> str:
    """Of a regular file within the model; a link or a device is never trusted."""
    if path.is_symlink() or not path.is_file() or not path.resolve().is_relative_to(model.resolve()):
        return ""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _brief(digest: str) -> str:
    return digest if len(digest) <= 24 else f"{digest[:19]}..."


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no reason given"
