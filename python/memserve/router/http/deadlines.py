"""How long a client waits for its answer: said in a header, kept over all that is done for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from math import isfinite

from memserve.core.errors import BadRequest
from memserve.router.errors import RequestTimeout

TIMEOUT = "x-request-timeout-secs"
"""The header: a number of seconds from when the request has come."""


def timeout_of(headers: Mapping[str, str]) -> float | None:
    """What the client says. Raises BadRequest for what is no number of seconds."""
    text = headers.get(TIMEOUT)
    if text is None:
        return None
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = 0.0
    if not (isfinite(timeout_s) and timeout_s > 0):
        raise BadRequest(f"{TIMEOUT} has to be a number of seconds more than 0", field=TIMEOUT)
    return timeout_s


@asynccontextmanager
async def in_time(timeout_s: float | None) -> AsyncIterator[None]:
    """A block that ends within `timeout_s`. Raises RequestTimeout, with what is left of it cancelled."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise RequestTimeout(f"no answer within {timeout_s:g} s") from error
