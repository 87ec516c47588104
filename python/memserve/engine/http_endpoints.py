"""What a server says of its memory pools over HTTP, beside SGLang's own pages.

    GET /mempool            JSON, one entry per scheduler that answers (one per data-parallel rank)
    GET /mempool/metrics    the same numbers for Prometheus

Knows SGLang's application and how to ask its schedulers; not what the numbers mean.
"""

from __future__ import annotations

import pkgutil
from typing import Any

from memserve.engine import sglang_internals as seams
from memserve.instance.metrics import CONTENT_TYPE, exposition


def add_pages() -> None:
    """Call before the server starts."""
    from fastapi import Response

    async def mempool() -> list[dict[str, Any]]:
        return await _pools()

    async def metrics() -> Response:
        return Response(exposition(await _pools()), media_type=CONTENT_TYPE)

    app = pkgutil.resolve_name(f"{seams.HTTP_SERVER}:app")
    app.add_api_route("/mempool", mempool, methods=["GET"])
    app.add_api_route("/mempool/metrics", metrics, methods=["GET"])


async def _pools() -> list[dict[str, Any]]:
    """The schedulers' own reports; none of a server without a memory pool."""
    state = pkgutil.resolve_name(f"{seams.HTTP_SERVER}:get_global_state")()
    reports = await state.tokenizer_manager.get_internal_state()
    return [report["memserve"]["pool"] for report in reports if "pool" in report.get("memserve", {})]
