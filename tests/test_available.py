"""available_memory over made-up /proc and /sys/fs/cgroup, both versions of control groups."""

import pytest

from edge_kv.runtime.available import available_memory

MIB = 1 << 20


@pytest.fixture
def system(tmp_path):
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroups.mkdir()
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4096 kB\n")

    def group(folder, **files):
        (cgroups / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (cgroups / folder / name.replace("__", ".")).write_text(text)

    def member(line):
        (proc / "self/cgroup").write_text(line + "\n")

    return proc, cgroups, group, member


def test_the_machine(system):
    proc, cgroups, _, _ = system
    assert available_memory(proc, cgroups) == 4 * MIB


def test_the_tightest_group_above_decides(system):
    proc, cgroups, group, member = system
    member("0::/a/b")
    group("a", memory__max=f"{3 * MIB}", memory__current=f"{MIB}", memory__stat="inactive_file 5\n")
    group("a/b", memory__max="max", memory__current="77", memory__stat="")
    assert available_memory(proc, cgroups) == 2 * MIB + 5
    group("a/b", memory__max=f"{MIB}", memory__current=f"{2 * MIB}")
    assert available_memory(proc, cgroups) == 0


def test_version_1(system):
    proc, cgroups, group, member = system
    member("3:cpu,memory:/x\n2:pids:/y")
    group("memory/x", memory__limit_in_bytes=f"{3 * MIB}", memory__usage_in_bytes=f"{2 * MIB}",
          memory__stat=f"inactive_file 9\ntotal_inactive_file {MIB}\n")  # fmt: skip
    group("memory", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="5")
    assert available_memory(proc, cgroups) == 2 * MIB


def test_a_system_that_says_nothing(tmp_path):
    assert available_memory(tmp_path, tmp_path) is None
