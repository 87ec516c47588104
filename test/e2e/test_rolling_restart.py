"""A cluster of two pairs under running chats: restarted one by one, paused, and stuck."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from memserve.testing.cluster import Cluster, wait_for
from memserve.testing.pool_reports import wait_pools_connected, wait_settled
from memserve.wire.messages import Role

from .conftest import REQUEST_TIMEOUT_S, NewCluster
from .geometry import PAGE

NUM_CHATS = 6
NEW_TOKENS = 24
PAUSE_S = 0.2
"""Seconds between two turns of the load: the machine starts servers meanwhile."""
LOSS = 0.05
ROUNDS = (("p0", "d0"), ("p1", "d1"))
NAMES = [name for round in ROUNDS for name in round]
HEARTBEAT_S = 1.0
STUCK_S = 3.0
BACK_S = 2.0


@dataclass
class Chat:
    """One conversation, which counts the cached part of its history."""

    url: str
    text: str
    turns: Iterator[int] = field(default_factory=itertools.count)

    def turn(self) -> float:
        """Send the next turn; return the share of the prompt that prefill had cached."""
        self.text += f" And then, for the {next(self.turns)}th time, what happened to the two of them?"
        body = {
            "text": self.text,
            "sampling_params": {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True},
        }
        response = requests.post(f"{self.url}/generate", json=body, timeout=REQUEST_TIMEOUT_S)
        assert response.status_code == 200, response.text
        answer = response.json()
        meta = answer["meta_info"]
        assert meta["completion_tokens"] == NEW_TOKENS
        self.text += answer["text"]
        return float(meta["prefill_cached_tokens"]) / meta["prompt_tokens"]


@contextmanager
def load(chats: list[Chat]) -> Iterator[list[float]]:
    """Run the chats inside the block; yields the answered turns. Fails with the first unanswered turn."""
    over, answered = threading.Event(), list[float]()

    def talk() -> None:
        for chat in itertools.cycle(chats):
            if over.wait(PAUSE_S):
                return
            answered.append(chat.turn())

    with ThreadPoolExecutor(1) as executor:
        talking = executor.submit(talk)
        try:
            yield answered
        finally:
            over.set()
            talking.result()  # a failure there causes the failure here


def hit_ratio(chats: list[Chat]) -> float:
    return sum(chat.turn() for chat in chats) / len(chats)


def drain(cluster: Cluster, name: str) -> Any:
    response = requests.post(
        f"{cluster.url}/workers/{name}/drain", json={"timeout_s": REQUEST_TIMEOUT_S}, timeout=90
    )
    assert response.status_code == 200
    return response.json()


def workers(cluster: Cluster) -> dict[str, Any]:
    page = requests.get(f"{cluster.url}/workers", timeout=REQUEST_TIMEOUT_S).json()
    return {worker["instance_id"]: worker for worker in page["workers"]}


def ready(cluster: Cluster) -> set[str]:
    return {name for name, worker in workers(cluster).items() if worker["state"] == "ready"}


def launch(cluster: Cluster, model: Path, *names: str) -> None:
    for name in names:
        role = Role.PREFILL if name.startswith("p") else Role.DECODE
        cluster.launch(name, role, model, "--dram-gib", "0.2")
    wait_for(lambda: ready(cluster) == set(NAMES), list(cluster.servers.values()), what="all servers")
    wait_pools_connected(cluster.server_urls())


@pytest.fixture(scope="module")
def pairs_of_two(new_cluster: NewCluster, tiny_model: Path) -> Iterator[Cluster]:
    flags = ("--heartbeat-secs", str(HEARTBEAT_S), "--stuck-secs", str(STUCK_S))
    with new_cluster("rolling", router_flags=flags) as cluster:
        launch(cluster, tiny_model, *NAMES)
        yield cluster


def test_rolling_restart_loses_no_request_and_little_history(pairs_of_two: Cluster, tiny_model: Path) -> None:
    cluster = pairs_of_two
    chats = [
        Chat(cluster.url, f"Chat {i} is a long story about {i} friends. " * 20) for i in range(NUM_CHATS)
    ]
    hit_ratio(chats)
    before = hit_ratio(chats)
    assert before > 0.8
    with load(chats) as answered:
        for round in ROUNDS:
            for name in round:
                drained = drain(cluster, name)
                assert drained["drained"], drained
                # KV that returns to a prefill after that is still at its decode.
                assert drained["evacuated"]["left"] * PAGE <= 2 * NEW_TOKENS, drained
                cluster.servers[name].send(signal.SIGTERM)
            assert [cluster.servers[name].wait() for name in round] == [0, 0]
            launch(cluster, tiny_model, *round)
        num_answered = len(answered)
        wait_for(lambda: len(answered) > num_answered + 1, what="chats to go on", timeout_s=30)
    wait_settled(cluster.server_urls())
    after = hit_ratio(chats)
    assert after > before - LOSS, f"{before:.3f} of the prompts were found before, {after:.3f} after"


def test_stuck_scheduler_gets_no_requests_until_it_steps_again(pairs_of_two: Cluster) -> None:
    cluster = pairs_of_two
    shown = workers(cluster)["p1"]["load"]
    assert shown["step_age_s"] < STUCK_S
    assert shown["max_tokens"] > 0
    scheduler = next(
        pid for pid in session_pids(cluster.servers["p1"].pid) if "sglang::scheduler" in title_of(pid)
    )
    os.kill(scheduler, signal.SIGSTOP)
    try:
        wait_for(lambda: workers(cluster)["p1"]["state"] == "suspect", what="suspicion", timeout_s=20)
        assert "no step" in workers(cluster)["p1"]["reason"]
        for i in range(4):
            Chat(cluster.url, f"While one of them is stuck, {i}.").turn()
    finally:
        os.kill(scheduler, signal.SIGCONT)
    wait_for(lambda: "p1" in ready(cluster), what="p1 to be ready", timeout_s=BACK_S + HEARTBEAT_S)


def test_paused_server_is_back_within_two_seconds(pairs_of_two: Cluster) -> None:
    cluster = pairs_of_two
    pids = session_pids(cluster.servers["d1"].pid)
    seen = []

    def state() -> str:
        worker = workers(cluster).get("d1")
        seen.append(worker["state"] if worker is not None else "gone")
        return seen[-1]

    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(lambda: state() == "gone", what="d1 to be forgotten", timeout_s=30)
        for i in range(4):
            Chat(cluster.url, f"While one of them is away, {i}.").turn()
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    wait_for(lambda: state() == "ready", what="d1 to be ready", timeout_s=BACK_S)
    assert list(dict.fromkeys(seen))[:4] == ["ready", "suspect", "down", "gone"]
    for i in range(4):
        Chat(cluster.url, f"And now it is back, {i}.").turn()


def test_prefill_becomes_a_decode_while_other_servers_serve(pairs_of_two: Cluster) -> None:
    cluster = pairs_of_two
    chats = [Chat(cluster.url, f"Chat {i} sees a prefill become a decode. " * 10) for i in range(2)]
    process, before = cluster.servers["p1"], workers(cluster)["p1"]
    with load(chats) as answered:
        response = requests.post(f"{cluster.url}/workers/p1/role", json={"role": "decode"}, timeout=300)
        assert response.status_code == 200
        assert response.json()["stage"] == "done", response.text
        num_answered = len(answered)
        wait_for(lambda: len(answered) > num_answered + 4, what="chats to go on", timeout_s=30)
    after = workers(cluster)["p1"]
    assert (after["role"], after["url"], process.status) == ("decode", before["url"], None)
    assert ready(cluster) == set(NAMES)
    response = requests.post(f"{cluster.url}/workers/p0/role", json={"role": "decode"}, timeout=60)
    assert response.status_code == 409, "no other server could prefill"
    # The router has to use the new decode once the others are drained.
    for name in ("d0", "d1"):
        assert drain(cluster, name)["drained"]
    hit_ratio(chats)


def session_pids(leader: int) -> list[int]:
    """Every process of a session."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader:
                pids.append(int(entry.name))
    return pids


def title_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()
