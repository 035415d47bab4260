"""The contract's models, and clients that send requests through a target's gateway and keep what they got."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from deployments.target import ServingTarget

MODEL = "flights"
CODE = """
import pathlib, time

def _load_pyfunc(path):
    kind = pathlib.Path(path, "kind").read_text()
    if kind == "broken":
        raise RuntimeError("the weights are not where they should be")
    return Model(kind)

class Model:
    def __init__(self, kind):
        self.kind = kind
    def predict(self, data, params=None):
        answers = []
        for x in data["x"]:
            if self.kind == "flawed" and x == 13:
                raise ValueError("never seen 13 in training")
            if x < 0:
                time.sleep(-x)
            answers.append(2 * x)
        return answers
"""
MLMODEL = """\
flavors:
  python_function:
    code: code
    loader_module: tiny_{kind}
signature:
  inputs: '[{{"type": "double", "name": "x", "required": true}}]'
  outputs: '[{{"type": "double", "required": true}}]'
  params: null
"""
GOOD, FLAWED, BROKEN = "good", "flawed", "broken"
KINDS = {"1": GOOD, "2": GOOD, "3": FLAWED}
"""The versions that are deployed throughout. Kinds: `good` answers 2x and sleeps -x seconds for a negative x;
`flawed` is the same but raises for 13; `broken` does not load."""


@dataclass(frozen=True)
class Reply:
    """What a client got."""

    status: int
    version: str | None
    attempts: int
    request_id: str
    text: str
    chosen: str | None = None


def body(x: float) -> bytes:
    """A request with one row."""
    return json.dumps({"dataframe_split": {"columns": ["x"], "data": [[x]]}}).encode()


class Clients:
    """Clients of one target's gateway."""

    target: ServingTarget

    def send(
        self,
        count: int,
        x: float = 1.0,
        version: str | None = None,
        ids: Callable[[int], str] | None = None,
        headers: Callable[[int], dict[str, str]] | None = None,
    ) -> list[Reply]:
        path = f"/v/{version}/invocations" if version else "/invocations"
        return asyncio.run(self._send(count, path, body(x), ids, more=headers))

    def pings(self, count: int) -> Counter[str | None]:
        replies = asyncio.run(self._send(count, "/ping", b"", None, method="GET"))
        assert {reply.status for reply in replies} == {200}
        return Counter(reply.version for reply in replies)

    async def _send(
        self,
        count: int,
        path: str,
        content: bytes,
        ids: Callable[[int], str] | None,
        at_once: int = 16,
        method: str = "POST",
        more: Callable[[int], dict[str, str]] | None = None,
    ) -> list[Reply]:
        gate = asyncio.Semaphore(at_once)
        limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
        async with httpx.AsyncClient(
            base_url=self.target.gateway(MODEL), timeout=60, limits=limits, trust_env=False
        ) as client:

            async def one(number: int) -> Reply:
                headers = {"content-type": "application/json"} | (more(number) if more else {})
                if ids:
                    headers["x-request-id"] = ids(number)
                async with gate:
                    answer = await client.request(method, path, content=content, headers=headers)
                told = answer.headers.get("x-titleshot-attempts") or answer.headers.get("x-envoy-attempt-count", 0)
                attempts = int(told)
                # Envoy of the local target, or else the version's own server, says who answered.
                version = answer.headers.get("x-model-version") or answer.headers.get("x-titleshot-version")
                name = answer.headers.get("x-request-id") or headers.get("x-request-id", "")
                # Behind a foreign gateway only who passed a request on says that another one was meant.
                chosen = answer.headers.get("x-model-chosen") or answer.headers.get("x-titleshot-chosen", version)
                return Reply(answer.status_code, version, attempts, name, answer.text, chosen)

            return await asyncio.gather(*map(one, range(count)))

    def at_once(self, count: int, x: float) -> list[Reply]:
        """All of them in flight together."""
        return asyncio.run(self._send(count, "/invocations", body(x), None, at_once=count))


def make_models(root: Path) -> Path:
    """One artifact directory per kind, small and quick to load."""
    for kind in (GOOD, FLAWED, BROKEN):
        (root / kind / "code").mkdir(parents=True)
        (root / kind / "MLmodel").write_text(MLMODEL.format(kind=kind))
        (root / kind / "code" / f"tiny_{kind}.py").write_text(CODE)
        (root / kind / "kind").write_text(kind)
        (root / kind / "serving_input_example.json").write_bytes(body(1.0))
    return root
