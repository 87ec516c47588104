"""The errors of a client that SGLang answers with 500. Pure.

Every server answers them so, and none is at fault: the client is told them as 400, and once.
Source: SGLang 0.5.23; a test compares the texts with its source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from memserve.router.errors import UpstreamError, UpstreamFault, UpstreamRejected, failure
from memserve.router.request import GenerationRequest


@dataclass(frozen=True, slots=True)
class ClientError:
    """One kind of error."""

    said: re.Pattern[str]
    """What the server's message contains."""
    fields: tuple[str, ...]
    """The request has to set one of these, which is at fault."""


_GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag", "response_format", "tools")

CLIENT_ERRORS = (
    # sampling_params.py (get_max_seq_length): re.error leaves the handler
    ClientError(
        re.compile(r"^Internal server error: .* at position \d+|^Internal Server Error$"), ("stop_regex",)
    ),
    # A grammar that the first tokens cannot fulfil: scheduler_components/batch_result_processor.py
    ClientError(re.compile("Grammar accept_token failed"), _GRAMMARS),
)


def client_error(request: GenerationRequest, fault: UpstreamFault) -> UpstreamRejected | None:
    """The client's error that `fault` reports; None if it may be the server's own fault."""
    if not isinstance(fault, UpstreamError):
        return None
    for kind in CLIENT_ERRORS:
        if kind.said.search(fault.said) and (field := next(_set_fields(request, kind.fields), None)):
            return UpstreamRejected(400, failure(400, f"{field}: {fault.said}", field=field).error)
    return None


def _set_fields(request: GenerationRequest, names: tuple[str, ...]) -> Iterator[str]:
    for values in (request.body, *request.sampling):
        yield from (name for name in names if isinstance(values, dict) and values.get(name) is not None)
