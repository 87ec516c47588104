"""The router sends prompts to their history, moves history if that pays, and answers under failures.

Two prefills, a decode and a memory instance behind a router without settings: it learns the cost of work.
It tokenizes nothing: most prompts here are ids, and servers report the keys of texts.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
import requests

from memserve.router.tokenization.text_keys import BLOCK_TOKENS, BYTES_PER_TOKEN
from memserve.testing.cluster import Cluster, ServerProcess, is_ready, wait_for
from memserve.testing.pool_reports import wait_pools_connected, wait_settled
from memserve.wire.messages import Role

from .conftest import REQUEST_TIMEOUT_S, NewCluster
from .geometry import PAGE

PREFILLS = ("prefill0", "prefill1")
HISTORY_TOKENS = 2048
SETTLED_S = 20.0
CHUNK = BLOCK_TOKENS * BYTES_PER_TOKEN

Answer = dict[str, Any]


@dataclasses.dataclass
class Stage:
    cluster: Cluster
    memory: ServerProcess
    draw: Random = dataclasses.field(default_factory=lambda: Random(11))

    def tokens(self, count: int) -> list[int]:
        return [self.draw.randrange(10, 250) for _ in range(count)]

    def post(self, path: str, body: Any = None, **kwargs: Any) -> requests.Response:
        answer = requests.post(self.cluster.url + path, json=body, timeout=REQUEST_TIMEOUT_S, **kwargs)
        assert answer.status_code == 200, answer.text
        return answer

    def generate(self, tokens: Sequence[int], num_new: int = 4) -> Answer:
        params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": num_new}
        answer = self.post(
            "/generate",
            {"input_ids": list(tokens), "sampling_params": params},
            headers={"x-memserve-explain": "1"},
        )
        return {**answer.json(), "home": json.loads(answer.headers["x-memserve-decision"])["prefill"]}

    def explain(self, tokens: Sequence[int]) -> Answer:
        told: Answer = self.post("/explain", {"input_ids": list(tokens)}).json()
        return told

    def flush(self) -> None:
        """Flush all servers but the memory instance, and wait until the router knows."""
        wait_settled(self.cluster.server_urls())
        self.post("/flush_cache")

        def is_empty() -> bool:
            held = requests.get(f"{self.cluster.url}/tree", timeout=REQUEST_TIMEOUT_S).json()["instances"]
            return not any(sum(held[name].values()) for name in (*PREFILLS, "decode"))

        wait_for(is_empty, what="the router to see the flush", timeout_s=SETTLED_S)

    def wait_remembered(self, tokens: Sequence[int]) -> None:
        """Wait until the router knows that the memory instance has a prompt's whole pages."""
        known = [{"instance": "memory", "blocks": len(tokens) // PAGE}]
        wait_for(lambda: self.explain(tokens)["memory"] == known, what="the memory", timeout_s=SETTLED_S)

    def count(self, name: str) -> float:
        page = requests.get(f"{self.cluster.url}/metrics", timeout=REQUEST_TIMEOUT_S).text
        found = re.search(rf"^memserve_router_{re.escape(name)} (\S+)$", page, re.MULTILINE)
        return float(found[1]) if found else 0.0


@pytest.fixture(scope="module")
def stage(tiny_model: Path, new_cluster: NewCluster) -> Iterator[Stage]:
    with new_cluster(
        "routing", router_flags=("--heartbeat-secs", "0.5", "--routing-keys", "text")
    ) as cluster:
        for name in PREFILLS:
            cluster.launch(name, Role.PREFILL, tiny_model)
        cluster.launch("decode", Role.DECODE, tiny_model)
        memory = cluster.launch_memory("memory", 0.1)
        cluster.wait_ready()
        wait_for(lambda: is_ready(cluster.url), what="a pair", timeout_s=SETTLED_S)
        wait_pools_connected(cluster.server_urls())
        stage = Stage(cluster, memory)
        for length in (40, 400, 1600, 100, 800, 2000, 200, 1200):  # Teach the router the cost of work.
            stage.generate(stage.tokens(length))
        yield stage


def computed(answer: Answer) -> int:
    meta = answer["meta_info"]
    return int(meta["prompt_tokens"] - meta["prefill_cached_tokens"])


def test_conversation_stays_with_its_history(stage: Stage) -> None:
    homes = []
    for _ in range(4):
        history = stage.tokens(600)
        answer = stage.generate(history)
        homes.append(answer["home"])
        for _ in range(2):
            history = [*history, *answer["output_ids"], *stage.tokens(30)]
            told = stage.explain(history)
            assert told["prefill"] == homes[-1], told["reason"]
            answer = stage.generate(history)
            assert computed(answer) <= 30 + 4 + 2 * PAGE
    assert set(homes) == set(PREFILLS), "different ones are spread"


def test_remote_history_is_fetched_if_faster_and_else_computed(stage: Stage) -> None:
    history = stage.tokens(HISTORY_TOKENS)
    cold = stage.generate([*history, *stage.tokens(20)])
    assert computed(cold) == HISTORY_TOKENS + 20
    stage.wait_remembered(history)
    stage.flush()
    prompt = [*history, *stage.tokens(20)]
    told = stage.explain(prompt)
    assert told["fetch"]["source"] == "memory", told["reason"]
    assert told["fetch"]["transfer_s"] < told["fetch"]["saved_s"]
    before = stage.count('fetches_total{outcome="whole"}')
    fetched = stage.generate(prompt)
    assert stage.count('fetches_total{outcome="whole"}') == before + 1
    assert computed(fetched) <= 20 + PAGE
    assert fetched["meta_info"]["e2e_latency"] < cold["meta_info"]["e2e_latency"]
    stage.flush()
    tiny = stage.explain([*history[:PAGE], *stage.tokens(20)])
    assert tiny["memory"] == [{"instance": "memory", "blocks": 1}]
    if tiny["fetch"] is not None:
        assert tiny["fetch"]["transfer_s"] < tiny["fetch"]["saved_s"], "never against Eq. 2"


def test_popular_prefix_is_replicated(stage: Stage) -> None:
    """One prefill has the prefix; while it is busy, the other fetches the prefix and helps."""
    prefix = stage.tokens(HISTORY_TOKENS)
    stage.generate(prefix)
    wait_settled(stage.cluster.server_urls())
    prompts = [[*prefix, *stage.tokens(1500)] for _ in range(8)]

    def num_late() -> float:
        return sum(stage.count(f'fetches_total{{outcome="{outcome}"}}') for outcome in ("part", "none"))

    before = num_late()
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(threads.map(stage.generate, prompts))
    assert {answer["home"] for answer in answers} == set(PREFILLS)
    if num_late() == before:  # Then all requests during the fetch have waited for it.
        assert max(map(computed, answers)) <= 1500 + 2 * PAGE, "a request computed the prefix again"


def test_text_keys_find_a_prompt_by_the_keys_that_a_server_reported(stage: Stage) -> None:
    text = " ".join(str(stage.draw.randrange(10**6)) for _ in range(400))
    params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 4}
    first = stage.post("/generate", {"text": text, "sampling_params": params}).json()["meta_info"]
    # The last, partial chunk of a text is not looked up.
    num_pages = int(first["prompt_tokens"] // PAGE * (1 - CHUNK / len(text))) - 1

    def cached(text: str) -> dict[str, int]:
        told = stage.post("/explain", {"text": text}).json()["prefill_candidates"]
        return {one["instance"]: one["blocks"] for one in told}

    wait_for(lambda: max(cached(text).values()) >= num_pages, what="its keys", timeout_s=SETTLED_S)
    longer = text + " and so on"
    assert max(cached(longer).values()) >= num_pages
    second = stage.post("/generate", {"text": longer, "sampling_params": params}).json()["meta_info"]
    assert second["prefill_cached_tokens"] >= num_pages * PAGE
    stage.flush()
    assert not any(cached(longer).values()), "what was evicted is not believed in"


def test_memory_instance_death_costs_recomputation_only(stage: Stage) -> None:
    prompt = stage.tokens(HISTORY_TOKENS)
    expected = stage.generate(prompt)["output_ids"]
    stage.wait_remembered(prompt)
    stage.flush()
    stage.memory.kill()
    answer = stage.generate(prompt)
    assert answer["output_ids"] == expected
    assert computed(answer) == HISTORY_TOKENS
    wait_for(lambda: stage.explain(prompt)["memory"] == [], what="the router to notice", timeout_s=SETTLED_S)
