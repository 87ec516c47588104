"""Writes log lines, as text or JSON, to stderr and a file. A thread that logs never waits and never fails.

    logger ── queue, bounded ──> a thread ──> stderr
                                      └─────> DIR/router.log, which is renamed when it has grown

If stderr is not read, or the disk is full, lines are lost and counted; the count is logged when lines can be
written again. Control characters are escaped: the text of a client cannot begin another line.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import sys
import threading
import time
from contextlib import suppress
from functools import lru_cache
from logging.handlers import QueueHandler, RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

from memserve.core.errors import ConfigError
from memserve.router.observability.config import LogConfig

_DIRECTIVE = re.compile(r"(?:(\w+)=)?%(?!%)[#0\- +]*\d*(?:\.\d+)?([a-zA-Z])")
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}


class TextFormatter(logging.Formatter):
    """One line per record; a traceback follows on further lines."""

    def __init__(self) -> None:
        super().__init__("[%(asctime)s] %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = record.message.translate(_ESCAPES)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and every `name=value` of the message."""

    def format(self, record: logging.LogRecord) -> str:
        """The JSON object, without a line break."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        names = fields_of(record.msg) if isinstance(record.msg, str) else ()
        args = record.args if isinstance(record.args, tuple) else ()
        if len(names) == len(args):
            for name, value in zip(names, args, strict=True):
                if name and name not in line:
                    line[name] = value if isinstance(value, int | float) else str(value)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


@lru_cache(maxsize=1024)
def fields_of(template: str) -> tuple[str, ...]:
    """The name of each argument of a message: the word before its `=`, or ""."""
    return tuple(name for name, _ in _DIRECTIVE.findall(template.replace("%%", "")))


class ResilientFileHandler(RotatingFileHandler):
    """A rotated file that may be unwritable for a while."""

    def __init__(self, path: Path, max_bytes: int, num_backups: int, retry_s: float) -> None:
        """Raises OSError if the file cannot be opened. `retry_s`: pause after a line cannot be written."""
        super().__init__(
            path, maxBytes=max_bytes, backupCount=num_backups, encoding="utf-8", errors="backslashreplace"
        )
        self.num_lost = 0
        self._retry_s = retry_s
        self._until_s = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, or lose and count it."""
        if time.monotonic() < self._until_s:
            self.num_lost += 1
            return
        lost, before = self.num_lost, self._until_s
        super().emit(record)
        if lost and self._until_s == before:
            self.num_lost = 0
            lines = f"{lost} lines were lost while this file could not be written"
            super().emit(logging.makeLogRecord({"name": __name__, "levelname": "WARNING", "msg": lines}))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Stop writing for `retry_s`. The buffered lines are lost, too: the buffer would only grow."""
        self.num_lost += 1
        error = sys.exception()
        if not isinstance(error, OSError):
            return
        if self._until_s == 0.0:
            print(f"cannot write {self.baseFilename}: {error}; logging to stderr only", file=sys.stderr)
        self._until_s = time.monotonic() + self._retry_s
        stream, self.stream = self.stream, None
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.close()


class _Stderr(logging.StreamHandler[TextIO]):
    """The process's stderr."""

    def handleError(self, _: logging.LogRecord) -> None:  # noqa: N802
        """Ignore errors: stderr may be closed."""


class _QueueHandler(QueueHandler):
    """Puts records into the queue, on any thread."""

    def __init__(self, records: queue.Queue[Any]) -> None:
        super().__init__(records)
        self.num_lost = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Defer formatting to the writer thread."""
        return record

    def handleError(self, _: logging.LogRecord) -> None:  # noqa: N802
        """The queue is full: count the lost line."""
        self.num_lost += 1


class Logs:
    """Writes the process's log lines from `start` to `close`."""

    def __init__(self, config: LogConfig) -> None:
        """Raises ConfigError if the log file cannot be written."""
        formatter = JsonFormatter() if config.log_format == "json" else TextFormatter()
        self._handlers: list[logging.Handler] = [_Stderr(sys.stderr)]
        if config.log_dir is not None:
            try:
                config.log_dir.mkdir(parents=True, exist_ok=True)
                file, max_bytes = config.log_dir / "router.log", config.log_max_mib << 20
                self._handlers.append(
                    ResilientFileHandler(file, max_bytes, config.log_backups, config.log_retry_secs)
                )
            except OSError as error:
                raise ConfigError(f"cannot write logs to {config.log_dir}: {error.strerror}") from error
        for handler in self._handlers:
            handler.setFormatter(formatter)
        self._level = config.log_level.upper()
        self._queue: queue.Queue[logging.LogRecord | None] = queue.Queue(config.log_queue_lines)
        self._close_s = config.log_close_secs
        self._entry = _QueueHandler(self._queue)
        self._thread = threading.Thread(target=self._write, name="logs", daemon=True)

    def start(self) -> None:
        """Handle all records from now on."""
        root = logging.getLogger()
        root.setLevel(self._level)
        root.addHandler(self._entry)
        self._thread.start()

    def close(self) -> None:
        """Write the queued lines, within `log_close_secs`."""
        logging.getLogger().removeHandler(self._entry)
        with suppress(queue.Full):
            self._queue.put(None, timeout=self._close_s)
        self._thread.join(self._close_s)

    def _write(self) -> None:
        while (record := self._queue.get()) is not None:
            self._handle(record)
            if (lost := self._entry.num_lost) and self._queue.empty():
                self._entry.num_lost -= lost
                told = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"}
                self._handle(logging.makeLogRecord({**told, "msg": "log lines lost num=%d", "args": (lost,)}))

    def _handle(self, record: logging.LogRecord) -> None:
        for handler in self._handlers:
            handler.handle(record)
