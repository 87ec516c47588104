"""Requests that the router refuses before it sends anything."""

from __future__ import annotations

import ast
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.core.errors import BadRequest
from memserve.router.proxy.validation import Limits, read_body, read_request
from memserve.router.request import Api, GenerationRequest
from memserve.router.sglang_api import SAMPLING_FIELDS, In, fields_of

LIMITS = Limits(vocab_size=100, context_tokens=8)
HELLO = [{"role": "user", "content": "hello"}]


def read(api: Api, body: dict[str, Any], limits: Limits = LIMITS) -> GenerationRequest:
    return read_request(api, body, limits, new_rid="new")


def generate(**body: Any) -> GenerationRequest:
    return read(Api.GENERATE, body)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"  \n",
        b"{",
        b"nonsense",
        b"[]",
        b'"text"',
        b"null",
        b"\xff\xfe",
        b'{"a": NaN}',
        b'{"a": 1} x',
        b'{"a": "\xff"}',
        b"[" * 10**6,
    ],
)
def test_body_that_is_not_a_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        read_body(raw)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "text"),
        ({"text": None}, "text"),
        ({"text": 5}, "text"),
        ({"text": []}, "text"),
        ({"text": ["a", 5]}, "text[1]"),
        ({"text": ""}, "text"),
        ({"text": ["a", ""]}, "text[1]"),
        ({"text": "a", "input_ids": [1]}, "input_ids"),
        ({"text": "a", "stream": "yes"}, "stream"),
        ({"text": "a", "stream": 1}, "stream"),
        ({"input_ids": "1 2"}, "input_ids"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [[]]}, "input_ids[0]"),
        ({"input_ids": [[1], []]}, "input_ids[1]"),
        ({"input_ids": [[1], 2]}, "input_ids[1]"),
        ({"input_ids": [1, [2]]}, "input_ids[1]"),
        ({"input_ids": [1, 100]}, "input_ids[1]"),
        ({"input_ids": [-1, 5]}, "input_ids[0]"),
        ({"input_ids": [1, True]}, "input_ids[1]"),
        ({"input_ids": [1.0]}, "input_ids[0]"),
        ({"input_ids": [None]}, "input_ids[0]"),
        ({"input_ids": ["1"]}, "input_ids[0]"),
        ({"input_ids": [[1, 2], [3, 2**70]]}, "input_ids[1][1]"),
        ({"input_ids": [1] * 8}, "input_ids"),
        ({"input_ids": [[1], [1] * 8]}, "input_ids[1]"),
        ({"input_embeds": [1.0]}, "input_embeds"),
        ({"text": "a", "sampling_params": 5}, "sampling_params"),
        ({"text": "a", "sampling_params": [{}]}, "sampling_params"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
        ({"text": ["a"], "sampling_params": [5]}, "sampling_params[0]"),
        ({"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]}, "sampling_params"),
        ({"text": "a", "sampling_params": {"max_tokens": 5}}, "sampling_params.max_tokens"),
        ({"text": "a", "sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 1.5}}, "sampling_params.max_new_tokens"),
        ({"text": "a", "sampling_params": {"max_new_tokens": True}}, "sampling_params.max_new_tokens"),
        ({"text": "a", "sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
        ({"text": "a", "sampling_params": {"temperature": math.inf}}, "sampling_params.temperature"),
        ({"text": "a", "sampling_params": {"temperature": math.nan}}, "sampling_params.temperature"),
        ({"text": "a", "sampling_params": {"top_p": 1.1}}, "sampling_params.top_p"),
        ({"text": "a", "sampling_params": {"n": 0}}, "sampling_params.n"),
        ({"text": "a", "sampling_params": {"n": 1000}}, "sampling_params.n"),
        ({"text": "a", "sampling_params": {"n": "2"}}, "sampling_params.n"),
        ({"text": "a", "rid": ""}, "rid"),
        ({"text": "a", "rid": 5}, "rid"),
        ({"text": "a", "rid": ["x"]}, "rid"),
        ({"text": ["a", "b"], "rid": ["x"]}, "rid"),
        ({"text": ["a", "b"], "rid": ["x", "x"]}, "rid"),
    ],
)
def test_generate_body_with_a_wrong_field_is_refused(body: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read(Api.GENERATE, body)
    assert caught.value.field == field
    assert field.split("[")[0].split(".")[-1] in caught.value.message


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"content": "hello"}]}, "messages[0]"),
        ({"messages": HELLO, "n": 0}, "n"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        ({"messages": HELLO, "max_completion_tokens": -5}, "max_completion_tokens"),
        ({"messages": HELLO, "temperature": "hot"}, "temperature"),
        ({"messages": HELLO, "model": 5}, "model"),
        ({"messages": HELLO, "input_ids": [500]}, "input_ids[0]"),
        ({"messages": HELLO, "input_ids": [[5]]}, "input_ids"),
    ],
)
def test_chat_body_with_a_wrong_field_is_refused(body: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read(Api.CHAT, body)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": [5, 100]}, "prompt[1]"),
        ({"prompt": [[5], [-1]]}, "prompt[1][0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "echo": "yes"}, "echo"),
    ],
)
def test_completions_body_with_a_wrong_field_is_refused(body: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read(Api.COMPLETIONS, body)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("body", "num_prompts", "num_samples"),
    [
        ({"text": "a"}, None, 1),
        ({"text": ["a"]}, 1, 1),
        ({"input_ids": [0, 99]}, None, 1),
        ({"input_ids": [[1], [2]]}, 2, 1),
        ({"input_embeds": [[0.5]]}, None, 1),
        ({"input_embeds": [[[0.5]]]}, 1, 1),
        ({"text": "a", "sampling_params": {"n": 3}}, None, 3),
        ({"text": "a", "sampling_params": {"n": 3, "beam_width": 4}}, None, 1),
        ({"text": ["a", "b"], "sampling_params": [{"n": 3}, {"n": 3}]}, 2, 3),
        ({"text": "a", "sampling_params": {"max_new_tokens": 0, "temperature": 0, "top_k": -1}}, None, 1),
        ({"text": "a", "sampling_params": {"max_new_tokens": None}, "stream": None}, None, 1),
        ({"text": "a", "some_new_field": 1}, None, 1),
    ],
)
def test_generate_body_with_valid_fields_is_accepted(
    body: dict[str, Any], num_prompts: int | None, num_samples: int
) -> None:
    call = read(Api.GENERATE, body)
    assert (call.num_prompts, call.num_samples) == (num_prompts, num_samples)
    assert call.body is body


def test_prompts_of_a_batch_have_sglangs_rids() -> None:
    assert generate(text="a").rids == ("new",)
    assert generate(text="a", rid="mine").rids == ("mine",)
    assert generate(text=["a", "b"]).rids == ("new_0", "new_1")
    assert generate(text=["a", "b"], rid=["x", "y"]).rids == ("x", "y")
    assert generate(text="a", rid="mine").has_client_rid
    assert not generate(text="a").has_client_rid


def test_empty_text_is_accepted_if_the_tokenizer_adds_a_token() -> None:
    assert read(Api.GENERATE, {"text": ""}, Limits(takes_empty_text=True)).num_prompts is None


def test_unknown_limits_are_not_checked() -> None:
    unknown = Limits()
    assert read(Api.GENERATE, {"input_ids": [10**6] * 1000}, unknown).num_prompts is None
    with pytest.raises(BadRequest):
        read(Api.GENERATE, {"input_ids": [-1]}, unknown)


names = st.sampled_from(["", "a", "n", "role", "temperature"])
scalars = st.none() | st.booleans() | st.integers(-200, 200) | st.floats() | names
json_values = (
    scalars
    | st.lists(scalars | st.lists(scalars, max_size=2) | st.dictionaries(names, scalars), max_size=3)
    | st.dictionaries(names, scalars, max_size=3)
)
fields = st.sampled_from(
    ["text", "input_ids", "prompt", "messages", "sampling_params", "stream", "n", "rid", "model", "echo"]
)


@given(st.sampled_from(list(Api)), st.dictionaries(fields, json_values))
def test_any_json_is_accepted_or_refused_with_a_reason(api: Api, body: dict[str, Any]) -> None:
    try:
        call = read(api, body)
    except BadRequest:
        return
    assert len(call.rids) == (1 if call.num_prompts is None else call.num_prompts)


def fields_of_class(path: str, name: str) -> list[str]:
    """The annotated fields of a class of SGLang, those of its bases first."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        pytest.skip("sglang is not installed")
    tree = ast.parse((Path(spec.origin).parent / "srt" / path).read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def fields(name: str) -> list[str]:
        if name not in classes:
            return []
        record = classes[name]
        bases = [field for base in record.bases if isinstance(base, ast.Name) for field in fields(base.id)]
        own = (node.target for node in record.body if isinstance(node, ast.AnnAssign))
        return bases + [target.id for target in own if isinstance(target, ast.Name)]

    return fields(name)


def test_sampling_fields_equal_sglangs() -> None:
    names = fields_of_class("sampling/sampling_params.py", "SamplingParams")
    public = names[: names.index("stop_strs")]
    assert set(public) == SAMPLING_FIELDS


@pytest.mark.parametrize(
    ("where", "path", "name", "others"),
    [
        # The router's own, which SGLang ignores.
        (In.NATIVE, "managers/io_struct.py", "GenerateReqInput", {"model", "user"}),
        # Read before the model is built; known to other servers only.
        (
            In.CHAT,
            "entrypoints/openai/protocol.py",
            "ChatCompletionRequest",
            {"reasoning", "use_beam_search"},
        ),
        (In.COMPLETIONS, "entrypoints/openai/protocol.py", "CompletionRequest", {"use_beam_search"}),
    ],
)
def test_field_table_names_fields_of_sglangs_requests(
    where: In, path: str, name: str, others: set[str]
) -> None:
    assert {field for field, _ in fields_of(where)} - set(fields_of_class(path, name)) == others
