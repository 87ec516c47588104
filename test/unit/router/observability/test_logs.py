"""Log lines: one per record, without blocking or failing the thread that logs."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memserve.router.observability import logs as logs_module
from memserve.router.observability.config import LogConfig
from memserve.router.observability.logs import (
    JsonFormatter,
    Logs,
    ResilientFileHandler,
    TextFormatter,
    fields_of,
)

logger = logging.getLogger("memserve.test_logs")


@pytest.fixture(autouse=True)
def root_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


def record(message: str, *args: Any, **others: Any) -> logging.LogRecord:
    return logging.LogRecord("memserve.x", logging.INFO, "x.py", 1, message, args, None, **others)


def told(folder: Path, **settings: Any) -> list[str]:
    """What the file has after a few lines."""
    logs = Logs(LogConfig(log_dir=folder, **settings))
    logs.start()
    logger.info("request end rid=%s status=%d ms=%.1f reason=%s", "r\n1", 200, 1.25, "it's 5 o'clock")
    logger.debug("unseen")
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("a part failed part=%s", "the tree")
    logs.close()
    return (folder / "router.log").read_text().splitlines()


def test_json_log_line_has_the_fields_of_its_message(tmp_path: Path) -> None:
    first, second = map(json.loads, told(tmp_path, log_format="json"))
    assert (first["rid"], first["status"], first["ms"]) == ("r\n1", 200, 1.25)
    assert (first["level"], first["logger"], first["reason"]) == ("info", logger.name, "it's 5 o'clock")
    assert first["time"].endswith("Z")
    assert "ValueError: broken" in second["traceback"]
    assert second["part"] == "the tree"


def test_log_escapes_control_characters(tmp_path: Path) -> None:
    lines = told(tmp_path)
    assert "rid=r\\x0a1 status=200" in lines[0]
    assert sum(line.startswith("[") for line in lines) == 2
    for text in ("\r", "\n", "\x1b[2J", "\u2028", "\x85"):
        for formatter in (TextFormatter(), JsonFormatter()):
            line = formatter.format(record("rid=%s", f"a{text}b"))
            assert text not in line
            assert len(line.splitlines()) == 1


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("rid=%s status=%d ms=%.1f", ("rid", "status", "ms")),
        ("blocks=%d of %d: %s", ("blocks", "", "")),
        ("100%% of rid=%s", ("rid",)),
        ("plain", ()),
    ],
)
def test_log_field_names_come_from_the_template(template: str, names: tuple[str, ...]) -> None:
    assert fields_of(template) == names


def test_json_log_keeps_its_own_keys() -> None:
    line = json.loads(JsonFormatter().format(record("level=%s time=%s x=%s", "mine", "mine", None)))
    assert (line["level"], line["x"]) == ("info", "None")
    assert line["time"] != "mine"


def test_log_file_rotates_at_its_limit(tmp_path: Path) -> None:
    file = ResilientFileHandler(tmp_path / "router.log", 100, 4, retry_s=5.0)
    for number in range(100):
        file.emit(record("line %d of many", number))
    file.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["router.log", *(f"router.log.{i}" for i in range(1, 5))]
    assert all(path.stat().st_size <= 100 for path in tmp_path.iterdir())


def test_log_survives_a_full_disk_and_reports_lost_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(logs_module.time, "monotonic", lambda: now[0])
    path = tmp_path / "router.log"
    path.symlink_to("/dev/full")
    file = ResilientFileHandler(path, 0, 4, retry_s=5.0)
    for number in range(3):
        file.emit(record("lost %d", number))
    assert file.num_lost == 3
    assert "No space left" in capsys.readouterr().err
    path.unlink()
    file.emit(record("too early"))
    now[0] += 5.0
    file.emit(record("again"))
    file.close()
    lost = "4 lines were lost while this file could not be written"
    assert path.read_text().splitlines() == ["again", lost]
    assert file.num_lost == 0


def test_log_does_not_block_on_unread_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unread pipe holds 64 KiB; then a write blocks for ever."""
    import os
    import time

    reading, writing = os.pipe()
    monkeypatch.setattr(sys, "stderr", os.fdopen(writing, "w"))
    logs = Logs(LogConfig(log_queue_lines=100, log_close_secs=0.05))
    logs.start()
    begun = time.monotonic()
    for _ in range(5000):
        logger.info("x" * 100)
    logs.close()
    assert time.monotonic() - begun < 10
    os.close(reading)


def test_unusable_log_folder_is_a_config_error(tmp_path: Path) -> None:
    from memserve.core.errors import ConfigError

    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write logs"):
        Logs(LogConfig(log_dir=tmp_path / "file" / "logs"))
