"""The operators of stored matrices, and rows of the per-layer table."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_kv import models
from edge_kv.export.rounding import round_rows
from edge_kv.export.weight_file import encode_ple, ple_layout
from edge_kv.formats import FORMATS, dequantise, pack
from edge_kv.nets.ops import embed_q, linear_q
from edge_kv.ple import PleTable
from edge_kv.tensors import weight_formats


def test_ops_are_plain_products_of_the_dequantised_weights():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(37, 128, generator=generator), torch.randn(3, 128, generator=generator)
    for name in ("code4-s8", "int8-f16", "int2-row"):
        q, _ = round_rows(weight, FORMATS[name])
        packed = torch.from_numpy(pack(FORMATS[name], q))
        kept = torch.from_numpy(dequantise(FORMATS[name], q))
        assert torch.allclose(linear_q(x, packed, 37, name), x @ kept.T)
        steps = (x / 0.05).round().clamp(-128, 127) * 0.05
        assert torch.allclose(linear_q(x, packed, 37, name, 0.05), steps @ kept.T, atol=1e-5)
        ids = torch.tensor([7, 0, 36])
        assert torch.equal(embed_q(ids, packed, 128, name), kept[ids])


@pytest.mark.parametrize("scheme", ["int4", "int8", "none"])
def test_ple_rows_read_back(tmp_path, scheme):
    entry = ple_layout(models.get_row("tiny").config.token_rows, 6, weight_formats(scheme))
    assert entry is not None
    values = torch.randn(6, entry.values, generator=torch.Generator().manual_seed(1))
    data, lost = encode_ple(values, entry)
    path = tmp_path / "ple.bin"
    path.write_bytes(data.tobytes())
    table = PleTable(path, entry)
    ids = np.array([5, 0, 5, 3])
    rows = table.rows(ids, 3)
    table.close()
    expected = values.view(6, entry.n_layers, entry.dim)[ids, :3].numpy()
    bound = {"int4": 0.12, "int8": 0.01, "none": 0.0}[scheme]
    assert rows.shape == (4, 3, entry.dim)
    assert np.linalg.norm(rows - expected) <= bound * np.linalg.norm(expected)
    assert (lost == 0) == (scheme == "none")
