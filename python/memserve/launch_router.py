"""`python -m memserve.launch_router`: one HTTP address in front of a cluster of SGLang servers."""

from __future__ import annotations

import gc
import logging
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress

import uvloop

from memserve.core.errors import ConfigError
from memserve.router.app import serve
from memserve.router.command_line import parse_args
from memserve.router.observability.logs import Logs

logger = logging.getLogger("memserve.launch_router")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a router until a signal stops it; returns the process's exit code."""
    try:
        asked = parse_args(argv)
        logs = Logs(asked.logs)
        logs.start()
        try:
            for remark in asked.remarks:
                logger.info("%s", remark)
            allow_many_connections()
            collect_rarely()
            uvloop.run(serve(asked.config))
        finally:
            logs.close()
    except ConfigError as error:
        print(f"launch_router: {error}", file=sys.stderr)
        return 2
    return 0


def allow_many_connections() -> None:
    """Raise the open-file limit to the maximum: a stream takes up to three files."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # without a hard limit, the system still has one
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def collect_rarely() -> None:
    """Freeze the objects that exist now, and collect garbage rarely.

    Requests leave almost no reference cycles; scanning a large tree takes longer than many requests.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


if __name__ == "__main__":
    sys.exit(main())
