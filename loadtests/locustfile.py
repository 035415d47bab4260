"""What Locust loads. Started by `loadtests.run`, which says in TITLESHOT_LOAD where the plan (JSON) is."""

import os
import signal

import gevent
from locust import events

from loadtests.users.scoring import Scoring

__all__ = ["Scoring"]


@events.init.add_listener  # type: ignore[untyped-decorator]
def _wake(**_: object) -> None:
    """Let gevent's loop look at the clock, and make an interrupt the same as being told to stop.

    Its `spawn_later` counts from the loop's last look, so that the time spent importing this file
    would be taken off every timer: a `--run-time` of 8 s ended after 0.1 s, with exit code 0.
    """
    gevent.get_hub().loop.update_now()
    # As an exception it would come up in whatever request is at work just then, which would be lost.
    gevent.signal_handler(signal.SIGINT, os.kill, os.getpid(), signal.SIGTERM)
