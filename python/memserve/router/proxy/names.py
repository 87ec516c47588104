"""The names of requests at the servers, which are the router's own. Pure.

    MARK-000001-job-7    a new mark for each attempt, the number of the prompt, the name in the answer

SGLang refuses a name that it still knows, aborts every request whose name begins with the given one, and
repeats an abort 2 s after a stream's end. No name here is a prefix of another request's, or used twice.
A first attempt whose client chose no name has no mark: its own name is in the answer.
Source: SGLang 0.5.23, Scheduler.abort_request, TokenizerManager.create_abort_task.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

from msgspec import structs

from memserve.router.request import Api, GenerationRequest, encode_json

_ID = re.compile(rb'^(data: ?\{"id": ?)"[^"]*"', re.MULTILINE)
_NUMBER = len("-000000-")


def renamed(request: GenerationRequest) -> GenerationRequest:
    """`request` with new names at the servers; answers call it as before."""
    mark = secrets.token_hex(8)
    rids = tuple(f"{mark}-{number:06}-{told_name(request, rid)}" for number, rid in enumerate(request.rids))
    rid = (
        rids[0] if request.num_prompts is None else f"{mark}-{len(rids):06}-{told_name(request, request.rid)}"
    )
    return structs.replace(request, rid=rid, rids=rids, mark=mark)


def told_name(request: GenerationRequest, name: str) -> str:
    """The name in answers for one of the names of `request` at the servers."""
    return name[len(request.mark) + _NUMBER :] if request.mark else name


def told_names(request: GenerationRequest) -> set[str]:
    """The names of all prompts of `request` in answers."""
    return {told_name(request, name) for name in request.rids}


def with_told_names(mark: str, answer: bytes) -> bytes:
    """A whole answer, or whole events, of the attempt with that mark, with the names for the client."""
    if not mark:
        return answer
    first, *rest = answer.split(f'"{mark}-'.encode())
    return b'"'.join([first, *(part[_NUMBER - 1 :] for part in rest)])


def has_several_ids(request: GenerationRequest) -> bool:
    """Whether SGLang's events have an id per prompt or sample, where OpenAI's have one in all."""
    is_single = request.num_prompts is None and request.num_samples == 1
    return request.api is not Api.GENERATE and not is_single


def with_one_id(request: GenerationRequest, events: bytes) -> bytes:
    """Whole events of OpenAI's, all with the id of the request."""
    name = encode_json(told_name(request, request.rid))
    return _ID.sub(lambda found: found[1] + name, events)


def names_to_abort(request: GenerationRequest, aborted: Iterable[str]) -> list[str]:
    """The names at the servers of the parts of `request` that answers call `aborted`."""
    wanted = set(aborted)
    return [name for name in request.rids if told_name(request, name) in wanted]
