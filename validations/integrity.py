"""Whether a model's files are what was registered, and whether loading them runs code that nobody reviewed.

Nothing is unpickled here: files are recognised by name and by their first bytes.
"""

import bz2
import io
import lzma
import pickletools
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from validations.verdict import Measurement, Value

PICKLES = {".pkl", ".pickle", ".joblib", ".dill", ".cloudpickle", ".pt", ".pth", ".mar"}
_HEAD = 65_536
# Opcode after the protocol byte: pickles begin with a frame, a mark, an empty container, a global or a value.
_BINARY_PICKLE = re.compile(rb"\x80[\x02-\x05][\x95(\]})\x8fcNKMJGXUTVC\x8c\x8a\x88\x89SI]", re.DOTALL)


class Finding(Value):
    """One file (relative to the model's directory) that is unsafe to load, and why."""

    path: str
    reason: str


def unsafe_files(model: Path, trusted: Collection[str] = ()) -> list[Finding]:
    """The files under `model` whose loading may run arbitrary code, or that lead out of the directory.

    Found: pickles by name (pickle, cloudpickle, dill, joblib, torch) and by content whatever their name, also
    inside zip archives and behind gzip, zlib, bz2 or xz; NumPy files of objects; skops files with types
    other than scikit-learn's, NumPy's, SciPy's and the `trusted` ones; links out of the directory; devices
    and pipes. Raises ValueError when `model` is no directory.
    """
    if not model.is_dir():
        raise ValueError(f"there is no model at {model}: download the version first")
    root = model.resolve()
    findings = []
    for path in sorted(model.rglob("*")):
        reason = _unsafe(path, root, trusted)
        if reason:
            findings.append(Finding(path=path.relative_to(model).as_posix(), reason=reason))
    return findings


def measurements(
    *, registered: str, found: str, unsafe: Sequence[Finding], example_error: str | None
) -> dict[str, Measurement]:
    """`digest_matches` (0 or 1), `unsafe_files` (count) and `answers_example` (0 or 1), all exact.

    `registered` and `found` are digests, computed elsewhere; `example_error` is what the model said when
    asked its input example in a process of its own, None where it answered: its last line becomes the note.
    """
    same = registered == found and bool(registered)
    first = unsafe[0] if unsafe else None
    error = "" if example_error is None else _last_line(example_error)
    return {
        "digest_matches": Measurement.exact(
            float(same), note="" if same else f"registered {_brief(registered)}, found {_brief(found)}"
        ),
        "unsafe_files": Measurement.exact(
            len(unsafe), where=first.path if first else "", note=first.reason if first else ""
        ),
        "answers_example": Measurement.exact(float(example_error is None), note=error),
    }


def _unsafe(path: Path, root: Path, trusted: Collection[str]) -> str:
    """Why `path` is unsafe; empty where it is not."""
    if not path.resolve().is_relative_to(root):
        return "leads out of the model's directory"
    mode = path.lstat().st_mode
    if stat.S_ISDIR(mode) or stat.S_ISLNK(mode):
        return ""  # a link within the directory: its target is looked at by itself
    if not stat.S_ISREG(mode):
        return "is no regular file"
    with path.open("rb") as file:
        reason = _content(path.name, file)
    if not reason and path.suffix == ".skops":
        return _foreign_types(path, trusted)
    return reason


def _content(name: str, file: IO[bytes], *, inside: bool = False) -> str:
    """Why the file called `name` is unsafe by its name or content; empty where it is not."""
    if Path(name).suffix.lower() in PICKLES:
        return f"is a pickle by its name ({Path(name).suffix}): loading it runs whatever code it holds"
    head = file.read(_HEAD)
    if head.startswith(b"PK\x03\x04"):
        if inside:
            return "is an archive within an archive, which is not looked into"
        file.seek(0)
        return _archive(file)
    for plain in _unpacked(head):
        if _BINARY_PICKLE.match(plain) or _is_text_pickle(plain):
            return "holds a pickle: loading it runs whatever code it holds"
        if plain.startswith(b"\x93NUMPY") and _holds_objects(plain):
            return "is a NumPy file of Python objects, which are pickled"
    return ""


def _archive(file: IO[bytes]) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                with archive.open(member) as inner:
                    reason = _content(member.filename, inner, inside=True)
                if reason:
                    return f"its member {member.filename} {reason}"
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError) as error:
        return f"is an archive that cannot be looked into ({error})"
    return ""


def _unpacked(head: bytes) -> Iterator[bytes]:
    """The first bytes as they are, and unpacked where they look compressed (joblib's `compress`)."""
    yield head
    openers: dict[bytes, Callable[[], zlib._Decompress | bz2.BZ2Decompressor | lzma.LZMADecompressor]] = {
        b"\x1f\x8b": lambda: zlib.decompressobj(wbits=31),
        b"\x78": zlib.decompressobj,
        b"BZh": bz2.BZ2Decompressor,
        b"\xfd7zXZ": lzma.LZMADecompressor,
        b"\x5d\x00\x00": lzma.LZMADecompressor,
    }
    for magic, opener in openers.items():
        if head.startswith(magic):
            try:
                yield opener().decompress(head, _HEAD)
            except (zlib.error, OSError, lzma.LZMAError, EOFError):
                return


def _is_text_pickle(head: bytes) -> bool:
    """Whether `head` begins a pickle of protocol 0 or 1 that imports something: those have no magic.

    Text may look like one: a list of requirements that starts with "cloudpickle" imports "loudpickle".
    So opcodes are read on, which runs nothing, to the end of the pickle or of `head`.
    """
    imports, reached = False, 0
    try:
        for opcode, _, position in pickletools.genops(head):
            imports, reached = imports or opcode.name in ("GLOBAL", "INST"), position or 0
    except ValueError:
        # Only where `head` is cut off may it end in the middle.
        return imports and len(head) == _HEAD and reached > _HEAD - 1024
    return imports


def _holds_objects(head: bytes) -> bool:
    """Whether the NumPy file that begins with `head` may hold Python objects."""
    file = io.BytesIO(head)
    try:
        one = np.lib.format.read_magic(file) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
        return bool(read(file)[2].hasobject)
    except ValueError:
        return True  # a header that NumPy itself does not read is not vouched for


def _foreign_types(path: Path, trusted: Collection[str]) -> str:
    """Skops names the types that it would have to import, without importing them."""
    import skops.io

    try:
        types = skops.io.get_untrusted_types(file=path)
    except Exception as error:  # noqa: BLE001 - whatever skops stumbles over, the file is not as it should be
        return f"cannot be read by skops ({_last_line(str(error))})"
    foreign = [
        name for name in sorted(types) if name not in trusted and not name.startswith(("sklearn.", "numpy.", "scipy."))
    ]
    return f"needs types that nobody vouched for: {', '.join(foreign)}" if foreign else ""


def _brief(digest: str) -> str:
    return digest if len(digest) <= 24 else f"{digest[:19]}..."


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no reason given"
