"""The RAM meter sees what is held and what kind it is; threads follow the affinity mask."""

import mmap
import os
import sys

import pytest

from edge_kv.errors import ConfigError
from edge_kv.runtime import meter, threads

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
MIB = 1 << 20


@linux
def test_anonymous_and_file_pages_are_told_apart(tmp_path):
    size = 32 * MIB
    (tmp_path / "f").write_bytes(os.urandom(MIB) * 32)
    before = meter.read_memory()
    held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held.write(b"x" * size)
    anon = meter.read_memory()
    assert size * 0.9 < anon.anon - before.anon < size * 3
    with (tmp_path / "f").open("rb") as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as file:
        assert sum(file[i] for i in range(0, size, 4096)) > 0
        mapped = meter.read_memory()
    assert mapped.file - anon.file > size * 0.9
    assert abs(mapped.anon - anon.anon) < size / 2
    assert mapped.peak >= mapped.rss * 0.99 and 0 < mapped.pss <= mapped.rss * 1.05
    assert abs(meter.resident() - meter.read_memory().rss) < 16 * MIB
    held.close()


@linux
def test_peak_can_be_reset():
    with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held.write(b"x" * (64 * MIB))
    high = meter.read_memory().peak
    if meter.reset_peak():
        assert meter.read_memory().peak < high - 32 * MIB


def test_cgroup_peak_is_read_from_the_own_group(tmp_path, monkeypatch):
    monkeypatch.setattr(meter, "_PROC", tmp_path)
    monkeypatch.setattr(meter, "_CGROUPS", tmp_path / "cg")
    (tmp_path / "cgroup").write_text("3:cpu:/x\n0::/user.slice/me\n")
    group = tmp_path / "cg/user.slice/me"
    group.mkdir(parents=True)
    assert meter.read_memory().cgroup_peak is None
    (group / "memory.peak").write_text("12345\n")
    assert meter.read_memory().cgroup_peak == 12345


def test_without_proc_only_the_peak_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(meter, "_PROC", tmp_path / "none")
    memory = meter.read_memory()
    assert memory.anon is memory.file is memory.pss is memory.rss is memory.cgroup_peak is None
    assert memory.peak > MIB
    assert meter.resident() is None and meter.reset_peak() is False


def cpus(tmp_path, monkeypatch, siblings, usable):
    for cpu, text in siblings.items():
        folder = tmp_path / f"cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(usable), raising=False)


def test_hyper_threads_of_one_core_count_once(tmp_path, monkeypatch):
    cpus(tmp_path, monkeypatch, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, {0, 1, 2, 3})
    assert threads.thread_count(None) == 2


def test_affinity_limits_the_cores(tmp_path, monkeypatch):
    cpus(tmp_path, monkeypatch, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, {0, 2})
    assert threads.thread_count(None) == 1


def test_unknown_topology_counts_cpus(tmp_path, monkeypatch):
    cpus(tmp_path, monkeypatch, {}, {0, 1, 5})
    assert threads.thread_count(None) == 3


def test_asking_wins(monkeypatch):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(8)))
    assert threads.thread_count(7) == 7
    with pytest.raises(ConfigError, match="threads -1 must be at least 1"):
        threads.thread_count(-1)
