"""The decoder and its ONNX programs against transformers: every family, every parameter random.

One run mixes chunk sizes, passes several ring wraps and rewinds; the oracle is transformers'
uncached float32 forward.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from weights_models import NAMES, tiny_hf

from edge_kv import runtime
from edge_kv.export import export_model
from edge_kv.kv_plan import plan_kv
from edge_kv.model.binding import load_parameters
from edge_kv.model.decoder import Decoder
from edge_kv.model.oracle import oracle_logits
from edge_kv.model.state import StaticState
from edge_kv.weights import open_weights

TOLERANCE = 2e-4
LENGTH, CHUNK = 70, 8  # window 8: rings of 15 slots wrap four times
CHUNKS = (8, 3, 1, 8, 5, 2, 7)  # 34 prompt tokens, the rest is decoded


def open_session(root, engine):
    return runtime.load(root, engine)


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    """(checkpoint directory, ids, transformers' logits [LENGTH, vocab]) of one tiny family."""
    model = tiny_hf(request.param)
    root = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(root)
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 90, LENGTH))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    return root, ids, logits


def float_parts(source, plan):
    """The eager decoder with a checkpoint's float parameters, and its PLE row reader."""
    config = source.config

    def read(region, start, stop):
        return torch.from_numpy(source.read(region, start, stop))

    def ple(ids):
        if not config.ple_dim:
            return None
        table = torch.from_numpy(source.read("ple_embed.weight"))
        return table[ids].view(len(ids), config.n_layers, config.ple_dim)

    with torch.device("meta"):
        decoder = Decoder(config, plan)
    decoder.rope = Decoder.rope_tables(config)
    load_parameters(decoder, config, read)
    return decoder, read, ple


def test_oracle_matches_transformers(case):
    root, ids, expected = case
    source = open_weights(str(root))
    plan = plan_kv(source.config, ctx=96, chunk=CHUNK, kv="f32")
    _, read, ple = float_parts(source, plan)
    rows = ple if source.config.ple_dim else None
    logits = oracle_logits(source.config, plan, read, ids, ple_rows=rows)
    assert (logits - expected).abs().max() <= TOLERANCE
    assert expected.std() > 0.1  # a model that says nothing would agree with anything


@torch.no_grad()
def test_static_buffers_match_transformers(case):
    root, ids, expected = case
    source = open_weights(str(root))
    plan = plan_kv(source.config, ctx=96, chunk=CHUNK, kv="f32")
    decoder, _, ple = float_parts(source, plan)
    state, pos, got = StaticState(plan), 0, {}

    def step(size):
        nonlocal pos
        part = ids[pos : pos + size]
        logits = decoder(part, torch.tensor([pos]), ple(part), state)
        got.update({pos + i: row for i, row in enumerate(logits)})
        pos += size

    for size in CHUNKS:
        step(size)
    rewinds = {40, 55, 66}
    while pos < LENGTH:
        step(1)
        if pos in rewinds:  # within what the rings retain, and on from there
            rewinds.remove(pos)
            pos -= 5
            step(4)
    assert sorted(got) == list(range(LENGTH))
    assert (torch.stack([got[i] for i in range(LENGTH)]) - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_prefill_then_decode_equals_the_full_run(case):
    """Prompt tokens that skip the sharing layers leave exactly the state of a full run."""
    root, ids, expected = case
    source = open_weights(str(root))
    plan = plan_kv(source.config, ctx=96, chunk=CHUNK, kv="f32")
    decoder, _, ple = float_parts(source, plan)
    full, skipped = StaticState(plan), StaticState(plan)
    for pos in range(0, 40, CHUNK):
        part, at = ids[pos : pos + CHUNK], torch.tensor([pos])
        decoder(part, at, ple(part), full)
        rows = ple(part)
        own = rows[:, : source.config.n_own] if rows is not None else None
        decoder.prefill(part, at, own, skipped)
    for name, buffer in full.buffers.items():
        assert torch.equal(buffer, skipped.buffers[name]), name
    part = ids[40:41]
    logits = decoder.decode(part, torch.tensor([40]), ple(part), skipped)
    assert (logits - expected[40]).abs().max() <= TOLERANCE


def test_onnx_matches_transformers(case, tmp_path):
    root, ids, expected = case
    out = export_model(
        weights=str(root), ctx=96, chunk=CHUNK, kv="f32", quant="none", out=tmp_path / "a",
        open_session=open_session,
    )  # fmt: skip
    ids = ids.numpy()
    with runtime.load(out) as session:
        for size in CHUNKS:
            session.prefill(ids[session.pos : session.pos + size])
        for stop in (42, 59, LENGTH):
            while session.pos < stop:
                pos = session.pos
                logits = session.decode(int(ids[pos]))
                assert np.abs(logits - expected[pos].numpy()).max() <= TOLERANCE, pos
            if stop < LENGTH:
                session.rewind(4)
                session.prefill(ids[session.pos : session.pos + 2])
        session.reset()
        session.prefill(ids[: LENGTH - 1])
        logits = session.decode(int(ids[-1]))
    assert np.abs(logits - expected[-1].numpy()).max() <= TOLERANCE
