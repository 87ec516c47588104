"""A chat's body as SGLang hands it to the chat template: its messages, tools and further variables.

Follows the request models of SGLang's OpenAI endpoint and what `OpenAIServingChat` does with their dumps.
Raises NotTokenizable for a value that needs more of pydantic than its type, and for features that are not
followed. Pure; knows no template text and no tokenizer.
Source: SGLang 0.5.23, entrypoints/openai/protocol.py and serving_chat.py (_process_messages,
_apply_jinja_template), parser/jinja_template_utils.py (process_content_for_template_format).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import msgspec

from memserve.router.request import JsonObject, decode_json
from memserve.router.sglang_api import MULTIMODAL, REASONING, UNRENDERED
from memserve.router.tokenization.token_records import NotTokenizable

MALFORMED = "a chat that is not well formed"


class ContentFormat(Enum):
    """The form in which a template expects a message's content."""

    STRING = "string"
    PARTS = "openai"


@dataclass(frozen=True, slots=True)
class Chat:
    """The input of a template."""

    messages: list[JsonObject]
    tools: list[JsonObject] | None
    variables: Mapping[str, object]
    """The request's variables, beside those that every template gets."""
    answer_start: str | None
    """The beginning of the answer, which is tokenized after the rendered text."""


# As variables they would be arguments of transformers' functions, not of the template.
_RESERVED_VARIABLES = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "conversations",
        "documents",
        "max_length",
        "messages",
        "padding",
        "raise_exception",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "self",
        "strftime_now",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
_OTHER_ROLES = frozenset({"system", "assistant", "tool", "function", "developer", "latest_reminder", "root"})
_PHASES = ("commentary", "final_answer")
_TEXT_FIELDS = ("tool_call_id", "name", "reasoning_content")
_SCHEMA_TYPES = frozenset({"string", "number", "integer", "boolean", "array", "object", "null"})
_LONG_NUMBER = re.compile(r"\d{19}")


def read_chat(body: JsonObject, content_format: ContentFormat) -> Chat:
    """The chat in `body`, whose messages are objects with roles. Raises NotTokenizable."""
    for name, reason in UNRENDERED.items():
        if body.get(name) is not None:
            raise NotTokenizable(reason)
    given = body.get("messages")
    if not isinstance(given, list):
        raise NotTokenizable(MALFORMED)
    messages = [_message(one, content_format) for one in given]
    messages, answer_start = _take_last_answer(messages, body.get("continue_final_message"))
    if not messages:
        raise NotTokenizable(MALFORMED)
    return Chat(messages, _tools(body), _variables(body.get("chat_template_kwargs")), answer_start)


def without_wrappers(tools: list[JsonObject] | None) -> list[JsonObject] | None:
    """The bare functions of `tools`: SGLang renders again with them if a template refuses `tools`."""
    if not tools:
        return None
    functions = [tool["function"] for tool in tools]
    return [function for function in functions if isinstance(function, dict)]


def _take_last_answer(messages: list[JsonObject], continues: object) -> tuple[list[JsonObject], str | None]:
    """Without `continue_final_message` SGLang turns a last assistant message into a user message."""
    if continues not in (None, True, False):
        raise NotTokenizable(MALFORMED)
    last = messages[-1]
    content = last["content"]
    if last["role"] != "assistant" or not isinstance(content, str):
        return messages, None
    if continues:
        return messages[:-1], content
    return [*messages[:-1], {"role": "user", "content": content}], None


def _message(given: object, content_format: ContentFormat) -> JsonObject:
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise NotTokenizable(MALFORMED)
    role = given["role"]
    content = given.get("content")
    parts = _text_parts(content) if isinstance(content, list) else None
    if role == "user":
        if parts is None and not isinstance(content, str):
            raise NotTokenizable(MALFORMED)
        message: JsonObject = {"role": role, "content": content}
    else:
        message = _message_of_others(role.lower(), given)
    if parts is None:
        return message
    if content_format is ContentFormat.PARTS:
        del message["content"]  # which puts it last: a template may print the whole message
        message["content"] = [{"type": "text", "text": text} for text in parts]
    # A tool's texts are joined for every template, other texts only for templates that take a string.
    if content_format is ContentFormat.STRING or message["role"] == "tool":
        message["content"] = " ".join(parts)
    return message


def _message_of_others(role: str, given: JsonObject) -> JsonObject:
    if role not in _OTHER_ROLES:
        raise NotTokenizable(MALFORMED)
    content = given.get("content")
    if content is not None and not isinstance(content, str | list):
        raise NotTokenizable(MALFORMED)
    if given.get("tools"):
        raise NotTokenizable("tools of a message")
    if given.get("tools") is not None or given.get("prefix") is not None:
        raise NotTokenizable(MALFORMED)
    if given.get("phase") not in (None, *_PHASES):
        raise NotTokenizable(MALFORMED)
    for name in _TEXT_FIELDS:
        _check(given.get(name), str)
    message: JsonObject = {"role": role, "content": "" if content is None else content}
    for name in ("tool_call_id", "name", "phase", "reasoning_content"):
        if given.get(name) is not None:
            message[name] = given[name]
    if (calls := given.get("tool_calls")) is not None:
        if not isinstance(calls, list):
            raise NotTokenizable(MALFORMED)
        message["tool_calls"] = [_tool_call(call, parses=role == "assistant") for call in calls]
    return message


def _text_parts(content: list[object]) -> list[str]:
    texts = []
    for part in content:
        if not isinstance(part, dict):
            raise NotTokenizable(MALFORMED)
        if part.get("type") != "text":
            raise NotTokenizable(MULTIMODAL)
        if not isinstance(part.get("text"), str):
            raise NotTokenizable(MALFORMED)
        texts.append(part["text"])
    return texts


def _tool_call(given: object, *, parses: bool) -> JsonObject:
    if not isinstance(given, dict) or not isinstance(given.get("function"), dict):
        raise NotTokenizable(MALFORMED)
    if given.get("type", "function") != "function":
        raise NotTokenizable(MALFORMED)
    _check(given.get("id"), str)
    _check(given.get("index"), int)
    function = given["function"]
    _check(function.get("name"), str)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and parses:
        arguments = _arguments(arguments)
    elif arguments is not None and not isinstance(arguments, str | dict):
        raise NotTokenizable(MALFORMED)
    return {
        "id": given.get("id"),
        "index": given.get("index"),
        "type": "function",
        "function": {"name": function.get("name"), "arguments": arguments},
    }


def _arguments(text: str) -> JsonObject:
    if _LONG_NUMBER.search(text):
        raise NotTokenizable("numbers that JSON readers disagree on")
    try:
        arguments = decode_json(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise NotTokenizable(MALFORMED) from error
    if not isinstance(arguments, dict):
        raise NotTokenizable(MALFORMED)
    return arguments


def _tools(body: JsonObject) -> list[JsonObject] | None:
    given, choice = body.get("tools"), body.get("tool_choice")
    if given is None:
        return None
    if not isinstance(given, list):
        raise NotTokenizable(MALFORMED)
    tools = [_tool(one) for one in given]
    if choice == "none":
        return None
    if choice in (None, "auto", "required"):
        return tools or None
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(function, dict):
        raise NotTokenizable(MALFORMED)
    return [tool for tool in tools if _name_of(tool) == function.get("name")] or None


def _name_of(tool: JsonObject) -> object:
    function = tool["function"]
    return function["name"] if isinstance(function, dict) else None


def _tool(given: object) -> JsonObject:
    """The tool with the fields that SGLang's model adds, in the model's order."""
    if not isinstance(given, dict) or not isinstance(given.get("function"), dict):
        raise NotTokenizable(MALFORMED)
    function = given["function"]
    if given.get("defer_loading") is not None or function.get("defer_loading") is not None:
        raise NotTokenizable("tools that are loaded later")
    if not isinstance(given.get("type", "function"), str) or not isinstance(function.get("name"), str):
        raise NotTokenizable(MALFORMED)
    _check(function.get("description"), str)
    _check(function.get("strict"), bool)
    _check_schema(function.get("parameters"))
    known = {name: function.get(name) for name in ("description", "name", "parameters")}
    if function.get("strict") is not None:
        known["strict"] = function["strict"]
    ordered = {name: known[name] for name in [*function, *known] if name in known}
    return {"type": given.get("type", "function"), "function": ordered, "defer_loading": None}


def _check_schema(schema: object) -> None:
    """Raises NotTokenizable for types that JSON schema does not have: SGLang rewrites them."""
    if isinstance(schema, list):
        for one in schema:
            _check_schema(one)
    elif isinstance(schema, dict):
        named = schema.get("type")
        names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
        known = [name for name in names if isinstance(name, str) and name in _SCHEMA_TYPES]
        if len(set(known)) != len(names):
            raise NotTokenizable("a tool's schema with types of its own")
        for one in schema.values():
            _check_schema(one)


def _variables(given: object) -> JsonObject:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise NotTokenizable(MALFORMED)
    if "reasoning_effort" in given:
        raise NotTokenizable(REASONING)
    if _RESERVED_VARIABLES & given.keys():
        raise NotTokenizable("template variables that are not the template's")
    return given


def _check(value: object, kind: type) -> None:
    if value is not None and type(value) is not kind:
        raise NotTokenizable(MALFORMED)
