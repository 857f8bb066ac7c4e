"""A connection of the server that a client cannot keep open by doing nothing."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from acorn.inference import server


class Connection(H11Protocol):
    """uvicorn's HTTP connection, looked at every `server.PATIENCE` seconds.

    uvicorn itself closes a connection that is idle after an answer. It waits without limit for the first request, and
    for a client to read the end of an answer, even when the server shuts down.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self.last_cycle = self.cycle  # the request that was answered when `look` last ran
        self.timer = self.loop.call_later(server.PATIENCE, self.look)

    def connection_lost(self, exc: Exception | None) -> None:
        self.timer.cancel()
        super().connection_lost(exc)

    def look(self) -> None:
        is_idle = self.cycle is None or self.cycle.response_complete
        if self.transport.is_closing():  # what remains to be sent was not read
            self.transport.abort()
        elif is_idle and self.cycle is self.last_cycle:
            self.transport.close()
        self.last_cycle = self.cycle
        self.timer = self.loop.call_later(server.PATIENCE, self.look)
