"""A server that is asked directly, past the router, refuses what would end it or stop it, and lives."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from memserve.wire.messages import Role

from .conftest import REQUEST_TIMEOUT_S, NewCluster

MAX_WAIT_S = 5
NO_TEXT = json.dumps({"$ref": "#"})


@pytest.fixture(scope="module")
def server(tiny_model: Path, new_cluster: NewCluster) -> Iterator[str]:
    with new_cluster("direct") as cluster:
        cluster.launch("alone", Role.COLOCATED, tiny_model)
        cluster.wait_ready()
        yield cluster.server_urls()[0]


def generate(url: str, params: dict[str, Any], **body: Any) -> requests.Response:
    sampling = {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True, **params}
    return requests.post(
        f"{url}/generate", json={"text": "hi", "sampling_params": sampling, **body}, timeout=REQUEST_TIMEOUT_S
    )


def assert_lives(url: str) -> None:
    began = time.monotonic()
    response = generate(url, {})
    assert response.json()["meta_info"]["completion_tokens"] == 3
    assert time.monotonic() - began < MAX_WAIT_S


BAD_PARAMS: list[dict[str, Any]] = [
    {"json_schema": NO_TEXT, "top_p": 0.9, "temperature": 1},
    {"json_schema": NO_TEXT, "temperature": 1},
    {"json_schema": '{"items":' * 500 + "{}" + "}" * 500},
    {"regex": "((a{0,500}){0,500}){0,500}b"},
    {"logit_bias": {"5": 1e39}, "top_p": 0.9},
    {"logit_bias": {"1000000": 1}},
    {"min_new_tokens": 1, "stop_token_ids": [261]},
    {"min_new_tokens": 1, "stop_token_ids": [-1]},
    {"min_new_tokens": 2**40, "max_new_tokens": 2**41},
    {"n": 10**9},
    {"stop_regex": "(["},
    {"stop_regex": 5},
    {"stop": [5]},
    {"stream_interval": "a"},
    {"stop_regex": r"(.+)+\x00", "max_new_tokens": 60},
]
BAD_FIELDS: list[dict[str, Any]] = [
    {"return_logprob": True, "top_logprobs_num": 261},
    {"return_logprob": True, "top_logprobs_num": -1},
    {"text": ["a", "b"], "return_logprob": True, "top_logprobs_num": [1, 10**6]},
    {"return_logprob": True, "token_ids_logprob": [260]},
    {"positional_embed_overrides": {"a": 1}},
    {"disagg_prefill_dp_rank": 5},
    {"bootstrap_room": 2**70},
    {"rid": ["a", "b"]},
]
MAY_SUCCEED = (r"(.+)+\x00",)
"""A pattern that the matcher of the `regex` package decides fast."""


@pytest.mark.parametrize("params", BAD_PARAMS, ids=lambda params: str(params)[:60])
def test_parameters_that_would_end_or_stop_a_server_are_refused(server: str, params: dict[str, Any]) -> None:
    response = generate(server, params)
    allowed = {200, 400} if params.get("stop_regex") in MAY_SUCCEED else {400}
    assert response.status_code in allowed, response.text[:300]
    assert_lives(server)


@pytest.mark.parametrize("fields", BAD_FIELDS, ids=str)
def test_fields_that_would_end_a_server_are_refused(server: str, fields: dict[str, Any]) -> None:
    response = generate(server, {}, **fields)
    assert response.status_code == 400, response.text[:300]
    assert_lives(server)


def test_the_first_use_of_a_parameter_does_not_stop_others(server: str) -> None:
    waits: list[float] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            began = time.monotonic()
            generate(server, {"max_new_tokens": 1})
            waits.append(time.monotonic() - began)

    others = threading.Thread(target=ask)
    others.start()
    try:
        for params in ({"repetition_penalty": 1.1}, {"sampling_seed": 5, "temperature": 1}, {"min_p": 0.1}):
            assert generate(server, params).status_code == 200
    finally:
        ended.set()
        others.join()
    assert max(waits) < MAX_WAIT_S


def test_ordinary_uses_of_the_bounded_parameters_work(server: str) -> None:
    for params in (
        {"stop_regex": "[.!?]$", "max_new_tokens": 200},
        {"stop_regex": "x.*y", "max_new_tokens": 200},
        {"regex": "[a-z]+( [a-z]+)*", "max_new_tokens": 200},
        {"json_schema": json.dumps({"type": "object", "properties": {"a": {"type": "string"}}})},
        {"logit_bias": {"65": 5}, "stop_token_ids": [259], "n": 2},
        {"top_p": 0.9, "temperature": 1, "top_k": 5},
    ):
        assert generate(server, params).status_code == 200, params
