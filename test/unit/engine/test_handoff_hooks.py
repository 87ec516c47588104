"""SGLang's own classes, with our repairs around their methods."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVManager

from memserve.engine.handoff_hooks import end_with_thread, status_of_room


def test_a_request_that_is_forgotten_between_two_looks_has_failed() -> None:
    manager = SimpleNamespace(request_status={7: KVPoll.Transferring})
    assert status_of_room(CommonKVManager.check_status, manager, 7) == KVPoll.Transferring
    with pytest.raises(KeyError):
        CommonKVManager.check_status(manager, 8)  # or else the repair is not needed any more
    assert status_of_room(CommonKVManager.check_status, manager, 8) == KVPoll.Failed


def test_a_server_whose_sending_thread_fails_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)

    def worker(queue: Any, *, executor: Any) -> str:
        if executor is None:
            raise RuntimeError("transfer thread failed")
        return f"{queue} {executor}"

    assert end_with_thread(worker, "queue", executor="executor") == "queue executor"
    assert not ended
    end_with_thread(worker, "queue", executor=None)
    assert ended == [1]
