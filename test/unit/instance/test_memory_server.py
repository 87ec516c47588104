"""A memory server as a real process: lends DRAM to whoever the router brings, and goes without a trace."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from memserve.core.block_keys import BlockKey
from memserve.core.caching import CachingMode
from memserve.core.errors import MemServeError
from memserve.core.ids import Epoch, InstanceId
from memserve.core.kv_layout import KVLayout, Part
from memserve.instance.membership import Membership
from memserve.launch_server import main
from memserve.mempool.arena import Arena
from memserve.mempool.pool import MemPool
from memserve.mempool.remote.config import PeersConfig
from memserve.mempool.remote.peers import Peers
from memserve.peering.endpoint import TransferEndpoint
from memserve.peering.remote_process import PeerAddress
from memserve.testing.cluster import Cluster, ServerProcess, is_ready, wait_for
from memserve.transport.registry import TransportConfig, open_transports
from memserve.wire.link import ControlClient
from memserve.wire.messages import PoolInfo, Role

WAIT_S = 20.0
NUM_BLOCKS = 40
BUDGET_GIB = 0.01
BUDGET_BYTES = int(BUDGET_GIB * 2**30)


def layout(model: str) -> KVLayout:
    """Blocks of 64 KiB."""
    return KVLayout(model, 4, 16, (Part(4, 32),) * 2, "float32", 4)


class Instance:
    """What a serving instance has for its exchange with others, in this process."""

    def __init__(self, cluster: Cluster, model: str) -> None:
        config = TransportConfig()
        endpoint = TransferEndpoint(config)
        self.epoch = endpoint.epoch
        blocks = layout(model)
        self.pool = MemPool(blocks, Arena(blocks.block_bytes, NUM_BLOCKS), self.epoch)
        opened = partial(open_transports, config, None)
        self.peers = Peers(endpoint, opened, lambda _: self.pool, PeersConfig(timeout_s=1.0))
        self.gone: queue.Queue[Epoch] = queue.Queue()
        info = PoolInfo(
            InstanceId(f"decode-{model}"),
            self.epoch,
            Role.DECODE,
            CachingMode.FULL,
            endpoint.address.control,
            blocks.digest.hex(),
        )
        self.members = Membership(ControlClient(cluster.control), info, on_gone=self._gone)

    def _gone(self, epoch: Epoch) -> None:
        self.peers.gone(epoch)
        self.gone.put(epoch)

    def memory(self, name: str) -> PeerAddress:
        """The memory server of that name, once it is known."""

        def found() -> list[PoolInfo]:
            others = self.members.others(self.pool.layout.digest.hex(), Role.MEMORY)
            return [info for info in others if info.instance_id == name]

        wait_for(found, what=name, timeout_s=WAIT_S)
        (info,) = found()
        return PeerAddress(info.address, info.epoch)

    def store(self, num_blocks: int) -> tuple[list[BlockKey], list[bytes]]:
        """A cached chain of random blocks, and their bytes."""
        addrs = self.pool.alloc_mem(num_blocks)
        data = [os.urandom(self.pool.layout.block_bytes) for _ in addrs]
        for addr, block in zip(addrs, data, strict=True):
            self.pool.block(addr)[:] = block
        self.pool.seal(addrs)
        keys = [BlockKey(os.urandom(32)) for _ in addrs]
        self.pool.insert(keys, addrs)
        return keys, data

    def read(self, keys: list[BlockKey]) -> list[bytes]:
        """What is cached under `keys`, checked."""
        lease = self.pool.acquire(self.pool.match(keys))
        assert self.pool.verify(lease) == len(lease)
        data = [bytes(self.pool.block(addr)) for addr in lease.addrs]
        self.pool.release(lease)
        return data

    def close(self) -> None:
        self.members.close()
        self.peers.close()
        self.pool.arena.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    flags = ("--heartbeat-secs", "0.1")
    with Cluster(tmp_path_factory.mktemp("memory"), router_flags=flags) as cluster:
        yield cluster


@pytest.fixture
def instance(cluster: Cluster) -> Iterator[Instance]:
    instance = Instance(cluster, "a")
    yield instance
    instance.close()


def page(process: ServerProcess, path: str) -> str:
    """What a memory server answers on that path."""
    ready = re.search(r"memory ready http=(\S+) control=\S+ dram_gib=", process.output())
    assert ready is not None
    with urllib.request.urlopen(ready[1] + path, timeout=WAIT_S) as answer:
        return str(answer.read().decode())


def report(process: ServerProcess) -> dict[str, Any]:
    return dict(json.loads(page(process, "/mempool")))


def pool_names(cluster: Cluster) -> list[str]:
    with urllib.request.urlopen(f"{cluster.url}/workers", timeout=WAIT_S) as answer:
        return [pool["instance_id"] for pool in json.load(answer)["pools"]]


def digests(cluster: Cluster, name: str) -> list[Any]:
    """Of what the router believes the memory server's pools to hold."""
    with urllib.request.urlopen(f"{cluster.url}/tree?digest=1", timeout=WAIT_S) as answer:
        told = json.load(answer)["digest"]
    return [tiers["dram"] for pool, tiers in told.items() if pool.startswith(f"{name}#")]


@pytest.mark.parametrize("transfer", ["auto", "tcp"])
def test_memory_server_returns_the_stored_bytes(cluster: Cluster, instance: Instance, transfer: str) -> None:
    name = f"memory-{transfer}"
    process = cluster.launch_memory(name, BUDGET_GIB, "--transfer", transfer)
    cluster.wait_ready()
    there = instance.memory(name)
    keys, data = instance.store(NUM_BLOCKS)
    assert instance.peers.transfer_with_insert(there, instance.pool, keys).num_sent == NUM_BLOCKS
    instance.pool.clear()
    assert instance.peers.fetch(there, instance.pool, keys, timeout_s=WAIT_S) == NUM_BLOCKS
    assert instance.read(keys) == data
    shown = report(process)
    assert (shown["role"], shown["registered"], shown["budget_bytes"]) == ("memory", True, BUDGET_BYTES)
    assert shown["pools"][0]["pool"]["cached"] == NUM_BLOCKS
    assert shown["peers"]["blocks_received"] == NUM_BLOCKS
    wait_for(
        lambda: digests(cluster, name) == [shown["pools"][0]["digest"]["dram"]],
        what="the router's tree to hold what the memory holds",
        timeout_s=WAIT_S,
    )
    assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()
    process.stop()


def test_a_killed_server_is_declared_gone_and_loses_nothing_here(
    cluster: Cluster, instance: Instance
) -> None:
    process = cluster.launch_memory("mortal", BUDGET_GIB)
    cluster.wait_ready()
    there = instance.memory("mortal")
    keys, data = instance.store(NUM_BLOCKS)

    def push_for_ever() -> None:
        while True:
            instance.peers.transfer_with_insert(there, instance.pool, keys)
            instance.peers.fetch(there, instance.pool, keys, timeout_s=WAIT_S)

    with ThreadPoolExecutor(1) as thread:
        pushing = thread.submit(push_for_ever)
        wait_for(lambda: instance.peers.stats().pushes > 2, what="some pushes", timeout_s=WAIT_S)
        process.kill()
        with pytest.raises(MemServeError):
            pushing.result(timeout=WAIT_S)
    assert instance.gone.get(timeout=WAIT_S) == there.epoch
    assert instance.members.others(instance.pool.layout.digest.hex(), Role.MEMORY) == ()
    assert instance.read(keys) == data
    stats = instance.pool.stats()
    assert (stats.cached, stats.leases, stats.private) == (NUM_BLOCKS, 0, 0)


def test_memory_server_shares_its_memory_between_models(cluster: Cluster, instance: Instance) -> None:
    process = cluster.launch_memory("shared", BUDGET_GIB)
    cluster.wait_ready()
    other = Instance(cluster, "b")
    for one in (instance, other):
        keys, _ = one.store(NUM_BLOCKS)
        one.peers.transfer_with_insert(one.memory("shared"), one.pool, keys)
    pools = report(process)["pools"]
    slots = BUDGET_BYTES // 2 // layout("a").block_bytes
    assert [pool["pool"]["total"] for pool in pools] == [slots, slots]
    digests = [one.pool.layout.digest.hex() for one in (instance, other)]
    assert [pool["labels"]["layout"] for pool in pools] == digests
    text = page(process, "/mempool/metrics")
    for digest in digests:
        assert f'memserve_pool_blocks{{layout="{digest}",tier="dram",state="cached"}} {NUM_BLOCKS}\n' in text
    assert "memserve_peers_received_blocks_total 80\n" in text
    other.close()
    process.stop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_memory_server_ends_on_sigterm_and_leaves_no_trace(cluster: Cluster, number: signal.Signals) -> None:
    process = cluster.launch_memory("leaving", BUDGET_GIB)
    cluster.wait_ready()
    assert "leaving" in pool_names(cluster)
    assert page(process, "/health") == page(process, "/readiness") == "OK"
    process.send(number)
    assert process.wait() == 0
    assert "leaving" not in pool_names(cluster)
    assert "Traceback" not in process.output()


def test_pool_with_another_caching_mode_is_refused_until_the_others_have_left(
    cluster: Cluster, instance: Instance
) -> None:
    wait_for(lambda: instance.members.registered, what="the first one", timeout_s=WAIT_S)
    process = cluster.launch_memory("odd", BUDGET_GIB, "--caching", "none")
    refusal = "odd has --caching none, but this cluster runs with --caching full"
    wait_for(lambda: refusal in process.output(), [process], what="the refusal", timeout_s=WAIT_S)
    url = re.search(r"memory ready http=(\S+)", process.output())
    assert url is not None
    assert not is_ready(url[1])
    instance.close()
    cluster.wait_ready()
    assert is_ready(url[1])
    process.stop()


def test_neither_torch_nor_sglang_is_loaded() -> None:
    code = "import sys, memserve.launch_server, memserve.instance.memory_server; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "memserve.mempool.remote.peers" in loaded.split()
    assert not {"torch", "sglang", "transformers"} & set(loaded.split())


@pytest.fixture
def _signals_as_they_were() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


ROUTER = ["--router", "127.0.0.1:1"]
DRAM = ["--dram-gib", "0.001"]


@pytest.mark.usefixtures("_signals_as_they_were")
@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (DRAM, "--role memory needs --router"),
        (ROUTER, "--role memory needs --dram-gib"),
        ([*ROUTER, "--dram-gib", "0"], "has to be more than 0"),
        ([*ROUTER, "--dram-gib", "1e9"], "does not fit"),
        ([*ROUTER, *DRAM, "--model-path", "m"], "--model-path makes no sense with --role memory"),
        ([*ROUTER, *DRAM, "--tp", "2"], "--tp makes no sense with --role memory"),
        ([*ROUTER, *DRAM, "--port", "x"], "--port"),
        ([*ROUTER, *DRAM, "--port", "70000"], "--port 70000 is not a port"),
        ([*ROUTER, *DRAM, "--host", "0.0.0.0"], "name the address"),
        ([*ROUTER, *DRAM, "--host", "192.0.2.1"], "192.0.2.1"),
    ],
)
def test_memory_server_reports_wrong_flags_in_one_line(
    argv: list[str], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["--role", "memory", *argv]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("memserve.launch_server")]
    assert len(said) == 1
    assert reason in said[0]


def test_memory_server_is_evacuated_to_the_other_ones(cluster: Cluster, instance: Instance) -> None:
    for name in ("goes", "stays"):
        cluster.launch_memory(name, BUDGET_GIB)
    cluster.wait_ready()
    keys, data = instance.store(6)
    assert instance.peers.transfer_with_insert(instance.memory("goes"), instance.pool, keys).num_sent == 6
    request = urllib.request.Request(f"{cluster.url}/workers/goes/drain", method="POST")
    with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
        said = json.load(answer)
    assert (said["drained"], said["evacuated"]["blocks"], said["evacuated"]["left"]) == (True, 6, 0)
    cluster.servers.pop("goes").kill()
    instance.pool.clear()
    stays = instance.memory("stays")
    assert instance.peers.fetch(stays, instance.pool, keys, timeout_s=WAIT_S) == 6
    assert instance.read(keys) == data
    assert cluster.servers.pop("stays").stop() == 0
