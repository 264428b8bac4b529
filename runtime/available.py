"""Memory this process may still take: what the machine has left, and its control groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Files of a control group in bytes: limit, use, and the part of the use that is file pages which
# the system takes back first (a line of memory.stat).
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")
_NO_LIMIT = 1 << 60  # cgroup v1 says it so


def available_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """Bytes that can be taken before the system reclaims or kills; None where it does not say.

    The least of /proc/meminfo's MemAvailable and of what every control group above this process
    has left, file pages that are easily taken back counted as free (Linux, Android).
    """
    found = [*_machine(proc), *_groups(proc, cgroups)]
    return min(found) if found else None


def _machine(proc: Path) -> Iterator[int]:
    for line in _lines(proc / "meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            yield int(value.split()[0]) << 10


def _groups(proc: Path, cgroups: Path) -> Iterator[int]:
    for line in _lines(proc / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroups, _V2
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", _V1
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            yield from _left(folder, *names)
            if folder == root:
                break


def _left(folder: Path, limit: str, used: str, reclaimed: str) -> Iterator[int]:
    bounds = [_number(folder / name) for name in (limit, used)]
    if bounds[0] is None or bounds[1] is None or bounds[0] >= _NO_LIMIT:
        return
    easy = 0
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == reclaimed:
            easy = int(value)
    yield max(0, bounds[0] - bounds[1] + easy)


def _number(path: Path) -> int | None:
    words = _lines(path)
    return int(words[0]) if words and words[0].isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
