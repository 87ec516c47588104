"""What a pair answers of its first token, which prefill computes, agrees with the rest of the answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import Pair

TEXT = "The quick brown fox jumps over the lazy dog"
NUM_TOKENS = 4


def metas(pair: Pair, stream: bool, **body: Any) -> dict[int, Any]:
    """The last `meta_info` of each prompt."""
    params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": NUM_TOKENS}
    asked = {"sampling_params": params, "return_logprob": True, "stream": stream, **body}
    response = pair.post("/generate", asked)
    assert response.status_code == 200, response.text
    if stream:
        events = [event for event in response.text.split("\n\n") if event.startswith("data: {")]
        items = [json.loads(event[6:]) for event in events]
        return {item.get("index", 0): item["meta_info"] for item in items}
    whole = response.json()
    return dict(enumerate(item["meta_info"] for item in (whole if isinstance(whole, list) else [whole])))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("texts", [TEXT, [TEXT, "abc"]])
def test_each_token_has_its_logprob_among_those_of_given_ids(
    pair: Pair, texts: str | list[str], stream: bool
) -> None:
    """The ids asked for are the generated tokens, so each logprob is told twice."""
    for index, told in metas(pair, False, text=texts).items():
        text = texts if isinstance(texts, str) else texts[index]
        ids = [token[1] for token in told["output_token_logprobs"]]
        (again,) = metas(pair, stream, text=text, token_ids_logprob=ids).values()
        rows = again["output_token_ids_logprobs"]
        assert len(rows) == NUM_TOKENS
        for number, (logprob, _, _) in enumerate(again["output_token_logprobs"]):
            assert rows[number][number][0] == pytest.approx(logprob, abs=1e-3)


def test_pair_refuses_what_it_cannot_answer(pair: Pair) -> None:
    response = pair.post("/generate", {"text": TEXT, "return_hidden_states": True})
    assert response.status_code == 400
    assert "hidden states" in response.json()["error"]["message"]
