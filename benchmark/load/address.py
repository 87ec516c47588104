"""A server or router that runs already, known by its address alone."""

from __future__ import annotations

import requests

from figures import progress

TIMEOUT_S = 60


class Address:
    """Whatever answers `/generate` there. Says nothing of the KV it moves."""

    def __init__(self, name: str, url: str, *, flushes: bool) -> None:
        """`flushes`: ask it to forget its caches before each run."""
        self.name, self.url = name, url.rstrip("/")
        self._flushes = flushes

    def flush(self) -> None:
        """A server that cannot is used as it is, and that is said once."""
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
        """An address does not say when it is done."""

    def kv_bytes_moved(self) -> None:
        return None
