"""Malicious, broken and harmless model files, made when they are asked for: the corpus of the integrity gate.

Every payload that could run does one thing only: it makes the file MARKER names, so that a test can see it. What
is here as text (Keras layers, graphs, templates) carries the shape of an attack and no attack.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np


@dataclass(frozen=True)
class Case:
    """One file that `make(folder, marker)` puts into a model's folder; returns the name it is refused by.

    `says` is a piece of the reason that a refusal must give; empty for harmless files.
    """

    name: str
    make: Callable[[Path, Path], str]
    says: str = ""


BAD: dict[str, Case] = {}
HARMLESS: dict[str, Case] = {}

Content = Callable[[Path], bytes]
"""Makes the bytes of a file, given the marker that its payload would make."""


def _bad(name: str, file: str, says: str, content: Content) -> None:
    assert name not in BAD, name

    def make(folder: Path, marker: Path) -> str:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(marker))
        return file

    BAD[name] = Case(name, make, says)


def _fine(name: str, file: str, content: bytes | str) -> None:
    assert name not in HARMLESS, name

    def make(folder: Path, _: Path) -> str:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    HARMLESS[name] = Case(name, make)


# --- what a payload is --------------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def _code(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()"


def _command(marker: Path) -> str:
    return f"touch {marker}"


def _system(marker: Path, protocol: int = 4) -> bytes:
    return pickle.dumps(Calls(os.system, _command(marker)), protocol=protocol)


def _text(value: str) -> bytes:
    """SHORT_BINUNICODE or BINUNICODE, as length allows."""
    data = value.encode()
    return b"\x8c" + bytes([len(data)]) + data if len(data) < 256 else b"X" + struct.pack("<I", len(data)) + data


def _by_name(module: str, name: str, *arguments: str) -> bytes:
    """A call, protocol 4 by hand, of a function that need not be importable here."""
    pushed = b"".join(_text(argument) for argument in arguments)
    return b"\x80\x04" + _text(module) + _text(name) + b"\x93(" + pushed + b"tR."


def _global(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def _zip(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name, (2024, 1, 1, 0, 0, 0)), data, method)
    return file.getvalue()


def _tar(members: dict[str, bytes], mode: str = "w", *more: tarfile.TarInfo) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for member in more:
            archive.addfile(member)
    return file.getvalue()


def _tar_link(name: str, to: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, to
    return member


def _hdf5(config: str, start: int = 0) -> bytes:
    """The bytes a reader looks for, and an attribute's text as HDF5 stores it: plain and in one piece."""
    return (
        bytes(start) + b"\x89HDF\r\n\x1a\n" + bytes(88) + b"model_config\x00\x00\x00\x00" + config.encode() + bytes(64)
    )


def _keras(layer: dict[str, object]) -> dict[str, object]:
    return {
        "module": "keras",
        "class_name": "Sequential",
        "config": {
            "name": "s",
            "layers": [
                {"module": "keras.layers", "class_name": "InputLayer", "config": {"batch_shape": [None, 3]}},
                layer,
            ],
        },
    }


def _keras_file(layer: dict[str, object]) -> bytes:
    return _zip(
        {
            "metadata.json": b'{"keras_version": "3.8.0"}',
            "config.json": json.dumps(_keras(layer)).encode(),
            "model.weights.h5": _hdf5("{}"),
        }
    )


LAMBDA: dict[str, object] = {
    "module": "keras.layers",
    "class_name": "Lambda",
    "config": {
        "name": "l",
        "function": {"class_name": "__lambda__", "config": {"code": "4wEAAAAA", "defaults": None, "closure": None}},
    },
}
DENSE: dict[str, object] = {
    "module": "keras.layers",
    "class_name": "Dense",
    "config": {"units": 2, "activation": "relu"},
    "registered_name": None,
}


def _field(number: int, data: bytes) -> bytes:
    """One length-delimited protobuf field, shorter than 128 bytes or of two length bytes."""
    size = bytes([len(data)]) if len(data) < 128 else bytes([len(data) & 127 | 128, len(data) >> 7])
    return bytes([number << 3 | 2]) + size + data


def _onnx(location: str, *, value_first: bool = False) -> bytes:
    key, value = _field(1, b"location"), _field(2, location.encode())
    entry = _field(13, value + key if value_first else key + value)
    tensor = _field(5, b"\x08\x03\x10\x01" + _field(8, b"weight") + entry + b"\x70\x01")
    return b"\x08\x08" + _field(2, b"pytorch") + _field(7, _field(2, b"graph") + tensor)


def _saved_model(operation: str) -> bytes:
    node = _field(1, b"node") + _field(2, operation.encode()) + _field(3, b"filename")
    return b"\x08\x01" + _field(2, _field(1, b"\x0a\x00") + _field(2, _field(1, node)))


MLMODEL = """\
artifact_path: m
flavors:
  python_function:
    env: {conda: conda.yaml, virtualenv: python_env.yaml}
    loader_module: mlflow.sklearn
    model_path: model.skops
    python_version: 3.11.9
  sklearn:
    code: null
    pickled_model: model.skops
    serialization_format: skops
mlflow_version: 3.17.2
model_uuid: 0123456789abcdef
"""

# --- pickles, by opcode -------------------------------------------------------------------------------------------

for _protocol in range(6):
    _bad(
        f"pickle protocol {_protocol} calling os.system",
        "weights.bin",
        "system",
        lambda marker, protocol=_protocol: _system(marker, protocol),
    )
_bad("pickle calling exec", "m.dat", "exec", lambda m: pickle.dumps(Calls(exec, _code(m))))
_bad("pickle calling eval", "m.dat", "eval", lambda m: pickle.dumps(Calls(eval, _code(m))))
_bad(
    "pickle chaining getattr",
    "m.dat",
    "getattr",
    lambda m: pickle.dumps(Calls(getattr, Calls(__import__, "os"), "system")),
)
_bad("INST", "m.dat", "system", lambda m: b"(S" + repr(_command(m)).encode() + b"\nios\nsystem\n.")
_bad("OBJ", "m.dat", "system", lambda m: b"(" + _global("os", "system") + b"S" + repr(_command(m)).encode() + b"\no.")
_bad(
    "NEWOBJ_EX",
    "m.dat",
    "Popen",
    lambda m: (
        b"\x80\x04"
        + _text("subprocess")
        + _text("Popen")
        + b"\x93"
        + _text(_command(m))
        + b"\x85}"
        + _text("shell")
        + b"\x88s\x92."
    ),
)
_bad(
    "NEWOBJ",
    "m.dat",
    "Popen",
    lambda m: (
        b"\x80\x02" + _global("subprocess", "Popen") + b"]" + b"(" + _text("touch") + _text(str(m)) + b"e\x85\x81."
    ),
)
_bad(
    "STACK_GLOBAL from the memo",
    "m.dat",
    "os.system",
    lambda m: (
        b"\x80\x04" + _text("os") + b"\x940" + _text("system") + b"\x940h\x00h\x01\x93" + _text(_command(m)) + b"\x85R."
    ),
)
_bad(
    "STACK_GLOBAL from old kinds of string",
    "m.dat",
    "os.system",
    lambda m: b"\x80\x04U\x02osT\x06\x00\x00\x00system\x93" + _text(_command(m)) + b"\x85R.",
)
_bad(
    "BUILD calling a method through the state",
    "m.dat",
    "system",
    lambda m: (
        b"\x80\x02"
        + _global("builtins", "Exception")
        + b")\x81}"
        + _text("__setstate__")
        + _global("os", "system")
        + b"sb"
        + _text(_command(m))
        + b"b."
    ),
)
for _module, _name in (
    ("runpy", "_run_code"),
    ("importlib", "import_module"),
    ("pip._internal.cli.main", "main"),
    ("webbrowser", "open"),
    ("torch.serialization", "load"),
    ("torch.hub", "load"),
    ("timeit", "timeit"),
    ("idlelib.run", "Executive.runcode"),
    ("numpy.testing._private.utils", "runstring"),
    ("asyncio.unix_events", "_UnixSubprocessTransport._start"),
):
    _bad(
        f"pickle calling {_module}.{_name}",
        "m.dat",
        _module,
        lambda m, module=_module, name=_name: _by_name(module, name, _code(m)),
    )
_bad("dotted name in STACK_GLOBAL", "m.dat", "os.system", lambda m: _by_name("shutil", "os.system", _command(m)))
_bad("extension registry", "m.dat", "extension", lambda m: b"\x80\x02\x82\x07" + _text(_code(m)) + b"\x85R.")
_bad("persistent id", "m.dat", "pickle", lambda m: b"\x80\x02" + _text(str(m)) + b"Q.")

# --- pickles, disguised or broken ---------------------------------------------------------------------------------

_bad("pickle cut off after the call", "m.dat", "system", lambda m: _system(m)[:-1])
_bad("text pickle cut off after the call", "m.dat", "system", lambda m: _system(m, 0)[:-1])
_bad("pickle with a broken opcode after the call", "m.dat", "system", lambda m: _system(m)[:-1] + b"\xff\xff\xff.")
_bad("text pickle with a broken opcode after the call", "m.dat", "system", lambda m: _system(m, 0)[:-1] + b"X.")
_bad(
    "an INT that only the C unpickler reads",
    "m.dat",
    "system",
    lambda m: b"I0x10\n0" + _global("os", "system") + b"(S" + repr(_command(m)).encode() + b"\ntR.",
)
_bad(
    "the same before a STACK_GLOBAL",
    "m.dat",
    "system",
    lambda m: b"I0x10\n0" + _text("os") + _text("system") + b"\x93" + _text(_command(m)) + b"\x85R.",
)
_bad("pickle after a PNG's first bytes", "logo.png", "system", lambda m: b"\x89PNG\r\n\x1a\n" + bytes(300) + _system(m))
_bad("pickle after 200 kB of zeros", "w.bin", "system", lambda m: bytes(200_000) + _system(m, 2))
_bad("text pickle after 200 kB of zeros", "w.bin", "system", lambda m: bytes(200_000) + _system(m, 0))
_bad(
    "pickle across a boundary of 64 KiB",
    "w.bin",
    "system",
    lambda m: bytes(65_536 - 5) + _system(m, 4) + bytes(100_000),
)
_bad("two pickles, the second one calls", "m.dat", "pickle", lambda m: pickle.dumps({"a": 1}) + _system(m))
_bad(
    "legacy torch file",
    "net.bin",
    "pickle",
    lambda m: (
        b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        + _system(m, 2)
    ),
)
_bad("pickle called .txt", "notes.txt", "system", _system)
_bad("pickle called .json", "config.json", "system", lambda m: _system(m, 0))
_bad("pickle called .npy", "a.npy", "system", _system)
_bad("pickle called requirements.txt", "requirements.txt", "system", lambda m: _system(m, 0))
_bad("pickle called .pkl in capitals", "MODEL.PKL", "by its name", _system)
_bad("pickle with a double extension", "model.pkl.gz", "by its name", lambda m: gzip.compress(_system(m)))
_bad("junk called .pkl", "model.pkl", "by its name", lambda m: b"nothing of the kind")
_bad("pickle with a frame that lies", "m.dat", "pickle", lambda m: b"\x80\x04\x95" + b"\xff" * 8 + _system(m)[11:])

_bad("twenty thousand beginnings of pickles", "w.bin", "beginnings", lambda m: b"a" + b"cos\nsystem\n(" * 20_000)

# --- pickles, wrapped ---------------------------------------------------------------------------------------------

_bad("pickle in gzip", "m.bin", "system", lambda m: gzip.compress(_system(m)))
_bad("pickle in bzip2", "m.bin", "system", lambda m: bz2.compress(_system(m)))
_bad("pickle in xz", "m.bin", "system", lambda m: lzma.compress(_system(m)))
_bad("pickle in lzma", "m.bin", "system", lambda m: lzma.compress(_system(m), lzma.FORMAT_ALONE))
_bad("pickle in zlib", "m.bin", "system", lambda m: zlib.compress(_system(m)))
_bad("pickle in gzip in gzip", "m.bin", "system", lambda m: gzip.compress(gzip.compress(_system(m))))
_bad(
    "pickle in the second member of gzip", "m.bin", "system", lambda m: gzip.compress(b"a") + gzip.compress(_system(m))
)
_bad("gzip of gzip, twenty deep", "m.bin", "compress", lambda m: _deep(_system(m), 20))
_bad("pickle in an lz4 frame", "m.bin", "lz4", lambda m: b"\x04\x22\x4d\x18\x64\x40\xa7" + _system(m))
_bad("pickle in zstd", "m.bin", "zstd", lambda m: b"\x28\xb5\x2f\xfd\x20\x29" + _system(m))
_bad("gzip cut off", "m.bin", "cut off", lambda m: gzip.compress(os.urandom(2000))[:900])


def _deep(data: bytes, levels: int) -> bytes:
    for _ in range(levels):
        data = gzip.compress(data)
    return data


def _joblib(marker: Path, compress: object) -> bytes:
    file = io.BytesIO()
    joblib.dump([Calls(os.system, _command(marker)), np.arange(50)], file, compress=compress)
    return file.getvalue()


_bad("joblib", "m.bin", "system", lambda m: _joblib(m, 0))
_bad("joblib with zlib", "m.bin", "system", lambda m: _joblib(m, ("zlib", 3)))
_bad("joblib with xz", "m.bin", "system", lambda m: _joblib(m, ("xz", 3)))
_bad("joblib's format of old", "m.bin", "joblib", lambda m: b"ZF0x29                 " + zlib.compress(_system(m)))

# --- NumPy --------------------------------------------------------------------------------------------------------

_bad(
    "npy of objects",
    "a.npy",
    "objects",
    lambda m: _npy(np.array([Calls(os.system, _command(m))], dtype=object)),
)
_bad(
    "npy with an object field",
    "a.npy",
    "objects",
    lambda m: _npy(np.array([(1, Calls(os.system, _command(m)))], dtype=[("n", "i4"), ("o", "O")])),
)
_bad(
    "npz with a member of objects",
    "a.npz",
    "objects",
    lambda m: _zip(
        {"x.npy": _npy(np.zeros(3)), "y.npy": _npy(np.array([Calls(os.system, _command(m))], dtype=object))}
    ),
)
_bad("npy with a header that is none", "a.npy", "header", lambda m: b"\x93NUMPY\x01\x00\x10\x00__import__('os')\n")
_bad("npy of an unknown version", "a.npy", "header", lambda m: b"\x93NUMPY\x09\x09" + _npy(np.zeros(3))[8:])
_bad("npy cut off", "a.npy", "cut off", lambda m: _npy(np.arange(1000.0))[:2000])
_bad("npy with a pickle behind the array", "a.npy", "system", lambda m: _npy(np.zeros(3)) + _system(m))
_bad("npy of nothing", "a.npy", "empty", lambda m: b"")

# --- archives -----------------------------------------------------------------------------------------------------


def _patched(data: bytes, signature: bytes, at: int, value: bytes) -> bytes:
    """`data` with `value` at the offset `at` of every record that begins with `signature`."""
    made, start = bytearray(data), 0
    while (start := made.find(signature, start)) >= 0:
        made[start + at : start + at + len(value)] = value
        start += 4
    return bytes(made)


_LOCAL, _CENTRAL = b"PK\x03\x04", b"PK\x01\x02"
_bad("zip with a pickle", "m.bin", "system", lambda m: _zip({"a/data": _system(m)}))
_bad("torch zip", "net.bin", "data.pkl", lambda m: _zip({"net/data.pkl": _system(m, 2), "net/data/0": bytes(64)}))
_bad("deflated zip with a pickle", "m.bin", "system", lambda m: _zip({"data": _system(m)}, zipfile.ZIP_DEFLATED))
_bad(
    "zip with a wrong checksum",
    "m.bin",
    "cannot be looked into",
    lambda m: _patched(_patched(_zip({"a": _system(m)}), _CENTRAL, 16, b"\1\2\3\4"), _LOCAL, 14, b"\1\2\3\4"),
)
_bad(
    "zip of harmless data with a wrong checksum",
    "m.bin",
    "cannot be looked into",
    lambda m: _patched(_zip({"a": b"x" * 200_000}), _CENTRAL, 16, b"\1\2\3\4"),
)
_bad(
    "zip that claims to be encrypted",
    "m.bin",
    "cannot be looked into",
    lambda m: _patched(_zip({"a": _system(m)}), _CENTRAL, 8, b"\x01\x00"),
)
_bad(
    "zip that claims to be encrypted, of harmless data",
    "m.bin",
    "cannot be looked into",
    lambda m: _patched(_zip({"a": b"x"}), _CENTRAL, 8, b"\x01\x00"),
)
_bad(
    "zip whose two names differ",
    "m.bin",
    "cannot be looked into",
    lambda m: _zip({"harmless.pkl": _system(m)}).replace(b"harmless.pkl", b"harmless.txt", 1),
)
_bad(
    "zip with an unknown method",
    "m.bin",
    "cannot be looked into",
    lambda m: _patched(_zip({"a": b"x"}), _CENTRAL, 10, b"\x63\x00"),
)
_bad(
    "zip behind other bytes",
    "m.bin",
    "system",
    lambda m: b"#!/bin/sh\n" * 20 + _zip({"a": _system(m)}, zipfile.ZIP_DEFLATED),
)
_bad("zip in a zip", "m.bin", "archive", lambda m: _zip({"inner.zip": _zip({"a": _system(m)}, zipfile.ZIP_DEFLATED)}))
_bad(
    "zip behind other bytes in a zip",
    "m.bin",
    "archive within",
    lambda m: _zip({"inner": b"x" * 100 + _zip({"a": _system(m)}, zipfile.ZIP_DEFLATED)}),
)
_bad("zip in a gzip", "m.bin", "archive", lambda m: gzip.compress(_zip({"a": _system(m)}, zipfile.ZIP_DEFLATED)))
_bad("zip cut off", "m.bin", "cannot be looked into", lambda m: _zip({"a": b"x" * 100})[:60])
_bad("zip leading up and out", "m.zip", "outside", lambda m: _zip({"../../evil.txt": b"x"}))
_bad("zip with an absolute path", "m.zip", "outside", lambda m: _zip({"/etc/evil": b"x"}))
_bad("zip with a drive", "m.zip", "outside", lambda m: _zip({"C:\\evil": b"x"}))
_bad("zip with a name twice", "m.zip", "twice", lambda m: _twice())
_bad("zip with a link", "m.zip", "link", lambda m: _zip_link())
_bad("zip bomb", "m.zip", "unpacks to", lambda m: _zip({"zeros": bytes(150 << 20)}, zipfile.ZIP_DEFLATED))
_bad("gzip bomb", "m.bin", "unpacks to", lambda m: gzip.compress(bytes(150 << 20), 9))
_bad("bzip2 bomb", "m.bin", "unpacks to", lambda m: bz2.compress(bytes(150 << 20)))
_bad("tar with a pickle", "m.bin", "system", lambda m: _tar({"a/data": _system(m)}))
_bad("tar.gz with a pickle", "m.tgz", "system", lambda m: _tar({"data": _system(m)}, "w:gz"))
_bad("tar.xz with a pickle", "m.bin", "system", lambda m: _tar({"data": _system(m)}, "w:xz"))
_bad(
    "torch file of the first kind (tar)",
    "net.bin",
    "pickle",
    lambda m: _tar({"sys_info": pickle.dumps({}, 2), "pickle": _system(m, 2), "tensors": b"", "storages": b""}),
)
_bad("tar leading up and out", "m.tar", "outside", lambda m: _tar({"../evil": b"x"}))
_bad("tar with an absolute path", "m.tar", "outside", lambda m: _tar({"/etc/evil": b"x"}))
_bad("tar with a link", "m.tar", "link", lambda m: _tar({}, "w", _tar_link("a", "/etc/passwd", tarfile.SYMTYPE)))
_bad("tar with a hard link", "m.tar", "link", lambda m: _tar({}, "w", _tar_link("a", "/etc/passwd", tarfile.LNKTYPE)))
_bad("tar with a device", "m.tar", "no regular file", lambda m: _tar({}, "w", _tar_link("a", "", tarfile.CHRTYPE)))
_bad("tar cut off", "m.tar", "cannot be looked into", lambda m: _tar({"a": os.urandom(5000)})[:2000])
_bad("7-Zip", "model.txt", "7-Zip", lambda m: b"7z\xbc\xaf\x27\x1c\x00\x04" + _system(m)[:0] + bytes(60))
_bad("RAR", "model.txt", "RAR", lambda m: b"Rar!\x1a\x07\x01\x00" + bytes(60))


def _twice() -> bytes:
    import warnings

    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("a", b"reviewed")
        archive.writestr("a", b"other")
    return file.getvalue()


def _zip_link() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        info = zipfile.ZipInfo("a")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    return file.getvalue()


# --- frameworks' formats ------------------------------------------------------------------------------------------

_bad("Keras file with a Lambda", "m.keras", "Lambda", lambda m: _keras_file(LAMBDA))
_bad(
    "Keras file with a function of another module",
    "m.keras",
    "builtins",
    lambda m: _keras_file({"module": "builtins", "class_name": "exec", "config": {"source": _code(m)}}),
)
_bad(
    "Keras file with a class of the team's own",
    "m.keras",
    "team.layers",
    lambda m: _keras_file({"module": "team.layers", "class_name": "Odd", "config": {}, "registered_name": "team>Odd"}),
)
_bad(
    "Keras file that wraps a torch module",
    "m.keras",
    "TorchModuleWrapper",
    lambda m: _keras_file({"module": "keras.layers", "class_name": "TorchModuleWrapper", "config": {"module": "x"}}),
)
_bad(
    "Keras file with a disguised Lambda",
    "m.keras",
    "Lambda",
    lambda m: _zip(
        {"metadata.json": b"{}", "config.json": json.dumps(_keras(LAMBDA)).replace("Lambda", "L\\u0061mbda").encode()}
    ),
)
_bad("Keras HDF5 with a Lambda", "m.h5", "Lambda", lambda m: _hdf5(json.dumps(_keras(LAMBDA))))
_bad("Keras HDF5 behind a user block", "m.bin", "Lambda", lambda m: _hdf5(json.dumps(_keras(LAMBDA)), 512))
_bad(
    "Keras HDF5 with a disguised Lambda",
    "m.h5",
    "disguise",
    lambda m: _hdf5(
        json.dumps(_keras({"class_name": "Lambda", "config": {"function": ["4wEA", None, None]}})).replace(
            "Lambda", "L\\u0061mbda"
        )
    ),
)
_bad("Keras architecture as JSON", "architecture.json", "Lambda", lambda m: json.dumps(_keras(LAMBDA)).encode())
for _operation in ("ReadFile", "WriteFile", "PyFunc"):
    _bad(
        f"SavedModel with {_operation}",
        "saved_model.pb",
        _operation,
        lambda m, operation=_operation: _saved_model(operation),
    )
_bad("ONNX reading a file above it", "m.onnx", "outside", lambda m: _onnx("../../../etc/passwd"))
_bad("ONNX reading an absolute path", "m.onnx", "outside", lambda m: _onnx("/etc/passwd"))
_bad("ONNX reading a file above it, value first", "m.onnx", "outside", lambda m: _onnx("a/../../x", value_first=True))
_bad("torch archive for serving", "net.mar", "by its name", lambda m: _zip({"MAR-INF/MANIFEST.json": b"{}"}))
_bad(
    "PMML with an entity",
    "m.pmml",
    "ENTITY",
    lambda m: b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><x>&e;</x>',
)
_bad(
    "PMML with an entity in UTF-16",
    "m.xml",
    "ENTITY",
    lambda m: '<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE x [<!ENTITY e "x">]><x/>'.encode("utf-16"),
)
_bad(
    "YAML that makes objects",
    "conf.yaml",
    "python",
    lambda m: f"!!python/object/apply:os.system ['{_command(m)}']\n".encode(),
)
_bad(
    "YAML that makes objects by a tag of its own",
    "conf.yml",
    "python",
    lambda m: f"%TAG ! tag:yaml.org,2002:py\n---\n!thon/object/apply:os.system ['{_command(m)}']\n".encode(),
)
_bad("YAML that is none", "conda.yaml", "cannot be read", lambda m: b"a: [1, 2\nb: }\n")
_bad("YAML nested ten thousand deep", "conf.yaml", "deep", lambda m: b"[" * 10_000)
_bad("JSON nested ten thousand deep", "config.json", "deep", lambda m: b'{"class_name": ' + b"[" * 100_000)
_bad(
    "MLmodel with a loader of its own",
    "MLmodel",
    "loader_module",
    lambda m: MLMODEL.replace("mlflow.sklearn", "my_loader").encode(),
)
_bad(
    "MLmodel with data above it",
    "MLmodel",
    "outside",
    lambda m: MLMODEL.replace("model_path: model.skops", "data: ../../other").encode(),
)
_bad(
    "MLmodel with an absolute path",
    "MLmodel",
    "outside",
    lambda m: MLMODEL.replace("model_path: model.skops", "model_path: /tmp/model.skops").encode(),
)
_bad("code that is shipped", "code/helper.py", "code", lambda m: _code(m).encode())
_bad("bytecode that is shipped", "code/__pycache__/helper.cpython-311.pyc", "code", lambda m: b"\xa7\r\r\n" + bytes(12))
_bad("a library that is shipped", "ops.bin", "machine code", lambda m: b"\x7fELF\x02\x01\x01" + bytes(60))
_bad("code in an archive", "bundle.zip", "code", lambda m: _zip({"pkg/__init__.py": _code(m).encode()}))
_bad("a start-up hook", "code/sneak.pth", "by its name", lambda m: f"import os; {_code(m)}\n".encode())
_bad(
    "a chat template that reaches for Python",
    "tokenizer_config.json",
    "template",
    lambda m: json.dumps({"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}).encode(),
)
_bad(
    "a chat template in GGUF",
    "m.gguf",
    "template",
    lambda m: (
        b"GGUF"
        + struct.pack("<IQQ", 3, 0, 1)
        + b"tokenizer.chat_template{% for c in [].__class__.__base__.__subclasses__() %}{% endfor %}"
    ),
)
_bad("skops cut off", "model.skops", "cannot be looked into", lambda m: _zip({"schema.json": b"{}" * 40})[:50])
_bad("skops of nothing", "model.skops", "empty", lambda m: b"")
_bad("skops of a pickle", "model.skops", "system", _system)
_bad("skops that calls a function of NumPy", "model.skops", "numpy.load", lambda m: _skops_calling())
_bad("safetensors cut off", "m.safetensors", "cut off", lambda m: _safetensors()[:-10])
_bad("safetensors with a header that lies", "m.safetensors", "header", lambda m: struct.pack("<Q", 1 << 60) + b"{}")
_bad("safetensors with overlapping offsets", "m.safetensors", "header", lambda m: _safetensors(offsets=[8, 900]))


def _skops_calling() -> bytes:
    import skops.io
    from sklearn.preprocessing import FunctionTransformer

    return skops.io.dumps(FunctionTransformer(np.load, kw_args={"allow_pickle": True}))


def _safetensors(offsets: list[int] | None = None) -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": offsets or [0, 16]}}).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack("<4f", 1, 2, 3, 4)


# --- paths --------------------------------------------------------------------------------------------------------


def _named(name: str, file: str, says: str) -> None:
    def make(folder: Path, marker: Path) -> str:
        (folder / file).write_bytes(_system(marker))
        return file.encode("unicode_escape").decode()

    BAD[name] = Case(name, make, says)


_named("a line break in the name", "notes\n.pkl", "name")
_named("a name written backwards", "model\u202egnp.pkl", "name")
_named("spaces behind the name", "model.pkl  ", "name")
_named("a dot behind the name", "model.pkl.", "name")


def _path(name: str, says: str) -> Callable[[Callable[[Path, Path], str]], Callable[[Path, Path], str]]:
    def keep(make: Callable[[Path, Path], str]) -> Callable[[Path, Path], str]:
        BAD[name] = Case(name, make, says)
        return make

    return keep


@_path("a link out of the model", "leads out")
def _link_out(folder: Path, marker: Path) -> str:
    marker.with_suffix(".outside").write_text("x")
    (folder / "data.txt").symlink_to(marker.with_suffix(".outside"))
    return "data.txt"


@_path("a folder that is a link out of the model", "leads out")
def _folder_out(folder: Path, marker: Path) -> str:
    (folder / "data").symlink_to(marker.parent)
    return "data"


@_path("a link to nowhere", "leads")
def _dangling(folder: Path, marker: Path) -> str:
    (folder / "data").symlink_to("/nowhere/at/all")
    return "data"


@_path("a link to itself", "leads")
def _loop(folder: Path, marker: Path) -> str:
    (folder / "data").symlink_to("data")
    return "data"


@_path("a pipe", "no regular file")
def _pipe(folder: Path, marker: Path) -> str:
    os.mkfifo(folder / "data")
    return "data"


@_path("folders three hundred deep", "deep")
def _folders(folder: Path, marker: Path) -> str:
    path = folder
    for _ in range(300):
        path = path / "d"
    path.mkdir(parents=True)
    (path / "m.bin").write_bytes(_system(marker))
    return "/".join(["d"] * 33)


# --- harmless -----------------------------------------------------------------------------------------------------


def _parquet() -> bytes:
    import pandas as pd

    file = io.BytesIO()
    pd.DataFrame({"x": np.arange(100.0), "s": ["os", "system"] * 50}).to_parquet(file)
    return file.getvalue()


def _arrow() -> bytes:
    import pyarrow as pa

    table, file = pa.table({"x": list(range(100))}), io.BytesIO()
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def _forest() -> bytes:
    import skops.io
    from sklearn.ensemble import RandomForestClassifier

    model = RandomForestClassifier(5, random_state=0).fit(np.random.default_rng(0).normal(size=(50, 3)), [0, 1] * 25)
    return skops.io.dumps(model)


def _linear() -> bytes:
    import skops.io
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return skops.io.dumps(make_pipeline(StandardScaler(), LogisticRegression()).fit([[0.0], [1.0]], [0, 1]))


_RANDOM = np.random.default_rng(7).bytes(1 << 20)

_fine("requirements that begin with cloudpickle", "requirements.txt", "cloudpickle\nnumpy\npandas==3.1\n")
_fine("requirements with capitals", "requirements.txt", "cloudpickle\nscikit-learn\nRequests\nibis\nos\nsystem\n")
_fine(
    "conda.yaml", "conda.yaml", "channels: [conda-forge]\ndependencies:\n- python=3.11.9\n- pip:\n  - mlflow==3.17.2\n"
)
_fine(
    "python_env.yaml",
    "python_env.yaml",
    "python: 3.11.9\nbuild_dependencies:\n- pip==24\ndependencies:\n- -r requirements.txt\n",
)
_fine("MLmodel", "MLmodel", MLMODEL)
_fine("parquet", "reference.parquet", _parquet())
_fine("arrow file", "table.arrow", _arrow())
_fine("npy of floats", "w.npy", _npy(np.arange(1000.0)))
_fine("npy of text", "w.npy", _npy(np.array(["os", "system", "posix"])))
_fine("npy of records", "w.npy", _npy(np.array([(1, 2.0)], dtype=[("Only", "i4"), ("Other", "f8")])))
_fine("npz", "w.npz", _zip({"a.npy": _npy(np.zeros(3)), "b.npy": _npy(np.arange(9))}, zipfile.ZIP_DEFLATED))
_fine("skops of a pipeline", "model.skops", _linear())
_fine("ONNX with weights inside", "m.onnx", _onnx("weights.bin"))
_fine("ONNX with weights in a folder beside it", "m.onnx", _onnx("weights/w..0.bin"))
_fine("safetensors", "m.safetensors", _safetensors())
_fine(
    "LightGBM",
    "model.txt",
    "tree\nversion=v4\nnum_class=1\nmax_feature_idx=3\nfeature_names=a b c d\n\nTree=0\nnum_leaves=3\n",
)
_fine("XGBoost JSON", "model.json", json.dumps({"learner": {"attributes": {}, "gradient_booster": {"name": "gbtree"}}}))
_fine(
    "XGBoost UBJSON",
    "model.ubj",
    b"{L\x00\x00\x00\x00\x00\x00\x00\x07learner{L\x00\x00\x00\x00\x00\x00\x00\x04name[$d#L" + bytes(64),
)
_fine("CatBoost", "model.cbm", b"CBM1" + struct.pack("<I", 200) + bytes(200))
_fine("PNG", "logo.png", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + _RANDOM[:5000])
_fine("zip of tables", "data.zip", _zip({"a/one.csv": b"x,y\n1,2\n", "a/two.csv": b"x,y\n3,4\n"}, zipfile.ZIP_DEFLATED))
_fine("table in gzip", "data.csv.gz", gzip.compress(b"x,y\n" + b"1,2\n" * 1000))
_fine("tar of tables", "data.tar", _tar({"a/one.csv": b"x,y\n1,2\n"}))
_fine("tar.gz of tables", "data.tar.gz", _tar({"a/one.csv": b"x,y\n1,2\n"}, "w:gz"))
_fine("random bytes", "w.bin", _RANDOM)
_fine("zeros", "w.bin", bytes(1 << 20))
_fine("a vocabulary", "vocab.txt", "cos\nsin\nRest\ntan\nos\nsystem\nios\nsystem\nposix\nsubprocess\nbuiltins\neval\n")
_fine("text about pickles", "README.md", "Never load `cos\nsystem` or b'\\x80\\x04'; (see pickle)\n.")
_fine("a Keras file", "m.keras", _keras_file(DENSE))
_fine("a Keras HDF5 file", "m.h5", _hdf5(json.dumps(_keras(DENSE))))
_fine("a SavedModel", "saved_model.pb", _saved_model("MatMul"))
_fine("PMML", "m.pmml", '<?xml version="1.0"?><PMML version="4.4"><Header/></PMML>')
_fine("a page", "page.html", "<!DOCTYPE html><html><body>x</body></html>")
_fine(
    "a chat template",
    "tokenizer_config.json",
    json.dumps({"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}),
)
_fine("an input example", "input_example.json", '{"columns": ["class_name", "y"], "data": [["Lambda", 1.0]]}')
_fine("nothing", "data.bin", b"")
_fine("a package's empty marker", "code/__init__.py", b"")
