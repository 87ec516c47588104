"""Hooks that let an exception in one request's processing end this request only.

SGLang's scheduler ends with the first exception. Here one that SGLang raises while it takes in a request,
or decides whether the request is finished, becomes the request's error, logged with its rid. Nothing else
is caught: after a failed batch the state of its requests is unknown, and the process must end.

All ranks of a server run the same code on the same request, so they fail alike. In a pair the other side
learns of the abort as of each other one: its receiver or sender of KV fails, or the router aborts its leg.
"""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from memserve.engine import request_seams as seams

logger = logging.getLogger(__name__)


def place() -> None:
    """Register the hooks, in a process that has a scheduler."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(seams.HANDLE_REQUEST, take_in, HookType.AROUND)
    HookRegistry.register(seams.FINISH_STATE, update_finish_state, HookType.AROUND)


def take_in(original: Callable[..., Any], scheduler: Any, request: Any, **kwargs: Any) -> None:
    """Abort the request if SGLang cannot take it in."""
    try:
        original(scheduler, request, **kwargs)
    except Exception as error:
        logger.exception("request failed on arrival and is aborted rid=%s", request.rid)
        reason = {
            "type": "abort",
            "message": _message(error),
            "status_code": int(HTTPStatus.INTERNAL_SERVER_ERROR),
            "err_type": "InternalServerError",
        }
        abort = pkgutil.resolve_name(seams.ABORT)(rid=request.rid, finished_reason=reason)
        scheduler.send_abort_output(abort, request)


def update_finish_state(original: Callable[..., Any], req: Any, *args: Any, **kwargs: Any) -> None:
    """Finish the request with an error if SGLang's checks for its end fail."""
    try:
        original(req, *args, **kwargs)
    except Exception as error:
        logger.exception("the check for a request's end failed and the request is aborted rid=%s", req.rid)
        abort(req, _message(error), HTTPStatus.INTERNAL_SERVER_ERROR)


def abort(req: Any, message: str, status: HTTPStatus) -> None:
    """Finish the request with an error."""
    kind = "BadRequestError" if status == HTTPStatus.BAD_REQUEST else "InternalServerError"
    req.to_finish = None
    req.finished_reason = pkgutil.resolve_name(seams.FINISH_ABORT)(message, status, kind)


def _message(error: Exception) -> str:
    return f"the server could not process this request: {type(error).__name__}: {error}"[:300]
