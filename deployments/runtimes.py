"""Which program serves a model version, and what it speaks. Pure: MLmodel text and tags in, `Serving` out.

What stands in the table below was read in each program's documentation. Of these programs only our own model server
and llama.cpp's were run by us, and in containers none: whatever is wrong for an image is put right in the settings
(`programs.<runtime>`: image, command, env).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any
from typing import Protocol as Shape
from urllib.parse import quote

import yaml

from deployments.target import TargetError

RUNTIME_TAG = "titleshot.runtime"
"""The tag of a model version, or the key in its MLmodel's metadata, that names the runtime; in metadata plain `runtime`
will do, where it names one of ours.
"""
PATH_TAG = "titleshot.runtime.path"
"""In the same places: what the runtime loads, as a path inside the artifact."""


class Runtime(StrEnum):
    """The programs that we can start."""

    MLFLOW_SCORING = "mlflow-scoring"
    MLSERVER = "mlserver"
    TRITON = "triton"
    VLLM = "vllm"
    TGI = "tgi"
    LLAMA_CPP = "llama.cpp"
    TENSORFLOW_SERVING = "tensorflow-serving"
    TORCHSERVE = "torchserve"


class Protocol(StrEnum):
    """The HTTP contract that a runtime speaks."""

    INVOCATIONS = "invocations"
    OPEN_INFERENCE = "oip-v2"
    OPENAI = "openai"
    TENSORFLOW = "tensorflow"
    TORCHSERVE = "torchserve"


class Layout(StrEnum):
    """How a runtime wants the artifact to lie."""

    AS_IS = "as-is"
    """It loads {path}: the artifact, or a folder or a file inside it."""
    REPOSITORY = "repository"
    """It loads {path}/{model}/{version}/, where the artifact, or a folder inside it, is mounted."""


class Override(Shape):
    """What settings may say about a runtime; None and {} leave it as it is."""

    @property
    def image(self) -> str | None:
        """The image."""

    @property
    def command(self) -> tuple[str, ...] | None:
        """All of the command."""

    @property
    def env(self) -> Mapping[str, str]:
        """More environment, or other."""


@dataclass(frozen=True, slots=True)
class Serving:
    """One version's runtime: what to start, and what to ask of it.

    Placeholders, to be filled by `fill`: in `command` and `env` {model}, {version}, {digest}, {path} (what the runtime
    loads), {artifact} (all of the artifact), {folder} and {file} (of {path}), {host} and {port} (where to listen); in
    paths {model} and {version}. `image` and `command` are None and () for our own model server, which the target
    knows how to start. `port` is what the program would take by itself.
    """

    runtime: Runtime
    protocol: Protocol
    port: int
    startup: str
    ready: str
    live: str
    infer: str
    """Where predictions are asked for: for warming up, and for clients."""
    also: tuple[str, ...] = ()
    """Where else clients may POST to; nothing else of a foreign runtime is reached from outside."""
    image: str | None = None
    command: tuple[str, ...] = ()
    env: Mapping[str, str] | None = None
    metrics_path: str | None = None
    """None: it has none without more configuration."""
    metrics_port: int | None = None
    """None: the same port."""
    metrics: tuple[str, ...] = ()
    """Names of what it counts itself, for dashboards: verdicts are made of what stands before it has counted."""
    layout: Layout = Layout.AS_IS
    inside: str = ""
    """What it loads, as a path inside the artifact; "" is all of it."""
    shared_memory: bool = False
    """Whether it wants a /dev/shm larger than a container's 64 MiB."""

    @property
    def ours(self) -> bool:
        """Whether our own model server serves it: it keeps answers and counts kinds by itself."""
        return self.runtime is Runtime.MLFLOW_SCORING


METRICS_PORT = 8071
"""Where runtimes show their metrics that cannot do so on their own port."""
_GRPC_PORT = 8072
"""Where runtimes listen that cannot do without gRPC (or TorchServe's management)."""

_OPENAI_PATH = "/v1/chat/completions"
_OPENAI_PATHS = ("/v1/completions", "/v1/embeddings")
_OIP_PATH = "/v2/models/{model}/infer"
_OIP_OF_VERSION = "/v2/models/{model}/versions/{version}/infer"
_TORCHSERVE = (
    'printf "%s\\n" "$@" >/tmp/torchserve.properties && exec torchserve --start --foreground --ncs --disable-token-auth'
    ' --ts-config /tmp/torchserve.properties --models "$0"'
)
_TABLE = {
    one.runtime: one
    for one in (
        Serving(  # run: deployments/local/server.py
            runtime=Runtime.MLFLOW_SCORING,
            protocol=Protocol.INVOCATIONS,
            port=8080,
            startup="/ping",
            ready="/ready",
            live="/ping",
            infer="/invocations",
            metrics_path="/metrics",
            metrics=("titleshot_requests_total", "titleshot_request_seconds", "titleshot_in_flight", "titleshot_ready"),
        ),
        Serving(  # read, not run. Without a model-settings.json it takes one model from the environment
            runtime=Runtime.MLSERVER,
            protocol=Protocol.OPEN_INFERENCE,
            port=8080,
            startup="/v2/models/{model}/ready",
            ready="/v2/models/{model}/ready",
            live="/v2/health/live",
            infer=_OIP_PATH,
            also=(_OIP_OF_VERSION, "/invocations"),
            image="seldonio/mlserver:1.7.1-mlflow",
            command=("mlserver", "start", "{path}"),
            env={
                "MLSERVER_HOST": "{host}",
                "MLSERVER_HTTP_PORT": "{port}",
                "MLSERVER_GRPC_PORT": str(_GRPC_PORT),
                "MLSERVER_METRICS_PORT": str(METRICS_PORT),
                "MLSERVER_MODEL_NAME": "{model}",
                "MLSERVER_MODEL_VERSION": "{version}",
                "MLSERVER_MODEL_IMPLEMENTATION": "mlserver_mlflow.MLflowRuntime",
                "MLSERVER_MODEL_URI": "{path}",
            },
            metrics_path="/metrics",
            metrics_port=METRICS_PORT,
            metrics=("model_infer_request_success", "model_infer_request_failure", "rest_server_requests"),
        ),
        Serving(  # read, not run. The official image lies on a registry that has to be named: settings must
            runtime=Runtime.TRITON,
            protocol=Protocol.OPEN_INFERENCE,
            port=8000,
            startup="/v2/models/{model}/ready",
            ready="/v2/models/{model}/ready",
            live="/v2/health/live",
            infer=_OIP_PATH,
            also=(_OIP_OF_VERSION, "/v2/models/{model}/generate", "/v2/models/{model}/generate_stream"),
            command=(
                "tritonserver",
                "--model-repository={path}",
                "--http-address={host}",
                "--http-port={port}",
                "--allow-grpc=false",
                f"--metrics-port={METRICS_PORT}",
            ),
            metrics_path="/metrics",
            metrics_port=METRICS_PORT,
            metrics=(
                "nv_inference_request_success",
                "nv_inference_request_failure",
                "nv_inference_request_duration_us",
            ),
            layout=Layout.REPOSITORY,
            shared_memory=True,
        ),
        Serving(  # read, not run
            runtime=Runtime.VLLM,
            protocol=Protocol.OPENAI,
            port=8000,
            startup="/v1/models",
            ready="/health",
            live="/health",
            infer=_OPENAI_PATH,
            also=(*_OPENAI_PATHS, "/v1/responses"),
            image="vllm/vllm-openai:v0.12.0",
            command=(
                "vllm",
                "serve",
                "{path}",
                "--served-model-name",
                "{model}",
                "--host",
                "{host}",
                "--port",
                "{port}",
            ),
            env={"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
            metrics_path="/metrics",
            metrics=(
                "vllm:time_to_first_token_seconds",
                "vllm:inter_token_latency_seconds",
                "vllm:e2e_request_latency_seconds",
                "vllm:num_requests_running",
                "vllm:kv_cache_usage_perc",
                "vllm:generation_tokens_total",
            ),
            shared_memory=True,
        ),
        Serving(  # read, not run. The official image lies on a registry that has to be named: settings must
            runtime=Runtime.TGI,
            protocol=Protocol.OPENAI,
            port=80,
            startup="/health",
            ready="/health",
            live="/health",
            infer=_OPENAI_PATH,
            also=("/v1/completions", "/generate", "/generate_stream"),
            command=(
                *("text-generation-launcher", "--model-id", "{path}"),
                *("--hostname", "{host}", "--port", "{port}"),
            ),
            env={"HF_HUB_OFFLINE": "1", "USAGE_STATS": "off"},
            metrics_path="/metrics",
            metrics=("tgi_request_duration", "tgi_queue_size", "tgi_request_count", "tgi_request_generated_tokens"),
            shared_memory=True,
        ),
        Serving(  # the program was run, the image was not; that one lies on a registry that has to be named
            runtime=Runtime.LLAMA_CPP,
            protocol=Protocol.OPENAI,
            port=8080,
            startup="/health",
            ready="/health",
            live="/health",
            infer=_OPENAI_PATH,
            also=_OPENAI_PATHS,
            command=(
                *("/app/llama-server", "-m", "{path}", "--alias", "{model}"),
                *("--host", "{host}", "--port", "{port}", "--metrics"),
            ),
            metrics_path="/metrics",
            metrics=("llamacpp:requests_processing", "llamacpp:requests_deferred", "llamacpp:tokens_predicted_total"),
        ),
        Serving(  # read, not run. Its REST port cannot be bound to one address
            runtime=Runtime.TENSORFLOW_SERVING,
            protocol=Protocol.TENSORFLOW,
            port=8501,
            startup="/v1/models/{model}/metadata",
            ready="/v1/models/{model}/metadata",
            live="/v1/models/{model}",
            infer="/v1/models/{model}:predict",
            also=(
                "/v1/models/{model}/versions/{version}:predict",
                "/v1/models/{model}:classify",
                "/v1/models/{model}:regress",
            ),
            image="tensorflow/serving:2.19.1",
            command=(
                "tensorflow_model_server",
                f"--port={_GRPC_PORT}",
                "--rest_api_port={port}",
                "--model_name={model}",
                "--model_base_path={path}/{model}",
            ),
            layout=Layout.REPOSITORY,
        ),
        Serving(  # read, not run. It takes its addresses from a file only; its makers no longer maintain it
            runtime=Runtime.TORCHSERVE,
            protocol=Protocol.TORCHSERVE,
            port=8080,
            startup="/ping",
            ready="/ping",
            live="/ping",
            infer="/predictions/{model}",
            image="pytorch/torchserve:0.12.0-cpu",
            command=(
                "/bin/sh",
                "-c",
                _TORCHSERVE,
                "{model}={file}",
                "inference_address=http://{host}:{port}",
                f"management_address=http://127.0.0.1:{_GRPC_PORT}",
                f"metrics_address=http://{{host}}:{METRICS_PORT}",
                "metrics_mode=prometheus",
                "model_store={folder}",
            ),
            env={"LOG_LOCATION": "/tmp", "METRICS_LOCATION": "/tmp"},  # noqa: S108 - the pod's own
            metrics_path="/metrics",
            metrics_port=METRICS_PORT,
            metrics=(
                "ts_inference_requests_total",
                "ts_inference_latency_microseconds",
                "ts_queue_latency_microseconds",
            ),
            shared_memory=True,
        ),
    )
}
_BY_FLAVOUR = {
    "python_function": Runtime.MLFLOW_SCORING,
    "transformers": Runtime.VLLM,
    "onnx": Runtime.TRITON,
    "tensorflow": Runtime.TENSORFLOW_SERVING,
}
"""The first flavour in this order that a model has decides, where nothing names a runtime."""
_MORE_PROGRAMS = frozenset({"recorder", "fetcher"})
"""What settings may describe among the programs besides runtimes."""
_WORDS = re.compile(r"\{(model|version|digest|path|artifact|folder|file|host|port|service|namespace)\}")


def fill(text: str, words: Mapping[str, str]) -> str:
    """Replace the placeholders in `text` for which there are words. Other braces stay as they are."""
    return _WORDS.sub(lambda found: words.get(found[1], found[0]), text)


def fill_path(text: str, model: str, version: str) -> str:
    """The same for a URL's path, where names are quoted."""
    return fill(text, {"model": quote(model, safe=""), "version": quote(version, safe="")})


def flavours(mlmodel: str) -> tuple[str, ...]:
    """The flavours that an MLmodel file names. MLflow writes it in block style: keys one level below
    `flavors:`; in any other style none are found, and so it is refused.
    """
    block = re.search(r"^flavors:\n((?:[ ].*\n?)+)", mlmodel, re.MULTILINE)
    return tuple(re.findall(r"^ {2}([\w.-]+):", block[1], re.MULTILINE)) if block else ()


def runtime(mlmodel: str) -> tuple[Runtime, Protocol]:
    """How to serve the model of this MLmodel file on this machine. Raises `TargetError` where we cannot."""
    named = flavours(mlmodel)
    if "python_function" in named:
        return Runtime.MLFLOW_SCORING, Protocol.INVOCATIONS
    if not named:
        raise TargetError("its MLmodel file names no flavours: this is not an MLflow model")
    raise TargetError(
        f"no runtime here serves the flavours {', '.join(named)}: only models with python_function are served"
    )


def serving(mlmodel: str, tags: Mapping[str, str], overrides: Mapping[str, Override]) -> Serving:
    """How to serve the model version of this MLmodel file with these tags, on a target with these settings.

    A runtime that a tag, or the MLmodel's metadata, names is taken; otherwise the flavours decide, and our own model
    server comes first. Raises `TargetError` where nothing serves it, or an image is missing.
    """
    described = _read(mlmodel)
    chosen = _chosen(mlmodel, tags, described)
    unknown = sorted({*overrides} - {*Runtime} - _MORE_PROGRAMS)
    if unknown:
        raise TargetError(f"the settings' programs name {', '.join(unknown)}: known are {', '.join(_known())}")
    made = replace(_TABLE[chosen], inside=_inside(chosen, tags, described))
    if chosen is Runtime.VLLM and _has_tokenizer(described) and made.inside == "model":
        made = replace(made, command=(*made.command, "--tokenizer", "{artifact}/components/tokenizer"))
    override = overrides.get(chosen)
    if override is not None:
        made = replace(
            made,
            image=override.image or made.image,
            command=made.command if override.command is None else tuple(override.command),
            env={**(made.env or {}), **override.env},
        )
    if made.image is None and not made.ours:
        raise TargetError(f"no image is known for {chosen}: set programs.{chosen}.image, with the registry that has it")
    return made


def _known() -> list[str]:
    return [*Runtime, *sorted(_MORE_PROGRAMS)]


def _read(mlmodel: str) -> dict[str, Any]:
    try:
        read = yaml.safe_load(mlmodel)
    except yaml.YAMLError as error:
        raise TargetError(f"its MLmodel file is no YAML: {str(error).splitlines()[0]}") from error
    return read if isinstance(read, dict) else {}


def _said(key: str, tags: Mapping[str, str], described: Mapping[str, Any]) -> str | None:
    metadata = described.get("metadata")
    said = tags.get(key) or (metadata.get(key) if isinstance(metadata, dict) else None)
    return None if said is None else str(said)


def _chosen(mlmodel: str, tags: Mapping[str, str], described: Mapping[str, Any]) -> Runtime:
    named = flavours(mlmodel)
    if not named:
        raise TargetError("its MLmodel file names no flavours: this is not an MLflow model")
    said = _said(RUNTIME_TAG, tags, described)
    if said is not None and said not in {*Runtime}:
        raise TargetError(f"{RUNTIME_TAG} is {said!r}: known are {', '.join(Runtime)}")
    # `runtime` is a word that anybody may use in metadata: what we do not know was not meant for us.
    said = said or next((one for one in Runtime if one == _said("runtime", {}, described)), None)
    by_flavour = next((one for flavour, one in _BY_FLAVOUR.items() if flavour in named), None)
    if said is None and by_flavour is None:
        raise TargetError(
            f"no runtime is known for the flavours {', '.join(named)}: name one in the version's tag {RUNTIME_TAG} "
            f"({', '.join(Runtime)})"
        )
    if said == Runtime.MLFLOW_SCORING and "python_function" not in named:
        raise TargetError(f"{said} serves models with python_function only; this one has {', '.join(named)}")
    return Runtime(said) if said is not None else Runtime(str(by_flavour))


def _inside(chosen: Runtime, tags: Mapping[str, str], described: Mapping[str, Any]) -> str:
    """What the runtime loads, as a path inside the artifact: nobody's MLmodel file leads out of it."""
    said = _said(PATH_TAG, tags, described)
    path = PurePosixPath(_found(chosen, _flavors(described)) if said is None else said)
    if path.is_absolute() or ".." in path.parts:
        raise TargetError(f"{chosen} is to load {str(path)!r}: that is no path inside the artifact ({PATH_TAG})")
    return "" if path == PurePosixPath() else str(path)


def _found(chosen: Runtime, flavors: Mapping[str, Mapping[str, Any]]) -> str:
    """Where MLflow put what this runtime loads."""
    if chosen in {Runtime.LLAMA_CPP, Runtime.TORCHSERVE}:
        return _one_file(flavors, ".gguf" if chosen is Runtime.LLAMA_CPP else ".mar", chosen)
    if chosen in {Runtime.VLLM, Runtime.TGI}:
        return str(flavors.get("transformers", {}).get("model_binary", ""))
    return _saved_model(flavors.get("tensorflow", {})) if chosen is Runtime.TENSORFLOW_SERVING else ""


def _saved_model(flavour: Mapping[str, Any]) -> str:
    """Where MLflow put the SavedModel. Keras models are one since TensorFlow 2.16 only where they were exported."""
    if flavour.get("model_type") != "keras":
        return str(flavour.get("saved_model_dir", ""))
    numbers = [int(part) for part in str(flavour.get("keras_version", "")).split(".")[:2] if part.isdigit()]
    if flavour.get("save_format") == "tf" and numbers < [2, 16]:
        return f"{flavour.get('data', 'data')}/model"
    raise TargetError(
        "TensorFlow Serving loads SavedModels, and this is a Keras file: export one into the artifact, and name its "
        f"folder in the version's tag {PATH_TAG}"
    )


def _one_file(flavors: Mapping[str, Mapping[str, Any]], ending: str, chosen: Runtime) -> str:
    artifacts = flavors.get("python_function", {}).get("artifacts")
    named = artifacts.values() if isinstance(artifacts, dict) else ()
    paths = sorted(str(one.get("path", "")) for one in named if isinstance(one, dict))
    found = [path for path in paths if path.endswith(ending)]
    if len(found) != 1:
        raise TargetError(
            f"its MLmodel file names {len(found)} artifacts *{ending} for {chosen}, not one: name the file in the "
            f"version's tag {PATH_TAG}"
        )
    return found[0]


def _flavors(described: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    flavors = described.get("flavors")
    named = flavors.items() if isinstance(flavors, dict) else ()
    return {str(name): data for name, data in named if isinstance(data, dict)}


def _has_tokenizer(described: Mapping[str, Any]) -> bool:
    components = _flavors(described).get("transformers", {}).get("components")
    return isinstance(components, list) and "tokenizer" in components
