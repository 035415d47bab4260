"""Why one file is unsafe to load, by its name and by its bytes: read in bounded pieces, nothing is loaded.

Strict where scanners are lenient: a pickle is refused whatever it calls, and so is what cannot be looked into.
Hence modelscan, picklescan and fickling are not used: in `benchmarks/scanners.py` none of them refuses a file that
this does not, and each lets many through. What a pickle calls is named by `validations.pickles`.
"""

import bz2
import lzma
import os
import re
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Protocol, cast

from validations import pickles
from validations.formats import (
    MOST_TEXT,
    SKOPS,
    UNPACKED,
    Unsafe,
    brief,
    entities,
    listed,
    looks,
    numpy_size,
    parsed,
    refuse,
    safetensors,
    shown,
    skops_types,
)

PICKLES = {".pkl", ".pickle", ".joblib", ".dill", ".cloudpickle", ".pt", ".pth", ".mar"}
CODE = {".py", ".pyc", ".pyo", ".pyd", ".pyz", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".whl", ".egg", ".jar"}
_NEVER_EMPTY = {".npy", ".npz", ".skops", ".keras", ".h5", ".onnx", ".safetensors"}
_WRAPPED = {".gz", ".bz2", ".xz", ".lzma", ".z", ".lz4", ".zst", ".zip", ".txt"}
_HEAD = 65_536
_PIECE = 1 << 20
_FREE = 64 << 20
_RATIO = 100
"""What a file may unpack to: 64 MiB, and 100 times its size on top. Weights and tables stay under 20 times."""
_LAYERS = 3
"""Compression within compression: one is usual, two an accident."""
_MEMBERS = 100_000
_MEMORY = 256 << 20
"""For xz's dictionary, whose size the file itself chooses; `xz -9` needs 65 MiB."""


_SEALED = {
    b"\x04\x22\x4d\x18": "lz4",
    b"\x02\x21\x4c\x18": "lz4",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xff\x06\x00\x00sNaPpY": "snappy",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!\x1a\x07": "RAR",
    b"MSCF\x00\x00\x00\x00": "cabinet",
    b"\x1f\x9d": "compress",
    b"LZIP\x01": "lzip",
    b"\x89LZO\x00\r\n": "lzop",
    b"ZF0x": "joblib's old format",
}
_MACHINE = (b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\xce\xfa\xed\xfe", b"\xca\xfe\xba\xbe")


_NESTED_ZIP = [
    (
        re.compile(rb"PK\x01\x02[\x00-\x3f][\x00-\x13][\x00-\x3f]\x00"),
        "holds an archive within an archive, which is not looked into: " + UNPACKED,
    )
]


class _Reads(Protocol):
    """What hands out bytes from the beginning to the end."""

    def read(self, count: int = -1, /) -> bytes: ...


def reason(path: Path) -> str:
    """Why the regular file at `path` is unsafe to load, and how to mend it; empty where nothing speaks against it.

    Raises OSError where the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            _Look(size).file(path.name, file)
            if path.suffix == ".skops":
                skops_types(path)
        except Unsafe as refused:
            return str(refused)
    return ""


class _Look:
    """One file of the model, with all that it holds, and how much it may still unpack to."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.left = _FREE + _RATIO * size
        self.hidden = pickles.Search(size)

    def file(self, name: str, file: IO[bytes]) -> None:
        """Look at the whole file, whose members may be looked at in any order."""
        if zipfile.is_zipfile(file):
            file.seek(0)
            head = file.read(_HEAD)
            self.head(name, head)
            self.zip(file)
        elif file.seek(0) == 0 and file.read(4) in (b"PK\x03\x04", b"PK\x07\x08"):
            refuse(f"is an archive that cannot be looked into (it is cut off): {UNPACKED}")
        elif not self.size and Path(name).suffix.lower() in _NEVER_EMPTY:
            refuse("is empty: a model file of no bytes was cut off on its way; log the model anew")
        file.seek(0)
        self.stream(name, file, self.size)

    def stream(self, name: str, file: _Reads, size: int | None, layer: int = 0, *, inside: bool = False) -> None:
        """Look at bytes as they come. `size` where it is known, `layer` of compression, `inside` an archive."""
        head = _exactly(file, _HEAD)
        self.head(name, head)
        if head.startswith((b"PK\x03\x04", b"PK\x07\x08")) and (inside or layer):
            refuse(f"is an archive within an archive, which is not looked into: {UNPACKED}")
        rest = _Joined(head, file)
        opener = _opener(head)
        if opener is not None:
            if layer >= _LAYERS:
                refuse(f"is compressed more than {_LAYERS} times over, which is not looked into: {UNPACKED}")
            bare = str(Path(name).with_suffix("")) if Path(name).suffix.lower() in _WRAPPED else name
            self.stream(bare, _Unpacked(rest, opener, self.take), None, layer + 1, inside=inside)
        elif _is_tar(head):
            if inside:
                refuse(f"is an archive within an archive, which is not looked into: {UNPACKED}")
            self.tar(rest)
        else:
            self.plain(name, head, rest, size)

    def take(self, count: int) -> None:
        """Account for `count` unpacked bytes."""
        self.left -= count
        if self.left < 0:
            limit = (_FREE + _RATIO * self.size) >> 20
            refuse(f"unpacks to more than {limit} MiB, over {_RATIO} times its size: it is a bomb, or {UNPACKED}")

    def head(self, name: str, head: bytes) -> None:
        """What the name and the first bytes tell."""
        names = pickles.begins(head)
        called = f", and imports {listed(names)}" if names else ""
        kind = pickle_by_name(name)
        if kind:
            refuse(f"is a pickle by its name ({kind}){called}: loading it runs whatever code it holds; {SKOPS}")
        if names is not None:
            what = f" that imports {listed(names)}" if names else ""
            refuse(f"holds a pickle{what}: loading it runs whatever code it holds; {SKOPS}")
        if Path(name).suffix.lower() in CODE and head.strip():
            refuse(
                f"is code ({Path(name).suffix}) that loading the model may run: "
                "log the model without code of its own, or review the file"
            )
        if head.startswith(_MACHINE):
            refuse("is machine code: log the model without libraries of its own, or review the file")
        for magic, what in _SEALED.items():
            if head.startswith(magic):
                refuse(f"is compressed by {what}, which is not looked into: {UNPACKED}, or use gzip")
        entities(head)

    def zip(self, file: IO[bytes]) -> None:
        """Look at every member of the archive that `file` is, or ends with."""
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if len(members) > _MEMBERS:
                    refuse(f"is an archive of more than {_MEMBERS:,} members, which is not looked into")
                self.take(sum(member.file_size for member in members if member.compress_type))
                self.left += sum(member.file_size for member in members if member.compress_type)
                seen = set()
                for member in members:
                    within(member.filename)
                    if member.filename in seen:
                        refuse(f"holds {shown(member.filename)} twice, and readers differ in which one they take")
                    seen.add(member.filename)
                    if member.external_attr >> 16 & 0o170000 == 0o120000:
                        refuse(f"holds a link ({shown(member.filename)}): {UNPACKED}")
                    if member.is_dir():
                        continue
                    with archive.open(member) as inner:
                        # What is stored as it is unpacks to no more than the file's own size.
                        counted = _Counted(inner, self.take) if member.compress_type else inner
                        self.member(member.filename, counted, member.file_size)
        except (
            zipfile.BadZipFile,
            RuntimeError,
            NotImplementedError,
            OSError,
            EOFError,
            zlib.error,
            lzma.LZMAError,
        ) as bad:
            refuse(f"is an archive that cannot be looked into ({brief(bad)}): log the model anew")

    def tar(self, file: _Reads) -> None:
        """Look at every member of the tar archive that comes from `file`."""
        try:
            with tarfile.open(fileobj=cast("IO[bytes]", file), mode="r|") as archive:
                for count, member in enumerate(archive):
                    if count >= _MEMBERS:
                        refuse(f"is an archive of more than {_MEMBERS:,} members, which is not looked into")
                    within(member.name)
                    if member.issym() or member.islnk():
                        refuse(f"holds a link ({shown(member.name)} to {shown(member.linkname)}): {UNPACKED}")
                    if not member.isfile() and not member.isdir():
                        refuse(f"holds {shown(member.name)}, which is no regular file")
                    inner = archive.extractfile(member)
                    if inner is not None:
                        self.take(member.size if member.issparse() else 0)
                        self.member(member.name, inner, member.size)
        except (tarfile.TarError, OSError, EOFError) as error:
            refuse(f"is an archive that cannot be looked into ({brief(error)}): log the model anew")

    def member(self, name: str, file: _Reads, size: int) -> None:
        try:
            self.stream(PurePosixPath(name).name, file, size, inside=True)
        except Unsafe as refused:
            refuse(f"its member {shown(name)} {refused}")

    def plain(self, name: str, head: bytes, file: _Reads, size: int | None) -> None:
        """Look at every byte of what is neither compressed nor an archive; parse what has a form to parse."""
        suffix = Path(name).suffix.lower()
        text = b"" if suffix in (".json", ".yaml", ".yml") or name == "MLmodel" else None
        patterns = looks(suffix, head)
        # Behind compression or in an archive a zip's directory has no business: it would be one within another.
        patterns = patterns if size == self.size else [*patterns, *_NESTED_ZIP]
        wanted = numpy_size(head) if head.startswith(b"\x93NUMPY") or suffix == ".npy" else 0
        window, total = b"", 0
        while piece := file.read(_PIECE):
            total += len(piece)
            if text is not None:
                text = text + piece if len(text) < MOST_TEXT else text
            window += piece
            # The last part is looked at with what follows, so that nothing hides across a boundary.
            self.window(window, max(len(window) - _HEAD, 0), patterns)
            window = window[max(len(window) - _HEAD, 0) :]
        self.window(window, len(window), patterns)
        size = total if size is None else size
        if wanted > size:
            refuse(f"is cut off: its array needs {wanted:,} bytes; log the model anew")
        if suffix == ".safetensors":
            safetensors(head, size)
        if text is not None:
            parsed(name, suffix, text)

    def window(self, data: bytes, end: int, patterns: list[tuple[re.Pattern[bytes], str]]) -> None:
        try:
            names = self.hidden(data, end)
        except pickles.TooMany:
            refuse(f"has more beginnings of pickles than honest data; {SKOPS}")
        if names is not None:
            refuse(f"hides a pickle that imports {listed(names)} behind other bytes: nobody honest does; {SKOPS}")
        for pattern, message in patterns:
            found = pattern.search(data)
            if found:
                what = next((group for group in found.groups() if group), b"").decode("latin-1")
                refuse(message.format(shown(what)))


def pickle_by_name(name: str) -> str:
    """The ending by which `name` is a pickle's, empty where it has none."""
    endings = Path(name.lower().rstrip(" .")).suffixes
    if endings and endings[-1] in PICKLES:
        return endings[-1]
    # `model.pkl.gz`, `model.pkl.txt`; but `vocab.pt.json` is Portuguese.
    if len(endings) > 1 and endings[-1] in _WRAPPED and endings[-2] in PICKLES:
        return "".join(endings[-2:])
    return ""


def plain_name(name: str) -> str:
    """Why a file called `name` is not what people see; empty where it is."""
    if any(unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") for letter in name):
        return "has a name with invisible characters, which people read as another one: rename it"
    if name != name.strip() or (name.endswith(".") and name.strip(".")):
        return "has a name with a space or dot at its end, which hides its kind: rename it"
    return ""


def within(name: str) -> None:
    """Refuse a member called `name` that would be unpacked outside of its folder, or under a misleading name."""
    windows = PureWindowsPath(name)
    if windows.is_absolute() or windows.drive or windows.root or ".." in windows.parts or "\0" in name:
        refuse(f"names a path outside of its folder ({shown(name)}): {UNPACKED}")
    for part in PurePosixPath(name).parts:
        odd = plain_name(part)
        if odd:
            refuse(f"holds {shown(name)}, which {odd}")


class _Joined:
    """`head`, and then the rest of `file`."""

    def __init__(self, head: bytes, file: _Reads) -> None:
        self.held, self.file = head, file

    def read(self, count: int = -1, /) -> bytes:
        if not self.held:
            return self.file.read(count)
        taken = self.held[:count] if count >= 0 else self.held
        self.held = self.held[len(taken) :]
        return taken


class _Counted:
    """`file`, which tells `take` how much was read."""

    def __init__(self, file: _Reads, take: Callable[[int], None]) -> None:
        self.file, self.take = file, take

    def read(self, count: int = -1, /) -> bytes:
        data = self.file.read(count)
        self.take(len(data))
        return data


class _Zlib:
    """zlib's decompressor with the manners of those of bz2 and lzma."""

    def __init__(self, bits: int) -> None:
        self.inner = zlib.decompressobj(wbits=bits)

    def decompress(self, data: bytes, most: int) -> bytes:
        return self.inner.decompress(self.inner.unconsumed_tail + data, most)

    @property
    def needs_input(self) -> bool:
        return not self.inner.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self.inner.eof

    @property
    def unused_data(self) -> bytes:
        return self.inner.unused_data


_Decompressor = _Zlib | bz2.BZ2Decompressor | lzma.LZMADecompressor
_Opener = Callable[[], _Decompressor]


class _Unpacked:
    """What `file` unpacks to, one compressed member after the other, never more than asked for at once."""

    def __init__(self, file: _Reads, opener: _Opener, take: Callable[[int], None]) -> None:
        self.file, self.opener, self.take = file, opener, take
        self.inner = opener()
        self.fed = b""

    def read(self, count: int = -1, /) -> bytes:
        count = _PIECE if count < 0 else count
        try:
            return self._read(count)
        except (zlib.error, OSError, lzma.LZMAError, MemoryError) as error:
            refuse(f"is compressed and cannot be looked into ({brief(error)}): log the model anew")

    def _read(self, count: int) -> bytes:
        while True:
            if self.inner.eof:
                self.fed = (self.inner.unused_data or self.fed).lstrip(b"\0") or self.file.read(_HEAD).lstrip(b"\0")
                if not self.fed:
                    return b""
                self.inner = self.opener()
            if self.inner.needs_input and not self.fed:
                self.fed = self.file.read(_HEAD)
                if not self.fed:
                    refuse("is compressed and cut off, so it is not looked into: log the model anew")
            data, self.fed = self.inner.decompress(self.fed, count), b""
            self.take(len(data))
            if data:
                return data


def _opener(head: bytes) -> _Opener | None:
    """What unpacks the stream that begins with `head`; None where it is not compressed."""
    if head.startswith(b"\x1f\x8b"):
        return lambda: _Zlib(31)
    if re.match(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", head):
        return bz2.BZ2Decompressor
    if head.startswith(b"\xfd7zXZ\x00"):
        return lambda: lzma.LZMADecompressor(memlimit=_MEMORY)
    # These two have no magic worth the name: text may begin so.
    weak: list[tuple[bytes, _Opener]] = [
        (b"\x78", lambda: _Zlib(15)),
        (b"\x5d\x00\x00", lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_MEMORY)),
    ]
    for magic, opener in weak:
        if head.startswith(magic):
            try:
                opener().decompress(head, 1)
            except (zlib.error, lzma.LZMAError):
                continue
            return opener
    return None


def _exactly(file: _Reads, count: int) -> bytes:
    """`count` bytes, fewer only at the end."""
    pieces = []
    while count > 0 and (piece := file.read(count)):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def _is_tar(head: bytes) -> bool:
    if len(head) < 512 or not head[:512].strip(b"\0"):
        return False
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False  # its checksum, which even the oldest kind of tar has
    return True
