"""Tokenizes once: the token ids of a request, exactly as the servers would compute them, or why not.

    request ── ids in it? ─────────────────────────────────────────► KnownTokens
         ── text ── Encoder ── on a thread ─────────────────────► KnownTokens
         ── chat ── read_chat ── ChatTemplate ── Encoder ───────► KnownTokens
         ── tokens that only a server can tell ─────────────────► UnknownTokens

Never guesses: servers must confirm that they tokenize texts and chats as these files do (`verify`).
Knows SGLang's three endpoints; knows no instances and no use of the ids.
Source: SGLang 0.5.23, managers/tokenizer_manager.py and entrypoints/openai/serving_{chat,completions}.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import jinja2
from msgspec import structs

from memserve.router.request import Api, GenerationRequest, JsonObject
from memserve.router.sglang_api import LORA, UNKNOWN_TOKENS
from memserve.router.tokenization.chat_messages import MALFORMED, read_chat
from memserve.router.tokenization.chat_template import ChatTemplate
from memserve.router.tokenization.token_encoder import Encoder
from memserve.router.tokenization.token_files import TokenizerFiles, read_tokenizer_files
from memserve.router.tokenization.token_probes import CHATS, Agreement, Agreements, probe_texts, renders_chats
from memserve.router.tokenization.token_records import (
    KnownTokens,
    NotTokenizable,
    TokenizerStats,
    Tokens,
    UnknownTokens,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

Ask = Callable[[JsonObject], Awaitable[object]]
"""Posts a body to a server's /v1/tokenize; gives its answer as parsed JSON, None if it was refused."""

_READ_BACK = 5
"""INIT_INCREMENTAL_DETOKENIZATION_OFFSET of SGLang."""
NO_TEMPLATE = "a model without one chat template"
UNCONFIRMED = "a tokenizer that the servers have not confirmed"


@dataclass(slots=True)
class _Reading:
    """The tokens of a request, from a thread."""

    known: KnownTokens
    num_tokens: int = 0
    num_cached: int = 0
    seconds: float = 0.0


class Tokenizer:
    """The tokenizer of one model. Event loop thread only."""

    def __init__(self, files: TokenizerFiles, *, cache_tokens: int = 1 << 20, num_threads: int = 2) -> None:
        """`files` become this object's. Starts no thread before the first request."""
        self._special_tokens = files.all_special_tokens
        self._encoder = Encoder(files.backend, cache_tokens=cache_tokens)
        bos = files.special_tokens.get("bos_token")
        self._bos_id = None if bos is None else self._encoder.id_of(bos)
        self._template, self._no_chats = _compile(files)
        self.agreements = Agreements()
        """With the probed servers. Read-only for others."""
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")
        self.stats = TokenizerStats()

    @classmethod
    def load(cls, path: Path, *, cache_tokens: int = 1 << 20, num_threads: int = 2) -> Tokenizer:
        """The tokenizer of the model directory `path`. Blocks for as long as it takes to read it.

        `cache_tokens` bounds the tokens of cached text, at about 10 bytes each.
        Raises ConfigError, in one line, if there is no fast tokenizer in it.
        """
        return cls(read_tokenizer_files(path), cache_tokens=cache_tokens, num_threads=num_threads)

    async def tokens_of(self, request: GenerationRequest) -> Tokens:
        """The tokens of each prompt of `request`, which was validated."""
        try:
            if (given := given_tokens(request, self.agreements.serves)) is not None:
                return given
            self._check_confirmed(request)
            reading = await self._on_thread(self._read, request)
        except NotTokenizable as cannot:
            self.stats.unknown[cannot.reason] += 1
            return UnknownTokens(cannot.reason)
        self.stats.calls += 1
        self.stats.tokens += reading.num_tokens
        self.stats.cached_tokens += reading.num_cached
        self.stats.seconds += reading.seconds
        return reading.known

    def with_token_ids(self, request: GenerationRequest, tokens: Tokens) -> GenerationRequest:
        """`request` with `tokens` for its text, so that no server tokenizes again; else `request` itself.

        The answer must stay the same: the text stays where SGLang answers with it (`echo`), and a chat keeps
        its messages beside the ids, as they decide how tools are constrained and parsed.
        """
        if isinstance(tokens, UnknownTokens) or not tokens.replaceable or not all(tokens.prompts):
            return request
        if _given_ids(request) is not None:
            return request
        lists = [list(ids) for ids in tokens.prompts]
        ids: object = lists[0] if request.num_prompts is None else lists
        if request.api is Api.CHAT:
            body = {**request.body, "input_ids": ids}
            if body.get("stop") == "":  # beside ids SGLang takes this for no text at all
                body["stop"] = [""]
            return structs.replace(request, body=body)
        if request.api is Api.COMPLETIONS:
            if request.body.get("echo"):
                return request
            return structs.replace(request, body={**request.body, "prompt": ids})
        body = {name: value for name, value in request.body.items() if name != "text"}
        return structs.replace(request, body={**body, "input_ids": ids})

    def text_after(self, prompt: Sequence[int], ids: Sequence[int], *, skips_special: bool) -> str:
        """The text that `ids` add to `prompt`, as SGLang detokenizes.

        Source: SGLang, Req.init_incremental_detokenize, which reads on from the prompt's last tokens.
        """
        before = prompt[-_READ_BACK:]
        known = self._encoder.decode(before, skips_special=skips_special)
        return self._encoder.decode([*before, *ids], skips_special=skips_special)[len(known) :]

    async def verify(self, server: str, server_info: JsonObject, ask: Ask) -> Agreement:
        """Have `server` tokenize texts and chats, and remember whether its tokens are equal to ours.

        For every server that joins, before it gets a request. `server_info` is the body of its /server_info.
        Raises what `ask` raises; an earlier agreement then stays.
        """
        texts = probe_texts(self._special_tokens)
        ours = await self._on_thread(self._text_ids, texts)
        answer = await ask({"prompt": texts})
        agrees = isinstance(answer, dict) and answer.get("tokens") == ours
        num_chats = 0
        if agrees and self._template is not None and renders_chats(server_info):
            num_chats = await self._num_equal_chats(ask)
        model = server_info.get("served_model_name")
        agreement = Agreement(agrees, num_chats > 0, model if isinstance(model, str) else None)
        self.agreements.note(server, agreement)
        level = logging.INFO if agrees else logging.WARNING
        logger.log(level, "tokenizer asked: server=%s texts=%s chats=%s", server, agrees, num_chats > 0)
        return agreement

    def forget(self, server: str) -> None:
        """`server` left: its agreement no longer counts."""
        self.agreements.forget(server)

    def close(self) -> None:
        """End the threads; requests that wait for a thread are cancelled."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _num_equal_chats(self, ask: Ask) -> int:
        """How many chats the server tokenizes as we do; 0 if it differs in one."""
        equal = 0
        for body in CHATS:
            try:
                reading = await self._on_thread(self._read_chat, body)
            except NotTokenizable:
                continue  # not every template takes tools, or a system message
            answer = await ask(body)
            if not isinstance(answer, dict) or answer.get("tokens") != list(reading.known.prompts[0]):
                return 0
            equal += 1
        return equal

    def _check_confirmed(self, request: GenerationRequest) -> None:
        if request.api is Api.CHAT and self._template is None:
            raise NotTokenizable(self._no_chats)
        if not (self.agreements.chats if request.api is Api.CHAT else self.agreements.texts):
            raise NotTokenizable(UNCONFIRMED)

    async def _on_thread(self, work: Callable[[T], R], argument: T) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, argument)

    # ---- any thread

    def _read(self, request: GenerationRequest) -> _Reading:
        start = time.perf_counter()
        try:
            reading = self._read_chat(request.body) if request.api is Api.CHAT else self._read_texts(request)
        except RecursionError as error:
            raise NotTokenizable(MALFORMED) from error
        reading.seconds = time.perf_counter() - start
        return reading

    def _text_ids(self, texts: list[str]) -> list[list[int]]:
        return [list(self._encoder.encode(text, add_special_tokens=True).ids) for text in texts]

    def _read_texts(self, request: GenerationRequest) -> _Reading:
        value = request.body["text" if request.api is Api.GENERATE else "prompt"]
        texts = value if isinstance(value, list) else [value]
        encoded = [
            self._encoder.encode(text, add_special_tokens=True) for text in texts if isinstance(text, str)
        ]
        return _Reading(
            KnownTokens(tuple(one.ids for one in encoded)),
            num_tokens=sum(len(one.ids) for one in encoded),
            num_cached=sum(one.cached for one in encoded),
        )

    def _read_chat(self, body: JsonObject) -> _Reading:
        if self._template is None:
            raise NotTokenizable(self._no_chats)
        chat = read_chat(body, self._template.content_format)
        rendered = self._template.render(chat)
        # The template writes BOS and the like itself.
        encoded = self._encoder.encode(rendered.text, add_special_tokens=False)
        if chat.answer_start:
            encoded.ids += self._answer_ids(chat.answer_start)
        known = KnownTokens((encoded.ids,), replaceable=not rendered.read_clock)
        return _Reading(known, num_tokens=len(encoded.ids), num_cached=encoded.cached)

    def _answer_ids(self, text: str) -> array[int]:
        """As SGLang: with special tokens, like any text, but without a BOS at the start."""
        ids = self._encoder.encode(text, add_special_tokens=True).ids
        return ids[1:] if ids and ids[0] == self._bos_id else ids


def given_tokens(request: GenerationRequest, serves: Callable[[str], bool]) -> KnownTokens | None:
    """The ids of a request that came as ids, which needs no tokenizer; None if it came as text.

    `serves` tells whether a name is the whole name of a model. Raises NotTokenizable for a request that is
    more than its tokens.
    """
    for name in UNKNOWN_TOKENS.keys() & request.body.keys():
        if request.body[name]:
            raise NotTokenizable(UNKNOWN_TOKENS[name])
    if request.api is not Api.GENERATE and ":" in (request.model or "") and not serves(request.model or ""):
        raise NotTokenizable(LORA)  # SGLang reads MODEL:ADAPTER
    ids = _given_ids(request)
    return None if ids is None else KnownTokens(ids)


def _given_ids(request: GenerationRequest) -> tuple[Sequence[int], ...] | None:
    """The ids that the client sent, one list per prompt; None if it sent text."""
    given = request.body.get("prompt" if request.api is Api.COMPLETIONS else "input_ids")
    if not isinstance(given, list) or not given or isinstance(given[0], str):
        return None
    return tuple(given) if isinstance(given[0], list) else (given,)


def _compile(files: TokenizerFiles) -> tuple[ChatTemplate | None, str]:
    """The chat template, and why there is none if there is none."""
    if files.no_chats is not None or files.chat_template is None:
        return None, files.no_chats or NO_TEMPLATE
    try:
        return ChatTemplate(files.chat_template, files.special_tokens), NO_TEMPLATE
    except jinja2.TemplateError as error:
        logger.warning("chats are not tokenized: the chat template is malformed: %s", error)
        return None, NO_TEMPLATE
