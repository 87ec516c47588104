"""Values for the fields of a request, from the router's table: at the bounds, past them, and of other kinds.

Knows no servers.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from memserve.router.field_kinds import (
    Boolean,
    GrammarText,
    Internal,
    Kind,
    Nested,
    Number,
    ProcessorParams,
    PromptPosition,
    Regexes,
    String,
    Strings,
    TokenBiases,
    TokenIds,
    TopTokens,
)
from memserve.router.request import Api
from memserve.router.sglang_api import FIELDS, In, fields_of

VOCABULARY, CONTEXT = 260, 8192
"""Of the tiny model."""


def nested(depth: int, inner: Any = "x") -> Any:
    """A JSON schema of objects within objects."""
    return inner if depth == 0 else {"type": "object", "properties": {"a": nested(depth - 1, inner)}}


WRONG: list[Any] = [
    *(0, 1, -1, 5, 1.5, 2**31, 2**63, 2**64, -(2**70), 10**400, 1e39, 1e308, -1e308, math.nan, math.inf),
    *(True, False, "", "x", "\x00", "\U0001f600" * 500, "x" * 100_000, "-5", "([{" * 5000),
    *([], [5], [10**6], [None], ["x"], [[5]], [1.5], [True], [{}], [[]], [5] * 5000),
    *({}, {"5": 1}, {"a": 1}, {"a": {"b": {"c": {}}}}, {"type": "x"}, {"": None}, nested(300)),
]
REGEXES = ["", "a", "x{3,9}", "(.+)+\x00", r"([\s\S]+)+\x00", "(a|a)*b", "^", "$", ".*", "(?=a)", r"\Z", "(["]
PATTERNS = ["a", "[a-z]{2,5}", "(a{1,99}){1,99}", "(" * 90 + "a" + ")" * 90, "[", "(?!x)", ".*", "\x00", ""]
SCHEMAS = [
    "{}",
    '{"$ref": "#"}',
    '{"type": "banana"}',
    "{",
    "[]",
    "5",
    '{"enum": []}',
    '{"type": "string", "pattern": "(["}',
    '{"type": "integer", "minimum": 5, "maximum": 1}',
    '{"allOf": [{"type": "string"}, {"type": "integer"}]}',
    '{"type": "array", "minItems": 1000000000}',
    '{"type": "string", "minLength": 100000}',
    json.dumps({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, nested(40)]}}, "$ref": "#/$defs/a"}),
    json.dumps(nested(90, {"type": "integer"})),
]
EBNFS = [
    'root ::= "a"',
    "root ::= (",
    "root ::= root",
    'root ::= "a" root | "b"',
    "",
    "x ::= y",
    'root ::= ""',
]
TAGS = [
    "{}",
    "[]",
    '{"type": "structural_tag", "format": {"type": "x"}}',
    '{"structures": [], "triggers": []}',
]


def _numbers(kind: Number) -> list[Any]:
    step = 1 if kind.is_whole else (kind.highest - kind.lowest) / 1000
    inside = [kind.lowest, kind.highest, kind.lowest + step, 1, 2]
    return [*inside, kind.lowest - step, kind.highest + step, float(kind.lowest), 1e-45, 1e-300]


def _counts(highest: int) -> list[Any]:
    return [-1, 0, 1, 2, highest - 1, highest, highest + 1, highest + 2, 3.0]


EDGES: dict[type[Kind], Callable[[Any], list[Any]]] = {
    Number: _numbers,
    TopTokens: lambda kind: [*_counts(min(kind.highest, VOCABULARY)), 128, 129],
    PromptPosition: lambda _: [*_counts(CONTEXT), -2],
    TokenIds: lambda _: [
        *([], [0], [VOCABULARY - 1], [VOCABULARY], [VOCABULARY + 1], [-1], [0, -1], list(range(VOCABULARY))),
        *([5] * 300, [2**31], [2**63], [2**70], [[0], [1]], [[VOCABULARY]]),
    ],
    TokenBiases: lambda kind: [
        {"0": kind.bias.lowest},
        {str(VOCABULARY - 1): kind.bias.highest},
        {str(VOCABULARY): 1},
        {"-1": 1},
        {"0": kind.bias.highest * 1.5},
        {"5": 1e39},
        {"5": math.nan},
        {str(token): kind.bias.lowest for token in range(VOCABULARY)},
        {str(token): kind.bias.highest for token in range(VOCABULARY)},
        {"05": 1},
        {" 5": 1},
        {"5": None},
    ],
    Boolean: lambda _: [True, False],
    String: lambda _: ["", "x", "\x00", "x" * 100_000],
    Strings: lambda _: [
        "",
        "a",
        "e",
        ["a", ""],
        ["x"] * 32,
        ["x"] * 33,
        "y" * 1024,
        "y" * 1025,
        [None],
        "\x00",
    ],
    Regexes: lambda _: [*REGEXES, REGEXES[:3], ["a"] * 32, "a" * 257, "(" * 128 + ")" * 128],
    Nested: lambda _: [{}, [], nested(40), nested(99), nested(101), {"pattern": "(" * 99}],
    GrammarText: lambda _: [*PATTERNS, *SCHEMAS, *EBNFS, *TAGS],
    ProcessorParams: lambda _: [
        {},
        {"a": 1},
        {"a": [1, None]},
        {"a": {"b": 1.5}},
        {"a": {"b": {}}},
        {"a": 2**64},
    ],
    Internal: lambda _: [0, 5, "127.0.0.1", [5], {"a": 1}, True],
}
"""The values at the bounds of each kind, and just outside."""
CONTENTS: list[Any] = ["", None, 5, [], [{"type": "x"}], {}, "x" * 9000, [{"type": "text", "text": "a"}]]
MESSAGES = [("user", content) for content in CONTENTS]
MESSAGES += [(role, "x") for role in ("alien", "tool", "assistant", "", "developer")]
BY_NAME: dict[str, list[Any]] = {
    "text": ["", "hi", ["a", "b"], [], [""], ["a"] * 9, "x" * 8191, "x" * 8192, "\x00", "\ufeff\u2028"],
    "input_ids": [[], [0], [VOCABULARY - 1], [VOCABULARY], [-1], [[1], [2]], [[]], [5] * 8191, [5] * 8192],
    "input_embeds": [
        [[0.1, 0.2]],
        [[0.1] * 64],
        [[0.1] * 64] * 4,
        [[[0.1] * 64]],
        [[1, 2], [3]],
        [["a"]],
        [[1e39]],
    ],
    "messages": [[{"role": role, "content": content}] for role, content in MESSAGES],
    "prompt": ["", "hi", ["a", "b"], [5], [[5], [6]], ["a", [5]], [VOCABULARY], "x" * 8192, [None]],
    "response_format": [
        *({"type": "text"}, {"type": "json_object"}, {"type": "json_schema"}, {"type": "x"}),
        *(
            {"type": "json_schema", "json_schema": {"name": "x", "schema": json.loads(one)}}
            for one in SCHEMAS[:3]
        ),
        {"type": "structural_tag", "format": {"type": "x"}},
    ],
    "tools": [
        [{"type": "function", "function": {"name": "f"}}],
        [{"type": "function", "function": {"name": "f", "parameters": nested(40)}}],
        [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}],
        [{"type": "x"}],
    ],
    "tool_choice": ["auto", "required", "none", {"type": "function", "function": {"name": "f"}}],
    "stream_options": [{"include_usage": True}, {"include_usage": "x"}, 5, []],
    "return_hidden_states": [True, False, "last", "x"],
    "session_params": [{}, {"id": "nope"}, {"id": 5}],
    "image_data": ["nope", ["nope"], "data:image/png;base64,AAAA"],
    "rid": ["job-1", "a\r\nb", ["x", "x"], ["x", "y"], "x" * 10_000, "\x00"],
    "sampling_logprobs_mode": ["selected", "support", "x"],
    "json_schema": SCHEMAS,
    "regex": PATTERNS,
    "ebnf": EBNFS,
    "structural_tag": TAGS,
}
COMPANIONS: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True},
    "top_logprobs_num": {"return_logprob": True},
    "token_ids_logprob": {"return_logprob": True},
    "logprob_start_len": {"return_logprob": True},
    "return_text_in_logprobs": {"return_logprob": True},
}
"""Without these fields the field has no effect."""
IN_SAMPLING: list[dict[str, Any]] = [
    *({}, {"temperature": 1}, {"temperature": 1, "top_p": 0.9}, {"temperature": 1e-6, "top_k": 5}),
    *({"temperature": 1, "min_p": 0.1}, {"min_new_tokens": 2}, {"sampling_seed": 5, "temperature": 1}),
]
IN_OPENAI: list[dict[str, Any]] = [
    *({}, {"top_p": 0.9}, {"temperature": 1, "top_k": 5}, {"min_tokens": 2}, {"n": 2})
]
OUTPUT_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Drawn:
    """A request with odd values."""

    api: Api
    body: dict[str, Any]
    fields: tuple[str, ...]
    """The fields that have a value of the table, for the report."""

    def raw(self) -> bytes:
        """The body; NaN and Infinity are written as Python writes them, which is not JSON."""
        return json.dumps(self.body).encode()


def values_of(where: In, name: str) -> list[Any]:
    """The values at the bounds of a field."""
    kind = FIELDS[name].kind_in(where)
    edges = EDGES[type(kind)](kind) if kind is not None and name not in BY_NAME else BY_NAME.get(name, [])
    each = [[edge, edge] for edge in edges[:6]] if FIELDS[name].is_per_prompt else []
    return [*edges, *each]


def draw(rng: random.Random, name: str | None = None, where: In | None = None) -> Drawn:
    """A request in which one field, or two, have an odd value; `name` and `where` choose the first."""
    where = where or rng.choice(list(In))
    chosen = [name or rng.choice([name for name, _ in fields_of(where)])]
    if rng.random() < 0.4:
        chosen.append(rng.choice([name for name, _ in fields_of(where)]))
    odd: dict[str, Any] = {}
    for one in chosen:
        odd |= COMPANIONS.get(one, {})
        odd[one] = rng.choice(values_of(where, one) or WRONG) if rng.random() < 0.75 else rng.choice(WRONG)
    api, body = base(rng, where, odd)
    if rng.random() < 0.3 and "stream" not in odd:
        body["stream"] = True
    return Drawn(api, body, tuple(f"{where.name}.{one}".lower() for one in chosen))


def base(rng: random.Random, where: In, odd: dict[str, Any]) -> tuple[Api, dict[str, Any]]:
    """The endpoint and the body with the fields `odd` in the object `where`."""
    if where in (In.NATIVE, In.SAMPLING):
        params: dict[str, Any] = {
            "max_new_tokens": OUTPUT_TOKENS,
            "temperature": 0,
            **rng.choice(IN_SAMPLING),
        }
        prompts: Sequence[dict[str, Any]] = [
            {"text": "hi"},
            {"text": ["hi", "you"]},
            {"input_ids": [40, 41, 42]},
        ]
        prompt = {} if {"text", "input_ids", "input_embeds"} & odd.keys() else rng.choice(prompts)
        if where is In.SAMPLING:
            return Api.GENERATE, {**prompt, "sampling_params": {**params, **odd}}
        return Api.GENERATE, {**prompt, "sampling_params": params, **odd}
    common = {"model": "default", "max_tokens": OUTPUT_TOKENS, "temperature": 0, **rng.choice(IN_OPENAI)}
    if where is In.CHAT:
        return Api.CHAT, {**common, "messages": [{"role": "user", "content": "hi"}], **odd}
    return Api.COMPLETIONS, {**common, "prompt": rng.choice(["hi", ["hi", "you"], [40, 41]]), **odd}
