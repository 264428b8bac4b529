"""How many threads an engine gets: one for every physical core, unless told otherwise."""

from __future__ import annotations

import logging
import os
import weakref
from pathlib import Path
from typing import Any

from edge_kv.errors import ConfigError, RuntimeFault

log = logging.getLogger(__name__)
_CPUS = Path("/sys/devices/system/cpu")


def thread_count(asked: int | None) -> int:
    """`asked`, or OMP_NUM_THREADS, or the physical cores in the process's affinity mask.

    Two threads on one core share its vector units: hyper-threads only slow decoding down. More
    than one thread for every usable CPU would wait for each other; so many are used, with a
    warning.

    Raises:
        ConfigError: `asked` is below 1.
    """
    if asked is None:
        wanted = os.environ.get("OMP_NUM_THREADS", "")
        if not (wanted.isdecimal() and int(wanted)):
            return physical_cores()
        asked = int(wanted)
    if asked < 1:
        raise ConfigError(f"threads {asked} must be at least 1.")
    cpus = usable_cpus()
    if asked > cpus:
        log.warning("%d threads are more than the %d CPUs; %d are used.", asked, cpus, cpus)
    return min(asked, cpus)


def usable_cpus() -> int:
    """CPUs this process may run on, hyper-threads counted."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


_sharing: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def share_threads(session: Any, threads: int) -> None:
    """Note that `session` runs on the threads of ExecuTorch that belong to the process.

    XNNPACK keeps their address for as long as a program is loaded, so their number cannot change
    while another session has them. A session that is gone, or gave them back, counts no more.

    Raises:
        RuntimeFault: an open session has another number of them.
    """
    for count in _sharing.values():
        if count != threads:
            raise RuntimeFault(
                f"An open session of this process runs a portable program on {count} threads, "
                f"which this one would share; close it first, or load this one with {count} "
                f"threads instead of {threads}."
            )
    _sharing[session] = threads


def return_threads(session: Any) -> None:
    """Forget what `share_threads` noted."""
    _sharing.pop(session, None)
