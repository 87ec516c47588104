"""An exception in one request's processing ends this request, and no other."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import AbortReq, msgpack_decode, msgpack_encode
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req

from memserve.engine.hooks.containment import take_in, update_finish_state


def fail(*_: Any, **__: Any) -> None:
    raise IndexError("index 261 is out of bounds")


def test_request_that_fails_on_arrival_is_aborted_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[tuple[AbortReq, Any]] = []
    scheduler = SimpleNamespace(send_abort_output=lambda abort, request: sent.append((abort, request)))
    request = SimpleNamespace(rid="job-1")
    with caplog.at_level(logging.ERROR):
        take_in(fail, scheduler, request, mm_input_error=None)
    ((abort, of),) = sent
    assert of is request
    received = msgpack_decode(msgpack_encode(abort))
    assert received.rid == "job-1"
    assert received.finished_reason["type"] == "abort"
    assert received.finished_reason["status_code"] == 500
    assert "index 261" in received.finished_reason["message"]
    assert "rid=job-1" in caplog.text


def test_requests_that_arrive_well_are_left_alone() -> None:
    arrived: list[Any] = []
    take_in(lambda scheduler, request, **_: arrived.append(request), SimpleNamespace(), "a request")
    assert arrived == ["a request"]


def request(**fields: Any) -> Any:
    """A request of SGLang that has generated two tokens."""
    known: dict[str, Any] = {
        **{"rid": "job-1", "to_finish": None, "finished_reason": None, "finished_len": None},
        **{"output_ids": [7, 8], "vocab_size": 260, "eos_token_ids": None, "grammar": None},
        "sampling_params": SimpleNamespace(stop_token_ids=None, max_new_tokens=2, ignore_eos=True),
    }
    req = Req.__new__(Req)
    for name, value in (known | fields).items():
        setattr(req, name, value)
    return req


def test_failed_finish_check_ends_the_request_with_an_error(caplog: pytest.LogCaptureFixture) -> None:
    req = request()  # whose parameters lack stop_strs, which SGLang's check reads
    with caplog.at_level(logging.ERROR):
        update_finish_state(Req.update_finish_state, req, 1)
    assert req.finished()
    assert isinstance(req.finished_reason, FINISH_ABORT)
    assert req.finished_reason.status_code == 500
    assert "rid=job-1" in caplog.text


def test_finish_check_that_works_decides_alone() -> None:
    req = request()
    req.sampling_params.stop_strs = req.sampling_params.stop_regex_strs = []
    update_finish_state(Req.update_finish_state, req, 1)
    assert isinstance(req.finished_reason, FINISH_LENGTH)
