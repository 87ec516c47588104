"""Fixtures of the router's tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from .harness import DEADLINE_S


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, None]], None]:
    """Run a coroutine as a test's body."""

    def runner(work: Coroutine[Any, Any, None]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(2 * DEADLINE_S):
                await work

        uvloop.run(bounded())

    return runner
