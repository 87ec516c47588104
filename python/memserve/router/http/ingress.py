"""Limits, keys and queues between clients and the router's endpoints, built from the configuration."""

from __future__ import annotations

import logging
import resource
import ssl
import time
from dataclasses import dataclass

from memserve.core.hosts import is_loopback
from memserve.router.admission.config import AdmissionConfig
from memserve.router.admission.controller import (
    SERVED_FACTOR,
    AdmissionController,
    AdmissionMetrics,
    ByteBudget,
    default_bytes,
)
from memserve.router.admission.fair_queue import FairQueue
from memserve.router.auth.access import Access
from memserve.router.auth.config import AuthConfig, TlsConfig
from memserve.router.auth.keys import admin_keys, tenant_keys
from memserve.router.auth.tls import Certificate
from memserve.router.errors import Overloaded
from memserve.router.http.config import HttpConfig
from memserve.router.tenant import Rates

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """How much, and how slowly, a client may send and read."""

    max_body_bytes: int
    max_header_bytes: int
    """Of one header, or of the request line."""
    head_s: float
    """For the head of a request, from its first byte."""
    stall_s: float
    """For the next part of a body, or until the client reads more of an answer."""
    max_connections: int
    """Of all clients together."""
    keepalive_s: float
    """For the next request on a connection."""


@dataclass(frozen=True, slots=True)
class Ingress:
    """See the module. Event loop thread only."""

    access: Access
    admission: AdmissionController
    limits: ClientLimits
    budget: ByteBudget
    """The memory of all requests in the router."""
    certificate: Certificate | None
    """The certificate for clients; None: plain HTTP."""

    @property
    def tls(self) -> ssl.SSLContext | None:
        """The context of the listening socket."""
        return self.certificate.context if self.certificate else None

    def out_of_memory(self) -> Overloaded:
        """The error for a request that the byte budget has no room for; counts it."""
        return self.admission.refused("memory")

    def reload(self, *, is_forced: bool = False) -> None:
        """Read changed key files and certificates again; all of them if `is_forced`."""
        self.access.reload(is_forced=is_forced)
        if self.certificate is not None:
            self.certificate.reload(is_forced=is_forced)


def build_ingress(
    http: HttpConfig, auth: AuthConfig, tls: TlsConfig, admission: AdmissionConfig, metrics: AdmissionMetrics
) -> Ingress:
    """Raises ConfigError for a key file or a certificate that cannot be used."""
    certificate = None
    if tls.ssl_certfile is not None and tls.ssl_keyfile is not None:
        certificate = Certificate(tls.ssl_certfile, tls.ssl_keyfile)
    limits = ClientLimits(
        http.max_body_bytes,
        http.max_header_bytes,
        http.client_header_timeout_secs,
        http.client_stall_timeout_secs,
        http.max_connections or max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 3 // 4),
        http.client_keepalive_secs,
    )
    budget = _budget(admission, http.max_body_bytes)
    metrics.show("buffered_bytes", "Memory that requests are taken to need.", lambda: budget.held)
    access = _access(auth, http.host, is_encrypted=certificate is not None)
    return Ingress(access, _admission(admission, metrics), limits, budget, certificate)


def _budget(config: AdmissionConfig, max_body_bytes: int) -> ByteBudget:
    given = config.max_buffered_mib
    budget = ByteBudget(default_bytes() if given is None else given << 20)
    largest = max_body_bytes * (1 + SERVED_FACTOR)
    if budget.max_bytes < largest:
        logger.warning(
            "a body of --max-body-bytes %d needs %d MiB, and --max-buffered-mib is %d: "
            "the largest bodies are always answered with 503",
            *(max_body_bytes, largest >> 20, budget.max_bytes >> 20),
        )
    return budget


def _access(config: AuthConfig, host: str, *, is_encrypted: bool) -> Access:
    is_exposed = not is_loopback(host)
    if is_exposed and not is_encrypted:
        logger.warning(
            "HTTP on %s is not encrypted, so API keys and prompts can be read on the network: "
            "start the router with --ssl-certfile and --ssl-keyfile, or behind a TLS proxy",
            host,
        )
    return Access(
        tenants=tenant_keys(config.api_keys_file) if config.api_keys_file else None,
        api_key=config.api_key,
        admins=admin_keys(config.admin_api_key_file) if config.admin_api_key_file else None,
        is_exposed=is_exposed,
    )


def _admission(config: AdmissionConfig, metrics: AdmissionMetrics) -> AdmissionController:
    max_running = None if config.max_concurrent_requests < 1 else config.max_concurrent_requests
    rate = config.rate_limit_tokens_per_second
    queue = FairQueue(
        max_running,
        config.queue_size,
        time.monotonic,
        rates=Rates() if rate is None else Rates(rps=rate),
        burst=max(rate or 1.0, max_running or 1.0),
    )
    return AdmissionController(queue, queue_timeout_s=config.queue_timeout_secs, metrics=metrics)
