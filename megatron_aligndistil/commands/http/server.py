"""uvicorn in a thread of its own, so that the main thread stays with the model."""

from __future__ import annotations

import socket
import threading
import time

import uvicorn
from fastapi import FastAPI

from megatron_aligndistil.errors import ConfigError

_LEAVE_SECONDS = 3  # that answers may take to reach their clients once the server ends


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, not listening yet. Raises ConfigError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    place = socket.socket(family, socket.SOCK_STREAM)
    try:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind((host, port))
    except OSError as error:
        place.close()
        raise ConfigError(
            f"cannot serve at {host}:{port}: {error.strerror}; give another --host or --port (0 takes a free one)"
        ) from None
    return place


def address(place: socket.socket) -> str:
    """The address for clients of a server at this socket."""
    host, port = place.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


class Server:
    """Serves an application at a socket from the moment it is made until :meth:`close`."""

    def __init__(self, app: FastAPI, place: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            access_log=False,
            log_level="warning",
            timeout_graceful_shutdown=_LEAVE_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([place],), name="http", daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the HTTP server ended while it started; its log says why")
            time.sleep(0.01)

    def close(self) -> None:
        """Take no more requests; what is being sent may arrive."""
        self._server.should_exit = True
        self._thread.join(2 * _LEAVE_SECONDS)
