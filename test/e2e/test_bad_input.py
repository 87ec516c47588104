"""Invalid requests get a 4xx with the reason, leave nothing running, and harm no server."""

from __future__ import annotations

from typing import Any

import pytest
import requests

from .conftest import REQUEST_TIMEOUT_S, Pair

PARAMS = {"max_new_tokens": 4, "temperature": 0}
BAD: list[tuple[str, str, Any, str]] = [
    (
        "token id past the vocabulary",
        "/generate",
        {"input_ids": [1, 2, 10**6], "sampling_params": PARAMS},
        "1000000",
    ),
    ("negative token id", "/generate", {"input_ids": [1, -1], "sampling_params": PARAMS}, "-1"),
    ("token id that is none", "/generate", {"input_ids": [1, "a"], "sampling_params": PARAMS}, "input_ids"),
    ("ids over the context", "/generate", {"input_ids": [5] * 9000, "sampling_params": PARAMS}, "8192"),
    ("text over the context", "/generate", {"text": "x" * 9000, "sampling_params": PARAMS}, "context"),
    ("no prompt", "/generate", {"sampling_params": PARAMS}, "text"),
    ("unknown parameter", "/generate", {"text": "a", "sampling_params": {"max_token": 3}}, "max_token"),
    ("wrong type", "/generate", {"text": 7, "sampling_params": PARAMS}, "text"),
    (
        "impossible temperature",
        "/generate",
        {"text": "a", "sampling_params": {"temperature": -2}},
        "temperature",
    ),
    ("not an object", "/generate", [1, 2], "object"),
    ("no messages", "/v1/chat/completions", {"model": "default"}, "messages"),
    ("prompt ids past the vocabulary", "/v1/completions", {"model": "default", "prompt": [10**6]}, "1000000"),
    (
        "chat over the context",
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x" * 9000}]},
        "",
    ),
]


@pytest.mark.parametrize(("path", "body", "reason"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_bad_requests_are_refused_with_a_reason(
    pair: Pair, path: str, body: Any, reason: str, stream: bool
) -> None:
    if stream and isinstance(body, dict):
        body = {**body, "stream": True}
    response = pair.post(path, body)
    assert 400 <= response.status_code < 500, response.text[:300]
    assert reason in response.json()["error"]["message"]
    pair.wait_idle()
    assert pair.generate(text="still there?", sampling_params=PARAMS)["meta_info"]["completion_tokens"] == 4


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b'{"text": "a"', b"null"])
def test_body_that_is_not_json_is_refused(pair: Pair, data: bytes) -> None:
    response = requests.post(f"{pair.url}/generate", data=data, timeout=REQUEST_TIMEOUT_S)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_enormous_body_is_refused(pair: Pair) -> None:
    response = requests.post(f"{pair.url}/generate", data=b" " * (65 << 20), timeout=REQUEST_TIMEOUT_S)
    assert response.status_code == 413


def test_client_disconnect_frees_both_servers(pair: Pair) -> None:
    body = {"text": "a very long answer", "stream": True}
    params = {"max_new_tokens": 5000, "temperature": 0, "ignore_eos": True}
    with pair.post("/generate", {**body, "sampling_params": params}, stream=True) as response:
        lines = response.iter_lines()  # a generator that is dropped closes the connection
        next(lines)
        assert pair.num_running() > 0
    pair.wait_idle()
