"""What Locust's master and its workers load, of a load by several. Started by `loadtests.agent`; the plan is in
TITLESHOT_LOAD.
"""

import gevent
from locust import events, runners

from loadtests.users.part import Master, Part

__all__ = ["Part"]

# A busy machine may be silent for longer than Locust's 3 s; a worker that ends is seen by whoever started it.
runners.HEARTBEAT_LIVENESS = 15


@events.init.add_listener  # type: ignore[untyped-decorator]
def _wake(environment: object, runner: object, **_: object) -> None:
    """Let gevent's loop look at the clock (see `loadtests.locustfile`); and the master watches over its workers."""
    gevent.get_hub().loop.update_now()
    if isinstance(runner, runners.MasterRunner):
        gevent.spawn(Master(environment).watch)
