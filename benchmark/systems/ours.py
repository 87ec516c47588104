"""MemServe: its router in front of its servers, a pair or two colocated ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import requests

from memserve.core.caching import CachingMode
from memserve.testing.cluster import Cluster, ServerProcess, is_ready, wait_for
from memserve.testing.pool_reports import wait_pools_connected, wait_settled
from memserve.wire.messages import Role
from systems.base import Setting, System, pin

TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Layout:
    """The servers and their caching mode."""

    roles: tuple[Role, ...]
    caching: CachingMode


class MemServe(System):
    """A MemServe cluster whose servers have cores of their own."""

    def __init__(self, name: str, setting: Setting, layout: Layout) -> None:
        super().__init__(name)
        self._cluster = Cluster(setting.logs / name)
        flags = [*setting.flags, "--caching", str(layout.caching)]
        for number, role in enumerate(layout.roles):
            server = self._cluster.launch(
                f"{role}{number}", role, setting.model, *flags, env={"OMP_NUM_THREADS": "1"}
            )
            pin(server, number, len(layout.roles))
        self._has_pools = layout.caching is not CachingMode.NONE

    def wait_ready(self) -> None:
        self._cluster.wait_ready()
        wait_for(lambda: is_ready(self._cluster.url), [self._cluster.router], what=f"{self.name}'s router")
        self.url = self._cluster.url
        if self._has_pools:
            wait_pools_connected(self._cluster.server_urls())

    def flush(self) -> None:
        self.settle()
        requests.post(f"{self.url}/flush_cache", timeout=TIMEOUT_S).raise_for_status()
        wait_for(self._is_flushed, what="the router to see the flush", timeout_s=TIMEOUT_S)

    def settle(self) -> None:
        if self._has_pools:
            wait_settled(self._cluster.server_urls())

    def kv_bytes_moved(self) -> int:
        return self._cluster.moved_bytes()

    def processes(self) -> Mapping[str, ServerProcess]:
        return {"router": self._cluster.router, **self._cluster.servers}

    def close(self) -> None:
        self._cluster.close()

    def _is_flushed(self) -> bool:
        page = requests.get(f"{self.url}/tree", timeout=TIMEOUT_S).json()
        return not any(blocks for held in page["instances"].values() for blocks in held.values())
