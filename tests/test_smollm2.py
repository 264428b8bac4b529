"""SmolLM2-135M-Instruct as it is published: a GGUF of Q4_1 weights, its tokenizer and template.

The expected reply is transformers' (fp32, greedy), recorded by `benchmarks/smollm2.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from common import smollm2_path
from jinja2 import Environment
from smollm2 import reply
from tokenizers import Tokenizer

from edge_kv import models, nets
from edge_kv.models.checkpoint import open_checkpoint
from edge_kv.nets.weights import Weights, load
from edge_kv.weights.gguf_file import open_gguf
from edge_kv.weights.gguf_tokenizer import hf_tokenizer_json

RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "greedy_smollm2.json"


def test_the_reply_is_that_of_transformers():
    checkpoint = open_checkpoint(smollm2_path())
    checkpoint.check()
    assert checkpoint.config == models.get_row("smollm2-135m").config
    metadata = open_gguf(smollm2_path()).metadata
    tokenizer = Tokenizer.from_str(hf_tokenizer_json(metadata, "smollm2"))
    record = json.loads(RECORD.read_text())["prompts"][0]
    text = Environment().from_string(metadata["tokenizer.chat_template"]).render(
        messages=[{"role": "user", "content": record["prompt"]}], add_generation_prompt=True
    )  # fmt: skip
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) == record["prompt_tokens"]
    sentence = tokenizer.encode(record["text"], add_special_tokens=False).ids[:7]
    forced = [*sentence, checkpoint.config.eos_ids[0]]  # the recorded text leaves marks out
    with torch.device("meta"):
        net = nets.make_net(checkpoint.config, Weights(models.weights(checkpoint.config)))
    load(net, lambda name, a, b: torch.from_numpy(checkpoint.read(name, a, b)))
    found, _ = reply(checkpoint, net, ids, forced, "f32")
    assert found == forced
