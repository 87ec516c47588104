"""Odd requests to real servers for as long as asked: `make fuzz`, or `make fuzz MINUTES=60 SEED=5`.

Half of the time goes to a colocated server, half to a pair. A server that ended is started again.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from memserve.testing.cluster import Cluster, is_ready, wait_for
from memserve.wire.messages import Role

from .differential import difference, draw_valid
from .harm import run
from .values import Drawn, draw

MINUTES = float(os.environ.get("MINUTES") or 10)
SEED = int(os.environ.get("SEED") or time.time())


@pytest.mark.timeout(MINUTES * 60 + 900)
@pytest.mark.parametrize("roles", [[Role.COLOCATED], [Role.PREFILL, Role.DECODE]], ids=["colocated", "pair"])
def test_odd_requests_do_no_harm(roles: list[Role], tiny_model: Path, tmp_path: Path) -> None:
    print(f"\nseed {SEED}, logs {tmp_path}", flush=True)
    with Cluster(tmp_path) as cluster:

        def launch(role: Role) -> None:
            cluster.launch(str(role), role, tiny_model)

        def find_ended(is_troubled: bool) -> str | None:
            ended, settles_s = None, time.monotonic() + (5 if is_troubled else 0)
            while True:
                for role in roles:
                    server = cluster.servers[str(role)]
                    if server.status is not None:
                        ended = f"{role} (log {server.log}.{time.time():.0f})"
                        server.log.rename(f"{server.log}.{time.time():.0f}")
                        launch(role)
                        cluster.wait_ready()
                if time.monotonic() >= settles_s and (not is_troubled or is_ready(cluster.url)):
                    return ended
                time.sleep(0.1)

        for role in roles:
            launch(role)
        cluster.wait_ready()
        wait_for(lambda: is_ready(cluster.url), what="the router")
        tally = run(cluster.url, requests_for(MINUTES * 30), find_ended, lambda line: print(line, flush=True))
    print(tally.summary(), flush=True)
    assert not tally.harms


def requests_for(seconds: float) -> Iterator[Drawn]:
    rng, ends_s = random.Random(SEED), time.monotonic() + seconds
    while time.monotonic() < ends_s:
        yield draw(rng)


@pytest.mark.timeout(MINUTES * 60 + 900)
def test_pair_answers_as_one_server(tiny_model: Path, tmp_path: Path) -> None:
    print(f"\nseed {SEED}, logs {tmp_path}", flush=True)
    rng, num, differences = random.Random(SEED), 0, []
    with Cluster(tmp_path / "pair") as pair, Cluster(tmp_path / "one") as one:
        pair.launch("prefill", Role.PREFILL, tiny_model)
        pair.launch("decode", Role.DECODE, tiny_model)
        one.launch("colocated", Role.COLOCATED, tiny_model)
        for cluster in (pair, one):
            cluster.wait_ready()
            wait_for(partial(is_ready, cluster.url), what="the router")
        (server_url,) = one.server_urls()
        ends_s = time.monotonic() + MINUTES * 60
        while time.monotonic() < ends_s:
            drawn, num = draw_valid(rng), num + 1
            if found := difference(drawn, server_url, pair.url):
                differences.append(f"{drawn.fields}: {found}")
                print(differences[-1], json.dumps(drawn.body)[:400], flush=True)
    print(f"{num} requests, {len(differences)} answered differently", flush=True)
    assert not differences
