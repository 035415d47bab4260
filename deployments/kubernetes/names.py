"""What our objects are called, labelled and numbered in a cluster. Pure."""

import hashlib
import re

MANAGER = "titleshot"
"""Our field manager in server-side apply, and the value of app.kubernetes.io/managed-by."""
GROUP = "titleshot.io"
MODEL, VERSION = f"{GROUP}/model", f"{GROUP}/version"
"""Labels of all that belongs to a model, or to one version: the model's name in the cluster, and the number."""
MODEL_NAME, DIGEST, PROMOTION = f"{GROUP}/model-name", f"{GROUP}/digest", f"{GROUP}/promotion"
"""Annotations: the model's name in the registry, the artifact's digest, whose lease it was made under."""
FENCE, TRAFFIC = f"{GROUP}/fence", f"{GROUP}/traffic"
"""Annotations: the number of the lease that wrote an object last, and the traffic that a route was made of (JSON)."""
PORTS = {"live": 8080, "shadow": 8081, "own": 8082, "pinned": 8083}
"""A version's ports by kind of traffic: so its server knows what a request is, whoever the gateway is."""
ADMIN = 8090
"""The port for probes, identity, answers and metrics; no Service has it."""
RUNTIME = 8070
"""The port of a foreign runtime behind the recorder, on the pod's loopback."""
LONGEST = 40


def slug(model: str) -> str:
    """The model's name in the cluster: a DNS label of at most 40 characters that begins with a letter. Names that had
    to be changed carry a digest of the original, so that no two models share one.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    if plain == model and len(plain) <= LONGEST and plain[:1].isalpha():
        return plain
    mark = hashlib.sha256(model.encode()).hexdigest()[:6]
    return f"m-{plain[: LONGEST - 9]}".rstrip("-") + f"-{mark}"


def of_version(model: str, version: str) -> str:
    """The name of a version's objects: Deployment, Service and the rest."""
    return f"{slug(model)}-v{version}"


def labels(model: str, version: str | None = None) -> dict[str, str]:
    """The labels of what belongs to `model`, or to one version of it."""
    common = {
        "app.kubernetes.io/name": slug(model),
        "app.kubernetes.io/managed-by": MANAGER,
        "app.kubernetes.io/part-of": "titleshot",
        MODEL: slug(model),
    }
    return common if version is None else {**common, "app.kubernetes.io/version": version, VERSION: version}
