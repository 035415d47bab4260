"""A port that several processes listen on: which of them new connections go to.

The kernel deals connections out by chance (SO_REUSEPORT). One that it has given to a process, and that the process has
not accepted when it stops listening, is reset. So before one stops, the kernel is told to give it nothing more. That
takes Linux; elsewhere, and where it is refused, a stop may cost a connection.
"""

import contextlib
import ctypes
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from deployments.local.supervisor import wait_for
from deployments.target import TargetUnavailable

_ATTACH = 51  # SO_ATTACH_REUSEPORT_CBPF, which the module `socket` does not know
_RETURN, _LOAD, _MODULO, _RETURN_IT, _RANDOM = 0x06, 0x20, 0x94, 0x16, 0xFFFFF038
_LISTENING = "0A"


@contextlib.contextmanager
def only(port: int, unwanted: Callable[[], bool], sockets: int) -> Iterator[None]:
    """While the block runs no new connection to `port` goes where `unwanted()`, asked by a new connection, is true;
    and those that went there before have been accepted when it begins. `sockets` listen on the port.
    """
    with _member(port) as member:
        if member is not None:
            for place in range(sockets):
                _tell(member, (_RETURN, place))
                if not any(unwanted() for _ in range(3)):
                    break
            with contextlib.suppress(TargetUnavailable):
                wait_for(lambda: not _waiting(port), 2.0, "connections are not accepted", every=0.001)
        yield


def all_alike(port: int, sockets: int) -> None:
    """Let new connections to `port` go to all of the `sockets` that listen on it again."""
    with _member(port) as member:
        if member is not None:
            # Ourselves we are the last one, and get none.
            _tell(member, (_LOAD, _RANDOM), (_MODULO, sockets), (_RETURN_IT, 0))


@contextlib.contextmanager
def _member(port: int) -> Iterator[socket.socket | None]:
    """A socket among those that listen, from which they can be told; None where there is no such thing."""
    with socket.socket() as member:
        try:
            member.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            member.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            member.bind(("127.0.0.1", port))
            program, _kept = _program((_RETURN, 0))
            member.listen(16)
            member.setsockopt(socket.SOL_SOCKET, _ATTACH, program)
        except (OSError, AttributeError):
            member.close()
            yield None
            return
        yield member


def _tell(member: socket.socket, *steps: tuple[int, int]) -> None:
    program, _kept = _program(*steps)
    member.setsockopt(socket.SOL_SOCKET, _ATTACH, program)


def _program(*steps: tuple[int, int]) -> tuple[bytes, object]:
    """A filter as the kernel reads it, and what it points to."""
    code = b"".join(struct.pack("HBBI", operation, 0, 0, value) for operation, value in steps)
    kept = ctypes.create_string_buffer(code)
    return struct.pack("HP", len(steps), ctypes.addressof(kept)), kept


def _waiting(port: int) -> bool:
    """Whether connections to `port` wait to be accepted."""
    with contextlib.suppress(OSError):
        lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
        ours = [one for one in lines if one[3] == _LISTENING and int(one[1].rpartition(":")[2], 16) == port]
        return any(int(one[4].rpartition(":")[2], 16) for one in ours)
    return False
