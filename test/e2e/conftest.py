"""Two clusters of real SGLang servers, which start in parallel and serve all tests of this folder.

`local`  one pair that hands KV over within the host's memory
`tcp`    one pair over our tcp transport, under a cluster key, whose prefill has a small radix cache
         over a DRAM tier; its router fetches whatever it can; tests may kill its servers
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from memserve.engine.platform_detect import is_cpu_machine
from memserve.testing.cluster import Cluster, ServerProcess, Start, is_ready, start_process, wait_for
from memserve.testing.pool_reports import wait_pools_connected
from memserve.wire.messages import Role

from .fork_server import ForkServer

REQUEST_TIMEOUT_S = 60
SMALL_HBM_TOKENS = 2048
ALWAYS_FETCH = ("--fetch", "always", "--max-fetch-secs", "20")
"""Flags of a router that fetches whatever another server holds, so that a test can count on it."""


def num_requests(server_url: str) -> int:
    """Requests that one server holds, queued or running."""
    loads = requests.get(f"{server_url}/v1/loads", timeout=REQUEST_TIMEOUT_S).json()["loads"]
    return sum(int(load["num_running_reqs"] + load["num_waiting_reqs"]) for load in loads)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One prefill and one decode server behind a router, with short calls for tests."""

    cluster: Cluster
    model: Path
    flags: tuple[str, ...]
    prefill_flags: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return self.cluster.url

    def launch(self, role: Role) -> ServerProcess:
        """Start the server of this role, also after it was killed."""
        flags = self.flags + (self.prefill_flags if role is Role.PREFILL else ())
        return self.cluster.launch(str(role), role, self.model, *flags)

    def post(self, path: str, body: Any, **kwargs: Any) -> requests.Response:
        return requests.post(f"{self.url}{path}", json=body, timeout=REQUEST_TIMEOUT_S, **kwargs)

    def generate(self, **body: Any) -> Any:
        """The answer of /generate, greedy unless `sampling_params` differ."""
        params = {"temperature": 0, "ignore_eos": True, **body.pop("sampling_params", {})}
        response = self.post("/generate", {**body, "sampling_params": params})
        assert response.status_code == 200, response.text
        return response.json()

    def flush(self) -> None:
        assert self.post("/flush_cache", None).status_code == 200

    def moved_bytes(self) -> int:
        """Bytes that prefill's transfer engine has written so far."""
        return self.cluster.moved_bytes()

    def workers(self) -> list[dict[str, Any]]:
        """The router's list of servers."""
        workers: list[dict[str, Any]] = self._members()["workers"]
        return workers

    def pool_names(self) -> list[str]:
        """The instances whose memory pools the router knows."""
        return [pool["instance_id"] for pool in self._members()["pools"]]

    def _members(self) -> dict[str, Any]:
        members: dict[str, Any] = requests.get(f"{self.url}/workers", timeout=REQUEST_TIMEOUT_S).json()
        return members

    def server_urls(self) -> list[str]:
        """URLs of the SGLang servers that the router knows."""
        return self.cluster.server_urls()

    def num_running(self) -> int:
        """Requests that the servers hold, queued or running."""
        return sum(map(num_requests, self.server_urls()))

    def wait_idle(self) -> None:
        wait_for(lambda: self.num_running() == 0, what="the servers to be idle", timeout_s=15)

    def wait_pair(self) -> None:
        """Wait until both servers are ready and their memory pools know each other."""
        wait_for(lambda: is_ready(self.url), what="a ready pair", timeout_s=15)
        wait_pools_connected(self.server_urls())


NewCluster = Callable[..., AbstractContextManager[Cluster]]


@pytest.fixture(scope="session")
def start() -> Start:
    """Starts servers quickly; a test of a user's own start uses `start_process` instead."""
    return ForkServer().start if is_cpu_machine() else start_process


@pytest.fixture(scope="session")
def new_cluster(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Iterator[NewCluster]:
    """Makes a cluster with a given name. A cluster stops in the background after its `with` block."""
    with ExitStack() as stopping:

        @contextmanager
        def new(name: str, **kwargs: Any) -> Iterator[Cluster]:
            kwargs = {"start": start, **kwargs}
            cluster = stopping.enter_context(Cluster(tmp_path_factory.mktemp(name), **kwargs))
            try:
                yield cluster
            finally:
                cluster.begin_close()

        yield new


@pytest.fixture(scope="session")
def pairs(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, new_cluster: NewCluster
) -> Iterator[dict[str, Pair]]:
    key = tmp_path_factory.mktemp("keys") / "cluster.key"
    key.write_bytes(b"a secret of the test cluster")
    key.chmod(0o600)
    keyed = ("--cluster-key-file", str(key))
    with ExitStack() as stack:
        pairs = {
            "local": Pair(stack.enter_context(new_cluster("local")), tiny_model, ("--transfer", "local")),
            "tcp": Pair(
                stack.enter_context(new_cluster("tcp", router_flags=(*keyed, *ALWAYS_FETCH))),
                tiny_model,
                ("--transfer", "tcp", *keyed),
                ("--max-total-tokens", str(SMALL_HBM_TOKENS), "--dram-gib", "0.05"),
            ),
        }
        for pair in pairs.values():
            pair.launch(Role.PREFILL)
            pair.launch(Role.DECODE)
        for pair in pairs.values():
            pair.cluster.wait_ready()
            pair.wait_pair()
        yield pairs


@pytest.fixture(scope="session")
def pair(pairs: dict[str, Pair]) -> Pair:
    """The pair whose servers run through the whole session."""
    return pairs["local"]


@pytest.fixture(scope="session")
def expendable_pair(pairs: dict[str, Pair]) -> Pair:
    """The pair whose servers a test may kill, if it starts them again."""
    return pairs["tcp"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            # The first test of the session waits for four servers to start.
            item.add_marker(pytest.mark.timeout(420))
