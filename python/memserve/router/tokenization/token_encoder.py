"""Text to token ids, with a cache that never changes the result. Knows no chats and no requests.

A fast tokenizer first cuts a text at its added tokens, on the raw text, before it normalizes or merges
anything; what lies between two of them is tokenized on its own. A chat template writes such tokens
around every message, so a message that was seen before need not be tokenized again:

    <|im_start|> user\\nHello <|im_end|> \\n <|im_start|> assistant\\n
    ^ cut        ^ piece      ^ cut      ^p ^ cut        ^ piece          piece: a key of the cache

Where a tokenizer has a part that looks across a cut (see `_SplitTokens.of`), texts are tokenized whole.
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

DEFAULT_CACHE_TOKENS = 1 << 20

_ENTRY_TOKENS = 32
"""What an entry costs the cache beside its tokens."""
_LARGEST_SHARE = 8
"""A piece larger than this part of the cache is not kept: it would drive out everything else."""

# These treat a piece of text alike wherever it stands.
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
_FRAMING_POST_PROCESSORS = frozenset({"BertProcessing", "ByteLevel", "RobertaProcessing"})


@dataclass(slots=True)
class Encoded:
    """Token ids of a text."""

    ids: array[int]
    cached: int = 0
    """How many of them came from the cache."""


class Encoder:
    """One model's tokenizer. Any thread."""

    def __init__(self, backend: Backend, *, cache_tokens: int = DEFAULT_CACHE_TOKENS) -> None:
        """`backend` becomes this object's; `cache_tokens` = 0 keeps nothing."""
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        description = json.loads(backend.to_str())
        self._cuts = _SplitTokens.of(backend, description)
        self._frame = _AffixTokens.of(backend, description)
        self._cache = _PieceCache(cache_tokens)

    @property
    def adds_tokens(self) -> bool:
        """Whether even an empty text has tokens, such as BOS."""
        return bool(self._backend.num_special_tokens_to_add(False))

    def id_of(self, token: str) -> int | None:
        """The id of one token of the vocabulary."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def encode(self, text: str, *, framed: bool) -> Encoded:
        """The ids of `text`; `framed` with the tokens that the tokenizer puts around every text.

        Raises NotTokenizable for a text that is no Unicode.
        """
        if framed and self._frame is None:
            return Encoded(self._whole(text, framed=True))
        encoded = self._pieces(text)
        if framed and self._frame is not None:
            encoded.ids = self._frame.before + encoded.ids + self._frame.after
        return encoded

    def decode(self, ids: Sequence[int], *, skips_special: bool) -> str:
        """The text of `ids`; half a character is U+FFFD. Unknown ids have none."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skips_special)
        return text

    def _pieces(self, text: str) -> Encoded:
        if self._cuts is None:
            return self._piece(text)
        encoded, position = Encoded(array("I")), 0
        for cut in self._cuts.pattern.finditer(text):
            if position < cut.start():
                self._append_piece(encoded, text[position : cut.start()])
            encoded.ids.append(self._cuts.ids[cut.group()])
            position = cut.end()
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
        ids = self._whole(text, framed=False)
        self._cache.put(text, ids)
        return Encoded(ids[:])

    def _whole(self, text: str, *, framed: bool) -> array[int]:
        try:
            # `encode` would hold the interpreter lock all the while, and compute offsets.
            [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=framed)
        except (TypeError, UnicodeEncodeError) as error:  # a lone surrogate
            raise NotTokenizable("text that is no Unicode") from error
        return array("I", encoding.ids)


@dataclass(frozen=True, slots=True)
class _SplitTokens:
    """The added tokens at which a text falls into parts that know nothing of each other."""

    pattern: re.Pattern[str]
    ids: Mapping[str, int]

    @classmethod
    def of(cls, backend: Backend, description: JsonObject) -> _SplitTokens | None:
        """None if some part of the tokenizer looks across the ends of its tokens."""
        added = backend.get_added_tokens_decoder()
        # A token that takes the spaces beside it, or wants a word's end there, looks over the cut.
        if any(token.lstrip or token.rstrip or token.single_word for token in added.values()):
            return None
        if not _is_local(description.get("pre_tokenizer")):
            return None
        # Normalized tokens are found later, in normalized text: they may be part of a piece.
        ids = {token.content: i for i, token in added.items() if token.content and not token.normalized}
        if not ids:
            return None
        # The tokenizer takes the longest of the tokens that begin first; so does this order.
        longest_first = sorted(ids, key=len, reverse=True)
        return cls(re.compile("|".join(map(re.escape, longest_first))), ids)


@dataclass(frozen=True, slots=True)
class _AffixTokens:
    """The ids that the tokenizer puts before and after every text."""

    before: array[int]
    after: array[int]

    @classmethod
    def of(cls, backend: Backend, description: JsonObject) -> _AffixTokens | None:
        """None if it does more to a text than that."""
        if not _is_framing(description.get("post_processor")):
            return None
        encoding = backend.encode("a", add_special_tokens=True)
        # The mask marks what the post-processor added, not what the text contains.
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


def _is_framing(post_processor: object) -> bool:
    if post_processor is None:
        return True
    if not isinstance(post_processor, dict):
        return False
    kind = post_processor.get("type")
    if kind == "Sequence":
        return all(map(_is_framing, post_processor["processors"]))
    if kind == "TemplateProcessing":
        parts: Iterable[JsonObject] = post_processor["single"]
        return [part["Sequence"] for part in parts if "Sequence" in part] == [{"id": "A", "type_id": 0}]
    return kind in _FRAMING_POST_PROCESSORS


class _PieceCache:
    """Pieces of text and their ids, the least recently used dropped first. Any thread."""

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity = capacity_tokens
        self._lock = threading.Lock()
        self._pieces: OrderedDict[str, array[int]] = OrderedDict()
        self._used = 0

    def get(self, text: str) -> array[int] | None:
        """The ids of `text`, not to be changed."""
        with self._lock:
            ids = self._pieces.get(text)
            if ids is not None:
                self._pieces.move_to_end(text)
            return ids

    def put(self, text: str, ids: array[int]) -> None:
        """Keep `ids`, which nobody changes from now on."""
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
