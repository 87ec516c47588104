"""Command-line flags from a configuration record, so that a setting is declared once.

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

from memserve.core.errors import ConfigError

RecordT = TypeVar("RecordT")


def setting(
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    is_secret: bool = False,
    above: float | None = None,
    at_least: float | None = None,
    synonyms: Mapping[str, str] = types.MappingProxyType({}),
) -> Any:
    """A dataclass field with its default and the line that `--help` shows for it.

    A secret is not in the record's repr. `above`, `at_least`: bounds that `check_settings` checks.
    `synonyms`: other spellings of a text.
    """
    bounds = {"above": above, "at_least": at_least}
    metadata = {"help": help, "metavar": metavar, "synonyms": synonyms, **bounds}
    return dataclasses.field(default=default, repr=not is_secret, metadata=metadata)


def check_settings(record: Any) -> None:
    """Raise ConfigError if a number is out of its setting's bounds. None is within all bounds."""
    for field in dataclasses.fields(record):
        value, bounds = getattr(record, field.name), field.metadata
        if value is None:
            continue
        if (bound := bounds.get("above")) is not None and not value > bound:
            raise ConfigError(f"{_flag(field)} has to be more than {bound:g}, not {value:g}")
        if (bound := bounds.get("at_least")) is not None and not value >= bound:
            raise ConfigError(f"{_flag(field)} has to be at least {bound:g}, not {value:g}")


def add_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup, record: type[Any]) -> None:
    """Add one `--kebab-case` flag per field of `record` that was declared with `setting`.

    bool gives `--x/--no-x`, Literal and StrEnum give choices, `X | None` reads an X, `tuple[X, ...]` several.
    """
    hints = typing.get_type_hints(record)
    for field in dataclasses.fields(record):
        if "help" not in field.metadata:
            continue
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
        parser.add_argument(_flag(field), **kwargs)


def settings_in(record: type[Any], namespace: argparse.Namespace) -> dict[str, Any]:
    """The parsed values of the fields of `record` that have a flag."""
    names = [field.name for field in dataclasses.fields(record) if "help" in field.metadata]
    values = {name: getattr(namespace, name) for name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def from_namespace(record: type[RecordT], namespace: argparse.Namespace, **others: Any) -> RecordT:
    """The record that the parsed flags describe; `others` fill the fields that have no flag."""
    return record(**settings_in(record, namespace), **others)


_METAVARS: dict[Any, str] = {int: "N", float: "SECONDS", Path: "FILE"}


def _flag(field: dataclasses.Field[Any]) -> str:
    return "--" + field.name.replace("_", "-")


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
