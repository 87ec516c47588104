"""The handoff hooks around methods of SGLang's own classes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVManager

from memserve.engine.hooks.handoff import end_with_thread, status_of_room, update_alone

OTHER_WITHIN_S = 0.5


def test_status_of_a_request_forgotten_between_two_reads_is_failed() -> None:
    manager = SimpleNamespace(request_status={7: KVPoll.Transferring})
    assert status_of_room(CommonKVManager.check_status, manager, 7) == KVPoll.Transferring
    with pytest.raises(KeyError):
        CommonKVManager.check_status(manager, 8)  # otherwise the hook is not needed any more
    assert status_of_room(CommonKVManager.check_status, manager, 8) == KVPoll.Failed


class Interrupted(dict[int, Any]):
    """Statuses that another thread updates between the first thread's read and write."""

    def __init__(self, other: Callable[[], Any]) -> None:
        super().__init__()
        self.other = threading.Thread(target=other)

    def get(self, key: int, default: Any = None) -> Any:
        found = super().get(key, default)
        if self.other.ident is None:
            self.other.start()
            self.other.join(OTHER_WITHIN_S)
        return found


def status_after(update: Callable[..., Any]) -> Any:
    """Status of a request that the scheduler opens while another thread records that decode is ready."""
    manager = SimpleNamespace(
        deferred_bootstrap=None,
        _deferred_ack_targets={},
        _deferred_ack_poisoned_rooms=set(),
        _staging_outstanding={},
    )
    manager.request_status = Interrupted(lambda: update(manager, 7, KVPoll.WaitingForInput))
    update(manager, 7, KVPoll.Bootstrapping)
    manager.request_status.other.join()
    return manager.request_status[7]


def test_status_update_keeps_the_readiness_of_decode_during_open() -> None:
    original = CommonKVManager.update_status
    assert status_after(original) == KVPoll.Bootstrapping  # otherwise the hook is not needed any more
    assert status_after(partial(update_alone, original)) == KVPoll.WaitingForInput


def test_server_ends_when_its_sending_thread_fails(monkeypatch: pytest.MonkeyPatch) -> None:
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
