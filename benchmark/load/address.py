"""A running server or router, known by its address alone."""

from __future__ import annotations

import requests

from figures import progress

TIMEOUT_S = 60


class Address:
    """The server at an address. It does not report the KV that it moves."""

    def __init__(self, name: str, url: str, *, flushes: bool) -> None:
        """`flushes`: flush its caches before each run."""
        self.name, self.url = name, url.rstrip("/")
        self._flushes = flushes

    def flush(self) -> None:
        """Flush the caches. A server that cannot flush is used as it is, with one warning."""
        if not self._flushes:
            return
        try:
            answer = requests.post(f"{self.url}/flush_cache", timeout=TIMEOUT_S)
        except requests.RequestException as error:
            raise SystemExit(f"{self.name}: nobody answers at {self.url} ({error})") from error
        if answer.status_code != 200:
            progress(f"{self.name}: POST /flush_cache answered {answer.status_code}; its caches stay warm")
            self._flushes = False

    def settle(self) -> None:
        """Does nothing: an address does not report when it is idle."""

    def kv_bytes_moved(self) -> None:
        return None
