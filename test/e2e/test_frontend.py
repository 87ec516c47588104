"""Every call of SGLang's frontend language, against a prefill/decode pair."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import sglang as sgl

from .conftest import Pair

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}


@pytest.fixture(autouse=True)
def backend(pair: Pair) -> Iterator[sgl.RuntimeEndpoint]:
    endpoint = sgl.RuntimeEndpoint(pair.url)
    sgl.set_default_backend(endpoint)
    yield endpoint
    sgl.set_default_backend(None)


@sgl.function
def dialogue(s: Any, first: str, second: str) -> None:
    s += sgl.system("You are terse.")
    s += sgl.user(first)
    s += sgl.assistant(sgl.gen("one", max_tokens=12, temperature=0))
    s += sgl.user(second)
    s += sgl.assistant(sgl.gen("two", max_tokens=12, temperature=0))


def test_frontend_gen_works_over_several_turns() -> None:
    state = dialogue.run(first="Who are you?", second="Since when?")
    assert len(state["one"]) == len(state["two"]) == 12
    assert state.get_meta_info("two")["prefill_cached_tokens"] > 0


def test_frontend_stream_gives_the_same_text_in_pieces() -> None:
    whole = dialogue.run(first="Who are you?", second="Since when?")
    streamed = dialogue.run(first="Who are you?", second="Since when?", stream=True)
    pieces = list(streamed.text_iter("two"))
    assert len(pieces) > 3
    assert "".join(pieces) == whole["two"]


def test_frontend_select_takes_the_likeliest_choice() -> None:
    @sgl.function
    def choose(s: Any, question: str) -> None:
        s += question + sgl.select("choice", choices=["yes", "no", "maybe so"])

    state = choose.run(question="Is water wet? Answer: ")
    assert state["choice"] in ("yes", "no", "maybe so")
    logprobs = state.get_meta_info("choice")["normalized_prompt_logprobs"]
    assert len(logprobs) == 3
    assert state["choice"] == ("yes", "no", "maybe so")[max(range(3), key=lambda i: logprobs[i])]


def test_frontend_select_scores_equal_those_of_one_server(pair: Pair) -> None:
    """Prefill's input logprobs reach the client complete and in order."""
    answers = pair.generate(
        text=["Answer: yes", "Answer: no"],
        return_logprob=True,
        logprob_start_len=4,
        return_text_in_logprobs=True,
        sampling_params={"max_new_tokens": 0},
    )
    for answer, text in zip(answers, ["Answer: yes", "Answer: no"], strict=True):
        scored = answer["meta_info"]["input_token_logprobs"]
        assert "".join(piece for _, _, piece in scored) == text[4:]
        assert all(logprob <= 0 for logprob, _, _ in scored[1:])


def test_frontend_fork_and_join_work() -> None:
    @sgl.function
    def branches(s: Any) -> None:
        s += "Two facts about the moon. "
        forks = s.fork(2)
        for i in range(2):
            forks[i] += f"Fact {i}: " + sgl.gen("fact", max_tokens=8, temperature=0)
        forks.join()
        s += "One: " + forks[0]["fact"] + " Two: " + forks[1]["fact"]
        s += " Summary: " + sgl.gen("summary", max_tokens=8, temperature=0)

    state = branches.run()
    assert len(state["summary"]) == 8


def test_frontend_concatenate_join_continues_with_the_joined_text() -> None:
    @sgl.function
    def branches(s: Any) -> None:
        s += "Two facts. "
        forks = s.fork(2)
        for i in range(2):
            forks[i] += f"Fact {i}: " + sgl.gen("fact", max_tokens=4, temperature=0)
        forks.join(mode="concate_and_append")
        s += sgl.gen("end", max_tokens=4, temperature=0)

    @sgl.function
    def plain(s: Any, text: str) -> None:
        s += text + sgl.gen("end", max_tokens=4, temperature=0)

    state = branches.run()
    joined = state.text().removesuffix(state["end"])
    assert joined.index("Fact 0: ") < joined.index("Fact 1: ")
    assert state["end"] == plain.run(text=joined)["end"]


def test_frontend_regex_and_json_schema_constrain_the_answer() -> None:
    @sgl.function
    def constrained(s: Any) -> None:
        s += "An address: " + sgl.gen(
            "ip", max_tokens=20, temperature=0, regex=r"((25[0-5]|[01]?\d\d?)\.){3}\d{1,2}"
        )
        s += "A person: " + sgl.gen("person", max_tokens=64, temperature=0, json_schema=json.dumps(SCHEMA))
        s += "A number: " + sgl.gen("number", max_tokens=6, temperature=0, dtype=int)

    state = constrained.run()
    assert re.fullmatch(r"\d{1,3}(\.\d{1,3}){3}", state["ip"])
    person = json.loads(state["person"])
    assert set(person) == {"name", "old"}
    assert int(state["number"]) is not None


def test_frontend_cache_prefix_warms_the_pair(backend: sgl.RuntimeEndpoint, pair: Pair) -> None:
    prefix = "A long preamble that many programs share, word for word. " * 3
    backend.flush_cache()
    backend.cache_prefix(prefix)
    meta = pair.generate(text=prefix + "Go.", sampling_params={"max_new_tokens": 2})["meta_info"]
    assert meta["prefill_cached_tokens"] >= len(prefix) // 16 * 16 - 16


def test_frontend_runs_a_batch_of_programs() -> None:
    arguments = [{"first": f"Question {i}?", "second": "Why?"} for i in range(4)]
    states = dialogue.run_batch(arguments, num_threads=4, progress_bar=False)
    assert [len(state["two"]) for state in states] == [12] * 4


def test_generate_returns_several_samples_of_one_prompt(pair: Pair) -> None:
    answers = pair.generate(text="Once", sampling_params={"n": 3, "max_new_tokens": 5, "temperature": 0.9})
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [5, 5, 5]


def test_frontend_reads_server_info_and_flushes_the_cache(backend: sgl.RuntimeEndpoint) -> None:
    info = backend.get_server_info()
    assert len(info["workers"]) == 2
    backend.flush_cache()


def test_malformed_concate_and_append_request_is_refused(pair: Pair) -> None:
    response = pair.post("/concate_and_append_request", {"src_rids": 3})
    assert response.status_code == 400
    assert "concate_and_append" in response.json()["error"]["message"]
