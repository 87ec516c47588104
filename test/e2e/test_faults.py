"""Servers that die during a request, restart, and are stopped."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from memserve.testing.cluster import Cluster, is_ready, start_process, wait_for
from memserve.testing.pool_reports import pool_reports, wait_settled
from memserve.wire.messages import Role

from .conftest import NewCluster, Pair, num_requests
from .geometry import PAGE, full_pages

ANSWER_WITHIN_S = 5.0
BACK_WITHIN_S = 2.0
LONG = {"max_new_tokens": 6000, "temperature": 0, "ignore_eos": True}


def wait_registered_again(pair: Pair, role: Role) -> None:
    """Restart the server of `role` and check that it serves soon after its registration."""
    pair.launch(role)
    pair.cluster.wait_ready()
    body = {"text": "back?", "sampling_params": {"max_new_tokens": 3}}
    wait_for(
        lambda: pair.post("/generate", body).status_code == 200,
        what=f"requests to be served after {role} has registered",
        timeout_s=BACK_WITHIN_S,
    )


def test_stream_ends_with_an_error_when_decode_is_killed(expendable_pair: Pair) -> None:
    pair = expendable_pair
    with pair.post(
        "/generate", {"text": "go on", "stream": True, "sampling_params": LONG}, stream=True
    ) as response:
        lines = response.iter_lines()
        assert next(lines).startswith(b"data: ")
        pair.cluster.servers["decode"].kill()
        killed = time.monotonic()
        rest = [line for line in lines if line]
    assert time.monotonic() - killed < ANSWER_WITHIN_S
    last = next(line for line in reversed(rest) if line.startswith(b"data: {"))
    assert b'"error"' in last
    assert b"decode" in last

    response = pair.post("/generate", {"text": "anyone?"})
    assert response.status_code == 503
    assert "decode" in response.json()["error"]["message"]
    assert requests.get(f"{pair.url}/readiness", timeout=5).status_code == 503
    wait_registered_again(pair, Role.DECODE)


def test_request_fails_clearly_when_prefill_is_killed_and_history_survives(
    expendable_pair: Pair,
) -> None:
    pair, new_tokens = expendable_pair, 40
    text = "What a prefill has forgotten, its decode may still know. " * 10
    first = pair.generate(text=text, sampling_params={"max_new_tokens": new_tokens})
    wait_settled(pair.server_urls())
    answers: list[Any] = []
    prefill = pair.cluster.servers["prefill"]
    # Stopped first, so that the request is certain to be there when it dies.
    prefill_pids = _session_pids(prefill.pid)
    for pid in prefill_pids:
        os.kill(pid, signal.SIGSTOP)
    client = threading.Thread(
        target=lambda: answers.append(pair.post("/generate", {"text": "x" * 500, "sampling_params": LONG}))
    )
    client.start()
    decode_url = next(
        worker["url"]
        for worker in requests.get(f"{pair.url}/workers", timeout=5).json()["workers"]
        if worker["role"] == "decode"
    )
    wait_for(lambda: num_requests(decode_url) > 0, what="the request to reach decode", timeout_s=10)
    prefill.kill()
    client.join(ANSWER_WITHIN_S)
    assert answers, "the client was left without an answer"
    assert answers[0].status_code in (502, 503)
    assert "prefill" in answers[0].json()["error"]["message"]
    wait_for(lambda: num_requests(decode_url) == 0, what="decode to be rid of the request", timeout_s=10)
    wait_registered_again(pair, Role.PREFILL)

    pair.wait_pair()
    meta = pair.generate(text=f"{text}{first['text']} And then?")["meta_info"]
    held = full_pages(first["meta_info"]["prompt_tokens"] + new_tokens - 1)
    assert meta["prefill_cached_tokens"] == held * PAGE, "fetched from decode"


def test_stopping_server_leaves_the_router_at_once(expendable_pair: Pair) -> None:
    pair = expendable_pair
    decode = pair.cluster.servers.pop("decode")
    decode.send(signal.SIGTERM)
    wait_for(lambda: not is_ready(pair.url), what="the router to drop decode", timeout_s=2)
    wait_registered_again(pair, Role.DECODE)
    assert decode.wait() == 0


@pytest.fixture(scope="module")
def alone(tiny_model: Path, new_cluster: NewCluster) -> Iterator[Cluster]:
    """One colocated server, started as a user does."""
    with new_cluster("alone", start=start_process) as cluster:
        cluster.launch("alone", Role.COLOCATED, tiny_model)
        yield cluster


def test_restarted_router_recovers_its_instances(alone: Cluster, tmp_path: Path) -> None:
    """A cluster on a router port that is used twice."""
    alone.wait_ready()
    server = alone.servers["alone"]
    port, control = alone.url.rsplit(":", 1)[1], alone.control.rsplit(":", 1)[1]
    assert alone.router.stop() == 0
    with Cluster(tmp_path / "again", router_flags=["--port", port, "--control-port", control]) as again:
        wait_for(lambda: is_ready(again.url), [server], what="the server to register again", timeout_s=10)
        body = {"text": "hello", "sampling_params": {"max_new_tokens": 5, "ignore_eos": True}}
        answer = requests.post(f"{again.url}/generate", json=body, timeout=30)
        assert answer.json()["meta_info"]["completion_tokens"] == 5
    server.send(signal.SIGINT)
    assert server.wait() == 0
    assert "Traceback" not in server.output()


def _session_pids(leader: int) -> list[int]:
    """Every process of a session, the leader last."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader:
                pids.append(int(entry.name))
    return sorted(pids, key=lambda pid: pid == leader)


@pytest.fixture(autouse=True)
def _leave_a_whole_pair(expendable_pair: Pair, alone: Cluster) -> Any:
    """Check that nothing leaked; restart servers that a failed test has killed."""
    yield
    for role in (Role.PREFILL, Role.DECODE):
        process = expendable_pair.cluster.servers.get(str(role))
        if process is None or process.status is not None:
            expendable_pair.launch(role)
    expendable_pair.cluster.wait_ready()
    expendable_pair.wait_pair()
    wait_settled(expendable_pair.server_urls())
    for report in pool_reports(expendable_pair.server_urls()):
        held = {name: report["pool"][name] for name in ("private", "reserved", "quarantined", "leases")}
        assert not any(held.values()), held
