"""Ends the processes that a script started, however the script itself ends.

    returns, fails       the caller's `with` or `finally`
    SIGINT, SIGTERM      `interrupt_on_signals`: KeyboardInterrupt, which unwinds to the same place
    SIGKILL, a crash     `start_child`, `end_with_parent`: Linux sends SIGTERM to the child

Knows no servers.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


class Terminated(KeyboardInterrupt):
    """A signal asked this process to end."""


def interrupt_on_signals() -> None:
    """From now on SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread. Idempotent.

    A shell without job control starts background processes with SIGINT ignored: that is replaced, too. An
    ignored SIGHUP (nohup) and a handler of the script's own stay. Does nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    replaced = {
        signal.SIGINT: (signal.SIG_DFL, signal.SIG_IGN),
        signal.SIGTERM: (signal.SIG_DFL,),
        signal.SIGHUP: (signal.SIG_DFL,),
    }
    for number, dispositions in replaced.items():
        if signal.getsignal(number) in dispositions:
            signal.signal(number, _interrupt)


def start_child(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a process that ends with this one, whose signals now raise; `options` are those of Popen."""
    interrupt_on_signals()
    return subprocess.Popen(command, preexec_fn=end_with_parent(), **options)  # noqa: PLW1509


def end_with_parent() -> Callable[[], None] | None:
    """A `preexec_fn` for a child that gets SIGTERM when this process has ended.

    None where the system cannot do it, and outside the main thread: Linux sends the signal at the end of
    the thread that started the child. The function makes one system call and takes no lock, so it is safe
    in a process with threads.
    """
    is_main = threading.current_thread() is threading.main_thread()
    return ask_for_sigterm if _LIBC is not None and is_main else None


def ask_for_sigterm() -> None:
    """Called in a child: the system sends it SIGTERM when the thread that forked it ends. Linux only."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM.value, 0, 0, 0)


def _interrupt(number: int, _: FrameType | None) -> None:
    raise Terminated(signal.Signals(number).name)
