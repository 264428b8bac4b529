"""Llama 3, Qwen3, SmolLM2: the plain decoder, with or without q/k norms, biases and a tied head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import inf
from typing import TYPE_CHECKING, Any

from edge_kv.errors import ConfigError
from edge_kv.models import reading
from edge_kv.models.model import (
    EMBED,
    FLOAT,
    HEAD,
    KV,
    LINEAR,
    OF_STATE,
    Divisors,
    Llama3,
    Model,
    Rope,
    Row,
    Weight,
)
from edge_kv.plan import Sizes, Table
from edge_kv.weights.fields import Fields
from edge_kv.weights.gguf_tokenizer import default_ids
from edge_kv.weights.source import Stored

if TYPE_CHECKING:
    from edge_kv.weights.gguf_file import GGUFFile


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
    paired: bool = field(default=False, compare=False)  # q and k rows of a GGUF file of Llama

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from self.not_positive("head_dim", "mlp_width")
        yield from self.uneven_heads(self.q_heads, self.kv_heads)
        if self.rope.dim > self.head_dim:
            yield f"rope of {self.rope.dim} dims must fit head_dim {self.head_dim}"


_COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 1e4}
# model_type -> what transformers' config class of it supplies.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "qwen2": _COMMON,
    "qwen3": {**_COMMON, "head_dim": 128},
}
HF = tuple(_DEFAULTS)
GGUF = ("llama", "qwen2", "qwen3")
_DIVISORS = "rope_freqs.weight"


def read_hf(raw: dict[str, Any], where: str) -> Config:
    """The config that a config.json describes.

    Raises:
        ConfigError: a field that would change the computation, or a wrong value, by name.
    """
    kind = str(raw["model_type"])
    fields = Fields(raw, where, _DEFAULTS[kind])
    fields.refuse_unless("hidden_act", "silu")
    fields.refuse_unless("quantization_config")
    fields.refuse_unless("use_sliding_window", False)
    heads = fields.integer("num_attention_heads")
    kv_heads = _or(fields, "num_key_value_heads", heads)
    common = reading.sizes(fields)
    reading.letters(fields, "layer_types", {"full_attention": "F"}, common["layers"])
    head_dim = _or(fields, "head_dim", common["hidden"] // max(heads, 1))
    rope = Fields(reading.one_rope(fields), f"{where}: rope_parameters")
    rope.refuse_unless("partial_rotary_factor", 1)
    theta = {"rope_theta": fields.number("rope_theta")}
    bias = kind == "qwen2" or fields.flag("attention_bias")
    return Config(
        **common,
        q_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=fields.integer("intermediate_size"),
        rope=reading.rope(rope, head_dim, theta),
        qk_norm=kind == "qwen3",
        attn_bias=bias,
        out_bias=bias and kind != "qwen2",
        mlp_bias=fields.flag("mlp_bias"),
        tied=fields.flag("tie_word_embeddings"),
    )


def _or(fields: Fields, key: str, otherwise: int, least: int | None = None) -> int:
    return otherwise if fields.get(key) is None else fields.integer(key, least)


def read_gguf(file: GGUFFile, where: str) -> Config:
    """The config that a GGUF file's metadata and tensors describe.

    Raises:
        ConfigError: a field that would change the computation, or a wrong value, by name.
    """
    arch = file.metadata["general.architecture"]
    fields = Fields(file.metadata, where, {"rope.freq_base": 1e4}, f"{arch}.")
    fields.refuse_unless("expert_count", 0)
    fields.refuse_unless("attention.causal", True)
    tokens = Fields(file.metadata, where, default_ids(file.metadata), "tokenizer.ggml.")
    heads = fields.integer("attention.head_count")
    kv_heads = _or(fields, "attention.head_count_kv", heads)
    hidden = fields.integer("embedding_length")
    head_dim = _or(fields, "attention.key_length", hidden // max(heads, 1), least=1)
    fields.refuse_unless("attention.value_length", head_dim)
    fields.refuse_unless("rope.dimension_count", head_dim)
    factor = reading.gguf_rope_factor(fields)
    rope = replace(Rope.whole(fields.number("rope.freq_base"), head_dim), factor=factor)
    if (divisors := file.tensors.get(_DIVISORS)) is not None:
        rope = replace(rope, scaling=_divisors(divisors, head_dim, where))
    table = file.tensors.get("token_embd.weight")
    return Config(
        vocab=table.shape[0] if table else 0,
        hidden=hidden,
        layers=fields.n_layers("block_count"),
        max_ctx=fields.integer("context_length"),
        norm_eps=float(f"{fields.number('attention.layer_norm_rms_epsilon'):.7g}"),
        bos_id=reading.token(tokens, "bos_token_id"),
        eos_ids=tokens.ids("eos_token_id"),
        pad_id=reading.token(tokens, "padding_token_id"),
        q_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=fields.integer("feed_forward_length"),
        rope=rope,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        attn_bias="blk.0.attn_q.bias" in file.tensors,
        out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        tied="output.weight" not in file.tensors,
        paired=arch == "llama",
    )


def _divisors(stored: Stored, dim: int, where: str) -> Divisors:
    """One positive number for each pair of `dim` dims."""
    pairs = dim // 2
    values = stored.rows(0, pairs) if stored.shape == (pairs,) and not stored.fault else None
    if values is None or not all(0 < v < inf for v in values.tolist()):
        raise ConfigError(
            f"{where}: {_DIVISORS} of shape {stored.shape} must hold {pairs} positive rope "
            "divisors; convert it with a current llama.cpp."
        )
    return Divisors(tuple(values.tolist()))


def ignored(c: Config, name: str) -> bool:
    """Whether checkpoints carry the tensor `name` and the text decoder does not use it."""
    return "rotary_emb" in name or (c.tied and name == "lm_head.weight")


def _llama(hidden: int, layers: int, heads: tuple[int, int], head_dim: int, mlp: int) -> Config:
    return Config(
        vocab=128_256, hidden=hidden, layers=layers, max_ctx=131_072, norm_eps=1e-5, bos_id=128_000,
        eos_ids=(128_001, 128_008, 128_009), pad_id=None, q_heads=heads[0], kv_heads=heads[1],
        head_dim=head_dim, mlp_width=mlp,
        rope=Rope(5e5, head_dim, head_dim // 2, 32.0, Llama3(8192)),
    )  # fmt: skip


def _qwen3(hidden: int, layers: int, heads: tuple[int, int], mlp: int) -> Config:
    return Config(
        vocab=151_936, hidden=hidden, layers=layers, max_ctx=40_960, norm_eps=1e-6, bos_id=151_643,
        eos_ids=(151_645, 151_643), pad_id=151_643, q_heads=heads[0], kv_heads=heads[1],
        head_dim=128, mlp_width=mlp, rope=Rope.whole(1e6, 128), qk_norm=True,
    )  # fmt: skip


def _smollm2(hidden: int, layers: int, heads: tuple[int, int], mlp: int, theta: float) -> Config:
    return Config(
        vocab=49_152, hidden=hidden, layers=layers, max_ctx=8192, norm_eps=1e-5, bos_id=1,
        eos_ids=(2,), pad_id=2, q_heads=heads[0], kv_heads=heads[1], head_dim=64, mlp_width=mlp,
        rope=Rope.whole(theta, 64),
    )  # fmt: skip


ROWS = {
    "llama3.2-1b": Row(
        _llama(2048, 16, (32, 8), 64, 8192), "meta-llama/Llama-3.2-1B-Instruct", "Llama 3.2 1B"
    ),
    "llama3.2-3b": Row(
        _llama(3072, 28, (24, 8), 128, 8192), "meta-llama/Llama-3.2-3B-Instruct", "Llama 3.2 3B"
    ),
    "qwen3-0.6b": Row(_qwen3(1024, 28, (16, 8), 3072), "Qwen/Qwen3-0.6B", "Qwen3 0.6B"),
    "qwen3-1.7b": Row(_qwen3(2048, 28, (16, 8), 6144), "Qwen/Qwen3-1.7B", "Qwen3 1.7B"),
    "qwen3-4b": Row(_qwen3(2560, 36, (32, 8), 9728), "Qwen/Qwen3-4B", "Qwen3 4B"),
    "smollm2-135m": Row(
        _smollm2(576, 30, (9, 3), 1536, 1e5), "HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2 135M"
    ),
    "smollm2-1.7b": Row(
        _smollm2(2048, 24, (32, 32), 8192, 1.3e5), "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "SmolLM2 1.7B",
    ),
}  # fmt: skip


def tables(c: Config, s: Sizes) -> Iterator[Table]:
    for i in range(c.layers):
        for name in "kv":
            yield s.table(f"l{i}.{name}", (c.kv_heads, c.head_dim), layer=i)


def weights(c: Config) -> Iterator[Weight]:
    tied = " | lm_head.weight" if c.tied else ""  # tied weights are stored under either name
    yield Weight(
        "embed", (c.vocab, c.hidden), EMBED, f"embed_tokens.weight{tied}", "token_embd.weight",
        share=1 if c.tied else 0, prefill=0,
    )  # fmt: skip
    for i in range(c.layers):
        yield from _layer(c, i)
    yield Weight("norm", (c.hidden,), FLOAT, "norm.weight", "output_norm.weight", prefill=0)
    if not c.tied:
        yield Weight(
            "head", (c.vocab, c.hidden), HEAD, "lm_head.weight", "output.weight", prefill=0
        )


def _layer(c: Config, i: int) -> Iterator[Weight]:
    at, blk = f"layers.{i}", f"blk.{i}"
    q, kv = c.q_heads * c.head_dim, c.kv_heads * c.head_dim

    def read(name: str) -> int:
        return 1 if i < c.layers - 1 or name in OF_STATE else 0

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
        # llama.cpp's converter makes the two halves of a Llama head's rotation neighbours.
        pairs = {"attn.q": c.q_heads, "attn.k": c.kv_heads}.get(name, 0) if c.paired else 0
        kind = KV if name in ("attn.k", "attn.v") else LINEAR
        yield Weight(
            f"{at}.{name}", shape, kind, f"{hf}.weight", f"{gguf}.weight", pairs=pairs,
            prefill=read(name),
        )  # fmt: skip
        if bias:
            yield Weight(
                f"{at}.{name}.bias", shape[:1], FLOAT, f"{hf}.bias", f"{gguf}.bias", pairs=pairs,
                prefill=read(name),
            )  # fmt: skip
    for name, width, hf, gguf in norms:
        yield Weight(
            f"{at}.{name}", (width,), FLOAT, f"{at}.{hf}.weight", f"{blk}.{gguf}.weight",
            prefill=read(name),
        )  # fmt: skip
