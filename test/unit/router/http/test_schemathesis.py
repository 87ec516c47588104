"""The router conforms to its OpenAPI document, by valid and invalid requests from Schemathesis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from memserve.router.http.endpoints import ENDPOINTS
from memserve.wire.messages import Role

from ..fuzz_harness import Beside, beside

CALLING = {("POST", "/workers"), ("POST", "/add_worker")}
"""These would make the router contact servers outside the test."""
PASSED_ON = "/v1/embeddings"
"""It needs a colocated server."""
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def router(tiny_model: Path) -> Iterator[Beside]:
    with beside(tiny_model, cb_failure_threshold=10**9, request_timeout_secs=5.0) as router:
        yield router


@pytest.fixture(scope="module")
def colocated(tiny_model: Path) -> Iterator[Beside]:
    with beside(tiny_model, [Role.COLOCATED], cb_failure_threshold=10**9, request_timeout_secs=5.0) as router:
        yield router


@pytest.fixture(scope="module")
def api(router: Beside) -> Any:
    return schemathesis.openapi.from_url(router.stage.url("/openapi.json"))


@pytest.mark.parametrize(
    ("method", "path"),
    sorted({(one.method, one.path) for one in ENDPOINTS if one.path != PASSED_ON} - CALLING),
)
@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_router_conforms_to_its_openapi_document(
    router: Beside, api: Any, method: str, path: str, data: st.DataObject
) -> None:
    check(router, api, method, path, data)


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_passed_on_endpoints_conform_to_the_openapi_document(colocated: Beside, data: st.DataObject) -> None:
    api = schemathesis.openapi.from_url(colocated.stage.url("/openapi.json"))
    check(colocated, api, "POST", PASSED_ON, data)


def check(router: Beside, api: Any, method: str, path: str, data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(list(GenerationMode)))
    try:
        strategy = api[path][method].as_strategy(generation_mode=mode)
        case = data.draw(strategy)
    except Unsatisfiable:
        return  # the endpoint has no input that could be invalid
    case.call_and_validate(checks=CHECKS, timeout=10)
    router.assert_well()
