"""Command-line flags from a configuration record, so that a setting is written down once.

A record is a frozen dataclass whose fields carry `setting(default, help)`. Knows no component.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

RecordT = TypeVar("RecordT")


def setting(
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    is_secret: bool = False,
    synonyms: Mapping[str, str] = types.MappingProxyType({}),
) -> Any:
    """A dataclass field with its default and the line that `--help` shows for it.

    A secret is not in the record's repr. `synonyms`: other spellings of a text.
    """
    metadata = {"help": help, "metavar": metavar, "synonyms": synonyms}
    return dataclasses.field(default=default, repr=not is_secret, metadata=metadata)


def add_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup, record: type[Any]) -> None:
    """Add one `--kebab-case` flag per field of `record` that was declared with `setting`.

    bool gives `--x/--no-x`, Literal and StrEnum give choices, `X | None` reads an X, `tuple[X, ...]` several.
    """
    hints = typing.get_type_hints(record)
    for field in dataclasses.fields(record):
        if "help" not in field.metadata:
            continue
        flag = "--" + field.name.replace("_", "-")
        kwargs: dict[str, Any] = {"default": field.default, "help": _help(field)}
        kind = _without_none(hints[field.name])
        if kind is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            kwargs["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is tuple:
            kwargs |= {"type": typing.get_args(kind)[0], "nargs": "*"}
            kwargs["metavar"] = field.metadata["metavar"] or "TEXT"
        elif isinstance(kind, enum.EnumMeta):
            kwargs |= {"type": kind, "choices": list(kind), "metavar": f"{{{','.join(kind)}}}"}
        else:
            kwargs["type"] = kind
            kwargs["metavar"] = field.metadata["metavar"] or _METAVARS.get(kind, "TEXT")
        if synonyms := field.metadata["synonyms"]:
            kwargs["type"] = lambda text, known=synonyms: known.get(text, text)
        parser.add_argument(flag, **kwargs)


def from_namespace(record: type[RecordT], namespace: argparse.Namespace, **others: Any) -> RecordT:
    """The record that the parsed flags describe; `others` fill the fields that have no flag."""
    values = {
        field.name: getattr(namespace, field.name)
        for field in dataclasses.fields(record)  # type: ignore[arg-type]
        if "help" in field.metadata
    }
    values = {name: tuple(one) if isinstance(one, list) else one for name, one in values.items()}
    return record(**values, **others)


_METAVARS: dict[Any, str] = {int: "N", float: "SECONDS", Path: "FILE"}


def _help(field: dataclasses.Field[Any]) -> str:
    text = str(field.metadata["help"]).replace("%", "%%")
    shown = field.default not in (None, "", ()) and not isinstance(field.default, bool)
    return f"{text} (default: {field.default})" if shown else text


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if len(kinds) == 1:
            return kinds[0]
    return hint
