"""Strategies for request bodies: any JSON, and damaged valid ones."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

NUMBERS = st.sampled_from([0, 1, -1, 3, 128, 129, 2**31, 2**63, 2**64, -(2**63), 0.5, -0.0, 1e308, 10**30])
TEXTS = st.sampled_from(
    [
        "",
        "a",
        "hello",
        " ",
        "\x00",
        "\ud7ff",
        "é" * 9,
        "𝕏",
        "x" * 300,
        "<|im_start|>",
        "{{ x }}",
        "default",
    ]
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
NAMES = st.sampled_from(
    [
        *(
            "text",
            "input_ids",
            "input_embeds",
            "sampling_params",
            "stream",
            "rid",
            "model",
            "messages",
            "prompt",
        ),
        *("role", "content", "n", "temperature", "max_new_tokens", "max_tokens", "stop", "logprobs", "echo"),
        *("return_logprob", "stream_options", "include_usage", "cache_salt", "extra_key", "user", "tools"),
        *("tool_calls", "function", "arguments", "name", "type", "image_url", "lora_path", "session_id"),
        *("regex", "json_schema", "response_format", "priority", "bootstrap_host", "bootstrap_room", ""),
        *("continue_final_message", "chat_template_kwargs", "tool_choice", "max_completion_tokens", "seed"),
    ]
)
ANY = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
VALID: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"text": "hello", "sampling_params": {"temperature": 0, "max_new_tokens": 3}}),
    ("/generate", {"text": ["a", "b"], "sampling_params": [{"n": 2}, {"n": 2}], "rid": ["x", "y"]}),
    ("/generate", {"input_ids": [[1, 2], [3]], "return_logprob": True, "stream": True}),
    ("/v1/completions", {"model": "default", "prompt": ["a", "b"], "echo": True, "logprobs": 1, "n": 2}),
    ("/v1/completions", {"prompt": [1, 2], "max_tokens": 2, "stream": True, "stop": ["x"]}),
    ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 2, "stream": True, "user": "u"}),
    (
        "/v1/chat/completions",
        {"messages": [*CHAT, CALLING]},
    ),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}),
    ("/v1/chat/completions", {"messages": CHAT, "tools": [TOOL], "tool_choice": "auto", "n": 2}),
]


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, Any]:
    """A path, and a valid body of it of which up to three parts are something else, or gone, or added."""
    path, body = draw(st.sampled_from(VALID))
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = body
        while True:
            parts = holder.values() if isinstance(holder, dict) else holder
            inner = [one for one in parts if one and isinstance(one, dict | list)]
            if not inner or draw(st.booleans()):
                break
            holder = draw(st.sampled_from(inner))
        _damage(draw, holder)
    return path, body


def _damage(draw: st.DrawFn, holder: Any) -> None:
    places = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    kind = draw(st.sampled_from(["change", "remove", "add"]))
    if isinstance(holder, dict) and (kind == "add" or not places):
        holder[draw(NAMES)] = draw(ANY)
    elif kind == "add" or not places:
        holder.append(draw(ANY))
    elif kind == "remove":
        del holder[draw(st.sampled_from(places))]
    else:
        holder[draw(st.sampled_from(places))] = draw(ANY)
