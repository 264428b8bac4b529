"""Every net on ExecuTorch with native operators against transformers: one row a model.

The steps are those of test_models: mixed chunks, single tokens, rings that wrap, blocks complete
and not, rewinds, wrong continuations that are overwritten.
"""

import ctypes

import numpy as np
import pytest
import torch
from tiny_models import tiny

from edge_kv import models
from edge_kv.export.executorch_net import PLE, lower_net_executorch
from edge_kv.export.weight_file import WeightLayout
from edge_kv.models.checkpoint import open_checkpoint
from edge_kv.runtime.native_library import load_library
from edge_kv.tensors import weight_formats

LENGTH, CTX, CHUNK, BOUND = 70, 78, 8, 2e-4
NAMES = ["e2b", "gemma3", "llama", "llama-bias", "qwen3"]


class Engine:
    """A program on the native engine, without a manifest."""

    def __init__(self, program, weights, checkpoint):
        self.native, self.checkpoint = load_library(), checkpoint
        error = ctypes.create_string_buffer(512)
        paths = str(program).encode(), str(weights).encode()
        self.handle = self.native.edge_kv_open(*paths, 2, 0, error, 512)
        assert self.handle, error.value.decode()
        self.error = error

    def rows(self, ids, layers):
        if PLE not in self.checkpoint.rows:
            return None
        table = self.checkpoint.read(PLE)[ids].reshape(len(ids), self.checkpoint.config.layers, -1)
        return np.ascontiguousarray(table[:, :layers], np.float32)

    def prefill(self, ids, pos):
        ids = np.ascontiguousarray(ids, np.int64)
        rows = self.rows(ids, getattr(self.checkpoint.config, "owners", None))
        address = None if rows is None else rows.ctypes.data
        status = self.native.edge_kv_prefill(
            self.handle, ids.ctypes.data, len(ids), pos, address, self.error, 512
        )
        assert status == 0, self.error.value.decode()

    def decode(self, token, pos):
        logits = np.full(self.checkpoint.config.vocab, np.nan, np.float32)
        rows = self.rows(np.array([token]), self.checkpoint.config.layers)
        address = None if rows is None else rows.ctypes.data
        status = self.native.edge_kv_decode(
            self.handle, int(token), pos, address, logits.ctypes.data, len(logits), self.error, 512
        )
        assert status == 0, self.error.value.decode()
        return logits

    def close(self):
        self.native.edge_kv_close(self.handle)


def lowered(checkpoint, folder, kv):
    """The `.pte` and the weight file of a checkpoint."""
    config = checkpoint.config
    plan = models.plan(config, ctx=CTX, chunk=CHUNK, kv=kv)
    layout = WeightLayout(models.weights(config), weight_formats("none"))
    weights = folder / "weights.bin"
    with weights.open("wb") as file:
        file.truncate(layout.bytes)
        for region in layout.regions.values():
            file.seek(region.offset)
            dtype = np.int64 if region.dtype == "i64" else np.float32
            file.write(np.ascontiguousarray(checkpoint.read(region.name), dtype).tobytes())
    facts = {"edge_kv_weights": layout.bytes, "edge_kv_layers": config.layers}
    if PLE in checkpoint.rows:
        width = checkpoint.rows[PLE].shape[1] // config.layers
        facts |= {"edge_kv_ple_dim": width, "edge_kv_own": config.owners}
    lower_net_executorch(config, plan, layout, folder / "model.pte", facts=facts)
    return Engine(folder / "model.pte", weights, checkpoint)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name, tmp_path):
    model = tiny(name)
    model.save_pretrained(tmp_path)
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 90, LENGTH))
    with torch.no_grad():
        expected = model(ids[None], use_cache=False).logits[0].numpy()
    checkpoint, ids = open_checkpoint(tmp_path), ids.numpy()
    engine = lowered(checkpoint, tmp_path, "f32")
    worst = pos = 0
    steps = [8, 8, 5, "1", "1", 3, "1", -3, 7, "1", "1", "wrong", 3, *["1"] * 21, -5, 8]
    for step in [*steps, *["1"] * LENGTH]:
        if step == "wrong":
            engine.prefill((ids[pos : pos + 7] + 7) % 90, pos)
        elif step == "1" and pos < LENGTH:
            worst = max(worst, np.abs(engine.decode(ids[pos], pos) - expected[pos]).max())
            pos += 1
        elif step != "1" and step < 0:
            pos += step
        elif step != "1":
            engine.prefill(ids[pos : pos + step], pos)
            pos += step
    engine.close()
    assert pos == LENGTH and worst <= BOUND
