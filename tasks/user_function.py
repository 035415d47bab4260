"""Calls a function of the user's own, from a file beside the policy, in a process of its own.

Whatever it does (raise, exit, crash, hang) comes back as one line, and never reaches the flow.
"""

import importlib.util
import inspect
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from tasks.score import PRELOAD
from tasks.settings import Mistake

_FILES: set[str] = set()
"""In the child: the user's files that were loaded."""


def call(folder: Path, work: Callable[..., Any], *arguments: Any, what: str, timeout: float) -> Any:
    """What `work(*arguments)` returns, run in a child whose working directory is `folder`.

    `work` is a function of a module of ours (it travels by name), which `load`s the user's. `what` begins the
    message of the `Mistake` that is raised for an exception, an exit, a crash, or no answer within `timeout` seconds.
    Afterwards the child and all that it started are ended. A `Mistake` of `work` itself comes back as it is.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(theirs, folder, work, arguments, dict(os.environ)))
    child.start()
    theirs.close()
    until = time.monotonic() + timeout
    try:
        if not ours.poll(timeout):
            raise Mistake(
                f"{what}: no answer within {timeout:g} s: make it faster, or give the gate a longer `timeout`"
            )
        try:
            answer, error, told = ours.recv()
        except EOFError as gone:
            child.join(max(1.0, until - time.monotonic()))
            raise Mistake(f"{what}: its process ended without an answer (exit code {child.exitcode})") from gone
    finally:
        _end(child)
        ours.close()
    if error:
        raise Mistake(error if told else f"{what}: {error}")
    return answer


def load(path: str) -> Any:
    """In the child: the object that `file.py:name` names, relative to the working directory."""
    file, _, name = path.rpartition(":")
    source = Path(file).resolve()
    if not source.is_file():
        raise FileNotFoundError(f"{source} is not there: paths in a policy are relative to its file")
    sys.path.insert(0, str(source.parent))
    spec = importlib.util.spec_from_file_location(source.stem, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[source.stem] = module
    _FILES.add(str(source))
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if found is None:
        own = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == source.stem]
        raise AttributeError(f"it has no '{name}': it has {', '.join(own) or 'no function'}")
    if not callable(found) and not hasattr(found, "eval_fn"):
        raise TypeError(f"'{name}' is no function: its type is {type(found).__name__}")
    return found


def guarded(path: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """In the child: `function` with its exceptions as a `Mistake` that names it."""

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except Exception as error:
            raise Mistake(f"{path}: {line(error)}") from error

    return call


def line(error: BaseException) -> str:
    """An exception in one line, with the place in the user's own file."""
    text = next(iter(str(error).strip().splitlines()), "")
    where = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in _FILES]
    place = f" ({Path(where[-1].filename).name}:{where[-1].lineno})" if where else ""
    return f"{type(error).__name__}: {text}{place}"


def _run(
    answers: Any, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str]
) -> None:
    """The child. What it and its own children are is one process group, so that a timeout ends them all."""
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)  # the fork server's own is as old as that server
    try:
        answers.send((work(*arguments), "", False))
    except Mistake as mistake:
        answers.send((None, str(mistake), True))
    except BaseException as error:  # noqa: BLE001 - sys.exit of the user's is a finding too
        answers.send((None, line(error), False))


def _end(child: Any) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)  # the child has answered, or has had its time
    child.kill()
    child.join()
