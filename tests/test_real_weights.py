"""Gemma 3 270M as it is published: its GGUF through our reader and decoder, and our quantiser.

Expected ids are transformers' (fp32, eager), recorded by `benchmarks/real_weights.py greedy`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from weights_gguf import gemma3_270m

from edge_kv import models
from edge_kv.export.rounding import round_rows
from edge_kv.formats import FORMATS
from edge_kv.models.checkpoint import Checkpoint, open_checkpoint
from edge_kv.nets.oracle import oracle
from edge_kv.nets.weights import Weights

RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "greedy_gemma3_270m.json"
PROMPT = "def fibonacci(n):\n    "


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return open_checkpoint(gemma3_270m())


def test_first_64_greedy_tokens_are_those_of_transformers(source: Checkpoint) -> None:
    from tokenizers import Tokenizer

    record = next(r for r in json.loads(RECORD.read_text())["prompts"] if r["prompt"] == PROMPT)
    tokenizer = Tokenizer.from_str(source.text.tokenizer_json() or "")
    prompt = [source.config.bos_id, *tokenizer.encode(PROMPT, add_special_tokens=False).ids]
    expected = record["ids"]
    assert (len(prompt), len(expected)) == (record["prompt_tokens"], 64)
    ids = torch.tensor(prompt + expected[:-1])
    run = oracle(
        source.config,
        Weights(models.weights(source.config)),
        lambda region, a, b: torch.from_numpy(source.read(region, a, b)),
        ids,
    )
    logits = run.logits(len(prompt) - 1)
    # Teacher-forced: equal argmax at every step is what makes a greedy run equal.
    assert logits.argmax(-1).tolist() == expected
    assert tokenizer.decode(expected) == record["text"]


@pytest.mark.parametrize(
    ("name", "limit"), [("int8-s8", 0.01), ("int4-s8", 0.1), ("code4-s8", 0.09)]
)
def test_real_matrices_survive_quantisation(source: Checkpoint, name: str, limit: float) -> None:
    for tensor in ("layers.0.attn.q", "layers.9.mlp.down"):
        rows = torch.from_numpy(source.read(tensor))
        _, lost = round_rows(rows, FORMATS[name])
        error = (lost / float(rows.square().sum())) ** 0.5
        assert limit / 4 < error < limit
