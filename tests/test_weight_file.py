"""The weight file: fixed layout, streaming, and resuming to the same bytes."""

from __future__ import annotations

import errno
import os
from itertools import pairwise

import numpy as np
import pytest
import torch

from edge_kv import models
from edge_kv.errors import ExportError, WeightsError
from edge_kv.export.weight_file import (
    Journal,
    StoredWeights,
    WeightLayout,
    ple_layout,
    write_ple,
    write_weights,
)
from edge_kv.formats import GROUP, dequantise, unpack
from edge_kv.models.model import FLOAT, PLE_TABLE
from edge_kv.models.sources import open_weights
from edge_kv.progress import Silent
from edge_kv.tensors import weight_formats

CONFIG = models.get_row("tiny").config


class Counting:
    """Random weights that remember what was read and may die at the n-th read."""

    def __init__(self, die_at: int | None = None):
        self.inner, self.reads, self.die_at = open_weights("random:3", CONFIG), [], die_at
        self.config, self.label = CONFIG, "counting"

    def read(self, name, start=0, stop=None):
        if len(self.reads) == self.die_at:
            raise KeyboardInterrupt
        self.reads.append(name)
        return self.inner.read(name, start, stop)


def layout_of(scheme):
    return WeightLayout(models.weights(CONFIG), weight_formats(scheme))


def write(source, folder, scheme="int4"):
    layout, journal = layout_of(scheme), Journal(folder / "journal")
    reports = write_weights(source, layout, folder / "weights.bin", journal, Silent())
    entry = ple_layout(CONFIG.token_rows, CONFIG.vocab, weight_formats(scheme))
    error = write_ple(source, "ple.embed", entry, folder / "ple.bin", journal, Silent())
    return layout, reports, error


def contents(folder):
    return [(folder / n).read_bytes() for n in ("weights.bin", "ple.bin")]


def test_layout_is_page_aligned_and_disjoint():
    for scheme in ("int4", "int8", "none"):
        regions = list(layout_of(scheme).regions.values())
        assert all(r.offset % 4096 == 0 for r in regions)
        for a, b in pairwise(regions):
            assert a.offset + a.bytes <= b.offset


@pytest.mark.parametrize("scheme", ["int4", "int8", "none"])
def test_every_tensor_reads_back(tmp_path, scheme):
    source = open_weights("random:3", CONFIG)
    layout, reports, ple_error = write(source, tmp_path, scheme)
    stored = StoredWeights(layout, tmp_path / "weights.bin")
    for spec in models.weights(CONFIG):
        if spec.kind == PLE_TABLE:
            continue
        kept, expected = layout.by_name[spec.name], torch.from_numpy(source.read(spec.name))
        rows = spec.shape[0]
        if kept.format is None:
            assert spec.kind == FLOAT or scheme == "none"
            assert torch.equal(stored.read(spec.name, 0, rows), expected)
            continue
        groups = -(-rows // GROUP)
        packed = stored.read(f"{spec.name}.packed", 0, groups)
        q = unpack(kept.format, packed.numpy(), rows, spec.shape[1])
        values = torch.from_numpy(dequantise(kept.format, q))
        error = float((values - expected).norm() / expected.norm())
        assert error == pytest.approx(reports[spec.name].error, rel=1e-3, abs=1e-6)
        assert error < (0.12 if kept.format.bits == 4 else 0.01)
        part = stored.read(f"{spec.name}.packed", 1, min(3, groups))
        assert torch.equal(part, packed[1:3])
    assert (ple_error == 0) == (scheme == "none")


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = Counting()
    write(whole, tmp_path / "whole")
    total, seen = len(whole.reads), []
    for die_at in [*range(0, total, max(1, total // 12)), None]:
        source = Counting(None if die_at is None else max(1, total // 12))
        try:
            write(source, tmp_path / "cut")
        except KeyboardInterrupt:
            with (tmp_path / "cut" / "journal").open("a") as f:
                f.write('{"name": "torn')  # the line that was being written
        seen += source.reads
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert len(seen) <= total + 13  # only the tensor under way is read again


def test_a_full_disk_is_a_sentence_and_the_next_run_goes_on(tmp_path, monkeypatch):
    real, calls = os.pwrite, []

    def full(fd, data, offset):
        calls.append(offset)
        if len(calls) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    source = open_weights("random:3", CONFIG)
    with pytest.raises(ExportError, match="No space left on device"):
        write(source, tmp_path)
    again = Counting()
    write(again, tmp_path)
    (tmp_path / "whole").mkdir()
    write(source, tmp_path / "whole")
    assert contents(tmp_path) == contents(tmp_path / "whole")
    assert "embed" not in again.reads


def test_values_that_are_not_finite_are_refused(tmp_path):
    class Broken(Counting):
        def read(self, name, start=0, stop=None):
            if name.endswith("attn.out"):
                raise WeightsError(f"{name} is not finite")
            return super().read(name, start, stop)

    with pytest.raises(WeightsError, match=r"attn\.out"):
        write(Broken(), tmp_path)


def test_random_weights_do_not_depend_on_the_row_blocks(tmp_path, monkeypatch):
    write(Counting(), tmp_path)
    first = contents(tmp_path)
    monkeypatch.setattr("edge_kv.export.weight_file.ROW_BLOCK_BYTES", 64 << 10)
    (tmp_path / "small").mkdir()
    write(Counting(), tmp_path / "small")
    for a, b in zip(first, contents(tmp_path / "small"), strict=True):
        assert np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8))
