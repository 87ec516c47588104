"""Decides everything about a request that can be decided before an instance is chosen, once.

    body ── validation ──> GenerationRequest ── tenant's salt ── PromptReader ──> keys, ids for text
                                                    ── capacity ──> PreparedRequest

Knows no HTTP, no policy and no upstream. Event loop thread only; tokenization runs on threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256

from msgspec import structs

from memserve.core.errors import BadRequest
from memserve.router.cluster.instance import ClusterSnapshot
from memserve.router.cluster.registry import InstanceRegistry
from memserve.router.field_kinds import ModelLimits
from memserve.router.proxy.capacity import check_fits, instances_that_fit, smallest_capacity
from memserve.router.proxy.names import renamed
from memserve.router.proxy.validation import read_body, read_request
from memserve.router.request import Api, GenerationRequest, JsonObject, LegTrace, RequestIds
from memserve.router.tokenization.prompts import PromptReader
from memserve.scheduling.context import Prompt

DEFAULT_MODEL = "default"
"""SGLang's name for the model of a request that names none."""


@dataclass(frozen=True, slots=True)
class ClientContext:
    """The facts of a request beside its body."""

    headers: Mapping[str, str] = field(default_factory=dict)
    """Names in lower case."""
    tenant: str | None = None
    """Whose part of the cache the request uses; None: the part that all clients share."""
    authorization: str | None = None
    """For the servers."""
    timeout_s: float | None = None
    """How long the client waits for the whole answer; None: not said."""
    wants_report: bool = False
    """A stream ends with a comment that tells what prefill reused."""
    trace: LegTrace | None = None


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that can be placed."""

    request: GenerationRequest
    """The request for the servers: with token ids in place of its text, where they are known."""
    prompt: Prompt
    model: str | None
    """The model that serves it, also if the request names none; None if no server is known."""
    sample: str | None = None
    """The beginning of its text, if the dashboard shows it."""
    num_tokens: int | None = None
    """Length of its longest prompt; None if every decode can hold it, or the length is not known."""

    def eligible(self, snapshot: ClusterSnapshot) -> ClusterSnapshot:
        """The instances of `snapshot` that serve the model and can hold the longest prompt.

        Colocated instances alone, if there are any and a pair cannot answer the request.
        """
        serving = ClusterSnapshot() if self.model is None else snapshot.serving(self.model)
        if serving.colocated and self.request.wanted_of_one_server:
            serving = ClusterSnapshot.of(serving.colocated)
        return serving if self.num_tokens is None else instances_that_fit(serving, self.num_tokens)

    def resumed(self, num_tokens: int | None) -> PreparedRequest:
        """This request with a prompt of `num_tokens`."""
        return replace(self, num_tokens=num_tokens)


@dataclass(frozen=True, slots=True)
class _ModelLimits:
    """The limits of all instances of one snapshot that serve a model."""

    candidates: ClusterSnapshot
    model: str | None
    page_tokens: int | None
    limits: ModelLimits
    max_prompt_tokens: int | None
    """The longest prompt that every decode can hold."""

    @classmethod
    def of(cls, candidates: ClusterSnapshot) -> _ModelLimits:
        facts = [instance.server_info for instance in candidates.all()]
        limits = ModelLimits(
            vocab_size=min((one.vocab_size for one in facts if one.vocab_size), default=None),
            context_tokens=min((one.context_tokens for one in facts if one.context_tokens), default=None),
            has_pairs=bool(candidates.prefills),
            takes_empty_text=all(one.takes_empty_text for one in facts),
        )
        page_tokens = next((one.page_size for one in facts if one.page_size), None)
        model = facts[0].model if facts else None
        return cls(candidates, model, page_tokens, limits, smallest_capacity(candidates))


class RequestPreparer:
    """Makes prepared requests of bodies."""

    def __init__(
        self,
        cluster: InstanceRegistry,
        reader: PromptReader,
        sample_of: Callable[[JsonObject], str | None] = lambda _: None,
    ) -> None:
        """`sample_of` gives the beginning of a body's text, if it is shown."""
        self._cluster = cluster
        self._reader = reader
        self._sample_of = sample_of
        self._ids = RequestIds()
        self._limits = _ModelLimits.of(ClusterSnapshot())

    async def prepare(self, api: Api | None, raw: bytes, client: ClientContext) -> PreparedRequest:
        """The request in the body `raw`. `api` None: the endpoint that takes a body of this shape.

        Raises BadRequest: the body is wrong, no server has the model (404), or no decode could ever hold
        the prompt.
        """
        body = read_body(raw)
        model = body.get("model")  # SGLang's native API knows no models, but a router has several
        limits = self._limits_of(model if isinstance(model, str) else None)
        request = read_request(api or _api_of(body), body, limits.limits, new_rid=self._ids.new())
        request = structs.replace(
            renamed(request) if request.has_client_rid else request,
            body=body if client.tenant is None else _salted(body, client.tenant),
            tenant=client.tenant,
            body_bytes=len(raw),
            authorization=client.authorization,
            timeout_s=client.timeout_s,
            wants_report=client.wants_report,
            trace=client.trace,
        )
        sample = self._sample_of(body)
        request, prompt, num_tokens = await self._reader.read(
            request, limits.model, limits.page_tokens, client.headers
        )
        limit = limits.max_prompt_tokens
        if limit is None or request.body_bytes <= limit:  # every token is at least one byte
            return PreparedRequest(request, prompt, limits.model, sample)
        if num_tokens is None:
            num_tokens = await self._reader.longest_prompt(request, limits.model)
        if num_tokens is not None and limits.model is not None:
            check_fits(self._cluster.snapshot.serving(limits.model), num_tokens, request.api)
        return PreparedRequest(request, prompt, limits.model, sample, num_tokens)

    def _limits_of(self, model: str | None) -> _ModelLimits:
        candidates = self.candidates(model)
        if self._limits.candidates is not candidates:
            self._limits = _ModelLimits.of(candidates)
        return self._limits

    def candidates(self, model: str | None) -> ClusterSnapshot:
        """The ready instances that serve `model`, or the first model if the request names none.

        Empty for a model whose servers are all away. Raises BadRequest (404) for one that is not served.
        """
        snapshot = self._cluster.snapshot
        models = snapshot.models()
        if not models:
            return snapshot
        if model in (None, DEFAULT_MODEL):
            return snapshot.serving(models[0])
        serving = snapshot.serving(model or "")
        if not serving.all() and not self._cluster.knows(model or ""):
            message = f"The model '{model}' does not exist; served here: {', '.join(models)}"
            raise BadRequest(message, field="model", status=404)
        return serving


def _api_of(body: JsonObject) -> Api:
    return Api.CHAT if "messages" in body else Api.COMPLETIONS if "prompt" in body else Api.GENERATE


def _salted(body: JsonObject, tenant: str) -> JsonObject:
    """`body` with a cache salt that depends on the tenant and on the client's own salt.

    Equal prompts of two tenants then have different keys in radix caches, pools and the prompt tree.
    """
    own = body.get("cache_salt")
    salt = [_salt(tenant, one) for one in own] if isinstance(own, list) else _salt(tenant, own)
    return {**body, "cache_salt": salt}


def _salt(tenant: str, own: object) -> str:
    """A salt that is no string counts as none."""
    parts = ("memserve tenant", tenant, own if isinstance(own, str) else "")
    return sha256(
        b"".join(len(part.encode()).to_bytes(8, "big") + part.encode() for part in parts)
    ).hexdigest()
