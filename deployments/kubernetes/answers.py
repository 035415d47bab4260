"""The answers of a version's pods as one sequence: merged oldest first, numbered here, while pods come and go."""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from deployments.kubernetes import names, pods
from deployments.kubernetes.client import Client
from deployments.kubernetes.cluster import Json
from deployments.target import Answer, TargetUnavailable, answer_of

_PAGE = 500
KEEP = 10_000
"""Answers of one version that are held here."""


class Answers:
    """What the pods of one version have answered, as far as they still hold it. Safe for threads."""

    def __init__(self, client: Client, labels: Mapping[str, str]) -> None:
        self._client, self._labels = client, labels
        self._held: deque[Answer] = deque(maxlen=KEEP)
        self._seen: dict[str, int] = {}
        self._next = 0
        self._lock = threading.Lock()

    def after(self, number: int) -> list[Answer]:
        """The answers with a greater number, once every pod has been asked. Raises `TargetUnavailable` where pods are
        there and none of them can be asked.
        """
        with self._lock:
            self._gather()
            return [one for one in self._held if one.number > number]

    def _gather(self) -> None:
        there = [pod for pod in self._client.items("Pod", self._labels) if pod.get("status", {}).get("podIP")]
        # One that is leaving still has what it answered last.
        asked = [pod for pod in there if pod.get("status", {}).get("phase") == "Running"]
        if not asked:
            return
        with ThreadPoolExecutor(max_workers=min(8, len(asked))) as threads:
            pages = list(threads.map(self._page, asked))
        failed = [page for page in pages if isinstance(page, TargetUnavailable)]
        if len(failed) == len(pages) and any(map(pods.ready, asked)):
            raise failed[0]
        fresh = [one for page in pages if not isinstance(page, TargetUnavailable) for one in page]
        fresh.sort(key=lambda one: one.at)
        for one in fresh:
            self._held.append(replace(one, number=self._next))
            self._next += 1
        alive = {_process(pod) for pod in there}
        self._seen = {key: last for key, last in self._seen.items() if key in alive}

    def _page(self, pod: Json) -> Sequence[Answer] | TargetUnavailable:
        """All that is new in one pod; its numbers begin anew with its process."""
        process, found = _process(pod), list[Answer]()
        after = self._seen.get(process, -1)
        try:
            while True:
                path = f"/titleshot/answers?after={after}&limit={_PAGE}"
                page = [answer_of(line) for line in self._client.pod_get(pod, names.ADMIN, path, 30.0).splitlines()]
                found += page
                if page:
                    self._seen[process] = after = page[-1].number
                if len(page) < _PAGE:
                    return found
        except TargetUnavailable as error:
            return found or error


def _process(pod: Json) -> str:
    started = [one.get("containerID") for one in pod.get("status", {}).get("containerStatuses") or ()]
    return f"{pod['metadata']['uid']} {started}"
