"""A model's chat template, rendered as transformers renders it. Knows no requests and no tokens.

Source: transformers 5.19, utils/chat_template_utils.py (the environment, its filters and functions);
SGLang 0.5.23, parser/jinja_template_utils.py (detect_jinja_template_content_format).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from memserve.router.request import JsonObject
from memserve.router.tokenization.chat_messages import Chat, ContentFormat, without_wrappers
from memserve.router.tokenization.token_records import NotTokenizable

_MEDIA_WORDS = ("image", "audio", "video", "vision")
_MESSAGE_NAMES = ("message", "msg", "m")

# Raised by a template that refuses a request; SGLang answers 400 or 500.
_REFUSALS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a prompt."""

    text: str
    read_clock: bool
    """The text may hold the date: rendered elsewhere, it may be another text."""


class ChatTemplate:
    """One compiled template. Any thread."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are the variables `bos_token` and the like.

        Raises jinja2.TemplateError for a malformed template.
        """
        environment = _environment()
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)
        self.content_format = _content_format(source, environment)

    def render(self, chat: Chat) -> Rendered:
        """The prompt of `chat`. Raises NotTokenizable if the template refuses it."""
        try:
            return self._render(chat, chat.tools)
        except _REFUSALS:
            pass
        try:
            return self._render(chat, without_wrappers(chat.tools))
        except _REFUSALS as error:
            raise NotTokenizable("a chat that the template refuses") from error

    def _render(self, chat: Chat, tools: list[JsonObject] | None) -> Rendered:
        clock = _Clock()
        variables = {**self._special_tokens, **chat.variables}
        text = self._template.render(
            messages=chat.messages,
            tools=tools,
            documents=None,
            add_generation_prompt=True,
            strftime_now=clock.strftime_now,
            **variables,
        )
        return Rendered(text, clock.was_read)


class _Clock:
    def __init__(self) -> None:
        self.was_read = False

    def strftime_now(self, pattern: str) -> str:
        self.was_read = True
        return datetime.now().strftime(pattern)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks an answer for training and prints its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja's way

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_print"), [], [], body).set_lineno(line)

    def _print(self, caller: jinja2.runtime.Macro) -> str:
        text: str = caller()
        return text


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter of transformers; jinja's `tojson` escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _content_format(source: str, environment: jinja2.Environment) -> ContentFormat:
    """PARTS for a template that loops over a message's content, or that mentions media."""
    if any(word in source for word in _MEDIA_WORDS):
        return ContentFormat.PARTS
    loops = environment.parse(source).find_all(jinja2.nodes.For)
    is_content = any(_is_content(loop.iter, name) for loop in loops for name in _MESSAGE_NAMES)
    return ContentFormat.PARTS if is_content else ContentFormat.STRING


def _is_content(node: jinja2.nodes.Node | None, name: str) -> bool:
    """Whether `node` is `name.content`, filtered or sliced."""
    if isinstance(node, jinja2.nodes.Filter | jinja2.nodes.Test):
        return _is_content(node.node, name)
    if isinstance(node, jinja2.nodes.Getitem):
        if isinstance(node.arg, jinja2.nodes.Slice):
            return _is_content(node.node, name)
        is_content = isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == "content"
    elif isinstance(node, jinja2.nodes.Getattr):
        is_content = node.attr == "content"
    else:
        return False
    return is_content and isinstance(node.node, jinja2.nodes.Name) and node.node.name == name
