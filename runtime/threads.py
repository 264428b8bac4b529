"""How many threads an engine gets: one for every physical core, unless told otherwise."""

from __future__ import annotations

import os
from pathlib import Path

from edge_kv.errors import ConfigError

_CPUS = Path("/sys/devices/system/cpu")


def thread_count(asked: int | None) -> int:
    """`asked`, or OMP_NUM_THREADS, or the physical cores in the process's affinity mask.

    Two threads on one core share its vector units: hyper-threads only slow decoding down.

    Raises:
        ConfigError: `asked` is below 1.
    """
    if asked is None:
        wanted = os.environ.get("OMP_NUM_THREADS", "")
        return int(wanted) if wanted.isdecimal() and int(wanted) else physical_cores()
    if asked < 1:
        raise ConfigError(f"threads {asked} must be at least 1.")
    return asked


def physical_cores() -> int:
    """Physical cores this process may run on; every usable CPU where the topology is unknown."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    usable = os.sched_getaffinity(0)
    cores = set()
    for cpu in usable:
        try:
            siblings = (_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:
            return len(usable)
        cores.add(siblings.strip())
    return max(1, len(cores))
