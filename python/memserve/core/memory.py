"""How much memory this process can have, and still take: the machine's, within the limits of its cgroups.

Reads /proc and /sys at each call. Knows nothing of what the memory is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class _CgroupFiles:
    """The names of the same three numbers in one of the two versions of cgroups."""

    limit: str
    used: str
    reclaimable: str


_V1 = _CgroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _CgroupFiles("memory.max", "memory.current", "inactive_file")


def free_memory_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be taken without swapping and without reaching the limit of a cgroup.

    Page cache counts as free, both of the machine and of a cgroup. Raises OSError if there is no
    /proc/meminfo. A cgroup that cannot be read has no limit.
    """
    free = _field(proc / "meminfo", "MemAvailable:") * 1024
    for directory, files in _own_cgroups(proc, cgroups):
        room = _room(directory, files)
        if room is not None:
            free = min(free, room)
    return max(free, 0)


def total_memory_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of the machine, or the tightest limit of the own cgroups. Raises as `free_memory_bytes`."""
    total = _field(proc / "meminfo", "MemTotal:") * 1024
    limits = (_limit(directory, files) for directory, files in _own_cgroups(proc, cgroups))
    return min([total, *(limit for limit in limits if limit is not None)])


def _own_cgroups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, _CgroupFiles]]:
    """The memory cgroups of this process and all cgroups above them: each of their limits binds."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, files = cgroups, _V2
        elif "memory" in controllers.split(","):
            top, files = cgroups / "memory", _V1
        else:
            continue
        own = top / path.lstrip("/")
        for directory in (own, *own.parents):
            yield directory, files
            if directory == top:
                break


def _room(directory: Path, files: _CgroupFiles) -> int | None:
    """Bytes left below the limit of one cgroup; None if it has none."""
    limit = _limit(directory, files)
    if limit is None:
        return None
    try:
        used = int((directory / files.used).read_text())
        return limit - used + _field(directory / "memory.stat", files.reclaimable)
    except (OSError, ValueError):
        return None


def _limit(directory: Path, files: _CgroupFiles) -> int | None:
    try:
        return int((directory / files.limit).read_text())  # "max" is no number
    except (OSError, ValueError):
        return None


def _field(path: Path, name: str) -> int:
    """The number after `name` in a file of lines; 0 if it has no such line."""
    for line in path.read_text().splitlines():
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    return 0
