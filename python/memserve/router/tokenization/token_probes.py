"""What servers are asked before their tokenizer is taken to be ours, and what they answered.

A server's flags, a class of transformers or a changed file can make it read a text in another way than
the files in the model's directory say. So nothing is known until a server has read the texts and chats
below as we do, and nothing is known any more as soon as one reads them differently.
Knows the endpoint /v1/tokenize; not how to call it.
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

# For these model paths SGLang takes a conversation of its own in place of the model's chat template.
_GUESSED = re.compile(
    r"\bpoints\b|moss.*vl|internvl|janus|vicuna|llava|deepseek.*vl2|minicpm-[vo]|phi-4-multimodal"
    r"|deepseek-ocr|paddleocr|unlimited|whisper",
    re.IGNORECASE,
)


def probe_texts(special_tokens: Sequence[str]) -> list[str]:
    """Texts that tell tokenizers apart; each special token stands between words, spaces and itself.

    Of thousands of special tokens, the first are asked about.
    """
    asked = special_tokens[:_MAX_SPECIAL_TOKENS]
    return [*_TEXTS, *(f"a{token}b {token} c\n{token}{token}" for token in asked)]


def renders_chats(server_info: JsonObject) -> bool:
    """Whether a server says that it renders chats with the model's own template, or one like it.

    A conversation that is built into SGLang has stop strings of its own: with ids they would be lost.
    """
    template = server_info.get("chat_template")
    if template is None:
        return not _GUESSED.search(str(server_info.get("model_path", "")))
    return isinstance(template, str) and template.endswith(".jinja")


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far one server reads as we do."""

    texts: bool
    chats: bool
    model: str | None = None
    """What it calls the model it serves."""


class Agreements:
    """The agreements with all servers that were asked."""

    def __init__(self) -> None:
        self._by_server: dict[str, Agreement] = {}

    def note(self, server: str, agreement: Agreement) -> None:
        self._by_server[server] = agreement

    def forget(self, server: str) -> None:
        """Its answers count no more; as if it had not been asked."""
        self._by_server.pop(server, None)

    @property
    def is_empty(self) -> bool:
        """Whether no server was asked."""
        return not self._by_server

    @property
    def confirming(self) -> list[str]:
        """The servers that read texts as we do."""
        return [server for server, one in self._by_server.items() if one.texts]

    @property
    def texts(self) -> bool:
        """Whether all servers read texts as we do, and there is one."""
        return bool(self._by_server) and all(one.texts for one in self._by_server.values())

    @property
    def chats(self) -> bool:
        """As `texts`, for chats."""
        return self.texts and all(one.chats for one in self._by_server.values())

    def serves(self, model: str) -> bool:
        """Whether that is the whole name of a model that is served."""
        return any(one.model == model for one in self._by_server.values())
