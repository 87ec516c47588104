"""A second process that a test drives, stops, resumes and kills; requests and answers are JSON lines.

`serve` is the loop of the child, `ChildProcess` the test's handle. Knows nothing of the child's verbs.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Verb = Callable[..., Any]

DEADLINE_S = 20.0
"""Time limit of each step of a test."""


class ChildProcess:
    """A child that runs `python *arguments` and answers `ask` until it is killed."""

    def __init__(self, *arguments: str) -> None:
        """Start the child and wait for its first line, which is `greeting`."""
        self._child = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._unread = b""
        self.pid = self._child.pid
        self.greeting = self._receive()

    def ask(self, verb: str, **arguments: object) -> Any:
        """The result of the child's `verb`. Raises ChildError with the child's exception."""
        self.send(verb, **arguments)
        return self.receive()

    def send(self, verb: str, **arguments: object) -> None:
        """The first half of `ask`."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
        self._child.stdin.flush()

    def receive(self) -> Any:
        """The second half of `ask`."""
        answer = self._receive()
        if "error" in answer:
            raise ChildError(answer["error"], answer["text"])
        return answer["value"]

    def stop(self) -> None:
        """Stop the child (SIGSTOP). Returns when all of its threads are stopped."""
        self._child.send_signal(signal.SIGSTOP)
        wait_until(lambda: self._states() == {"T"}, "the child to stop")

    def resume(self) -> None:
        """Continue a stopped child."""
        self._child.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill the child. Returns when it has ended. Idempotent."""
        self._child.kill()
        self._child.wait(DEADLINE_S)
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()

    def _states(self) -> set[str]:
        stats = Path(f"/proc/{self.pid}/task").glob("*/stat")
        return {stat.read_text().rpartition(")")[2].split()[0] for stat in stats}

    def _receive(self) -> Any:
        assert self._child.stdout is not None
        deadline = time.monotonic() + DEADLINE_S
        poll = select.poll()  # `select` takes descriptors below 1,024 only.
        poll.register(self._child.stdout, select.POLLIN)
        while b"\n" not in self._unread:
            if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
                raise TimeoutError(f"child {self.pid} did not answer")
            data = os.read(self._child.stdout.fileno(), 1 << 16)
            if not data:
                raise EOFError(f"child {self.pid} ended")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)


class ChildError(Exception):
    """The child's verb raised an exception of type `kind`."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


def serve(greeting: object, verbs: Mapping[str, Verb]) -> None:
    """Send `greeting`, then answer requests until the parent ends."""
    _send(greeting)
    for line in sys.stdin:
        request = json.loads(line)
        verb = verbs[request.pop("verb")]
        try:
            _send({"value": verb(**request)})
        except Exception as error:
            _send({"error": type(error).__name__, "text": str(error)})
    os._exit(0)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Return when `condition` holds. Raises TimeoutError, which names `what`, after DEADLINE_S."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {DEADLINE_S:g} s for {what}")
        time.sleep(0.002)


def _send(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
