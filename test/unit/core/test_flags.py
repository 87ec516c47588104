"""Flags made from a record."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from memserve.core.flags import add_flags, from_namespace, setting


@dataclass(frozen=True, slots=True)
class Example:
    """One field of every kind."""

    host: str = setting("127.0.0.1", "where to listen")
    num_threads: int = setting(4, "how many")
    wait_secs: float = setting(0.5, "how long")
    mode: Literal["fast", "safe"] = setting("safe", "100% of the time")
    verbose: bool = setting(False, "say more")
    key_file: Path | None = setting(None, "a secret")
    limit: int | None = setting(None, "at most", metavar="BYTES")
    extra: tuple[str, ...] = ()


def parse(*argv: str, **others: Any) -> Example:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, Example)
    return from_namespace(Example, parser.parse_args(argv), **others)


def test_flags_default_to_the_values_of_the_record() -> None:
    assert parse() == Example()


def test_flags_are_parsed_by_the_type_of_their_field() -> None:
    argv = "--host h --num-threads 2 --wait-secs 1.5 --mode fast --verbose --key-file k --limit 7"
    assert parse(*argv.split(), extra=("x",)) == Example("h", 2, 1.5, "fast", True, Path("k"), 7, ("x",))


def test_bool_flags_can_be_turned_off() -> None:
    assert parse("--verbose", "--no-verbose").verbose is False


def test_fields_without_setting_have_no_flag() -> None:
    with pytest.raises(SystemExit):
        parse("--extra", "x")


@pytest.mark.parametrize("argv", ["--num-threads x", "--mode other", "--limit 1.5", "--unknown 1"])
def test_invalid_flag_value_exits_with_status_2(argv: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*argv.split())
    assert caught.value.code == 2
    assert argv.split()[0] in capsys.readouterr().err


def test_help_lists_each_setting_with_its_default() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Example)
    text = " ".join(parser.format_help().split())
    assert "--num-threads N how many (default: 4)" in text
    assert "--limit BYTES at most" in text
    assert "100% of the time (default: safe)" in text
    assert "--wait-secs SECONDS" in text
    assert "(default: None)" not in text
