"""Copies of live requests where the gateway makes none: the champion's answers hold them, the challenger gets them."""

import contextlib
import itertools
import logging
import queue
import threading
import time
import zlib
from collections.abc import Callable

from deployments.kubernetes import names, pods
from deployments.kubernetes.answers import Answers
from deployments.kubernetes.client import Client
from deployments.kubernetes.cluster import Json
from deployments.target import FULL, Answer, TargetError, Traffic

_EVERY, _LOOK = 0.5, 5.0
_WORKERS, _WAITING = 4, 1000
RATE = 100.0
"""Copies per second, at most: through the API server's proxy they cost it something, too."""
_LOG = logging.getLogger(__name__)


class Replay:
    """Sends the champion's live requests once more, to the challenger's shadow port, until `stop`, or until `still`
    says that this is not the traffic any more.

    A copy has the id of its original, so that answers pair; which requests are copied, of `traffic.mirror`, goes by
    that id. Copies are made up to a second late, of requests that were answered, in `RATE` per second; what is more is
    dropped, and so is what a stopped process would have copied.
    """

    def __init__(self, client: Client, traffic: Traffic, still: Callable[[], bool]) -> None:
        self.traffic, self.sent, self.dropped = traffic, 0, 0
        self._client, self._still = client, still
        self._answers = Answers(client, _labels(traffic.model, traffic.champion))
        self._waiting: queue.Queue[Answer] = queue.Queue(_WAITING)
        self._over = threading.Event()
        self._pods: list[Json] = []
        self._turn = itertools.count()
        self._last = self._newest()
        jobs = [self._look, *[self._send] * _WORKERS]
        self._threads = [threading.Thread(target=job, name="replay", daemon=True) for job in jobs]
        for thread in self._threads:
            thread.start()

    @property
    def running(self) -> bool:
        """Whether requests are still copied."""
        return not self._over.is_set()

    def stop(self) -> None:
        """Copy no more; what is under way ends."""
        self._over.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(15)

    def _newest(self) -> int:
        """Only what comes from now on is copied."""
        with contextlib.suppress(TargetError):
            return max((one.number for one in self._answers.after(-1)), default=-1)
        return -1

    def _look(self) -> None:
        began, looked, offered = time.monotonic(), time.monotonic(), 0
        self._find_pods()
        while not self._over.wait(_EVERY):
            try:
                if time.monotonic() - looked > _LOOK:
                    looked = time.monotonic()
                    if not self._still():
                        self._over.set()
                        return
                    self._find_pods()
                fresh = self._answers.after(self._last)
            except TargetError as error:
                _LOG.info("copies of %s wait: %s", self.traffic.model, error)
                continue
            for one in fresh:
                self._last = one.number
                if one.shadow or one.own_path or zlib.crc32(one.request_id.encode()) % FULL >= self.traffic.mirror:
                    continue
                # A second's worth may be made up for.
                if offered > (time.monotonic() - began + 1.0) * RATE:
                    self.dropped += 1
                    continue
                offered += 1
                try:
                    self._waiting.put_nowait(one)
                except queue.Full:
                    self.dropped += 1

    def _find_pods(self) -> None:
        with contextlib.suppress(TargetError):
            found = self._client.items("Pod", _labels(self.traffic.model, str(self.traffic.challenger)))
            self._pods = [pod for pod in found if pods.ready(pod)]

    def _send(self) -> None:
        while not self._over.is_set():
            try:
                one = self._waiting.get(timeout=_EVERY)
            except queue.Empty:
                continue
            there = self._pods
            if not there:
                self.dropped += 1
                continue
            pod = there[next(self._turn) % len(there)]
            headers = {"content-type": "application/json", "x-request-id": one.request_id}
            try:
                # Whatever it answers, its server has counted it.
                self._client.pod_request(
                    "POST", pod, names.PORTS["shadow"], _path(pod), body=one.request, headers=headers, seconds=30.0
                )
                self.sent += 1
            except TargetError as error:
                self.dropped += 1
                _LOG.info("a copy did not arrive: %s", error)


def _path(pod: Json) -> str:
    """Where a pod is asked for predictions: our server has one such path, a recorder is told its runtime's."""
    for one in pod.get("spec", {}).get("containers") or ():
        words = [*(one.get("command") or ()), *(one.get("args") or ())]
        if "--infer-path" in words[:-1]:
            return str(words[words.index("--infer-path") + 1])
    return "/invocations"


def _labels(model: str, version: str) -> dict[str, str]:
    return {names.MODEL: names.slug(model), names.VERSION: version}
