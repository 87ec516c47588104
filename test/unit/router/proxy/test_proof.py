"""The tokens of a streamed text: kept if they are proven to be those that were generated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec import structs

from memserve.router.proxy.proof import num_proven, question
from memserve.router.proxy.recovery_policy import openai_text, resumption
from memserve.router.request import Api, GenerationRequest

from .greedy_server import GreedyServer
from .recovery_harness import LETTERS, PROMPT, SERVER, TOKENIZER, openai, proven, seen_of, tokens_of


@pytest.mark.parametrize("api", [Api.CHAT, Api.COMPLETIONS])
def test_the_tokens_of_an_openai_answer_are_kept_if_they_are_proven(api: Api) -> None:
    server = GreedyServer(TOKENIZER, LETTERS)
    call = openai(api, min_tokens=12, stop=["zzz"])
    seen = seen_of(call, server.stream(call, PROMPT, [1])[:11])
    count = 11 - (api is Api.CHAT)  # its first event names the role
    ids = proven(server, openai_text(call, seen))
    assert len(ids) == count
    going = resumption(call, seen, tokens_of(server, ids))
    assert going.num_kept == count - 2, "a stop string may have begun"
    assert (going.call.body["max_tokens"], going.call.body["min_tokens"]) == (42 - count, 14 - count)
    name = "input_ids" if api is Api.CHAT else "prompt"
    assert going.call.body[name] == PROMPT + ids[:-2]
    assert resumption(call, seen, tokens_of(server)).num_kept == 0


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{}]},
        {"response_format": {"type": "json_object"}},
        {"frequency_penalty": 1},
        {"logprobs": True},
        {"n": 2},
        {"logit_bias": {"7": 1}},
        {"something_new": 1},
    ],
)
def test_openai_answers_that_look_back_are_done_again(field: Any) -> None:
    call = openai(Api.CHAT)
    seen = seen_of(call, SERVER.stream(call, PROMPT, [1])[:12])
    assert openai_text(call, seen)
    more = structs.replace(call, body={**call.body, **field}, num_samples=field.get("n", 1))
    assert openai_text(more, seen) is None
    assert openai_text(openai(Api.COMPLETIONS, max_tokens=None), seen) is None
    seen.choices[0].parts["reasoning_content",] = "hm"
    assert openai_text(call, seen) is None


def answer_to(asked: GenerationRequest, likeliest: Sequence[int]) -> bytes:
    """As SGLang: for the last token of the prompt before, and each that follows."""
    ids: Any = asked.body["input_ids"]
    start: Any = asked.body["logprob_start_len"]
    read = [[None, ids[start], None], *([-0.1, one, None] for one in ids[start + 1 :])]
    tops = [None, *([[-0.1, one, None]] for one in likeliest)]
    return json.dumps({"meta_info": {"input_token_logprobs": read, "input_top_logprobs": tops}}).encode()


def test_tokens_are_proven_up_to_the_first_that_is_not_the_likeliest() -> None:
    asked = question(openai(Api.CHAT, extra_key="k"), [1, 2, 3], [4, 5, 6])
    body = asked.body
    assert (asked.api, body["input_ids"], body["extra_key"]) == (Api.GENERATE, [1, 2, 3, 4, 5, 6], "k")
    assert not asked.is_stream
    assert num_proven([4, 5, 6], answer_to(asked, [4, 5, 6])) == 3
    assert num_proven([4, 5, 6], answer_to(asked, [4, 7, 6])) == 1
    assert num_proven([4, 5, 6], answer_to(asked, [7, 5, 6])) == 0
    assert num_proven([4, 5, 7], answer_to(asked, [4, 5, 6])) == 0, "it has read something else"


@pytest.mark.parametrize("answer", [b"", b"{}", b"[]", b'{"meta_info": {}}', b"1"])
def test_what_proves_nothing_proves_nothing(answer: bytes) -> None:
    assert num_proven([1, 2], answer) == 0
