"""Keys for a prompt whose tokens are not known: chained hashes of its text, chunk by chunk.

    chunk i of the text, 512 bytes ── xxh3_128(key[i-1] + chunk i) ──> key[i]

They stand for blocks of caches that are inferred from requests (a worker that reports nothing): a prompt's
text finds the instances that the same text was sent to. An instance that reports its cache uses keys of
tokens instead. The text of a chat is its messages as JSON; chats that begin alike also render alike.
The hash is not cryptographic: a client that makes two texts of one namespace collide has them sent to the
same instance.
"""

from __future__ import annotations

from hashlib import sha256

from xxhash import xxh3_128_digest

from memserve.core.block_keys import BlockKey, Namespace
from memserve.router.request import Api, GenerationRequest, encode_json
from memserve.router.sglang_api import TEXT_KEY_SEEDS

BYTES_PER_TOKEN = 4
"""Approximate, for English text."""
BLOCK_TOKENS = 128
"""Approximate tokens per key. Finer keys would cost each request more than they gain."""


def text_of(request: GenerationRequest) -> tuple[bytes, ...] | None:
    """The text of each prompt of a request; None if it came as ids, or holds more than text."""
    body = request.body
    if request.api is Api.CHAT:
        messages = body.get("messages")
        texts = body.get("input_ids") is None and isinstance(messages, list) and all(map(_is_text, messages))
        return (encode_json(messages)[:-1],) if texts else None
    value = body.get("text" if request.api is Api.GENERATE else "prompt")
    if isinstance(value, str):
        return (value.encode(errors="surrogatepass"),)
    if isinstance(value, list) and value and isinstance(value[0], str):
        return tuple(str(one).encode(errors="surrogatepass") for one in value)
    return None


def text_chain(text: bytes, request: GenerationRequest, namespace: Namespace | None) -> list[BlockKey]:
    """The key of each whole chunk of one prompt's text."""
    size = BLOCK_TOKENS * BYTES_PER_TOKEN
    body = request.body
    seeds = [(name, body[name]) for name in TEXT_KEY_SEEDS if body.get(name)]
    key = b"" if namespace is None else namespace.seed()
    if seeds:
        key = sha256(key + encode_json(seeds)).digest()
    keys = []
    for start in range(0, len(text) - size + 1, size):
        half = xxh3_128_digest(key + text[start : start + size])
        key = half + half
        keys.append(BlockKey(key))
    return keys


def _is_text(message: object) -> bool:
    if not isinstance(message, dict):
        return False
    content = message.get("content")
    if isinstance(content, list):
        return all(isinstance(part, dict) and part.get("type") == "text" for part in content)
    return content is None or isinstance(content, str)
