"""Reads what the scheduler needs of a request: its tokens, the keys of its blocks, its session.

    request ── Tokenizers ──> token ids ── page keys, in the request's namespace ──> Prompt
       │                      └──> the request with ids for text, so that no server tokenizes again
       └── text keys, where the ids are not known or not wanted ──> Prompt

Knows no instances and no policy. Event loop thread only; long work is done on threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from zlib import crc32

from memserve.core.block_keys import BlockKey, Namespace, page_keys
from memserve.router.request import GenerationRequest, JsonObject
from memserve.router.tokenization.config import RoutingKeys
from memserve.router.tokenization.text_key_cache import TextKeyCache
from memserve.router.tokenization.text_keys import BYTES_PER_TOKEN, text_chain, text_of
from memserve.router.tokenization.token_records import KnownTokens, Tokens, UnknownTokens
from memserve.router.tokenization.tokenizers import Tokenizers
from memserve.scheduling.context import Prompt

LONG_PROMPT = 16384
"""The keys of a longer prompt, in tokens, are computed on a thread: 40 ns each."""
SESSION_HEADERS = ("x-session-id", "x-user-id")

NO_PAGES = "instances that do not tell their page size"


class PromptReader:
    """See the module."""

    def __init__(self, tokenizers: Tokenizers, routing_keys: RoutingKeys = "auto") -> None:
        self._tokenizers = tokenizers
        self._routing_keys = routing_keys
        self.text_keys = TextKeyCache()

    async def read(
        self,
        request: GenerationRequest,
        model: str | None,
        page_tokens: int | None,
        headers: Mapping[str, str],
    ) -> tuple[GenerationRequest, Prompt, int | None]:
        """The request for the servers, its prompts for the scheduler, and its longest prompt's tokens.

        `model` will serve it. None: the length of a prompt is not known.
        """
        session, output_tokens = session_of(request.body, headers), request.expected_output_tokens
        tokens: Tokens | None = None
        if self._routing_keys != "text" or text_of(request) is None:
            tokens = await self._tokenizers.tokens_of(request, model)
        longest = _longest(tokens)
        if isinstance(tokens, KnownTokens) and page_tokens is None:
            tokens = UnknownTokens(NO_PAGES)
        if not isinstance(tokens, KnownTokens):
            num_tokens = max(1, request.body_bytes // BYTES_PER_TOKEN)
            chains, by_text = self._chains_of(request)
            reason = None if tokens is None else tokens.reason
            return request, Prompt(num_tokens, chains, by_text, session, output_tokens, reason), longest
        assert page_tokens is not None
        cuts = []
        for number, ids in enumerate(tokens.prompts):
            cut = (ids, page_tokens, _namespace(request, number))
            long = len(ids) > LONG_PROMPT
            cuts.append(await asyncio.to_thread(page_keys, *cut) if long else page_keys(*cut))
        num_tokens = max(1, sum(map(len, tokens.prompts)))
        prompt = Prompt(num_tokens, tuple(cuts), False, session, output_tokens)
        return self._tokenizers.with_token_ids(request, model, tokens), prompt, longest

    async def longest_prompt(self, request: GenerationRequest, model: str | None) -> int | None:
        """The tokens of the longest prompt of a request that `read` did not tokenize; None: not known."""
        if self._routing_keys != "text":
            return None
        return _longest(await self._tokenizers.tokens_of(request, model))

    def _chains_of(self, request: GenerationRequest) -> tuple[tuple[Sequence[BlockKey], ...], bool]:
        """The keys of a request's texts, and whether they are keys of text, not of tokens."""
        texts = None if self._routing_keys == "tokens" else text_of(request)
        if texts is None:
            return (), False
        chains = tuple(text_chain(text, request, _namespace(request, i)) for i, text in enumerate(texts))
        if self._routing_keys != "text" or len(chains) > 1:
            return chains, True
        self.text_keys.record_request(request.rid, chains[0], len(texts[0]))
        keys = self.text_keys.keys_of(chains[0])
        return ((keys,), False) if keys else (chains, True)


def _longest(tokens: Tokens | None) -> int | None:
    return max(map(len, tokens.prompts)) if isinstance(tokens, KnownTokens) else None


def _namespace(request: GenerationRequest, number: int) -> Namespace | None:
    return namespace_of(request.body, number if request.num_prompts is not None else None)


def namespace_of(body: JsonObject, number: int | None) -> Namespace | None:
    """The namespace of one prompt's blocks, as SGLang reads it; `number` is the prompt's place in a batch.

    Source: SGLang 0.5.23, GenerateReqInput: in a batch a single value counts for all prompts, "" for none.
    """
    parts: list[str | None] = []
    if "extra_key" not in body and "cache_salt" not in body:
        return None
    for name in ("extra_key", "cache_salt"):
        value = body.get(name)
        if isinstance(value, list):
            value = value[number] if number is not None and number < len(value) else None
        if not isinstance(value, str) or (number is not None and not value):
            value = None
        parts.append(value)
    return None if parts == [None, None] else Namespace(*parts)


def session_of(body: JsonObject, headers: Mapping[str, str]) -> int | None:
    """A hash of the session in a header, or else of the user in the body; None without either."""
    name: object = next((headers[header] for header in SESSION_HEADERS if header in headers), None)
    name = name or body.get("user")
    return crc32(name.encode()) if isinstance(name, str) and name else None
