"""Log lines, as text or JSON, to stderr and a file; whoever logs never waits for either, and never fails.

    logger ── queue, bounded ──> a thread ──> stderr
                                      └─────> DIR/router.log, which is renamed when it has grown

Where nobody reads stderr, or the disk is full, lines are lost and counted; the count is logged when lines
can be written again. What a line says of strangers cannot begin another one: control characters are escaped.
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

MAX_WAITING = 10_000
"""Lines that wait for their turn; of more, the newest are lost."""
RETRY_S = 5.0
"""How long a file that could not be written to is left alone."""
CLOSE_S = 2.0
"""How long the end of the process waits for lines to be written."""

_DIRECTIVE = re.compile(r"(?:(\w+)=)?%(?!%)[#0\- +]*\d*(?:\.\d+)?([a-zA-Z])")
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), 0x7F, 0x85, 0x2028, 0x2029)}


class TextFormatter(logging.Formatter):
    """One line per record; a traceback follows on lines of its own."""

    def __init__(self) -> None:
        super().__init__("[%(asctime)s] %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = record.message.translate(_ESCAPES)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and every `name=value` of the message."""

    def format(self, record: logging.LogRecord) -> str:
        """As `json.dumps` writes it, without a line break."""
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
    """What each argument of a message is called: the word before its `=`, or ""."""
    return tuple(name for name, _ in _DIRECTIVE.findall(template.replace("%%", "")))


class ResilientFileHandler(RotatingFileHandler):
    """A file that may be impossible to write to for a while."""

    def __init__(self, path: Path, max_bytes: int, num_backups: int) -> None:
        """Raises OSError if it cannot be opened at the beginning."""
        super().__init__(path, maxBytes=max_bytes, backupCount=num_backups, encoding="utf-8")
        self.num_lost = 0
        self._until_s = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Write it, or lose it."""
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
        """Leave the file alone for a while. What its buffer holds is lost too: it would only grow."""
        self.num_lost += 1
        error = sys.exception()
        if not isinstance(error, OSError):
            return
        if self._until_s == 0.0:
            print(f"cannot write {self.baseFilename}: {error}; logging to stderr only", file=sys.stderr)
        self._until_s = time.monotonic() + RETRY_S
        stream, self.stream = self.stream, None
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.close()


class _Stderr(logging.StreamHandler[TextIO]):
    """What a service manager or a person reads, if anybody does."""

    def handleError(self, _: logging.LogRecord) -> None:  # noqa: N802
        """Nobody does."""


class _QueueHandler(QueueHandler):
    """Where records come in, on any thread."""

    def __init__(self, waiting: queue.Queue[Any]) -> None:
        super().__init__(waiting)
        self.num_lost = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Words are made on the other thread."""
        return record

    def handleError(self, _: logging.LogRecord) -> None:  # noqa: N802
        """Too many wait."""
        self.num_lost += 1


class Logs:
    """The process's log lines, from `start` to `close`."""

    def __init__(self, config: LogConfig) -> None:
        """Raises ConfigError if the log file cannot be written."""
        formatter = JsonFormatter() if config.log_format == "json" else TextFormatter()
        self._handlers: list[logging.Handler] = [_Stderr(sys.stderr)]
        if config.log_dir is not None:
            try:
                config.log_dir.mkdir(parents=True, exist_ok=True)
                file, max_bytes = config.log_dir / "router.log", config.log_max_mib << 20
                self._handlers.append(ResilientFileHandler(file, max_bytes, config.log_backups))
            except OSError as error:
                raise ConfigError(f"cannot write logs to {config.log_dir}: {error.strerror}") from error
        for handler in self._handlers:
            handler.setFormatter(formatter)
        self._level = config.log_level.upper()
        self._waiting: queue.Queue[logging.LogRecord | None] = queue.Queue(MAX_WAITING)
        self._door = _QueueHandler(self._waiting)
        self._thread = threading.Thread(target=self._write, name="logs", daemon=True)

    def start(self) -> None:
        """Take everything that is logged from now on."""
        root = logging.getLogger()
        root.setLevel(self._level)
        root.addHandler(self._door)
        self._thread.start()

    def close(self) -> None:
        """Write what waits, for a while at most."""
        logging.getLogger().removeHandler(self._door)
        with suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSE_S)
        self._thread.join(CLOSE_S)

    def _write(self) -> None:
        while (record := self._waiting.get()) is not None:
            self._handle(record)
            if (lost := self._door.num_lost) and self._waiting.empty():
                self._door.num_lost -= lost
                told = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"}
                self._handle(logging.makeLogRecord({**told, "msg": "log lines lost num=%d", "args": (lost,)}))

    def _handle(self, record: logging.LogRecord) -> None:
        for handler in self._handlers:
            handler.handle(record)
