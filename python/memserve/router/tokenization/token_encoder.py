"""Text to token ids, with a cache that never changes the result. Knows no chats and no requests.

A fast tokenizer first splits the raw text at its added tokens, before it normalizes or merges anything; each
piece between two added tokens is tokenized on its own. A chat template writes such tokens around every
message, so a message that was seen before need not be tokenized again:

    <|im_start|> user\\nHello <|im_end|> \\n <|im_start|> assistant\\n
    ^ split      ^ piece      ^ split    ^p ^ split      ^ piece          piece: a key of the cache

Texts are tokenized whole if a part of the tokenizer looks across a split (see `_SplitTokens.of`).
Source: tokenizers, AddedVocabulary::extract_and_normalize; SGLang, parallel_prompt_encode.py.
"""

from __future__ import annotations

import json
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer as Backend

from memserve.router.request import JsonObject
from memserve.router.tokenization.token_records import NotTokenizable

_ENTRY_TOKENS = 32
"""The cost of an entry beside its tokens, in tokens."""
_LARGEST_SHARE = 8
"""A piece larger than one part in so many of the cache is not kept: it would evict everything else."""

# These treat a piece of text alike wherever it stands in a text.
_LOCAL_PRE_TOKENIZERS = frozenset(
    {
        "BertPreTokenizer",
        "ByteLevel",
        "CharDelimiterSplit",
        "Digits",
        "Punctuation",
        "Split",
        "UnicodeScripts",
        "Whitespace",
        "WhitespaceSplit",
    }
)
_AFFIX_POST_PROCESSORS = frozenset({"BertProcessing", "ByteLevel", "RobertaProcessing"})


@dataclass(slots=True)
class Encoded:
    """Token ids of a text."""

    ids: array[int]
    cached: int = 0
    """How many of the ids came from the cache."""


class Encoder:
    """One model's tokenizer. Any thread."""

    def __init__(self, backend: Backend, *, cache_tokens: int = 1 << 20) -> None:
        """`backend` becomes this object's; `cache_tokens` = 0 turns the cache off."""
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        description = json.loads(backend.to_str())
        self._split = _SplitTokens.of(backend, description)
        self._affixes = _AffixTokens.of(backend, description)
        self._cache = _PieceCache(cache_tokens)

    def id_of(self, token: str) -> int | None:
        """The id of one token of the vocabulary."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def encode(self, text: str, *, add_special_tokens: bool) -> Encoded:
        """The ids of `text`; special tokens are those that the tokenizer puts around every text.

        Raises NotTokenizable for a text that is not valid Unicode.
        """
        if add_special_tokens and self._affixes is None:
            return Encoded(self._whole(text, add_special_tokens=True))
        encoded = self._pieces(text)
        if add_special_tokens and self._affixes is not None:
            encoded.ids = self._affixes.before + encoded.ids + self._affixes.after
        return encoded

    def decode(self, ids: Sequence[int], *, skips_special: bool) -> str:
        """The text of `ids`; half a character is U+FFFD. Unknown ids have none."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skips_special)
        return text

    def _pieces(self, text: str) -> Encoded:
        if self._split is None:
            return self._piece(text)
        encoded, position = Encoded(array("I")), 0
        for split in self._split.pattern.finditer(text):
            if position < split.start():
                self._append_piece(encoded, text[position : split.start()])
            encoded.ids.append(self._split.ids[split.group()])
            position = split.end()
        if position < len(text):
            self._append_piece(encoded, text[position:])
        return encoded

    def _append_piece(self, encoded: Encoded, text: str) -> None:
        piece = self._piece(text)
        encoded.ids += piece.ids
        encoded.cached += piece.cached

    def _piece(self, text: str) -> Encoded:
        if (ids := self._cache.get(text)) is not None:
            return Encoded(ids[:], len(ids))
        ids = self._whole(text, add_special_tokens=False)
        self._cache.put(text, ids)
        return Encoded(ids[:])

    def _whole(self, text: str, *, add_special_tokens: bool) -> array[int]:
        try:
            # `encode` would hold the interpreter lock all the while, and compute offsets.
            [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:  # a lone surrogate
            raise NotTokenizable("text that is no Unicode") from error
        return array("I", encoding.ids)


@dataclass(frozen=True, slots=True)
class _SplitTokens:
    """The added tokens between which pieces of text are tokenized independently."""

    pattern: re.Pattern[str]
    ids: Mapping[str, int]

    @classmethod
    def of(cls, backend: Backend, description: JsonObject) -> _SplitTokens | None:
        """None if a part of the tokenizer looks across the ends of added tokens."""
        added = backend.get_added_tokens_decoder()
        # A token that takes the spaces beside it, or needs the end of a word there, looks across the split.
        if any(token.lstrip or token.rstrip or token.single_word for token in added.values()):
            return None
        if not _is_local(description.get("pre_tokenizer")):
            return None
        # Normalized tokens are found later, in normalized text: they may be a part of a piece.
        ids = {token.content: i for i, token in added.items() if token.content and not token.normalized}
        if not ids:
            return None
        # Of the tokens that begin first the tokenizer takes the longest; so does this order.
        longest_first = sorted(ids, key=len, reverse=True)
        return cls(re.compile("|".join(map(re.escape, longest_first))), ids)


@dataclass(frozen=True, slots=True)
class _AffixTokens:
    """The ids that the tokenizer puts before and after every text."""

    before: array[int]
    after: array[int]

    @classmethod
    def of(cls, backend: Backend, description: JsonObject) -> _AffixTokens | None:
        """None if the tokenizer changes texts in another way."""
        if not _adds_affixes_only(description.get("post_processor")):
            return None
        encoding = backend.encode("a", add_special_tokens=True)
        # The mask marks the ids that the post-processor added, not special tokens of the text.
        marks, ids = encoding.special_tokens_mask, array("I", encoding.ids)
        if 0 not in marks:
            return None
        first, last = marks.index(0), len(marks) - marks[::-1].index(0)
        return cls(ids[:first], ids[last:])


def _is_local(pre_tokenizer: object) -> bool:
    if pre_tokenizer is None:
        return True
    if not isinstance(pre_tokenizer, dict):
        return False
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return all(map(_is_local, pre_tokenizer["pretokenizers"]))
    if kind == "Metaspace":
        return pre_tokenizer.get("prepend_scheme") in ("always", "never")
    return kind in _LOCAL_PRE_TOKENIZERS


def _adds_affixes_only(post_processor: object) -> bool:
    if post_processor is None:
        return True
    if not isinstance(post_processor, dict):
        return False
    kind = post_processor.get("type")
    if kind == "Sequence":
        return all(map(_adds_affixes_only, post_processor["processors"]))
    if kind == "TemplateProcessing":
        parts: Iterable[JsonObject] = post_processor["single"]
        return [part["Sequence"] for part in parts if "Sequence" in part] == [{"id": "A", "type_id": 0}]
    return kind in _AFFIX_POST_PROCESSORS


class _PieceCache:
    """Pieces of text and their ids; drops the least recently used piece first. Any thread."""

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity = capacity_tokens
        self._lock = threading.Lock()
        self._pieces: OrderedDict[str, array[int]] = OrderedDict()
        self._used = 0

    def get(self, text: str) -> array[int] | None:
        """The ids of `text`, which the caller must not change."""
        with self._lock:
            ids = self._pieces.get(text)
            if ids is not None:
                self._pieces.move_to_end(text)
            return ids

    def put(self, text: str, ids: array[int]) -> None:
        """Keep `ids`, which must not change from now on."""
        cost = len(ids) + _ENTRY_TOKENS
        if cost * _LARGEST_SHARE > self._capacity:
            return
        with self._lock:
            if text in self._pieces:
                return
            self._pieces[text] = ids
            self._used += cost
            while self._used > self._capacity:
                _, dropped = self._pieces.popitem(last=False)
                self._used -= len(dropped) + _ENTRY_TOKENS
