"""Records: a request's tokens, and the counts of tokenization. Knows no tokenizer and no HTTP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class KnownTokens:
    """The token ids that a server will compute."""

    prompts: tuple[Sequence[int], ...]
    """The ids of each prompt, in the order of the request; one for a single prompt."""
    replaceable: bool = True
    """The ids may be sent in place of the text. False if rendering read the clock: a server may read another
    day, so these ids are good for keys only, where an error costs a cache miss."""


@dataclass(frozen=True, slots=True)
class UnknownTokens:
    """Only a server can tell the tokens; nothing is guessed."""

    reason: str
    """One of few texts: a label of a metric."""


Tokens: TypeAlias = KnownTokens | UnknownTokens


class NotTokenizable(Exception):
    """Only a server can tell the tokens of a request. Never leaves `Tokenizer`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True)
class TokenizerStats:
    """Counts since the start. Written by the event loop thread only."""

    calls: int = 0
    """Requests that were tokenized or rendered here, not requests with token ids."""
    tokens: int = 0
    """Tokens of the text of those requests."""
    cached_tokens: int = 0
    """The tokens among them that were found in the cache."""
    seconds: float = 0.0
    """Time spent rendering and tokenizing, without the wait for a thread."""
    unknown: Counter[str] = field(default_factory=Counter)
    """Requests whose tokens are not known, by reason."""
