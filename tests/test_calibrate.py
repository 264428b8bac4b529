"""Calibrated rounding: any net, all sequences in step, and the same bytes every time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from edge_kv import models
from edge_kv.errors import ExportError
from edge_kv.export import calibrate as calibration
from edge_kv.export.calibrate import calibrate, sequences, shipped_text
from edge_kv.export.rounding import round_rows
from edge_kv.formats import FORMATS, dequantise
from edge_kv.models.llama import Config
from edge_kv.models.model import FLOAT, Rope
from edge_kv.nets import make_net
from edge_kv.nets.state import StaticState
from edge_kv.nets.weights import Weights, load

CONFIG = Config(
    vocab=150, hidden=64, layers=3, max_ctx=64, q_heads=4, kv_heads=2, head_dim=16, mlp_width=96,
    rope=Rope.whole(1e4, 16), attn_bias=True,
)  # fmt: skip
PLAN = models.plan(CONFIG, ctx=64, chunk=64, kv="f32")
ROWS = models.weights(CONFIG)


def float_weights(seed=0, rank=12):
    """Random, but what matrices put out goes together, as it does in trained models."""
    generator = torch.Generator().manual_seed(seed)

    def draw(row):
        if row.kind == FLOAT:
            return 1 + 0.1 * torch.randn(row.shape, generator=generator)
        if len(row.shape) == 1:
            return 0.1 * torch.randn(row.shape, generator=generator)
        n, width = row.shape
        few = torch.randn(n, rank, generator=generator)
        few = few @ torch.randn(rank, width, generator=generator) / rank**0.5
        return (few + 0.2 * torch.randn(n, width, generator=generator)) / width**0.5

    return {row.name: draw(row) for row in ROWS}


class Memory:
    """A store of tensors: float ones, and those that were rounded so far."""

    def __init__(self, weights, fmt, plain=()):
        self.weights, self.fmt = weights, fmt
        self.rounded = {
            name: torch.from_numpy(dequantise(fmt, round_rows(weights[name], fmt)[0]))
            for name in plain
        }
        self.todo = {r.name for r in ROWS if r.kind != FLOAT and "bias" not in r.name} - set(plain)
        self.finished = []
        self.calls = []

    def rounds(self, name):
        return name in self.todo

    def source(self, name, start, stop):
        return self.weights[name][start:stop]

    def stored(self, name, start, stop):
        return self.rounded.get(name, self.weights[name])[start:stop]

    def round(self, name, start, stop, factors):
        self.calls.append((name, start, stop))
        q, _ = round_rows(self.weights[name][start:stop], self.fmt, factors)
        held = self.rounded.setdefault(name, torch.zeros_like(self.weights[name]))
        held[start:stop] = torch.from_numpy(dequantise(self.fmt, q))

    def finish(self, name):
        self.todo.remove(name)
        self.finished.append(name)


def texts(n=6, length=40, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, CONFIG.vocab, (length - i,), generator=generator) for i in range(n)]


@torch.no_grad()
def logits(weights, ids):
    net = make_net(CONFIG, Weights(ROWS))
    load(net, lambda name, a, b: weights[name][a:b])
    return net.logits(net(ids, torch.zeros(1, dtype=torch.int64), StaticState(PLAN)))


def divergence(weights, others, ids):
    p, q = (logits(w, ids).log_softmax(-1) for w in (weights, others))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_every_matrix_is_rounded_once_and_in_order_of_use():
    store = Memory(float_weights(), FORMATS["int4-s8"])
    seen = []
    calibrate(CONFIG, PLAN, ROWS, store, texts(), on_matrix=seen.append)
    matrices = [r.name for r in ROWS if r.kind != FLOAT and "bias" not in r.name]
    assert store.finished == seen == [*matrices[1:], "embed"]  # the head is the embedding
    rows = [call for call in store.calls if call[0] == "embed"]
    assert rows[0][1] == 0 and rows[-1][2] == CONFIG.vocab


@pytest.mark.parametrize("name", ["int4-s8", "code4-s8", "int2-row"])
def test_text_that_was_not_seen_diverges_less_than_after_plain_rounding(name):
    weights, fmt = float_weights(), FORMATS[name]
    matrices = [r.name for r in ROWS if r.kind != FLOAT and "bias" not in r.name]
    plain = Memory(weights, fmt, matrices)
    store = Memory(weights, fmt)
    calibrate(CONFIG, PLAN, ROWS, store, texts(8, 60))
    fresh = texts(1, 60, seed=9)[0]
    ours = divergence(weights, {**weights, **store.rounded}, fresh)
    assert ours < 0.8 * divergence(weights, {**weights, **plain.rounded}, fresh)


def test_a_run_taken_up_again_ends_the_same():
    weights, fmt = float_weights(), FORMATS["code4-s8"]
    whole = Memory(weights, fmt)
    calibrate(CONFIG, PLAN, ROWS, whole, texts())

    class Killed(Memory):
        def finish(self, name):
            super().finish(name)
            if name == "layers.1.mlp.gate":
                raise KeyboardInterrupt

    store = Killed(weights, fmt)
    with pytest.raises(KeyboardInterrupt):
        calibrate(CONFIG, PLAN, ROWS, store, texts())
    again = Memory(weights, fmt)
    again.rounded, again.todo = store.rounded, store.todo
    calibrate(CONFIG, PLAN, ROWS, again, texts())
    for name, values in whole.rounded.items():
        np.testing.assert_array_equal(again.rounded[name], values, err_msg=name)


def test_an_error_at_a_matrix_ends_all_sequences():
    class Full(Memory):
        def round(self, name, start, stop, factors):
            raise ExportError("the disk is full")

    with pytest.raises(ExportError, match="the disk is full"):
        calibrate(CONFIG, PLAN, ROWS, Full(float_weights(), FORMATS["int4-s8"]), texts())


def test_an_error_of_one_sequence_ends_all():
    too_long = [*texts(2), torch.zeros(65, dtype=torch.int64) + CONFIG.vocab]
    with pytest.raises(Exception, match="size of tensor"):
        calibrate(CONFIG, PLAN, ROWS, Memory(float_weights(), FORMATS["int4-s8"]), too_long)


def test_sequences_cover_the_text_and_begin_with_the_start_token():
    cut = sequences(lambda text: list(map(ord, text)), "abcdefghij", [2], window=4)
    assert [list(s) for s in cut] == [[2, *map(ord, part)] for part in ("abc", "def", "ghi", "j")]
    many = sequences(lambda text: list(range(100_000)), "x", [])
    assert len(many) == calibration.SEQUENCES and len(many[0]) == calibration.WINDOW
    starts = [int(s[0]) for s in many]
    gaps = [b - a for a, b in pairwise(starts)]
    assert starts[0] == 0 and max(gaps) - min(gaps) <= calibration.WINDOW  # evenly spread
    assert starts[-1] > 90_000
    with pytest.raises(ExportError, match="empty"):
        sequences(lambda text: [], "", [2])


def test_shipped_text_has_many_scripts_and_code():
    text = shipped_text()
    assert 25_000 < len(text.encode()) < 60_000
    for sign in (
        "ß",
        "é",
        "ж",
        "学",
        "の",
        "김",
        "ك",
        "ह",
        "def ",
        "#include",
        "SELECT",
        "And God",
    ):
        assert sign in text
