"""How much memory a process can have and still take, of machines and cgroups written to files."""

from __future__ import annotations

from pathlib import Path

import pytest

from memserve.core.memory import free_memory_bytes, total_memory_bytes

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine with 8 GiB available and no limits."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/\n")
    (tmp_path / "sys").mkdir()
    return tmp_path


def free(machine: Path) -> float:
    return free_memory_bytes(machine / "proc", machine / "sys") / GIB


def put(directory: Path, **numbers: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, number in numbers.items():
        (directory / name.replace("memory_", "memory.")).write_text(f"{number}\n")


def test_free_memory_without_limits_is_the_available_memory(machine: Path) -> None:
    assert free(machine) == 8
    put(machine / "sys", memory_max="max", memory_current=5 * GIB)
    assert free(machine) == 8
    (machine / "proc" / "self" / "cgroup").unlink()
    assert free(machine) == 8


def test_free_memory_is_bounded_by_the_tightest_cgroup_without_its_page_cache(machine: Path) -> None:
    (machine / "proc" / "self" / "cgroup").write_text("0::/job/step\n")
    put(machine / "sys" / "job" / "step", memory_max="max", memory_current=GIB, memory_stat="inactive_file 0")
    put(
        machine / "sys" / "job",
        memory_max=4 * GIB,
        memory_current=3 * GIB,
        memory_stat=f"anon 1\ninactive_file {2 * GIB}",
    )
    assert free(machine) == 3


def test_free_memory_is_bounded_by_version_1_cgroups(machine: Path) -> None:
    (machine / "proc" / "self" / "cgroup").write_text("5:cpu,cpuacct:/\n4:memory:/job\n0::/\n")
    put(
        machine / "sys" / "memory" / "job",
        memory_limit_in_bytes=2 * GIB,
        memory_usage_in_bytes=GIB,
        memory_stat="total_inactive_file 0",
    )
    assert free(machine) == 1


def test_free_memory_is_zero_above_a_limit(machine: Path) -> None:
    put(machine / "sys", memory_max=GIB, memory_current=2 * GIB, memory_stat="")
    assert free(machine) == 0


def test_this_machine_has_free_memory() -> None:
    assert 0 < free_memory_bytes() < total_memory_bytes()


def test_total_memory_without_limits_is_that_of_the_machine(machine: Path) -> None:
    assert total_memory_bytes(machine / "proc", machine / "sys") == 16 * GIB
    put(machine / "sys", memory_max="max")
    assert total_memory_bytes(machine / "proc", machine / "sys") == 16 * GIB


def test_total_memory_is_the_tightest_limit_of_the_cgroups(machine: Path) -> None:
    (machine / "proc" / "self" / "cgroup").write_text("4:memory:/job\n0::/job/step\n")
    put(machine / "sys" / "job" / "step", memory_max=5 * GIB)
    put(machine / "sys" / "job", memory_max=4 * GIB)
    assert total_memory_bytes(machine / "proc", machine / "sys") == 4 * GIB
    put(machine / "sys" / "memory" / "job", memory_limit_in_bytes=3 * GIB)
    assert total_memory_bytes(machine / "proc", machine / "sys") == 3 * GIB
