"""Weights in huge pages: the same bytes at the same addresses, or left where they are."""

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from edge_kv.plan import Plan, Table
from edge_kv.runtime import huge_pages, load, mapped
from edge_kv.runtime.session import _allocate

SIZE = (5 << 20) + 777  # two whole huge pages somewhere in it, and a part of a page


@pytest.fixture
def weights(tmp_path):
    """A mapped file of random bytes: (its folder, its bytes, how it reads where it is mapped)."""
    data = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes()
    path = tmp_path / "weights.bin"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    held = mmap.mmap(fd, SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ)
    os.close(fd)
    yield tmp_path, data, held
    held.close()


def smaps_of(span):
    """Fields of the mapping that holds an address, in KB."""
    found, inside = {}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()
        if "-" in head[0] and not head[0].endswith(":"):
            start, stop = (int(x, 16) for x in head[0].split("-"))
            inside = start <= span[0] < stop
        elif inside and head[-1] == "kB":
            found[head[0]] = int(head[1])
    return found


def test_a_copy_takes_the_place_of_the_file(weights):
    folder, data, held = weights
    (span,) = mapped.spans(folder)
    assert huge_pages.use_huge_pages([span], folder) == span[1]
    assert held[:] == data
    assert not mapped.spans(folder)
    if "[never]" not in huge_pages._ENABLED.read_text():
        assert smaps_of(span)["AnonHugePages:"] >= 2048
    assert ctypes.CDLL(None).madvise(ctypes.c_void_p(span[0]), ctypes.c_size_t(4096), 0) == 0


def test_other_mappings_are_left_alone(weights):
    folder, data, held = weights
    assert huge_pages.use_huge_pages([(4096, 4096)], folder) == 0
    assert mapped.spans(folder) and held[:] == data


@pytest.mark.parametrize("available", [None, 100 << 20])
def test_nothing_is_copied_where_memory_is_short(weights, monkeypatch, caplog, available):
    folder, data, held = weights
    monkeypatch.setattr(huge_pages, "available_memory", lambda: available)
    assert huge_pages.use_huge_pages(mapped.spans(folder), folder) == 0
    assert "stay in pages of their file" in caplog.text
    assert mapped.spans(folder) and held[:] == data


def test_what_is_mapped_twice_is_copied_once(weights):
    """The larger of two mappings of one part stays in pages of the file."""
    folder, data, held = weights
    fd = os.open(folder / "weights.bin", os.O_RDONLY)
    part = mmap.mmap(fd, 3 << 20, mmap.MAP_PRIVATE, mmap.PROT_READ, offset=1 << 20)
    os.close(fd)
    with part:
        assert huge_pages.use_huge_pages(mapped.spans(folder), folder) == 3 << 20
        (left,) = mapped.spans(folder)
        assert left[1] > SIZE and held[:] == data
        assert part[:] == data[1 << 20 : 4 << 20]


def test_a_file_that_cannot_be_read_is_mapped_again(weights, monkeypatch, caplog):
    folder, data, held = weights

    def fail(*args):
        raise OSError("broken disk")

    monkeypatch.setattr(os, "preadv", fail)
    assert huge_pages.use_huge_pages(mapped.spans(folder), folder) == 0
    assert "broken disk" in caplog.text
    assert held[:] == data


def test_a_session_answers_the_same(tiny_artifact):
    """With weights of huge pages, turning from prompts to tokens and back."""
    logits = []
    for huge in (False, True):
        with load(tiny_artifact, threads=1, huge_pages=huge) as session:
            assert (session.stats.huge_page_bytes > 0) == huge
            session.prefill(range(20))
            logits.append([session.decode(5)])
            session.prefill(range(20))
            logits[-1].append(session.decode(6))
    np.testing.assert_array_equal(*logits)


def test_state_is_covered_as_it_fills():
    """Whole pages of rows alone, the same bytes, no more memory; once each."""
    rows = 3 * huge_pages._HUGE // 1024
    long = Table("k", (1, 1024), rows, dtype="int8")
    plan = Plan(rows, 128, "int8", (long, Table("ring", (1, 256), 640, keep=512)))
    state = {t.name: _allocate(t) for t in plan.tables}
    span = state["k"].ctypes.data, state["k"].nbytes
    expected = np.random.default_rng(1).integers(-127, 128, state["k"].shape, np.int8)
    filled = huge_pages.FilledState(plan)
    end, covered = rows - 100, 0
    state["k"][:end] = expected[:end]
    before = smaps_of(span)["Rss:"]
    for at in (0, 10, 300, 3000, end):  # also back to where it was
        covered += filled.cover(state, at)
    assert smaps_of(span)["Rss:"] <= before
    first = -(-span[0] // huge_pages._HUGE) * huge_pages._HUGE
    whole = (span[0] + end * 1024 - first) // huge_pages._HUGE
    if huge_pages._has_huge_pages():
        assert covered == whole * huge_pages._HUGE
        assert smaps_of(span)["AnonHugePages:"] >= covered >> 10
    assert filled.cover(state, 0) == filled.cover(state, end) == 0
    np.testing.assert_array_equal(state["k"][:end], expected[:end])
    assert not state["k"][end:].any() and not state["ring"].any()


def test_state_stays_as_it_is_where_the_system_refuses(monkeypatch):
    table = Table("k", (1, 1024), 4 * huge_pages._HUGE // 1024, dtype="int8")
    filled = huge_pages.FilledState(Plan(table.slots, 128, "int8", (table,)))
    state = {"k": _allocate(table)}
    state["k"][:] = 7
    asked = []
    monkeypatch.setattr(huge_pages, "_has_huge_pages", lambda: True)
    monkeypatch.setattr(huge_pages, "_advise_at", lambda *how: bool(asked.append(how)))
    assert filled.cover(state, table.slots) == 0 and len(asked) <= 1
    assert filled.cover(state, 300) == 0 and len(asked) <= 1  # it is not asked again
    assert (state["k"] == 7).all()
