"""A system under test: an address to send requests to, and processes behind it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from bench_model import ROOM
from memserve.testing.cluster import ServerProcess


@dataclass(frozen=True, slots=True)
class Setting:
    """Settings that all systems share."""

    model: Path
    logs: Path
    kv_tokens: int = 16384
    """Share of each server's device memory."""
    page_tokens: int = 16

    @property
    def flags(self) -> list[str]:
        """Flags of every SGLang server, MemServe's or stock."""
        return [
            *("--max-total-tokens", str(self.kv_tokens), "--page-size", str(self.page_tokens)),
            *("--random-seed", "1"),
            *ROOM,
        ]


class System(ABC):
    """Started when built, ready after `wait_ready`. A context manager that stops what it started."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.url = ""
        """URL of the router, once it is ready."""

    @abstractmethod
    def wait_ready(self) -> None:
        """Return when requests are served. Raises ClusterFailed."""

    @abstractmethod
    def flush(self) -> None:
        """Drop all KV; return when it is dropped."""

    @abstractmethod
    def settle(self) -> None:
        """Return when all work of answered requests is done."""

    def kv_bytes_moved(self) -> int | None:
        """Bytes between servers so far; None if they do not report them."""
        return None

    @abstractmethod
    def processes(self) -> Mapping[str, ServerProcess]:
        """All processes, by name."""

    def close(self) -> None:
        """Stop everything. Idempotent."""
        for process in self.processes().values():
            process.kill()

    def __enter__(self) -> System:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def pin(process: ServerProcess, share: int, shares: int) -> None:
    """Give a server one of so many equal shares of the cores: two of them must not slow each other down.

    A machine with fewer cores than shares gives the last servers the same core.
    """
    cores = sorted(os.sched_getaffinity(0))
    width = max(1, len(cores) // shares)
    begin = min(share * width, len(cores) - width)
    os.sched_setaffinity(process.pid, cores[begin : begin + width])
