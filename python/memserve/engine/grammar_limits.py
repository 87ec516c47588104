"""The bounds of a grammar's text, checked before a grammar compiler sees it.

A compiler takes long for deep nesting and for many alternatives, in a thread that cannot be stopped. A
matcher keeps a state for each way to read the answer: nested repeats multiply them, and one step can take
seconds. Each check raises ValueError. The text may be invalid; the compiler finds that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """Measured with xgrammar: a schema of 64 levels compiles in 0.1 s, one of 500 in 9 s."""

    max_chars: int = 65536
    max_regex_chars: int = 8192
    max_depth: int = 64
    """Nested arrays and objects of a JSON schema or structural tag, parentheses of EBNF."""
    max_regex_depth: int = 16
    max_repeats: int = 10000
    """The product of the counts of nested repeats, as 10000 for `(a{1,100}){1,100}`."""


ANY_JSON = "$$ANY$$"
"""What SGLang understands as a schema for all JSON."""

_TOKEN = re.compile(
    r"""\\. | \[(?:\\.|[^\]\\])*\] | (?P<string>"(?:\\.|[^"\\])*") | (?P<open>\() | (?P<close>\))
      | (?P<repeat>\{\s*(?P<low>\d*)\s*,?\s*(?P<high>\d*)\s*\}) | (?P<lazy>[*+?]) | \s | . """,
    re.VERBOSE | re.DOTALL,
)


def check_grammar(name: str, text: str, limits: GrammarLimits = GrammarLimits()) -> None:
    """Refuse the value `text` of SGLang's parameter `name` if it is too long, deep or repetitive."""
    if name == "regex":
        _check_text(name, text, limits.max_regex_chars, limits.max_regex_depth, limits.max_repeats)
    elif name == "ebnf":
        _check_text(name, text, limits.max_chars, limits.max_depth, limits.max_repeats)
    elif text != ANY_JSON:
        _check_chars(name, text, limits.max_chars)
        try:
            parsed = json.loads(text)
        except RecursionError:
            raise ValueError(f"{name}: nested more than {limits.max_depth} deep") from None
        for depth, key, value in _walk(parsed):
            if depth > limits.max_depth:
                raise ValueError(f"{name}: nested more than {limits.max_depth} deep")
            if isinstance(value, str) and key in ("pattern", "regex"):
                check_grammar("regex", value, limits)
            elif isinstance(value, str) and key in ("grammar", "ebnf"):
                check_grammar("ebnf", value, limits)


def _check_text(name: str, text: str, max_chars: int, max_depth: int, max_repeats: int) -> None:
    _check_chars(name, text, max_chars)
    depth, repeats = nesting(text, has_strings=name == "ebnf")
    if depth > max_depth:
        raise ValueError(f"{name}: parentheses nested more than {max_depth} deep")
    if repeats > max_repeats:
        raise ValueError(f"{name}: nested repeats count to more than {max_repeats}")


def _check_chars(name: str, text: str, max_chars: int) -> None:
    if len(text) > max_chars:
        raise ValueError(f"{name}: at most {max_chars} characters are allowed, got {len(text)}")


def nesting(text: str, *, has_strings: bool) -> tuple[int, int]:
    """The depth of parentheses, and the largest product of the counts of nested repeats.

    Escaped characters, character classes and, with `has_strings`, strings in double quotes count as one.
    """
    groups = [1]
    deepest = 0
    atom = 1
    for token in _TOKEN.finditer(text):
        if token["open"]:
            groups.append(1)
            deepest = max(deepest, len(groups) - 1)
        elif token["close"]:
            atom = groups.pop() if len(groups) > 1 else 1
        elif token["repeat"]:
            atom *= max(int(token["low"][:9] or 1), int(token["high"][:9] or 1), 1)
        elif token["string"] and not has_strings:
            inner = nesting(token["string"][1:-1], has_strings=False)
            deepest, atom = max(deepest, len(groups) - 1 + inner[0]), inner[1]
        elif not token["lazy"] and not token[0].isspace():
            atom = 1
        groups[-1] = max(groups[-1], atom)
    return deepest, max(groups)


def _walk(parsed: Any) -> Iterator[tuple[int, str, Any]]:
    """All values inside parsed JSON, each with its depth and the key of an object that holds it, or ""."""
    waiting: list[tuple[int, str, Any]] = [(0, "", parsed)]
    while waiting:
        depth, key, value = waiting.pop()
        yield depth, key, value
        if isinstance(value, dict):
            waiting += [(depth + 1, str(name), one) for name, one in value.items()]
        elif isinstance(value, list):
            waiting += [(depth + 1, "", one) for one in value]
