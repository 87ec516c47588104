"""Strategies for control messages, with few different values, so that messages refer to the same things."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from memserve.core.block_keys import page_keys
from memserve.wire.messages import Message

NUMBERS = (0, 1, 2, 3, -1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -(2**63))
WORDS = (
    "",
    "a",
    "b",
    "127.0.0.1:1",
    "http://127.0.0.1:1",
    "zz",
    "00ff",
    "\udcff".encode("utf-8", "replace").decode(),
)
CHAIN = tuple(page_keys([1] * 4, 1))
BYTES = (*CHAIN, *page_keys([2] * 2, 1), b"", b"short", b"x" * 33)


def messages(*kinds: type) -> st.SearchStrategy[Any]:
    """Of these kinds; of all there are, if none is named."""
    return (
        _of(inspect.multi_type_info([kind])[0] for kind in kinds)
        if kinds
        else _any(inspect.type_info(Message))
    )


def _of(types: Any) -> st.SearchStrategy[Any]:
    return st.one_of([_any(one) for one in types])


def _any(kind: inspect.Type) -> st.SearchStrategy[Any]:
    match kind:
        case inspect.IntType():
            return st.sampled_from(NUMBERS)
        case inspect.FloatType(ge=None):
            return st.sampled_from((0.0, 0.5, -1.0, 1e300, float("inf"), float("nan")))
        case inspect.FloatType():
            return st.sampled_from((0.0, 0.5, 86400.0))
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.StrType():
            return st.sampled_from(WORDS)
        case inspect.BytesType():
            return st.sampled_from(BYTES)
        case inspect.EnumType(cls):
            return st.sampled_from(list(cls))
        case inspect.UnionType(types):
            return _of(types)
        case inspect.VarTupleType(item_type) | inspect.ListType(item_type):
            return st.lists(_any(item_type), max_size=4).map(tuple)
        case inspect.TupleType(item_types):
            return st.tuples(*map(_any, item_types))
        case inspect.StructType(cls) | inspect.DataclassType(cls):
            fields = {field.name: _any(field.type) for field in kind.fields}
            return (
                st.fixed_dictionaries(fields)
                .map(lambda values: _built(cls, values))
                .filter(lambda one: one is not None)
            )
        case inspect.NamedTupleType(cls):
            return st.tuples(*(_any(field.type) for field in kind.fields)).map(lambda values: cls(*values))
    raise AssertionError(f"no strategy for {kind}")


def _built(cls: Any, values: dict[str, Any]) -> Any:
    """None for what cannot be: it could not be received either."""
    try:
        built = cls(**values)
        msgspec.msgpack.encode(built)
    except (ValueError, OverflowError):
        return None
    return built
