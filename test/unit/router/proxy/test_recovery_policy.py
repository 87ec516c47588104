"""Recovery policy and splicers: a stream that broke anywhere continues as an undisturbed one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from memserve.router.proxy.recovery import StreamState
from memserve.router.proxy.recovery_policy import (
    SAMPLES,
    PromptTokens,
    accepted_prefix,
    closing_events,
    not_resumable,
    plan_resumption,
)
from memserve.router.proxy.stream_splicer import AcceptedPrefix, Diverged
from memserve.router.request import Api, GenerationRequest

from .greedy_server import GreedyServer
from .recovery_harness import (
    LETTERS,
    PROMPT,
    SAID,
    SCRIPT,
    SERVER,
    TOKENIZER,
    native,
    openai,
    seen_of,
    tokens_of,
)


def told(call: GenerationRequest, events: Sequence[bytes]) -> Any:
    """The content of whole events: each choice's text, ids and end, and the usage."""
    state = StreamState(call)
    for event in events:
        state.note(event)
    seen = state.received()
    last: Any = {}
    for event in events:
        if event.startswith(b"data: {"):
            last = json.loads(event[6:])
    choices = {i: (one.parts, one.is_finished) for i, one in seen.choices.items()}
    meta = {k: v for k, v in last.get("meta_info", {}).items() if k != "id"}
    return choices, seen.is_done, meta, last.get("usage"), seen.head, len(seen.choices)


def broken(
    server: GreedyServer,
    call: GenerationRequest,
    cuts: Sequence[tuple[int, Sequence[int]]],
    last: Sequence[int],
) -> tuple[list[bytes], list[int]]:
    """The events if servers are lost after so many each, and the accepted tokens of each resumption."""
    got, num_accepted = list[bytes](), list[int]()
    state, asked, rewrite = StreamState(call), call, None
    for count, groups in [*cuts, (1 << 30, last)]:
        prompt: Any = asked.body.get("input_ids") or asked.body.get("prompt") or PROMPT
        for event in server.stream(asked, prompt, groups)[:count]:
            own = rewrite(event) if rewrite else event
            if own:
                got.append(own)
                state.note(own)
        if count == 1 << 30:
            break
        seen = state.received()
        rest = closing_events(call, seen)
        if rest is not None:
            got.append(rest)
            break
        going = plan_resumption(call, seen, tokens_of(server))
        num_accepted.append(going.num_accepted)
        asked, rewrite = going.request, going.splicer.rewrite
    return [event for event in got if event], num_accepted


def one_by_one(cuts: list[tuple[int, list[int]]]) -> list[tuple[int, list[int]]]:
    """Whether an incremental stream holds the beginning of a stop string depends on its token groups."""
    return [(count, [1]) for count, _ in cuts]


GROUPS = st.lists(st.integers(1, 4), min_size=1, max_size=4)
CUTS = st.lists(st.tuples(st.integers(1, 45), GROUPS), min_size=1, max_size=3)
STOPS = st.lists(
    st.integers(0, len(SAID) - 1).flatmap(lambda i: st.integers(1, 9).map(lambda n: SAID[i : i + n])),
    max_size=2,
)


@given(CUTS, GROUPS, STOPS, st.integers(1, 60), st.booleans())
def test_resumed_native_stream_equals_an_undisturbed_one(
    cuts: list[tuple[int, list[int]]], last: list[int], stops: list[str], most: int, incremental: bool
) -> None:
    if stops and incremental:
        cuts, last = one_by_one(cuts), [1]
    server = replace(SERVER, is_incremental=incremental)
    call = native(stop=stops, max_new_tokens=most)
    whole = told(call, server.stream(call, PROMPT, last))
    got, _ = broken(server, call, cuts, last)
    assert told(call, got) == whole


@given(
    CUTS,
    GROUPS,
    STOPS,
    st.integers(1, 60),
    st.sampled_from([Api.CHAT, Api.COMPLETIONS]),
    st.booleans(),
)
def test_resumed_openai_stream_equals_an_undisturbed_one(
    cuts: list[tuple[int, list[int]]],
    last: list[int],
    stops: list[str],
    most: int,
    api: Api,
    include_usage: bool,
) -> None:
    if stops:
        cuts, last = one_by_one(cuts), [1]
    call = openai(api, stop=stops, max_tokens=most, stream_options={"include_usage": include_usage})
    groups = cuts[0][1]
    whole, got = SERVER.stream(call, PROMPT, groups), broken(SERVER, call, cuts, last)[0]
    assert told(call, got) == told(call, whole)


def test_streamed_tokens_become_a_part_of_the_prompt() -> None:
    call = native(max_new_tokens=30, min_new_tokens=12, ignore_eos=True)
    server = GreedyServer(TOKENIZER, LETTERS)
    seen = seen_of(call, server.stream(call, PROMPT, [1])[:10])
    going = plan_resumption(call, seen, tokens_of(server))
    assert going.num_accepted == 10
    params: Any = going.request.body["sampling_params"]
    assert going.request.body["input_ids"] == PROMPT + seen.choices[0].ids
    assert (params["max_new_tokens"], params["min_new_tokens"]) == (20, 2)
    assert params["ignore_eos"], "the rest is as it was"
    assert len(call.body["input_ids"]) == len(PROMPT), "the call itself is not changed"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("params", "num_accepted"),
    [
        ({}, 12),
        ({"stop": ["12345"]}, 8),
        ({"frequency_penalty": 0.5}, 0),
        ({"presence_penalty": -1}, 0),
        ({"repetition_penalty": 1.1}, 0),
        ({"repetition_penalty": 1.0, "presence_penalty": 0}, 12),
        ({"json_schema": "{}"}, 0),
        ({"regex": "a*"}, 0),
        ({"stop_regex": "a+"}, 0),
        ({"max_new_tokens": None}, 0),
        ({"something_new": True}, 0),
    ],
)
def test_request_whose_next_token_needs_more_than_tokens_resumes_from_the_prompt(
    params: Any, num_accepted: int
) -> None:
    """The stop string has five characters: the last four may be its beginning."""
    call = native(**params)
    server = GreedyServer(TOKENIZER, LETTERS)
    seen = seen_of(call, server.stream(call, PROMPT, [1])[:12])
    going = plan_resumption(call, seen, tokens_of(server))
    assert going.num_accepted == num_accepted
    if not num_accepted:
        assert going.request is call


@pytest.mark.parametrize("field", ["lora_path", "image_data", "return_logprob", "return_prompt_token_ids"])
def test_request_with_more_than_tokens_resumes_from_the_prompt(field: str) -> None:
    call = native()
    seen = seen_of(call, SERVER.stream(call, PROMPT, [1])[:12])
    more = structs.replace(call, body={**call.body, field: True})
    assert plan_resumption(more, seen, tokens_of(SERVER)).request is more
    assert plan_resumption(call, seen, PromptTokens()).request is call


def test_accepted_prefix_ends_at_a_whole_character() -> None:
    ids = TOKENIZER.encode(" 🐍").ids
    halves = [SERVER.text_after(PROMPT, ids[: count + 1]) for count in range(len(ids))]
    assert [half.endswith("�") for half in halves].count(True) >= 2, "a character of several tokens"
    kept = accepted_prefix(ids[:-1], " ", [], lambda some: SERVER.text_after(PROMPT, some))
    assert kept.text in ("", " ")
    assert accepted_prefix(ids, " 🐍", [], lambda some: SERVER.text_after(PROMPT, some)) == AcceptedPrefix(
        tuple(ids), " 🐍"
    )


def test_accepted_prefix_is_empty_if_its_text_differs() -> None:
    assert accepted_prefix([1, 2, 3], "abc", [], lambda ids: "x" * len(ids)) == AcceptedPrefix()
    assert accepted_prefix([1, 2, 3], "abc", [], lambda ids: "") == AcceptedPrefix(), "the text is not known"


# ---- who is continued


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({}, None),
        ({"temperature": 1e-9}, None),
        ({"temperature": 0.7, "top_k": 1}, None),
        ({"temperature": 0.7}, SAMPLES),
        ({"temperature": None}, SAMPLES),
        ({"temperature": 0.7, "sampling_seed": 7}, SAMPLES),
        ({"beam_width": 4}, "beam_width is set"),
    ],
)
def test_greedy_requests_are_resumable(params: Any, reason: str | None) -> None:
    assert not_resumable(native(**params), is_deterministic=False) == reason
    expected = None if reason is SAMPLES else reason
    assert not_resumable(native(**params), is_deterministic=True) == expected


def test_batch_is_resumable_only_if_every_prompt_is_greedy() -> None:
    params = [{"temperature": 0}, {"temperature": 0}]
    body = {"input_ids": [[1], [2]], "sampling_params": params}
    call = GenerationRequest(Api.GENERATE, body, "x", False, ("x", "y"), 2, 1, None)
    assert not_resumable(call, is_deterministic=False) is None
    params[1]["temperature"] = 1
    assert not_resumable(call, is_deterministic=False) is SAMPLES
    assert not_resumable(openai(Api.CHAT, temperature=None), is_deterministic=False) is SAMPLES


def test_request_with_a_session_is_not_resumable() -> None:
    call = native()
    call = structs.replace(call, body={**call.body, "session_params": {"id": "s"}})
    assert not_resumable(call, is_deterministic=True) == "session_params is set"


# ---- what follows


def test_closing_events_are_what_a_client_with_the_whole_answer_lacks() -> None:
    for call in (native(), openai(Api.CHAT), openai(Api.COMPLETIONS)):
        *events, done = SERVER.stream(call, PROMPT, [1])
        assert closing_events(call, seen_of(call, events)) == done
        assert closing_events(call, seen_of(call, [*events, done])) == b""
        assert closing_events(call, seen_of(call, events[:-1])) is None
    call = openai(Api.CHAT, stream_options={"include_usage": True})
    *events, usage, _ = SERVER.stream(call, PROMPT, [1])
    assert closing_events(call, seen_of(call, events)) is None, "what it used is not told yet"
    assert closing_events(call, seen_of(call, [*events, usage])) is not None


@pytest.mark.parametrize("call", [native(presence_penalty=1), openai(Api.CHAT), openai(Api.COMPLETIONS)])
def test_splicer_raises_diverged_for_a_different_answer(call: GenerationRequest) -> None:
    other = GreedyServer(TOKENIZER, SCRIPT[::-1])
    seen = seen_of(call, SERVER.stream(call, PROMPT, [1])[:8])
    rewrite = plan_resumption(call, seen, PromptTokens(PROMPT)).splicer.rewrite
    events = other.stream(call, PROMPT, [1])
    with pytest.raises(Diverged):
        list(map(rewrite, events))


@pytest.mark.parametrize("call", [native(presence_penalty=1), openai(Api.CHAT), openai(Api.COMPLETIONS)])
def test_splicer_raises_diverged_for_a_shorter_answer(call: GenerationRequest) -> None:
    seen = seen_of(call, SERVER.stream(call, PROMPT, [1])[:20])
    short = native(max_new_tokens=3) if call.api is Api.GENERATE else openai(call.api, max_tokens=3)
    rewrite = plan_resumption(call, seen, PromptTokens(PROMPT)).splicer.rewrite
    events = SERVER.stream(short, PROMPT, [1])
    with pytest.raises(Diverged):
        list(map(rewrite, events))


def chunk(delta: Any, index: int = 0, **said: Any) -> bytes:
    choice = {"index": index, "delta": delta, "finish_reason": None, **said}
    return b"data: " + json.dumps({"id": "x", "created": 1, "choices": [choice]}).encode() + b"\n\n"


def tool(number: int, arguments: str, name: str | None = None, call_id: str | None = None) -> Any:
    return {
        "tool_calls": [{"index": number, "id": call_id, "function": {"name": name, "arguments": arguments}}]
    }


def test_splicer_continues_reasoning_and_tool_calls() -> None:
    call = openai(Api.CHAT, tools=[{}])
    first = [
        chunk({"role": "assistant", "content": ""}),
        chunk({"reasoning_content": "hm, "}),
        chunk({"content": "so"}),
        chunk(tool(0, "", "noon", "call_1")),
        chunk(tool(0, '{"ci')),
    ]
    again = [
        chunk({"role": "assistant", "content": ""}),
        chunk({"reasoning_content": "hm"}),
        chunk({"reasoning_content": ", "}),
        chunk({"content": "so"}),
        chunk(tool(0, "", "noon", "call_2")),
        chunk(tool(0, '{"city"')),
        chunk(tool(0, ": 1}")),
        chunk(tool(1, "", "late", "call_3")),
        chunk({}, finish_reason="tool_calls"),
        b"data: [DONE]\n\n",
    ]
    rewrite = plan_resumption(call, seen_of(call, first), PromptTokens()).splicer.rewrite
    rest = [own for event in again if (own := rewrite(event))]
    assert [json.loads(event[6:])["choices"][0]["delta"] for event in rest[:-1]] == [
        tool(0, 'ty"'),
        tool(0, ": 1}"),
        tool(1, "", "late", "call_3"),
        {},
    ]


def test_splicer_continues_each_choice_by_itself() -> None:
    call = structs.replace(openai(Api.CHAT, n=2), num_samples=2)
    first = [chunk({"content": "a"}, 0), chunk({"content": "bcd"}, 1), chunk({}, 1, finish_reason="stop")]
    again = [
        chunk({"content": "bc"}, 1),
        chunk({"content": "ab"}, 0),
        chunk({"content": "d"}, 1),
        chunk({}, 1, finish_reason="stop"),
        chunk({}, 0, finish_reason="stop"),
    ]
    rewrite = plan_resumption(call, seen_of(call, first), PromptTokens()).splicer.rewrite
    rest = [json.loads(own[6:]) for event in again if (own := rewrite(event))]
    assert rest == [json.loads(event[6:]) for event in (chunk({"content": "b"}, 0), again[-1])]


def test_splicer_sends_logprobs_once() -> None:
    call = openai(Api.COMPLETIONS, logprobs=1)

    def event(text: str, *values: float) -> bytes:
        logprobs = {"tokens": list(text), "token_logprobs": list(values)}
        said = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": None}
        return b"data: " + json.dumps({"id": "x", "choices": [said]}).encode() + b"\n\n"

    rewrite = plan_resumption(call, seen_of(call, [event("ab", -0.1, -0.2)]), PromptTokens()).splicer.rewrite
    assert rewrite(event("a", -0.10001)) == b""
    rest = json.loads(rewrite(event("bc", -0.2, -0.3))[6:])["choices"][0]
    assert (rest["text"], rest["logprobs"]) == ("c", {"tokens": ["c"], "token_logprobs": [-0.3]})
