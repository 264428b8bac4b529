"""Letting go of mapped pages: clean ones leave, changed ones stay, the content holds."""

import mmap
import subprocess
import sys

import numpy as np
import pytest

from edge_kv import runtime
from edge_kv.runtime import mapped

SIZE = 1 << 20


@pytest.fixture
def held(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    before = mapped.spans(tmp_path)
    with path.open("rb") as f:
        pages = mmap.mmap(f.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    assert sum(pages[::4096]) == 0  # every page is touched
    yield tmp_path, pages, mapped.spans(tmp_path) - before
    pages.close()


def resident(span):
    with open("/proc/self/smaps") as f:
        lines = f.read().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"{span[0]:x}-"))
    return next(1024 * int(x.split()[1]) for x in lines[at:] if x.startswith("Rss:"))


def test_clean_pages_leave_and_come_back(held):
    folder, pages, (span,) = held[0], held[1], tuple(held[2])
    assert span[1] == SIZE and resident(span) == SIZE
    mapped.let_go({span}, folder)
    assert resident(span) == 0
    assert pages[4097] == 1 and resident(span) > 0


def test_changed_pages_stay(held):
    folder, pages, (span,) = held[0], held[1], tuple(held[2])
    pages[5] = 77
    mapped.let_go({span}, folder)
    assert pages[5] == 77 and resident(span) == SIZE


def test_changed_pages_that_were_swapped_out_stay_too(held, tmp_path, monkeypatch):
    folder, _, (span,) = held[0], held[1], tuple(held[2])
    with open("/proc/self/smaps") as f:
        said = f.read()
    mapping = said.index(f"{span[0]:x}-")
    at = said.index("Swap:", mapping)
    swapped = tmp_path / "smaps"
    swapped.write_text(said[:at] + said[at:].replace("0 kB", "4 kB", 1))
    monkeypatch.setattr(mapped, "_SMAPS", swapped)
    mapped.let_go({span}, folder)
    assert resident(span) == SIZE


def test_only_the_named_mappings_are_dropped(held):
    folder, _, (span,) = held[0], held[1], tuple(held[2])
    mapped.let_go(set(), folder)
    mapped.let_go({span}, folder / "elsewhere")
    assert resident(span) == SIZE


def test_turns_between_programs_change_no_logit(tiny_artifact):
    ids = np.arange(1, 40)
    with runtime.load(tiny_artifact) as session:
        session.prefill(ids)
        first = session.decode(7)
        session.reset()
        session.prefill(ids)
        assert np.array_equal(session.decode(7), first)
        assert all(session._mapped.values())  # both programs map the weights


@pytest.mark.parametrize("piece", [1 << 14, 1 << 18, SIZE])
def test_what_a_touch_maps_is_measured(piece, tmp_path):
    """Beside the pages that the kernel counts in a mapping of which one byte was read."""
    path = tmp_path / "library.so"
    with path.open("wb", 0) as f:
        for _ in range(8 * SIZE // piece):
            f.write(b"x" * piece)
    before = mapped.spans(tmp_path)
    counts = []
    for at in (SIZE + 7, 5 * SIZE + SIZE // 2):
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            assert pages[at] == ord("x")
            counts.append(resident(*(mapped.spans(tmp_path) - before)))
    least = max(min(counts), mapped.WINDOW)
    assert mapped.WINDOW << round(mapped.doublings(path)) == least


def test_what_cannot_be_touched_doubles_nothing(tmp_path):
    (tmp_path / "empty").touch()
    assert mapped.doublings(tmp_path / "empty") == mapped.doublings(tmp_path / "none") == 0


_CODE = """
import numpy as np
from edge_kv.runtime.mapped import let_go_of_code
from edge_kv.runtime.meter import read_memory
from edge_kv.runtime.ort import onnxruntime
before = read_memory()
let_go_of_code()
after = read_memory()
assert np.linalg.inv(np.eye(3)).sum() == 3 and onnxruntime.get_available_providers()
print(before.file, after.file, after.anon - before.anon)
"""


def test_code_leaves_and_comes_back():
    found = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, check=True)
    before, after, more = map(int, found.stdout.split())
    assert after < before / 2 and more < 8e6
