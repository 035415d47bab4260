"""Which program serves a version, what it loads, and what is refused."""

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.runtimes import Layout, Protocol, Runtime, Serving, fill, fill_path, serving
from deployments.target import TargetError


@dataclass(frozen=True)
class Program:
    """What settings say about a runtime."""

    image: str | None = None
    command: tuple[str, ...] | None = None
    env: dict[str, str] = field(default_factory=dict)


IMAGES = {one: Program(image="here:1") for one in Runtime}


def mlmodel(flavors: dict[str, Any], metadata: Any = None) -> str:
    """An MLmodel file as MLflow writes it."""
    return yaml.safe_dump({"flavors": flavors, **({"metadata": metadata} if metadata is not None else {})})


PYFUNC = {"python_function": {"loader_module": "mlflow.sklearn"}}
GGUF = {"python_function": {"artifacts": {"gguf": {"path": "artifacts/smol.gguf"}, "prompt": {"path": "artifacts/p"}}}}
KERAS = {"model_type": "keras", "data": "data", "save_format": "tf"}


def chosen(flavors: dict[str, Any], metadata: Any = None, **tags: str) -> Serving:
    named = {f"titleshot.{key.replace('_', '.')}": value for key, value in tags.items()}
    return serving(mlmodel(flavors, metadata), named, IMAGES)


@pytest.mark.parametrize(
    ("flavors", "runtime", "protocol"),
    [
        (PYFUNC, Runtime.MLFLOW_SCORING, Protocol.INVOCATIONS),
        ({"transformers": {}, **PYFUNC}, Runtime.MLFLOW_SCORING, Protocol.INVOCATIONS),
        ({"transformers": {}}, Runtime.VLLM, Protocol.OPENAI),
        ({"onnx": {}}, Runtime.TRITON, Protocol.OPEN_INFERENCE),
        ({"tensorflow": {}}, Runtime.TENSORFLOW_SERVING, Protocol.TENSORFLOW),
    ],
)
def test_flavours_decide(flavors: dict[str, Any], runtime: Runtime, protocol: Protocol) -> None:
    """Where nobody names a runtime: our own model server if it can, or the one for the flavour."""
    found = chosen(flavors)
    assert (found.runtime, found.protocol) == (runtime, protocol)
    assert found.ours == (runtime is Runtime.MLFLOW_SCORING)


def test_what_is_named_is_taken() -> None:
    """First the version's tag, then the MLmodel's metadata; a word that means nothing to us there is not ours."""
    assert chosen(GGUF, {"runtime": "llama.cpp"}).runtime is Runtime.LLAMA_CPP
    assert chosen(GGUF, {"titleshot.runtime": "llama.cpp"}).runtime is Runtime.LLAMA_CPP
    assert chosen(GGUF, {"runtime": "llama.cpp"}, runtime="mlserver").runtime is Runtime.MLSERVER
    assert chosen(PYFUNC, {"runtime": "python3.11"}).runtime is Runtime.MLFLOW_SCORING
    assert chosen(PYFUNC, "no mapping").runtime is Runtime.MLFLOW_SCORING
    assert chosen({"custom": {}}, runtime="triton").runtime is Runtime.TRITON
    with pytest.raises(TargetError, match=r"titleshot\.runtime is 'tritn': known are mlflow-scoring, mlserver"):
        chosen(PYFUNC, runtime="tritn")
    with pytest.raises(TargetError, match="'x': known are"):
        chosen(PYFUNC, {"titleshot.runtime": "x"})


def test_what_nothing_serves_is_refused() -> None:
    """In one line that says how to mend it."""
    with pytest.raises(
        TargetError, match=r"flavours openai, prophet: name one in the version's tag titleshot\.runtime"
    ):
        chosen({"openai": {}, "prophet": {}})
    with pytest.raises(TargetError, match="python_function only; this one has onnx"):
        chosen({"onnx": {}}, runtime="mlflow-scoring")
    for text in ("", "flavors:\n", "nonsense", "flavors: {python_function: {}}"):
        with pytest.raises(TargetError, match="no flavours"):
            serving(text, {}, {})
    with pytest.raises(TargetError, match="no YAML"):
        serving("flavors:\n  python_function: {", {}, {})


@pytest.mark.parametrize("runtime", [Runtime.TRITON, Runtime.TGI, Runtime.LLAMA_CPP])
def test_no_registry_is_made_up(runtime: Runtime) -> None:
    """Where an image's name needs a registry, settings must say it."""
    text = mlmodel(GGUF)
    with pytest.raises(TargetError, match=re.escape(f"set programs.{runtime}.image")):
        serving(text, {"titleshot.runtime": runtime}, {})
    assert serving(text, {"titleshot.runtime": runtime}, {runtime: Program("here:1")}).image == "here:1"


@pytest.mark.parametrize("runtime", Runtime)
def test_no_image_names_a_registry(runtime: Runtime) -> None:
    """Images that are known by themselves have neither a host nor the tag "latest"."""
    try:
        image = serving(mlmodel(GGUF | {"x": {"path": "a.mar"}}), {"titleshot.runtime": runtime}, {}).image
    except TargetError:
        return
    if image is not None:
        first, _, tag = image.partition(":")
        assert "." not in first.partition("/")[0]
        assert re.search(r"\d+\.\d+\.\d+", tag)


def test_overrides() -> None:
    """Settings replace image and command and add environment; a name that means nothing is an error, not ignored."""
    text, tags = mlmodel(GGUF), {"titleshot.runtime": "mlserver"}
    plain = serving(text, tags, {})
    made = serving(text, tags, {"mlserver": Program("mine:1", ("/serve", "{path}"), {"A": "1"}), "recorder": Program()})
    assert (made.image, made.command) == ("mine:1", ("/serve", "{path}"))
    assert made.env == {**(plain.env or {}), "A": "1"}
    assert serving(text, tags, {"mlserver": Program()}) == plain
    with pytest.raises(TargetError, match="programs name mlsever: known are"):
        serving(text, tags, {"mlsever": Program()})


@pytest.mark.parametrize(
    ("flavors", "runtime", "inside"),
    [
        (PYFUNC, Runtime.MLFLOW_SCORING, ""),
        (GGUF, Runtime.LLAMA_CPP, "artifacts/smol.gguf"),
        ({"transformers": {"model_binary": "model"}}, Runtime.VLLM, "model"),
        ({"transformers": {"model_binary": "model"}}, Runtime.TGI, "model"),
        ({"onnx": {"data": "model.onnx"}}, Runtime.TRITON, ""),
        (
            {"tensorflow": {"saved_model_dir": "tf2model", "model_type": "tf2-module"}},
            Runtime.TENSORFLOW_SERVING,
            "tf2model",
        ),
        ({"tensorflow": {**KERAS, "keras_version": "2.9.1"}}, Runtime.TENSORFLOW_SERVING, "data/model"),
    ],
)
def test_what_is_loaded(flavors: dict[str, Any], runtime: Runtime, inside: str) -> None:
    """The folder or file that MLflow's own layout has for it."""
    assert chosen(flavors, runtime=runtime).inside == inside
    assert chosen(flavors, runtime=runtime, runtime_path="./some/thing/").inside == "some/thing"
    assert chosen(flavors, {"titleshot.runtime.path": "that"}, runtime=runtime).inside == "that"
    assert chosen(flavors, runtime=runtime, runtime_path=".").inside == ""


def test_what_is_loaded_lies_in_the_artifact() -> None:
    """Neither a tag nor the MLmodel file leads out of it, and a choice between files is nobody's guess."""
    for path in ("/etc/passwd", "../other", "a/../../b"):
        with pytest.raises(TargetError, match="no path inside the artifact"):
            chosen(PYFUNC, runtime="vllm", runtime_path=path)
        with pytest.raises(TargetError, match="no path inside the artifact"):
            chosen({"transformers": {"model_binary": path}}, runtime="vllm")
    two = {"python_function": {"artifacts": {"a": {"path": "a.gguf"}, "b": {"path": "b.gguf"}}}}
    with pytest.raises(TargetError, match=r"2 artifacts \*\.gguf"):
        chosen(two, runtime="llama.cpp")
    assert chosen(two, runtime="llama.cpp", runtime_path="b.gguf").inside == "b.gguf"
    with pytest.raises(TargetError, match=r"0 artifacts \*\.mar"):
        chosen(PYFUNC, runtime="torchserve")
    for version, form in (("2.16.0", "tf"), ("2.9.0", "h5"), ("3.0", "keras")):
        with pytest.raises(TargetError, match="Keras file"):
            chosen({"tensorflow": {**KERAS, "keras_version": version, "save_format": form}})


def test_a_tokenizer_that_lies_beside_the_model_is_named() -> None:
    """MLflow puts it into a folder of its own; one named by a tag has its own."""
    flavors = {"transformers": {"model_binary": "model", "components": ["tokenizer"]}}
    assert chosen(flavors).command[-2:] == ("--tokenizer", "{artifact}/components/tokenizer")
    assert "--tokenizer" not in chosen(flavors, runtime_path="snapshot").command
    assert "--tokenizer" not in chosen({"transformers": {"model_binary": "model"}}).command


@pytest.mark.parametrize("runtime", Runtime)
def test_the_table(runtime: Runtime) -> None:
    """Each runtime has paths to be probed and asked at, listens where it is told, and finds what it is to load."""
    found = chosen(GGUF | {"x": {}}, runtime=runtime, runtime_path="model")
    for path in (found.startup, found.ready, found.live, found.infer, *found.also):
        assert path.startswith("/")
        assert "{" not in fill_path(path, "m", "1")
    if found.ours:
        assert (found.command, found.env or {}) == ((), {})
        return
    text = " ".join([*found.command, *(found.env or {}).values()])
    assert "{port}" in text
    assert "{host}" in text or runtime is Runtime.TENSORFLOW_SERVING
    assert {"{path}", "{folder}"} & set(re.findall(r"\{\w+\}", text))
    words = dict.fromkeys(("model", "version", "digest", "path", "artifact", "folder", "file", "host", "port"), "x")
    assert not re.search(r"\{\w+\}", fill(text, words))
    assert (found.layout is Layout.REPOSITORY) == (runtime in {Runtime.TRITON, Runtime.TENSORFLOW_SERVING})


def test_fill() -> None:
    """Only known placeholders are replaced, once, and only those for which there is a word."""
    assert (
        fill('{model} {version} {"a": {}} {other}', {"model": "{version}"}) == '{version} {version} {"a": {}} {other}'
    )
    assert fill_path("/v2/models/{model}/versions/{version}", "a b/c", "3") == "/v2/models/a%20b%2Fc/versions/3"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["artifacts", "path", "model_binary", "components", "a"]), inner, max_size=3)
    ),
)


@given(
    st.dictionaries(
        st.sampled_from(["python_function", "transformers", "onnx", "tensorflow", "x"]), anything, min_size=1
    ),
    anything,
    st.sampled_from(Runtime),
)
@settings(max_examples=60, deadline=None)
def test_whatever_an_mlmodel_file_says(flavors: dict[str, Any], metadata: Any, runtime: Runtime) -> None:
    """It is served, or refused by a `TargetError`: nobody's file makes anything else of it."""
    for tags in ({}, {"titleshot.runtime": str(runtime)}):
        try:
            found = serving(mlmodel(flavors, metadata), tags, IMAGES)
        except TargetError:
            continue
        assert ".." not in found.inside.split("/")
