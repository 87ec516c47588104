"""The kinds of values that a field of a request can have, with the bounds that a model sets.

A kind tells what is wrong with a value, and its JSON schema. Pure; knows no field.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

Schema = dict[str, Any]
encode_json = msgspec.json.Encoder().encode

_OPENING = b"([{"
_TYPE_NAMES: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
_NO_BRACKETS = bytes(one for one in range(256) if one not in b"()[]{}")


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """A model's limits; None: not known, not checked."""

    vocab_size: int | None = None
    context_tokens: int | None = None
    has_pairs: bool = False
    """Some of its servers are pairs."""
    takes_empty_text: bool = False
    """False: an empty prompt would end the server that gets it."""


class Kind(Protocol):
    """What values are valid."""

    def problem(self, value: object, limits: ModelLimits) -> str | None:
        """What the value of a field has to be, if it is not; null is not asked about."""

    def schema(self) -> Schema:
        """The JSON schema, without the bounds that depend on the model."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number within bounds, both included. A whole one may be written as 6.0, as SGLang takes it."""

    lowest: float
    highest: float
    is_whole: bool = False

    def problem(self, value: object, limits: ModelLimits) -> str | None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and self.is_whole and isinstance(value, float):
            is_number = value.is_integer()
        if is_number and self.lowest <= value <= self.highest:  # type: ignore[operator]
            return None
        kind = "a whole number" if self.is_whole else "a number"
        return f"{kind}, at least {self.lowest:.12g}, at most {self.highest:.12g}"

    def schema(self) -> Schema:
        kind = "integer" if self.is_whole else "number"
        return {"type": kind, "minimum": self.lowest, "maximum": self.highest}


@dataclass(frozen=True, slots=True)
class TopTokens:
    """A number of most probable tokens, at most `highest`."""

    highest: int = 2**31 - 1
    highest_of_pairs: int = 128
    """Prefill hands over as many; one more ends it. Source: SGLang, MetadataBuffers."""

    def problem(self, value: object, limits: ModelLimits) -> str | None:
        highest = min(self.highest, limits.vocab_size or self.highest)
        if limits.has_pairs:
            highest = min(highest, self.highest_of_pairs)
        return Number(0, highest, is_whole=True).problem(value, limits)

    def schema(self) -> Schema:
        return Number(0, self.highest, is_whole=True).schema()


@dataclass(frozen=True, slots=True)
class PromptPosition:
    """A position in the prompt; -1: its end."""

    def problem(self, value: object, limits: ModelLimits) -> str | None:
        return Number(-1, limits.context_tokens or 2**31 - 1, is_whole=True).problem(value, limits)

    def schema(self) -> Schema:
        return Number(-1, 2**31 - 1, is_whole=True).schema()


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A list of token ids. One outside the vocabulary would end an SGLang server."""

    def problem(self, value: object, limits: ModelLimits) -> str | None:
        bound = limits.vocab_size or 2**31
        wanted = f"a list of at most {bound} token ids, 0 to {bound - 1}"
        if not isinstance(value, list) or len(value) > bound:
            return wanted
        return None if all(type(one) is int and 0 <= one < bound for one in value) else wanted

    def schema(self) -> Schema:
        return {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}}


@dataclass(frozen=True, slots=True)
class TokenBiases:
    """An object of numbers by token id."""

    bias: Number

    def problem(self, value: object, limits: ModelLimits) -> str | None:
        bound = limits.vocab_size or 2**31
        if isinstance(value, dict):
            are_ids = all(name.isdecimal() and len(name) < 12 and int(name) < bound for name in value)
            if are_ids and all(self.bias.problem(one, limits) is None for one in value.values()):
                return None
        return (
            f"an object whose names are token ids, 0 to {bound - 1}, and whose values are numbers, "
            f"{self.bias.lowest:g} to {self.bias.highest:g}"
        )

    def schema(self) -> Schema:
        return {"type": "object", "additionalProperties": self.bias.schema()}


@dataclass(frozen=True, slots=True)
class Boolean:
    """true or false."""

    def problem(self, value: object, limits: ModelLimits) -> str | None:
        return None if isinstance(value, bool) else "true or false"

    def schema(self) -> Schema:
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class String:
    """A string."""

    def problem(self, value: object, limits: ModelLimits) -> str | None:
        return None if isinstance(value, str) else "a string"

    def schema(self) -> Schema:
        return {"type": "string"}


@dataclass(frozen=True, slots=True)
class Strings:
    """A string, or a list of strings. At every token SGLang looks for them in the end of the answer."""

    max_bytes: int
    max_count: int = 32
    """SGLang's most, MAX_STOP_COUNT."""

    def problem(self, value: object, limits: ModelLimits) -> str | None:
        if self.read(value) is not None:
            return None
        return f"a string, or a list of at most {self.max_count}, of at most {self.max_bytes} bytes each"

    def read(self, value: object) -> list[str] | None:
        """The strings; None if `value` is not valid."""
        values = value if isinstance(value, list) else [value]
        texts = [one for one in values if isinstance(one, str) and len(one.encode()) <= self.max_bytes]
        return texts if len(texts) == len(values) <= self.max_count else None

    def schema(self) -> Schema:
        texts = {"type": "array", "items": {"type": "string"}, "maxItems": self.max_count}
        return {"anyOf": [{"type": "string"}, texts]}


@dataclass(frozen=True, slots=True)
class Regexes:
    """Regular expressions of Python's."""

    strings: Strings

    def problem(self, value: object, limits: ModelLimits) -> str | None:
        for pattern in self.strings.read(value) or ():
            try:
                with warnings.catch_warnings(action="ignore"):
                    re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                return f"a regular expression, which {pattern!r} is not: {error}"
        return self.strings.problem(value, limits)

    def schema(self) -> Schema:
        return self.strings.schema()


@dataclass(frozen=True, slots=True)
class Nested:
    """JSON of bounded size and depth, from which a server may build a grammar or a prompt.

    Parsers of grammars recurse at each bracket, some of them in C++, where that can end the process.
    """

    types: tuple[type, ...] = (dict,)
    """Of dict, list, str."""
    max_bytes: int = 256 << 10
    max_depth: int = 100

    def problem(self, value: object, limits: ModelLimits) -> str | None:
        if not isinstance(value, self.types):
            return " or ".join(_TYPE_NAMES[one] for one in self.types)
        return self.problem_of_text(encode_json(value))

    def problem_of_text(self, text: bytes) -> str | None:
        """As `problem`, for source text in any language."""
        if len(text) > self.max_bytes:
            return f"at most {self.max_bytes} bytes long"
        return f"nested at most {self.max_depth} brackets deep" if nesting_of(text) > self.max_depth else None

    def schema(self) -> Schema:
        names: dict[type, str] = {dict: "object", list: "array", str: "string"}
        return {"type": [names[one] for one in self.types]}


@dataclass(frozen=True, slots=True)
class GrammarText:
    """The source of a grammar. Only the server can tell whether it is valid."""

    bounds: Nested = Nested()

    def problem(self, value: object, limits: ModelLimits) -> str | None:
        return self.bounds.problem_of_text(value.encode()) if isinstance(value, str) else "a string"

    def schema(self) -> Schema:
        return {"type": "string"}


@dataclass(frozen=True, slots=True)
class ProcessorParams:
    """An object of scalars, and of lists and objects of them: what SGLang's processes pass to each other."""

    def problem(self, value: object, limits: ModelLimits) -> str | None:
        if isinstance(value, dict) and all(map(_is_flat, value.values())):
            return (
                None
                if not any(name.startswith("__sglang") for name in value)
                else "without SGLang's own names"
            )
        return "an object of scalars, or of lists or objects of scalars"

    def schema(self) -> Schema:
        return {"type": "object", "additionalProperties": {"type": "string"}}


@dataclass(frozen=True, slots=True)
class Internal:
    """A field that SGLang's processes, or the router, set for themselves. A client may set it to nothing."""

    def problem(self, value: object, limits: ModelLimits) -> str | None:
        return None if value is False else "absent: it is not for clients"

    def schema(self) -> Schema:
        return {"type": "null"}


def nesting_of(text: bytes) -> int:
    """How deep brackets of any kind are nested in `text`, whatever its language."""
    depth = deepest = 0
    for one in text.translate(None, _NO_BRACKETS):
        if one in _OPENING:
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth = max(0, depth - 1)
    return deepest


def _is_flat(value: object) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return all(one is None or isinstance(one, str | float) or _is_int64(one) for one in parts)


def _is_int64(value: object) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**63
