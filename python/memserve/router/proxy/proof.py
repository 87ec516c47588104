"""Which tokens a greedy answer was made of, where only its text was streamed. Pure.

OpenAI's streams tell no token ids, and a text may be made of other tokens than its tokenizer would make of
it. So a server is asked for the likeliest token at each place of `prompt + ids`, which takes one prefill:
as long as those are the ids themselves, by induction they are what a greedy server generates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import structs

from memserve.router.request import Api, GenerationRequest, JsonObject

LEAST_TOKENS = 16
"""Fewer are generated again before they are proven."""
TIMEOUT_S = 10.0
"""What takes longer to prove is generated again."""

_KEPT = ("extra_key", "cache_salt", "priority")

decode_json = msgspec.json.Decoder().decode


def question(call: GenerationRequest, prompt: Sequence[int], ids: Sequence[int]) -> GenerationRequest:
    """What a server is asked to prove that it would answer `call` with `ids`."""
    body: JsonObject = {name: call.body[name] for name in _KEPT if call.body.get(name) is not None}
    body |= {
        "input_ids": [*prompt, *ids],
        "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": max(0, len(prompt) - 1),
        "top_logprobs_num": 1,
    }
    return structs.replace(call, api=Api.GENERATE, body=body, wants_report=False)


def num_proven(ids: Sequence[int], answer: bytes) -> int:
    """How many of `ids` the answer to `question` shows to be those of a greedy server."""
    try:
        meta: Any = decode_json(answer)["meta_info"]
        read, likeliest = meta["input_token_logprobs"][-len(ids) :], meta["input_top_logprobs"][-len(ids) :]
        if [one[1] for one in read] != list(ids):
            return 0
        best = [tops[0][1] if tops else None for tops in likeliest]
    except (msgspec.DecodeError, KeyError, TypeError, IndexError):
        return 0
    return next((n for n, (one, other) in enumerate(zip(ids, best, strict=False)) if one != other), len(best))
