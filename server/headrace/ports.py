"""Ports to listen on: one that is taken is refused, one can be held for several processes."""

import errno
import os
import socket

from headrace.errors import StartupError
from headrace.settings import join_address


def refuse_taken_port(flag: str, host: str, port: int) -> None:
    """
    Bind plainly first: grpcio shares a taken port, or does not say why it failed.

    Raises:
        StartupError: the address cannot be listened on.
    """
    if not port:
        return
    try:
        made, address = _socket(host, port)
        with made as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise _refusal(flag, host, port, error) from None


def hold_port(flag: str, host: str, port: int) -> socket.socket:
    """
    Take a port without listening on it, so that processes of this user's can share it.

    They listen on it with SO_REUSEPORT; nobody is ever connected to the one who holds it. As long
    as it is held, nobody else gets it, even while none of them listens.

    Args:
        flag: Whose address it is, for the message.
        host: Name or address.
        port: 0 takes a free one.

    Returns:
        The socket; closing it gives the port up.

    Raises:
        StartupError: the address cannot be listened on.
    """
    refuse_taken_port(flag, host, port)
    try:
        held, address = _socket(host, port)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            held.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # Nobody listens: connections of an earlier server are in TIME_WAIT. Only then: with
            # this option, two that hold a port before anyone listens do not exclude each other.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(address)
    except OSError as error:
        raise _refusal(flag, host, port, error) from None
    return held


def _socket(host: str, port: int) -> tuple[socket.socket, tuple[object, ...]]:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    return socket.socket(family, kind, protocol), address


def _refusal(flag: str, host: str, port: int, error: OSError) -> StartupError:
    reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
    return StartupError(
        f"{flag} {join_address(host, port)}: {reason}; choose another or stop what uses it"
    )
