"""PLE rows: every storage against a plain reader, and files that are cut off."""

import numpy as np
import pytest

from edge_kv.errors import ArtifactError
from edge_kv.manifest import PleEntry
from edge_kv.ple import PleTable

ROWS, LAYERS, DIM = 12, 3, 8


def store(path, bits, block, seed=0):
    """Write a random table; returns its entry and the values a reader must get."""
    rng = np.random.default_rng(seed)
    entry = PleEntry(file=path.name, rows=ROWS, n_layers=LAYERS, dim=DIM, bits=bits, block=block)
    values = np.empty((ROWS, LAYERS * DIM), np.float32)
    data = bytearray()
    for row in values:
        if bits == 32:
            row[:] = rng.standard_normal(entry.values)
            data += row.astype("<f4").tobytes()
            continue
        top = 8 if bits == 4 else 128
        q = rng.integers(-top, top, entry.values)
        scales = rng.random(entry.values // block).astype("<f2")
        row[:] = q * np.repeat(scales.astype(np.float32), block)
        if bits == 4:
            data += bytes((q[i] + 8) | (q[i + 1] + 8) << 4 for i in range(0, len(q), 2))
        else:
            data += q.astype(np.int8).tobytes()
        data += scales.tobytes()
    assert len(data) == ROWS * entry.row_bytes
    path.write_bytes(data)
    return entry, values.reshape(ROWS, LAYERS, DIM)


@pytest.mark.parametrize(("bits", "block"), [(4, 8), (4, 2), (4, 24), (8, 8), (8, 3), (32, 0)])
def test_rows_equal_a_plain_reader(tmp_path, bits, block):
    entry, values = store(tmp_path / "ple.bin", bits, block)
    table = PleTable(tmp_path / "ple.bin", entry)
    ids = np.array([3, 0, 11, 3, 3, 7])
    for layers in (1, 2, LAYERS):
        rows = table.rows(ids, layers)
        assert rows.dtype == np.float32 and rows.shape == (6, layers, DIM)
        np.testing.assert_array_equal(rows, values[ids][:, :layers])
    table.close()
    table.close()


def test_repeated_ids_are_read_once(tmp_path, monkeypatch):
    import os

    entry, _ = store(tmp_path / "ple.bin", 4, 8)
    table = PleTable(tmp_path / "ple.bin", entry)
    reads = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *a: reads.append(a) or real(*a))
    table.rows(np.array([5, 5, 5, 2, 5]), 1)
    assert sorted(offset // entry.row_bytes for _, _, offset in reads) == [2, 5]


def test_short_files_are_refused_when_opened_and_when_read(tmp_path):
    path = tmp_path / "ple.bin"
    entry, _ = store(path, 8, 8)
    table = PleTable(path, entry)
    with path.open("r+b") as f:
        f.truncate(ROWS * entry.row_bytes - 1)
    with pytest.raises(ArtifactError, match=f"ends inside the row of token {ROWS - 1}"):
        table.rows(np.array([0, ROWS - 1]), 1)
    with pytest.raises(ArtifactError, match=f"{ROWS} rows need"):
        PleTable(path, entry)
    with pytest.raises(ArtifactError, match="Cannot open"):
        PleTable(tmp_path / "none.bin", entry)


@pytest.mark.parametrize(("bits", "block"), [(2, 8), (4, 0), (8, 7)])
def test_storage_it_does_not_read_is_refused(tmp_path, bits, block):
    entry = PleEntry(file="p", rows=1, n_layers=LAYERS, dim=DIM, bits=bits, block=block)
    (tmp_path / "p").write_bytes(bytes(10_000))
    with pytest.raises(ArtifactError, match=f"{bits} bits in blocks of {block}"):
        PleTable(tmp_path / "p", entry)
