"""Greedy requests, a server that answers them, and the events that a client received."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memserve.router.proxy.recovery import StreamState
from memserve.router.proxy.recovery_policy import PromptTokens
from memserve.router.request import Api, GenerationRequest

from ..tokenization.token_harness import byte_level
from .greedy_server import GreedyServer

TOKENIZER = byte_level()
SAID = " The quick 日本語 brown naïve 🐍🦊 fox 中文\n jumps over café the lazy dog; it's 12345 times 한국어."
SCRIPT: list[int] = TOKENIZER.encode(SAID).ids
LETTERS: list[int] = [TOKENIZER.token_to_id(letter) for letter in "zqxjvk" * 9]
PROMPT: list[int] = TOKENIZER.encode("Say the quick brown fox: hello 🐍").ids
SERVER = GreedyServer(TOKENIZER, SCRIPT)

GREEDY = {"temperature": 0, "max_new_tokens": 40}


def native(**params: Any) -> GenerationRequest:
    body = {"input_ids": PROMPT, "stream": True, "sampling_params": {**GREEDY, **params}}
    return GenerationRequest(Api.GENERATE, body, "me", False, ("me",), None, 1, None)


def openai(api: Api, **body: Any) -> GenerationRequest:
    asked = {"messages": []} if api is Api.CHAT else {"prompt": PROMPT}
    whole = {**asked, "stream": True, "temperature": 0, "max_tokens": 40, **body}
    return GenerationRequest(api, whole, "me", False, ("me",), None, 1, None)


def tokens_of(server: GreedyServer) -> PromptTokens:
    return PromptTokens(PROMPT, lambda ids: server.text_after(PROMPT, ids))


def seen_of(call: GenerationRequest, events: Sequence[bytes]) -> Any:
    state = StreamState(call)
    for event in events:
        state.note(event)
    return state.received()
