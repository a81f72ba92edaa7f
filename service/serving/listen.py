"""Where the service listens: addresses of both families, or a Unix socket."""

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from features.errors import AdrankError

from ..settings import Settings

BACKLOG = 2048
"""Connections that wait to be accepted."""
ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
PROBE_SECONDS = 1.0
SEND_BYTES = 2**17
"""What the kernel may hold of a connection's answers, which it doubles for its own: it would take megabytes, which no limit counts."""


class ListenError(AdrankError, RuntimeError):
    """The address cannot be listened on; the message says why and what to do."""


def listen(settings: Settings) -> list[socket.socket]:
    """Sockets that listen: on the Unix socket, if one is set, else on all addresses of the host.

    Raises:
        ListenError: there are none, or the port or the file is taken.
    """
    if settings.uds is not None:
        return [_unix(settings.uds, int(settings.uds_mode, 8))]
    host, port = settings.host, settings.port
    try:
        listeners = _all_of(host, port)
    except OSError as error:
        why = f"cannot listen on {host or 'all addresses'} port {port}: {reason(error)}"
        raise ListenError(f"{why}; choose another with --host and --port, or ADRANK_HOST and ADRANK_PORT") from error
    for listener in listeners:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # each connection inherits both
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
    return listeners


def _all_of(host: str, port: int) -> list[socket.socket]:
    if host in ("", "::") and socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return [socket.create_server(("::", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)]
    listeners: list[socket.socket] = []
    refusal: OSError | None = None
    try:
        for family, _, _, _, address in socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
            try:
                listeners.append(socket.create_server(address, family=family, backlog=BACKLOG))
            except OSError as error:
                refusal = error
                if error.errno not in ABSENT:  # such as ::1 of localhost on a machine without IPv6
                    raise
        if refusal and not listeners:
            raise refusal
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _unix(path: Path, mode: int) -> socket.socket:
    """Listen on a file. One that a service left behind is replaced, one that somebody answers at is not."""
    if wrong := uds_wrong(path):
        raise ListenError(f"cannot listen on {path}: {wrong}; choose another with --uds or ADRANK_UDS")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o777)  # nobody may connect before the mode is set
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(mode)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ListenError(f"cannot listen on {path}: {reason(error)}; choose another with --uds or ADRANK_UDS") from error
    finally:
        os.umask(before)
    return listener


def uds_wrong(path: Path) -> str | None:
    """Why nobody can listen on a file now; None where it can be made, or was left behind by a service that ended."""
    try:
        if len(os.fsencode(path)) > 107:
            return "its path is over 107 bytes, which is what Unix sockets may have"
        if not path.parent.is_dir():
            return f"{path.parent} is no folder"
        if not os.access(path.parent, os.W_OK | os.X_OK):
            return f"{path.parent} may not be written to"
        if not stat.S_ISSOCK(path.stat().st_mode):
            return "it is a file that is no socket"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(PROBE_SECONDS)
            probe.connect(str(path))
        return "another process listens there"
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except OSError as error:
        return reason(error)


def unlisten(settings: Settings) -> None:
    """Remove the Unix socket's file, unless another process listens there by now."""
    if settings.uds is not None and uds_wrong(settings.uds) is None:
        with contextlib.suppress(OSError):
            settings.uds.unlink(missing_ok=True)


def reason(error: OSError) -> str:
    """What the system says of it, in words."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error.strerror or error)


def name(listener: socket.socket) -> str:
    """Where a socket listens, as a URL."""
    address = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{address}"
    host, port = address[:2]
    if listener.family == socket.AF_INET6 and host == "::" and not listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        return f"http://[::]:{port} and http://0.0.0.0:{port}"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
