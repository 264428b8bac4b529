"""Every net on ExecuTorch with native operators against transformers: one row a model.

The steps are those of test_models: mixed chunks, single tokens, rings that wrap, blocks complete
and not, rewinds, wrong continuations that are overwritten.
"""

import ctypes

import numpy as np
import pytest
import torch
from parity_runs import BOUND, CHUNK, CTX, LENGTH
from test_models import RESTLESS, ROUNDED
from tiny_models import FEWEST, NAMES, tiny

from edge_kv import models
from edge_kv.export.lower_executorch import lower_executorch
from edge_kv.export.packed_weights import PackedWeights
from edge_kv.export.weight_file import Journal, StoredWeights, WeightLayout, write_weights
from edge_kv.models.checkpoint import open_checkpoint
from edge_kv.nets import make_net
from edge_kv.nets.state import StaticState
from edge_kv.nets.weights import load
from edge_kv.progress import Silent
from edge_kv.runtime.native_library import load_library
from edge_kv.tensors import weight_formats


class Engine:
    """A program on the native engine, without a manifest."""

    def __init__(self, program, weights, checkpoint, exact=False):
        self.native, self.checkpoint = load_library(), checkpoint
        error = ctypes.create_string_buffer(512)
        paths = str(program).encode(), str(weights).encode()
        self.handle = self.native.edge_kv_open(*paths, 2, exact, error, 512)
        assert self.handle, error.value.decode()
        self.error = error

    def rows(self, ids, layers):
        return token_rows(self.checkpoint, ids, layers)

    def prefill(self, ids, pos):
        ids = np.ascontiguousarray(ids, np.int64)
        fed = self.checkpoint.config.token_rows
        rows = self.rows(ids, fed.prefill if fed else 0)
        address = None if rows is None else rows.ctypes.data
        status = self.native.edge_kv_prefill(
            self.handle, ids.ctypes.data, len(ids), pos, address, self.error, 512
        )
        assert status == 0, self.error.value.decode()

    def decode(self, ids, pos):
        ids = np.ascontiguousarray(ids, np.int64)
        vocab = self.checkpoint.config.vocab
        logits = np.full((len(ids), vocab), np.nan, np.float32)
        rows = self.rows(ids, self.checkpoint.config.layers)
        address = None if rows is None else rows.ctypes.data
        status = self.native.edge_kv_decode(
            self.handle, ids.ctypes.data, len(ids), pos, address, logits.ctypes.data, vocab,
            self.error, 512,
        )  # fmt: skip
        assert status == 0, self.error.value.decode()
        return logits

    def close(self):
        self.native.edge_kv_close(self.handle)


def token_rows(checkpoint, ids, layers):
    """Token rows of the per-layer embedding, of models that have one."""
    fed = checkpoint.config.token_rows
    if fed is None:
        return None
    table = checkpoint.read(fed.name)[ids].reshape(len(ids), checkpoint.config.layers, -1)
    return np.ascontiguousarray(table[:, :layers], np.float32)


def lowered(checkpoint, folder, kv, quant="none"):
    """The `.pte` and the weight file of a checkpoint."""
    config = checkpoint.config
    plan = models.plan(config, ctx=CTX, chunk=CHUNK, kv=kv)
    layout = WeightLayout(models.weights(config), weight_formats(quant))
    stored = StoredWeights(layout, folder / f"{quant}.bin")
    if not stored.path.exists():
        write_weights(checkpoint, layout, stored.path, Journal(folder / quant), Silent())
    program = folder / f"{kv}-{quant}.pte"
    facts = {"edge_kv_weights": layout.bytes}
    lower_executorch(config, plan, stored, program, facts=facts, attention="native", delegate=False)
    return program, stored


def errors(engine, ids, expected):
    """The largest error of each position's logits, over the steps of `test_models`.

    The second half of a pass of several tokens is wrong drafts.
    """
    found, pos = {}, 0
    several = [("pass", n) for n in (8, 3, 2, 5, 4, 6, 7)]
    steps = [8, 8, 5, "1", "1", 3, "1", -3, 7, "1", "1", "wrong", 3, *several, -5, 8]
    for step in [*steps, *["1"] * LENGTH]:
        if step == "wrong":
            engine.prefill((ids[pos : pos + 7] + 7) % 90, pos)
        elif step == "1" and pos == LENGTH:
            break
        elif step == "1" or isinstance(step, tuple):
            fed = ids[pos : pos + (step[1] if isinstance(step, tuple) else 1)].copy()
            kept = -(-len(fed) // 2)
            fed[kept:] = (fed[kept:] + 11) % 90
            logits = engine.decode(fed, pos)
            for row in logits[:kept]:
                error = float(np.abs(row - expected[pos]).max())
                found[pos], pos = max(found.get(pos, 0.0), error), pos + 1
        elif step < 0:
            pos += step
        else:
            engine.prefill(ids[pos : pos + step], pos)
            pos += step
    engine.close()
    assert pos == LENGTH
    return np.array(list(found.values()))


# One of each kind of table and of product: how a table or a matrix is stored changes no others.
STORED = ("e2b", "26b", "llama", "laguna-element", "zaya-sliding", "deepseek_v4")


def saved(name, folder, **changes):
    """A saved tiny model, ids, and transformers' logits of them."""
    model = tiny(name, **changes)
    model.save_pretrained(folder)
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 90, LENGTH))
    with torch.no_grad():
        expected = model(ids[None], use_cache=False).logits[0].numpy()
    return name, open_checkpoint(folder), ids.numpy(), expected


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    return saved(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def few_layers(request, tmp_path_factory):
    changes = FEWEST.get(request.param, {})
    return saved(request.param, tmp_path_factory.mktemp(request.param), **changes)


@pytest.mark.parametrize("case", NAMES, indirect=True)
def test_logits_are_those_of_transformers(case, tmp_path):
    _, checkpoint, ids, expected = case
    program, stored = lowered(checkpoint, tmp_path, "f32")
    assert errors(Engine(program, stored.path, checkpoint), ids, expected).max() <= BOUND


@pytest.mark.parametrize("few_layers", STORED, indirect=True)
def test_rounded_state_stays_near(few_layers, tmp_path):
    name, checkpoint, ids, expected = few_layers
    for kv in ("int8", "f16") if name in ("e2b", "deepseek_v4") else ("int8",):
        program, stored = lowered(checkpoint, tmp_path, kv)
        found = errors(Engine(program, stored.path, checkpoint), ids, expected)
        assert np.median(found) <= RESTLESS.get(name, ROUNDED[kv])


@pytest.mark.parametrize("few_layers", STORED, indirect=True)
def test_packed_weights_multiply_exactly_when_asked(few_layers, tmp_path):
    """Float activations: the logits of the stored weights; rounded ones are another path."""
    name, checkpoint, ids, _ = few_layers
    for quant in ("int4", "int8") if name in ("e2b", "laguna-element") else ("int4",):
        program, stored = lowered(checkpoint, tmp_path, "f32", quant)
        expected = stored_logits(checkpoint, stored, ids)
        found = errors(Engine(program, stored.path, checkpoint, exact=True), ids, expected)
        assert found.max() <= BOUND
        rounded = errors(Engine(program, stored.path, checkpoint), ids, expected)
        assert BOUND < np.median(rounded) < 1.0


@torch.no_grad()
def stored_logits(checkpoint, stored, ids):
    """The net over stored weights and float tables, in one step."""
    plan = models.plan(checkpoint.config, ctx=CTX, chunk=LENGTH, kv="f32")
    with torch.device("meta"):
        net = make_net(
            checkpoint.config, PackedWeights(models.weights(checkpoint.config), stored.layout)
        )
    load(net, stored.read)
    rows = token_rows(checkpoint, ids, None)
    rows = None if rows is None else torch.from_numpy(rows)
    x = net(torch.from_numpy(ids), torch.tensor([0]), StaticState(plan), rows)
    return net.logits(x).numpy()
