"""What the router reads of a request to place it: its tokens, the keys of its blocks, its session.

    call ── Tokenizers ──> token ids ── page keys, in the request's namespace ──> Prompt
                              └──> the call with ids for text, so that no server tokenizes again

Knows no instances and no policy. Event loop thread only; long work is done on threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

from memserve.core.block_keys import BlockKey, Namespace
from memserve.router.serving.api import Api, Call, JsonObject
from memserve.router.text.token_records import KnownTokens, Tokens, UnknownTokens, keys_of
from memserve.router.text.tokenizers import Tokenizers

BYTES_PER_TOKEN = 4
"""Of a body whose tokens are not known."""
OUTPUT_TOKENS = 256
"""How many tokens an answer is expected to have, at most."""
LONG_PROMPT = 16384
"""The keys of a prompt with more tokens are cut on a thread: 40 ns each."""
SESSION_HEADERS = ("x-session-id", "x-user-id")

NO_PAGES = "instances that do not tell their page size"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request, as a policy needs it. Of a batch all prompts together: they are placed as one."""

    num_tokens: int
    """Estimated, where the tokens are not known."""
    chains: tuple[Sequence[BlockKey], ...] = ()
    """The keys of each prompt's whole pages; none if they are not known."""
    session: int | None = None
    """A hash of whatever names the conversation."""
    output_tokens: int = OUTPUT_TOKENS
    unknown: str | None = None
    """Why the tokens are not known."""


class PromptReader:
    """See the module."""

    def __init__(self, tokenizers: Tokenizers) -> None:
        self._tokenizers = tokenizers

    async def read(
        self, call: Call, model: str | None, page_tokens: int | None, headers: Mapping[str, str]
    ) -> tuple[Call, Prompt]:
        """What is known of `call`, which `model` will serve, and the call as the servers should get it."""
        session, output_tokens = session_of(call.body, headers), output_tokens_of(call)
        tokens: Tokens = await self._tokenizers.tokens_of(call, model)
        if isinstance(tokens, KnownTokens) and page_tokens is None:
            tokens = UnknownTokens(NO_PAGES)
        if isinstance(tokens, UnknownTokens):
            num_tokens = max(1, call.body_bytes // BYTES_PER_TOKEN)
            return call, Prompt(num_tokens, (), session, output_tokens, tokens.reason)
        assert page_tokens is not None
        chains = []
        for number, ids in enumerate(tokens.prompts):
            namespace = namespace_of(call.body, number if call.num_prompts is not None else None)
            cut = (ids, page_tokens, namespace)
            long = len(ids) > LONG_PROMPT
            chains.append(await asyncio.to_thread(keys_of, *cut) if long else keys_of(*cut))
        num_tokens = max(1, sum(map(len, tokens.prompts)))
        prompt = Prompt(num_tokens, tuple(chains), session, output_tokens)
        return self._tokenizers.forwardable(call, model, tokens), prompt


def namespace_of(body: JsonObject, number: int | None) -> Namespace | None:
    """What keeps this prompt's blocks apart from equal ones, as SGLang reads it; `number` in a batch.

    Source: SGLang 0.5.23, GenerateReqInput: in a batch one value is every prompt's, and "" is none.
    """
    parts = []
    for name in ("extra_key", "cache_salt"):
        value = body.get(name)
        if isinstance(value, list):
            value = value[number] if number is not None and number < len(value) else None
        if not isinstance(value, str) or (number is not None and not value):
            value = None
        parts.append(value)
    return None if parts == [None, None] else Namespace(*parts)


def session_of(body: JsonObject, headers: Mapping[str, str]) -> int | None:
    """A hash of the session that a header names, or else of the user in the body; None if nothing does."""
    name: object = next((headers[header] for header in SESSION_HEADERS if header in headers), None)
    name = name or body.get("user")
    return crc32(name.encode()) if isinstance(name, str) and name else None


def output_tokens_of(call: Call) -> int:
    """How many tokens the answer will have, as far as the request says."""
    if call.api is Api.GENERATE:
        params = call.body.get("sampling_params")
        wanted = params.get("max_new_tokens") if isinstance(params, dict) else None
    else:
        wanted = call.body.get("max_completion_tokens") or call.body.get("max_tokens")
    return min(wanted, OUTPUT_TOKENS) if isinstance(wanted, int) and wanted > 0 else OUTPUT_TOKENS
