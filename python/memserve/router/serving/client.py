"""The client's end of a stream: headers when the first byte is there, bytes at once, errors as events."""

from __future__ import annotations

from contextlib import suppress

from aiohttp import web

from memserve.router.serving.failures import ClientLeft, Failure


class ClientStream:
    """An answer that is written as it comes. One per request."""

    def __init__(self, request: web.Request, headers: dict[str, str]) -> None:
        self._request = request
        self._headers = headers
        self._response: web.StreamResponse | None = None

    @property
    def response(self) -> web.StreamResponse | None:
        """What was begun; None while the client has not seen anything."""
        return self._response

    @property
    def has_begun(self) -> bool:
        """Whether the client may have seen anything."""
        return self._response is not None

    async def write(self, chunk: bytes) -> None:
        """Send `chunk` now; the first one commits the status 200. Raises ClientLeft."""
        try:
            response = await self._begun()
            await response.write(chunk)
        except ConnectionError as error:
            raise ClientLeft("the client left") from error

    async def fail(self, failure: Failure) -> None:
        """Tell what went wrong as the last event of a stream that has begun; never raises."""
        with suppress(ClientLeft):
            await self.write(failure.event())

    async def end(self) -> web.StreamResponse:
        """The complete response."""
        return await self._begun()

    async def _begun(self) -> web.StreamResponse:
        if self._response is None:
            headers = {**self._headers, "Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
            self._response = web.StreamResponse(headers=headers)
            await self._response.prepare(self._request)
        return self._response
