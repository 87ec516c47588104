"""Texts and chats that servers must tokenize as we do before requests are tokenized here, and their results.

A server's flags, a class of transformers or a changed file can make it tokenize in another way than the files
in the model's directory. So requests are tokenized only while all servers have tokenized the texts and chats
below as we do. Knows the bodies of /v1/tokenize; not how to send them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from memserve.router.request import JsonObject

_MAX_SPECIAL_TOKENS = 512

_TEXTS = (
    "Hello, world!  Two spaces,\ttab,\n\n\nthree lines; and 1234567890 or 3.14159e-10 digits. ",
    " A leading space; it's WE'LL they'd, I'M; naïve café, cafe\u0301, \ufb01 Å Ａ ½ ²",
    "多语言：日本語 한국어 العربية हिन्दी 🙂👩‍👩‍👧 \u200b\u00a0\u3000end\r\n",
    "def f(x):\n    return x**2  # <b>&amp;</b> [INST] </s> {{ '{%' }}\\",
    "   ",
)
_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
_USER = {"role": "user", "content": _TEXTS[0]}
_SYSTEM = {"role": "system", "content": "Be brief."}
_ANSWER = {"role": "assistant", "content": " Yes, it's so. "}
_CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    ],
}
_RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}

CHATS: tuple[JsonObject, ...] = (
    {"messages": [_USER]},
    {"messages": [_SYSTEM, _USER, _ANSWER, _USER]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": _TEXTS[1]}] * 2}]},
    {"messages": [_SYSTEM, _USER, _ANSWER], "continue_final_message": True},
    {"messages": [_USER], "tools": [_WEATHER]},
    {"messages": [_USER, _CALL, _RESULT], "tools": [_WEATHER]},
)
"""Bodies for /v1/tokenize, each also a body of a chat."""

# For these model paths SGLang uses a built-in conversation instead of the model's chat template.
_GUESSED = re.compile(
    r"\bpoints\b|moss.*vl|internvl|janus|vicuna|llava|deepseek.*vl2|minicpm-[vo]|phi-4-multimodal"
    r"|deepseek-ocr|paddleocr|unlimited|whisper",
    re.IGNORECASE,
)


def probe_texts(special_tokens: Sequence[str]) -> list[str]:
    """Texts on which tokenizers differ; each special token stands between words, spaces and itself.

    Of thousands of special tokens only the first are used.
    """
    asked = special_tokens[:_MAX_SPECIAL_TOKENS]
    return [*_TEXTS, *(f"a{token}b {token} c\n{token}{token}" for token in asked)]


def renders_chats(server_info: JsonObject) -> bool:
    """Whether a server reports that it renders chats with a chat template.

    A conversation that is built into SGLang has stop strings of its own, which a request with ids would lose.
    """
    template = server_info.get("chat_template")
    if template is None:
        return not _GUESSED.search(str(server_info.get("model_path", "")))
    return isinstance(template, str) and template.endswith(".jinja")


@dataclass(frozen=True, slots=True)
class Agreement:
    """Whether one server tokenizes as we do."""

    texts: bool
    chats: bool
    model: str | None = None
    """The server's name for its model."""


class Agreements:
    """The agreements with all probed servers."""

    def __init__(self) -> None:
        self._by_server: dict[str, Agreement] = {}

    def note(self, server: str, agreement: Agreement) -> None:
        self._by_server[server] = agreement

    def forget(self, server: str) -> None:
        """Forget a server, as if it had not been probed."""
        self._by_server.pop(server, None)

    @property
    def is_empty(self) -> bool:
        """Whether no server was probed."""
        return not self._by_server

    @property
    def confirming(self) -> list[str]:
        """The servers that tokenize texts as we do."""
        return [server for server, one in self._by_server.items() if one.texts]

    @property
    def texts(self) -> bool:
        """Whether there are servers, and all tokenize texts as we do."""
        return bool(self._by_server) and all(one.texts for one in self._by_server.values())

    @property
    def chats(self) -> bool:
        """As `texts`, for chats."""
        return self.texts and all(one.chats for one in self._by_server.values())

    def serves(self, model: str) -> bool:
        """Whether `model` is the whole name of a served model."""
        return any(one.model == model for one in self._by_server.values())
