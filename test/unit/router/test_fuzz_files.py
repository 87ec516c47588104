"""Any file content is read, or refused with an error that names the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memserve.core.errors import ConfigError
from memserve.router.auth.keys import admin_keys, tenant_keys
from memserve.scheduling.cost_model.file import read_costs
from memserve.simulation.traces import parse_trace

from .json_strategies import ANY

WORDS = st.sampled_from(
    ["key", "alice", "rps=1", "tps=nan", "weight=-1", "rps=1e999", "=", "#", "\x00", "é", "\u2028"]
)
LINES = st.lists(st.lists(WORDS, max_size=5).map(" ".join), max_size=5).map("\n".join)
COSTS = (
    b'{"prefill": {"call_s": 0.01}, "decode": {}, "kv_bytes_per_token": 1, "dram": {}, "remote": {}}',
    b'{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1]}\n',
)
ANYTHING = (
    st.binary(max_size=60) | LINES.map(str.encode) | ANY.map(lambda one: repr(one).encode("utf-8", "replace"))
)
tmp_files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@tmp_files
@given(ANYTHING)
def test_any_key_file_is_read_or_a_config_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    path.chmod(0o600)
    check(lambda: tenant_keys(path), str(path))
    check(lambda: admin_keys(path), str(path))


@tmp_files
@given(ANYTHING | st.sampled_from(COSTS))
def test_any_cost_file_is_read_or_a_config_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "costs"
    path.write_bytes(content)
    check(lambda: read_costs(str(path)), str(path))


@given(st.lists(ANYTHING | st.sampled_from(COSTS), max_size=4))
def test_any_trace_file_is_read_or_a_config_error_that_names_it(lines: list[bytes]) -> None:
    check(lambda: parse_trace(lines, "a trace"), "a trace")


def check(read: Callable[[], object], name: str) -> None:
    """It is read, or refused by name."""
    refused = name
    try:
        read()
    except ConfigError as error:
        refused = str(error)
    assert name in refused
