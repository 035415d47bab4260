"""What is unsafe in each kind of file: NumPy, skops, Keras, TensorFlow, ONNX, safetensors, YAML, XML, templates.

Each look is at bytes that `validations.scanner` read; it refuses by raising `Unsafe`.
"""

import io
import json
import re
import struct
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any, NoReturn

import numpy as np
import yaml

SKOPS = "log the model with serialization_format='skops'"
UNPACKED = "log it unpacked"
MOST_TEXT = 16 << 20
"""JSON and YAML are parsed whole, and take ten times their size then: more than this is looked at as bytes."""
_MOST_YAML = 1 << 20
_NESTED = 100


class Unsafe(Exception):
    """The file is unsafe; the message says why."""


def refuse(reason: str) -> NoReturn:
    """Raise `Unsafe`."""
    raise Unsafe(reason)


def shown(name: str) -> str:
    """`name` as it may stand in a message: one line, nothing invisible, nothing that reverses the rest."""
    return "".join(
        letter
        if letter.isprintable() and unicodedata.category(letter) != "Cs"
        else repr(letter)[1:-1].encode("ascii", "backslashreplace").decode()
        for letter in name
    )


_KERAS_UNSAFE = ("Lambda", "__lambda__", "TorchModuleWrapper", "TFSMLayer")
_KERAS = "has a Keras {} ({{}}), which runs Python of its own: use layers of keras itself, or review the file"
_HDF5 = [
    (re.compile(rb'"class_name"\s*:\s*"(Lambda|__lambda__|TorchModuleWrapper|TFSMLayer)"'), _KERAS.format("layer")),
    (
        re.compile(
            rb'"module"\s*:\s*"((?!keras[".]|tensorflow[".]|tf_keras[".]|builtins",\s*"class_name"\s*:\s*"function")[^"]{0,100})"'
        ),
        _KERAS.format("object of another module"),
    ),
    (
        # JSON may write every letter as an escape; writers escape only what is not plain.
        re.compile(rb"(\\u00[2-7][0-9a-fA-F])"),
        "disguises plain letters in its Keras configuration ({}): save the model anew with Keras",
    ),
]
_GRAPH = [
    (
        re.compile(rb"(?<![A-Za-z])(ReadFile|WriteFile|PyFunc|EagerPyFunc|PyFuncStateless)(?![A-Za-z])"),
        "has a TensorFlow operation ({}) that reads or writes files or runs Python: save the model without it",
    )
]
_OUTSIDE = "keeps its weights outside of its folder ({}): save the model with the weights beside it"
_ONNX = [
    # The key and the value of an entry of `external_data`, in either order.
    (
        re.compile(
            rb"location\x12[\x00-\xff]{1,3}?(/[\w./\\-]{0,100}|[A-Za-z]:[\\/]|[^\x00]{0,250}?\.\.[/\\][\w./\\-]{0,100})"
        ),
        _OUTSIDE,
    ),
    (re.compile(rb"\x12[\x01-\xff]{1,2}(/[\w./\\-]{0,250})\x0a\x08location"), _OUTSIDE),
    (re.compile(rb"\.\.([/\\][\w./\\-]{0,250})\x0a\x08location"), _OUTSIDE),
]
_TEMPLATE = [
    (
        re.compile(
            rb"\{[{%][^}]{0,2000}?(__(?:class|globals|subclasses|mro|bases?|builtins|import|init|getattribute|self)__"
            rb"|\\+x5f\\+x5f|\\+u005f)"
        ),
        "has a chat template that reaches for Python itself ({}): log the template that the model's makers publish",
    )
]
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"


def looks(suffix: str, head: bytes) -> list[tuple[re.Pattern[bytes], str]]:
    """What to search the whole file for: HDF5 keeps attributes, and protobuf its strings, as they are."""
    if any(head.startswith(_HDF5_MAGIC, start) for start in (0, 512, 1024, 2048, 4096, 8192, 16_384, 32_768)):
        return _HDF5
    if suffix in (".pb", ".pbtxt"):
        return _GRAPH
    if suffix == ".onnx":
        return _ONNX
    if suffix in (".json", ".jinja", ".jinja2", ".j2") or head.startswith(b"GGUF"):
        return _TEMPLATE
    return []


def numpy_size(head: bytes) -> int:
    """How many bytes the NumPy file that begins with `head` must have."""
    file = io.BytesIO(head)
    try:
        one = np.lib.format.read_magic(file) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
        shape, _, kind = read(file)
    except (ValueError, RecursionError, MemoryError) as error:
        refuse(f"has a NumPy header that NumPy does not read ({brief(error)}): save the array anew")
    if kind.hasobject:
        refuse(f"is a NumPy file of Python objects, which are pickled: save numbers or text; {SKOPS}")
    wanted = kind.itemsize
    for length in shape:
        wanted *= length
    return file.tell() + wanted


def safetensors(head: bytes, size: int) -> None:
    """The header must fit the file; a header over 64 KiB is not parsed, as nothing in it can run."""
    (length,) = struct.unpack("<Q", head[:8].ljust(8, b"\xff"))
    if length > size - 8:
        refuse("has a safetensors header that is longer than the file: log the model anew")
    if length > len(head) - 8:
        return
    try:
        header = json.loads(head[8 : 8 + length])
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        begins = [tensor["data_offsets"][0] for name, tensor in header.items() if name != "__metadata__"]
        whole = max(ends, default=0)
        joined = sorted(begins) == [0, *sorted(ends)[:-1]] if ends else True
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        refuse(f"has a safetensors header that cannot be read ({brief(error)}): log the model anew")
    if not joined:
        refuse("has a safetensors header whose tensors overlap or leave gaps: log the model anew")
    if 8 + length + whole > size:
        refuse(f"is cut off: its tensors need {whole:,} bytes; log the model anew")


def entities(head: bytes) -> None:
    """XML entities read files and multiply text."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00<" in head[:8] or b"<\x00" in head[:8]:
        head = head.replace(b"\x00", b"")
    found = re.search(rb"<!ENTITY", head) if b"<?xml" in head[:512] or b"<!DOCTYPE" in head[:4096] else None
    if found:
        refuse("declares an XML entity (<!ENTITY), which may read files: export the model without a DOCTYPE")


def parsed(name: str, suffix: str, text: bytes) -> None:
    """Refuse JSON and YAML that make objects or name paths outside of the model; `text` is the whole file."""
    if suffix == ".json":
        if len(text) < MOST_TEXT and (b"class_name" in text or re.search(rb"\\u00[2-7]", text)):
            _keras(text)
        return
    if len(text) >= _MOST_YAML:
        refuse("is YAML of more than 1 MiB, which is not looked into: keep data out of configuration")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _NESTED:
                refuse(f"is nested more than {_NESTED} deep, which breaks readers: save it anew")
            tag = getattr(event, "tag", None) or ""
            if "python/" in tag:
                refuse(f"makes Python objects by its tag {shown(tag)}: write plain YAML")
        if name == "MLmodel":
            _mlmodel(yaml.compose(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        refuse(f"is YAML that cannot be read ({brief(error)}): log the model anew")


_PATHS = {"code", "data", "model_path", "model_data", "model_code_path", "path", "pickled_model", "python_model"}


def _mlmodel(root: Any) -> None:
    """MLflow imports what `loader_module` names, and joins paths without a look."""
    flavors = dict(_pairs(root)).get("flavors")
    todo, seen = [flavors], set()
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        for key, value in _pairs(node):
            todo.append(value)
            if not isinstance(value, yaml.ScalarNode) or key == "uri":
                continue
            words = PureWindowsPath(value.value)
            if ".." in words.parts or (key in _PATHS and (words.root or words.drive)):
                refuse(f"names a path outside of the model ({key}: {shown(value.value)}): log the model anew")
            if key == "loader_module" and not re.fullmatch(r"mlflow(\.\w+)+", value.value):
                refuse(
                    f"has a loader of its own (loader_module: {shown(value.value)}), which runs when the model is "
                    "loaded: log the model with one of MLflow's flavours, or review the file"
                )


def _pairs(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, yaml.MappingNode):
        yield from ((str(key.value), value) for key, value in node.value)


def _keras(text: bytes) -> None:
    """Keras makes objects by name from its configuration. Where the JSON is another's, nothing matches."""
    try:
        todo = [json.loads(text)]
    except RecursionError:
        refuse("is nested too deep to be read: save it anew")
    except ValueError:
        return  # broken JSON is read by nobody
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += value
        if not isinstance(value, dict):
            continue
        todo += value.values()
        made, module = value.get("class_name"), value.get("module")
        if made in _KERAS_UNSAFE:
            refuse(_KERAS.format("layer").format(made))
        if isinstance(made, str) and isinstance(module, str) and module != "":
            known = module.split(".")[0] in ("keras", "tensorflow", "tf_keras")
            if not known and (module, made) != ("builtins", "function"):
                refuse(_KERAS.format("object of another module").format(shown(f"{module}.{made}")))


_VOUCHED = re.compile(
    r"(?!.*\.(?:testing|_testing|externals|f2py|distutils|_lib)\.)(?:sklearn|numpy|scipy)\.(?:\w+\.)*"
    r"(?:_*[A-Z]\w*|\w+_gen|rv_\w*frozen)|sklearn\.metrics\.\w+\.\w+"
)
"""Classes (and scorers): a function, such as `numpy.load`, would be called with what a request holds."""


def skops_types(path: Path) -> None:
    """Skops names the types that it would have to import, without importing them."""
    import skops.io

    try:
        types = skops.io.get_untrusted_types(file=path)
    except Exception as error:  # noqa: BLE001 - whatever skops stumbles over, the file is not as it should be
        refuse(f"cannot be read by skops ({brief(error)}): log the model anew")
    foreign = [name for name in sorted(types) if not _VOUCHED.fullmatch(name)]
    if foreign:
        refuse(
            f"needs types that nobody vouched for: {listed(foreign)}; "
            "use classes of scikit-learn, NumPy and SciPy, or review the file"
        )


def listed(names: list[str]) -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(shown(name)[:80] for name in names[:5]) + more


def brief(error: BaseException) -> str:
    """What a library said, in one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shown(lines[0])[:160].rstrip(".:") if lines else type(error).__name__
