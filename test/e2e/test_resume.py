"""Streams whose decode is killed continue at another decode, token for token as without the kill."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import requests

from memserve.testing.cluster import wait_for
from memserve.wire.messages import Role

from .conftest import Pair

NEW_TOKENS = 120
CUT_AFTER = 20
"""Tokens that a client has received when decode is killed."""
SAMPLING = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
CHAT_SAMPLING = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "Tell me of the sea, and of those who live by it."}]
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"text": "The sea is wide, and", "sampling_params": SAMPLING}),
    ("/generate", {"text": "Mountains", "sampling_params": {**SAMPLING, "stop": ["no such words in it"]}}),
    ("/generate", {"text": "Deserts", "sampling_params": {**SAMPLING, "frequency_penalty": 0.5}}),
    ("/v1/chat/completions", {"messages": MESSAGES, **CHAT_SAMPLING}),
    ("/v1/completions", {"prompt": "Rivers run", **CHAT_SAMPLING, "stream_options": {"include_usage": True}}),
]


class Reader:
    """A client of one stream, on a thread."""

    def __init__(self, pair: Pair, path: str, body: dict[str, Any]) -> None:
        self._pair, self._path, self._body = pair, path, body
        self.events: list[bytes] = []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        with self._pair.post(self._path, {**self._body, "stream": True}, stream=True) as response:
            for line in response.iter_lines():
                if line.startswith(b"data: "):
                    self.events.append(line[6:])

    def told(self) -> Any:
        """Text, ids, finish reason and usage, after the end of the stream."""
        self.thread.join(60)
        assert self.events[-1] == b"[DONE]", self.events[-1]
        items = [json.loads(event) for event in self.events[:-1]]
        assert not any("error" in item for item in items), items[-1]
        if "text" in items[0]:
            meta = items[-1]["meta_info"]
            counts = [item["meta_info"]["completion_tokens"] for item in items]
            assert counts == sorted(set(counts)), "no token is told twice"
            return items[-1]["text"], items[-1]["output_ids"], meta["finish_reason"], meta["prompt_tokens"]
        choices = [choice for item in items for choice in item["choices"]]
        text = "".join(
            choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices
        )
        usage = items[-1].get("usage") or {}
        return text, choices[-1]["finish_reason"], usage.get("prompt_tokens"), usage.get("completion_tokens")


def test_streams_continue_after_their_decode_dies(expendable_pair: Pair) -> None:
    pair = expendable_pair
    spare = pair.cluster.launch("spare", Role.DECODE, pair.model, *pair.flags)
    try:
        undisturbed = [Reader(pair, path, body).told() for path, body in ASKED]
        pair.cluster.wait_ready()
        wait_for(lambda: len(_ready(pair)) == 3, what="the spare decode", timeout_s=15)
        # All requests go to the other decode until all streams have begun.
        drain = f"{pair.url}/workers/spare/drain"
        assert requests.post(drain, json={"timeout_s": 5}, timeout=10).status_code == 200
        readers = [Reader(pair, path, body) for path, body in ASKED]
        wait_for(
            lambda: all(len(reader.events) > CUT_AFTER for reader in readers),
            what="all streams to have begun",
            timeout_s=30,
        )
        assert requests.delete(drain, timeout=10).status_code == 200
        assert all(reader.events[-1] != b"[DONE]" for reader in readers)
        pair.cluster.servers["decode"].kill()
        assert [reader.told() for reader in readers] == undisturbed
        metrics = requests.get(f"{pair.url}/metrics", timeout=5).text
        counts = dict(re.findall(r'memserve_router_resumed_total{outcome="(\w+)"} (\d+)', metrics))
        # A penalty depends on the generated tokens, which OpenAI's streams do not contain.
        assert int(counts["continued"]) == 2
        assert int(counts["repeated"]) == 3
        assert sum(map(int, counts.values())) == len(ASKED)
    finally:
        # The spare decode replaces the killed one.
        pair.cluster.servers["decode"].kill()
        pair.cluster.servers["decode"] = pair.cluster.servers.pop("spare", spare)
        wait_for(lambda: len(pair.workers()) == 2, what="the dead one to be forgotten", timeout_s=30)
        pair.wait_pair()


def _ready(pair: Pair) -> list[Any]:
    return [worker for worker in pair.workers() if worker["state"] == "ready"]
