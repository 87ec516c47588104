"""One generation request that was validated. Knows no servers."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Protocol, TypeAlias

import msgspec

from memserve.router.sglang_api import DEFAULT_OUTPUT_TOKENS, LOST_IN_PAIRS, OUTPUT_LIMITS

JsonObject: TypeAlias = dict[str, object]
"""A JSON object with SGLang's fields: the router reads a few and passes on all."""

encode_json = msgspec.json.Encoder().encode
decode_json = msgspec.json.Decoder().decode


class Api(StrEnum):
    """The endpoints that generate; the value is the path."""

    GENERATE = "/generate"
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


class RequestIds:
    """Gives request ids that are unique among router processes; no id is a prefix of another."""

    def __init__(self) -> None:
        self._process = secrets.token_hex(10)
        self._counter = itertools.count()

    def new(self) -> str:
        """The next id."""
        return f"{self._process}{next(self._counter):012x}"


def part_names(rid: str, count: int) -> tuple[str, ...]:
    """Names for the parts of the request `rid`: none is a prefix of another."""
    return tuple(f"{rid}_{number:06}" for number in range(count))


class LegTrace(Protocol):
    """Records when the legs of a request begin and end."""

    def leg(self, instance: str, role: str) -> Mapping[str, str]:
        """A leg begins; returns trace headers for its server."""

    def left(self, instance: str, *, is_answered: bool) -> None:
        """A leg has ended."""


class GenerationRequest(msgspec.Struct, frozen=True):
    """A validated request."""

    api: Api
    body: JsonObject
    """As the client sent it. Never changed."""
    rid: str
    """The request's name at every server."""
    has_client_rid: bool
    """The client chose the name, and may use it again."""
    rids: tuple[str, ...]
    """The servers' names: one per prompt."""
    num_prompts: int | None
    """Number of prompts in a batch; None for a single prompt."""
    num_samples: int
    """Number of answers per prompt."""
    model: str | None
    body_bytes: int = 0
    """Size of the body as the client sent it."""
    authorization: str | None = None
    timeout_s: float | None = None
    """How long the client waits for the whole answer; None: not said."""
    mark: str = ""
    """What the names begin with if answers call the request otherwise (`proxy.names`)."""
    tenant: str | None = None
    """Whose request it is; None: clients are not told apart."""
    aborted: set[str] = msgspec.field(default_factory=set)
    """The names, in answers, of the prompts that the client has aborted since. Shared by all attempts."""
    wants_report: bool = False
    """Its stream ends with a comment that reports the prompt tokens that prefill reused."""
    trace: LegTrace | None = None

    def __repr__(self) -> str:
        return f"GenerationRequest({self.api}, rid={self.rid})"  # neither prompts nor keys

    @property
    def is_stream(self) -> bool:
        """Whether the answer is an event stream."""
        return self.body.get("stream") is True

    @property
    def sampling(self) -> Sequence[JsonObject]:
        """The sampling parameters of each prompt; one entry if all prompts share them."""
        params = (self.body.get("sampling_params") or {}) if self.api is Api.GENERATE else self.body
        return params if isinstance(params, list) else [params]  # type: ignore[list-item]

    @property
    def answer_limit(self) -> int | None:
        """The longest answer in tokens that the request allows to one prompt; None: no limit."""
        params = next(iter(self.sampling), None)
        for name in OUTPUT_LIMITS if isinstance(params, dict) else ():
            limit = params.get(name)  # type: ignore[union-attr]
            if isinstance(limit, int) and not isinstance(limit, bool) and limit >= 0:
                return limit
        return None

    @property
    def expected_output_tokens(self) -> int:
        """How many tokens an answer is expected to have, at most."""
        return min(self.answer_limit or DEFAULT_OUTPUT_TOKENS, DEFAULT_OUTPUT_TOKENS)

    @property
    def max_output_tokens(self) -> int:
        """How many tokens all answers together may have."""
        limit = self.answer_limit
        each = DEFAULT_OUTPUT_TOKENS if limit is None else limit
        return (self.num_prompts or 1) * self.num_samples * each

    @property
    def wants_input_logprobs(self) -> bool:
        """Whether the answer holds logprobs of the prompt, which only prefill knows."""
        if self.api is Api.GENERATE:
            wanted = self.body.get("return_logprob")
            return any(wanted) if isinstance(wanted, list) else bool(wanted)
        return self.api is Api.COMPLETIONS and bool(self.body.get("echo")) and bool(self.body.get("logprobs"))

    @property
    def wanted_of_one_server(self) -> list[str]:
        """The fields that ask for values of the prompt which a prefill server does not hand over."""
        wanted = {name: self.body.get(name) for name in LOST_IN_PAIRS}
        return [name for name, one in wanted.items() if (any(one) if isinstance(one, list) else one)]
