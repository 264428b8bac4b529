"""Llama 3, Qwen3, SmolLM2: the plain decoder, with or without q/k norms, biases and a tied head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edge_kv.models.model import EMBED, FLOAT, HEAD, Model, Rope, Weight
from edge_kv.plan import Sizes, Table


@dataclass(frozen=True, kw_only=True)
class Config(Model):
    q_heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope: Rope
    qk_norm: bool = False  # per-head RMS norms of queries and keys (Qwen3)
    attn_bias: bool = False  # on q, k and v
    out_bias: bool = False  # on the attention's output
    mlp_bias: bool = False
    tied: bool = True  # the token table is the head


def tables(c: Config, s: Sizes) -> Iterator[Table]:
    for i in range(c.layers):
        for name in "kv":
            yield s.table(f"l{i}.{name}", (c.kv_heads, c.head_dim), layer=i)


def weights(c: Config) -> Iterator[Weight]:
    yield Weight(
        "embed", (c.vocab, c.hidden), EMBED, "embed_tokens.weight", "token_embd.weight",
        share=1.0 if c.tied else 0.0,
    )  # fmt: skip
    for i in range(c.layers):
        yield from _layer(c, f"layers.{i}", f"blk.{i}")
    yield Weight("norm", (c.hidden,), FLOAT, "norm.weight", "output_norm.weight")
    if not c.tied:
        yield Weight("head", (c.vocab, c.hidden), HEAD, "lm_head.weight", "output.weight")


def _layer(c: Config, at: str, blk: str) -> Iterator[Weight]:
    q, kv = c.q_heads * c.head_dim, c.kv_heads * c.head_dim
    linears = (
        ("attn.q", (q, c.hidden), "self_attn.q_proj", "attn_q", c.attn_bias),
        ("attn.k", (kv, c.hidden), "self_attn.k_proj", "attn_k", c.attn_bias),
        ("attn.v", (kv, c.hidden), "self_attn.v_proj", "attn_v", c.attn_bias),
        ("attn.out", (c.hidden, q), "self_attn.o_proj", "attn_output", c.out_bias),
        ("mlp.gate", (c.mlp_width, c.hidden), "mlp.gate_proj", "ffn_gate", c.mlp_bias),
        ("mlp.up", (c.mlp_width, c.hidden), "mlp.up_proj", "ffn_up", c.mlp_bias),
        ("mlp.down", (c.hidden, c.mlp_width), "mlp.down_proj", "ffn_down", c.mlp_bias),
    )
    norms = [
        ("attn_norm", c.hidden, "input_layernorm", "attn_norm"),
        ("mlp_norm", c.hidden, "post_attention_layernorm", "ffn_norm"),
    ]
    if c.qk_norm:
        norms += [
            ("attn.q_norm", c.head_dim, "self_attn.q_norm", "attn_q_norm"),
            ("attn.k_norm", c.head_dim, "self_attn.k_norm", "attn_k_norm"),
        ]
    for name, shape, hf, gguf, bias in linears:
        hf, gguf = f"{at}.{hf}", f"{blk}.{gguf}"
        yield Weight(f"{at}.{name}", shape, hf=f"{hf}.weight", gguf=f"{gguf}.weight")
        if bias:
            yield Weight(f"{at}.{name}.bias", shape[:1], FLOAT, f"{hf}.bias", f"{gguf}.bias")
    for name, width, hf, gguf in norms:
        yield Weight(f"{at}.{name}", (width,), FLOAT, f"{at}.{hf}.weight", f"{blk}.{gguf}.weight")
