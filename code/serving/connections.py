"""Connections that send no complete request header in time are closed.

uvicorn limits the time between two requests only: clients that send a header byte by byte would
hold their connections for ever, until no file descriptor is left.
"""

import asyncio
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 30.0  # from the connection, or from a request's first byte


def server_settings(app: Any, **options: Any) -> uvicorn.Config:
    """uvicorn's settings for the ASGI application `app`; `options` are further ones."""
    return uvicorn.Config(app, http=TimedProtocol, log_level="warning", **options)


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP protocol with a time limit on headers."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Await the first request."""
        super().connection_made(transport)
        self._set_timer()

    def data_received(self, data: bytes) -> None:
        """Handle a piece of a request."""
        super().data_received(data)
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._cancel_timer()
        super().connection_lost(exc)

    def _set_timer(self) -> None:
        """Start the timer, if it does not run, or stop it if a header is complete."""
        if self.conn.their_state is not h11.IDLE:
            self._cancel_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
