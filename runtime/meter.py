"""The RAM meter: what this process holds, told apart because the kinds mean different things.

Anonymous memory cannot be reclaimed; file pages (mapped weights) are dropped under pressure and
read again. Numbers come from /proc (Linux, Android) and cgroup v2; elsewhere only the peak is
known.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc/self")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """Bytes held by this process; None where the system does not tell."""

    anon: int | None  # RssAnon: heap, state buffers
    file: int | None  # RssFile: mapped files; clean pages are reclaimable
    shared: int | None  # RssShmem
    peak: int | None  # VmHWM: highest RSS since start or `reset_peak`
    pss: int | None  # RSS with pages shared by n processes counted 1/n
    cgroup_peak: int | None  # highest use of the control group, page cache included

    @property
    def rss(self) -> int | None:
        """Everything resident."""
        if self.anon is None or self.file is None:
            return None
        return self.anon + self.file + (self.shared or 0)


def read_memory() -> Memory:
    """Read the meter now; costs well under a millisecond apart from PSS, which walks the maps."""
    status = _fields(_PROC / "status")
    rollup = _fields(_PROC / "smaps_rollup")
    peak = status.get("VmHWM")
    return Memory(
        anon=status.get("RssAnon"),
        file=status.get("RssFile"),
        shared=status.get("RssShmem"),
        peak=_usage_peak() if peak is None else peak,
        pss=rollup.get("Pss"),
        cgroup_peak=_cgroup_peak(),
    )


def resident() -> int | None:
    """RSS alone, cheap enough for a status line."""
    return _fields(_PROC / "status").get("VmRSS")


def reset_peak() -> bool:
    """Start the peak (VmHWM) anew; False where the kernel does not allow it."""
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _fields(path: Path) -> dict[str, int]:
    """`Name:  123 kB` lines as bytes; empty when there is no such file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    fields: dict[str, int] = {}
    for line in lines:
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isdecimal():
            fields[name] = int(words[0]) * 1024
    return fields


def _cgroup_peak() -> int | None:
    try:
        entries = (_PROC / "cgroup").read_text().splitlines()
        group = next(e[3:] for e in entries if e.startswith("0::"))
        return int((_CGROUPS / group.lstrip("/") / "memory.peak").read_text())
    except (OSError, StopIteration, ValueError):
        return None


def _usage_peak() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
