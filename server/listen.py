"""The socket that is listened on, and uvicorn behind it."""

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager

import uvicorn
from starlette.types import ASGIApp

from utils.errors import UserError

LARGEST_FRAME = 2**20  # bytes of a message; the protocol's own bound is far below
PING = 10.0  # seconds: a client that answers none is gone
CONNECTIONS = 512


@contextmanager
def listen(name: str, port: int) -> Iterator[socket.socket]:
    """A listening socket; UserError if the address or the port cannot be had."""
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--server_name {name} is no address of this machine") from error
    with closing(listener):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen()  # so that no other server binds the same port meanwhile
        except OSError as error:
            raise UserError(
                f"{name}:{port} cannot be listened on ({(error.strerror or '').lower()}): "
                "give another --server_port"
            ) from error
        yield listener


def run(app: ASGIApp, listener: socket.socket, *, proxied: bool) -> None:
    """Serve until the process is told to end; `proxied`: a proxy here says who its clients are."""
    new_server(app, proxied=proxied).run(sockets=[listener])


def new_server(app: ASGIApp, *, proxied: bool = False, ping: float = PING) -> uvicorn.Server:
    """The server that `run` starts."""
    config = uvicorn.Config(
        app,
        ws="websockets-sansio",
        ws_max_size=LARGEST_FRAME,
        ws_max_queue=8,
        ws_ping_interval=ping,
        ws_ping_timeout=ping,
        ws_per_message_deflate=False,  # video does not get smaller
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=5,
        proxy_headers=proxied,
        server_header=False,
        log_level="warning",
        access_log=False,
    )
    return uvicorn.Server(config)
