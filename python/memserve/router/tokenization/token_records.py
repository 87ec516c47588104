"""What the router knows of a request's tokens, and what it counts. Knows no tokenizer and no HTTP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from memserve.core.block_keys import BlockKey, Namespace, page_keys


@dataclass(frozen=True, slots=True)
class KnownTokens:
    """The ids that a server will compute on."""

    prompts: tuple[Sequence[int], ...]
    """The ids of each prompt, in the order of the request; one for a single prompt."""
    replaceable: bool = True
    """The ids may be sent in place of the text. False if rendering read the clock: a server may
    read another day, so these are good for keys, where an error costs a miss, and for nothing else."""


@dataclass(frozen=True, slots=True)
class UnknownTokens:
    """Only the server can tell, so nothing is guessed."""

    reason: str
    """One of few, in words: a label of a metric."""


Tokens: TypeAlias = KnownTokens | UnknownTokens


class NotTokenizable(Exception):
    """Ends the reading of a request whose tokens only the server can tell; never leaves `Tokenizer`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True)
class TokenizerStats:
    """Counts since the start. Written by the event loop thread only."""

    calls: int = 0
    """Calls that were tokenized or rendered here; those that came as ids are not."""
    tokens: int = 0
    """Tokens of the text of those calls."""
    cached_tokens: int = 0
    """Those of them that were found in the cache."""
    seconds: float = 0.0
    """Time spent rendering and tokenizing, without the wait for a thread."""
    unknown: Counter[str] = field(default_factory=Counter)
    """Calls of which nothing is known, by reason."""


def keys_of(ids: Sequence[int], page_tokens: int, namespace: Namespace | None = None) -> list[BlockKey]:
    """The key of each whole page of one prompt. Raises as `page_keys`.

    Nothing is left out: that the last token is always computed is the caller's to mind.
    """
    return page_keys(ids, page_tokens, namespace)
