"""Gemma 3 and Gemma 4: sliding and full layers, shared keys and values, per-layer embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edge_kv.config import AttentionSpec, ModelConfig
from edge_kv.models.model import (
    EMBED,
    EXPERT,
    FLOAT,
    KV,
    LINEAR8,
    PLE_TABLE,
    Model,
    Rope,
    Row,
    TokenRows,
    Weight,
)  # fmt: skip
from edge_kv.plan import Sizes, Table
from edge_kv.presets import PRESETS
from edge_kv.weights.hf_config import config_from_hf

if TYPE_CHECKING:
    from edge_kv.weights.gguf_file import GGUFFile

SLIDING, FULL = "S", "F"
_PLE_TABLE = "ple.embed"


@dataclass(frozen=True)
class Attention:
    """Attention of one layer type."""

    q_heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    k_eq_v: bool = False  # no value projection: V is the raw key projection


@dataclass(frozen=True)
class MoE:
    """Routed experts beside the always-on MLP (Gemma 4 26B-A4B)."""

    experts: int
    top_k: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Config(Model):
    """`pattern` has one letter a layer, S or F; the last `shared` layers own no keys and values
    and read those of the last owner of their type."""

    pattern: str
    window: int
    sliding: Attention
    full: Attention
    mlp_width: int
    attention_scale: float = 1.0
    shared: int = 0
    shared_mlp_width: int = 0  # of the sharing layers; 0: as the others
    ple_dim: int = 0  # per-layer embedding width; 0: none
    moe: MoE | None = None
    v_norm: bool = True  # values are normed, without a weight
    layer_scalar: bool = True  # a learned factor on the residual behind each layer
    norm_offset: float = 0.0  # Gemma 3 stores w and multiplies by 1 + w
    softcap: float = 0.0  # of the logits; 0: none

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from self.not_positive("window", "mlp_width", "attention_scale")
        yield from self.not_one_of("pattern", SLIDING + FULL)
        for name, a in (("sliding ", self.sliding), ("full ", self.full)):
            yield from self.uneven_heads(a.q_heads, a.kv_heads, name)
            if a.head_dim < 1 or a.rope.dim > a.head_dim:
                yield f"{name}rope of {a.rope.dim} dims must fit head_dim {a.head_dim}"
        if not 0 <= self.shared < max(1, self.layers):
            yield f"{self.shared} sharing layers must be fewer than all {self.layers}"
        elif lost := set(self.pattern[self.owners :]) - set(self.pattern[: self.owners]):
            yield f"sharing layers of type {''.join(sorted(lost))} have no owner to read from"
        if self.moe and not 1 <= self.moe.top_k <= self.moe.experts:
            yield f"top_k {self.moe.top_k} must be from 1 to the {self.moe.experts} experts"

    @property
    def owners(self) -> int:
        """Layers 0 … owners-1 own keys and values."""
        return self.layers - self.shared

    @property
    def token_rows(self) -> TokenRows | None:
        if not self.ple_dim:
            return None
        return TokenRows(_PLE_TABLE, self.layers, self.owners, self.ple_dim)

    def attention(self, layer: int) -> Attention:
        return self.full if self.pattern[layer] == FULL else self.sliding

    def source(self, layer: int) -> int:
        """The layer whose keys and values `layer` reads: itself, or the last owner of its type."""
        if layer < self.owners:
            return layer
        return self.pattern.rindex(self.pattern[layer], 0, self.owners)


# Parts of multimodal checkpoints beside the text decoder.
_TOWERS = {
    "vision_tower", "audio_tower", "embed_vision", "embed_audio", "vision_embedder",
    "multi_modal_projector",
}  # fmt: skip
# Tensors of sharing layers that published checkpoints still hold.
_SHARED = {
    "k_proj.weight", "v_proj.weight", "k_norm.weight", "v_norm.weight",
    "attn_k.weight", "attn_v.weight", "attn_k_norm.weight",
}  # fmt: skip


def ignored(c: Config, name: str) -> bool:
    """Whether checkpoints carry the tensor `name` and the text decoder does not use it."""
    parts = name.split(".")
    if _TOWERS & set(parts) or name in ("lm_head.weight", "rope_freqs.weight"):
        return True
    layer, own = (parts[1], ".".join(parts[2:])) if len(parts) > 3 else ("", "")
    sharing = layer.isdigit() and c.owners <= int(layer) < c.layers
    return sharing and own.removeprefix("self_attn.") in _SHARED


HF = ("gemma3", "gemma3_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
GGUF = ("gemma3", "gemma4")


def read_hf(raw: dict[str, Any], where: str) -> Config:
    """The config that a config.json describes.

    Raises:
        ConfigError: a field that would change the computation, or a wrong value, by name.
    """
    return of(config_from_hf(raw, where))


def read_gguf(file: GGUFFile, where: str) -> Config:
    """The config that a GGUF file's metadata and tensors describe.

    Raises:
        ConfigError: a field that would change the computation, or a wrong value, by name.
    """
    from edge_kv.weights.gguf_model import config_from_gguf

    folded = of(config_from_gguf(file, where))  # 1 + w is what such a file holds
    return replace(folded, norm_offset=0.0)


def of(c: ModelConfig) -> Config:
    """The same model in the words of this module."""
    four = c.family == "gemma4"

    def attention(spec: AttentionSpec) -> Attention:
        rope = Rope(spec.rope_theta, spec.head_dim, spec.rotated_pairs, spec.rope_factor)
        return Attention(spec.q_heads, spec.kv_heads, spec.head_dim, rope, spec.k_eq_v)

    return Config(
        vocab=c.vocab_size, hidden=c.hidden, layers=c.n_layers, max_ctx=c.max_ctx,
        norm_eps=c.norm_eps, bos_id=c.bos_id, eos_ids=c.eos_ids, pad_id=c.pad_id,
        pattern=c.pattern, window=c.sliding_window, sliding=attention(c.sliding),
        full=attention(c.full), mlp_width=c.mlp_width, attention_scale=c.attention_scale,
        shared=c.n_kv_shared, shared_mlp_width=c.shared_mlp_width, ple_dim=c.ple_dim,
        moe=MoE(c.moe.n_experts, c.moe.top_k, c.moe.width) if c.moe else None, v_norm=c.v_norm,
        layer_scalar=four, norm_offset=0.0 if four else 1.0, softcap=c.final_softcap,
    )  # fmt: skip


ROWS = {name: Row(of(p.config), p.hub_id, p.about, p.weights) for name, p in PRESETS.items()}


def tables(c: Config, s: Sizes) -> Iterator[Table]:
    for i in range(c.owners):
        a = c.attention(i)
        readers = tuple(r for r in range(c.layers) if c.source(r) == i)
        keep = c.window if c.pattern[i] == SLIDING else 0
        for name in "kv":
            yield s.table(
                f"l{i}.{name}", (a.kv_heads, a.head_dim), layer=i, keep=keep, readers=readers
            )


def weights(c: Config) -> Iterator[Weight]:
    yield Weight(
        "embed",
        (c.vocab, c.hidden),
        EMBED,
        "embed_tokens.weight | lm_head.weight",
        "token_embd.weight",
        prefill=0,
    )
    if c.ple_dim:
        width = c.layers * c.ple_dim
        yield Weight(
            _PLE_TABLE, (c.vocab, width), PLE_TABLE,
            "embed_tokens_per_layer.weight", "per_layer_token_embd.weight", share=0, prefill=0,
        )  # fmt: skip
        yield Weight(
            "ple.proj", (width, c.hidden), LINEAR8,
            "per_layer_model_projection.weight", "per_layer_model_proj.weight",
            prefill=c.owners / c.layers,
        )  # fmt: skip
        yield Weight(
            "ple.norm", (c.ple_dim,), FLOAT,
            "per_layer_projection_norm.weight", "per_layer_proj_norm.weight",
        )  # fmt: skip
    for i in range(c.layers):
        yield from _layer(c, i)
    yield Weight(
        "norm", (c.hidden,), FLOAT, "norm.weight", "output_norm.weight", offset=c.norm_offset
    )


def _layer(c: Config, i: int) -> Iterator[Weight]:
    a, d, at, blk = c.attention(i), c.hidden, f"layers.{i}", f"blk.{i}"
    owns = i < c.owners
    q, kv = a.q_heads * a.head_dim, a.kv_heads * a.head_dim
    width = c.mlp_width if owns else c.shared_mlp_width or c.mlp_width

    def row(name: str, shape: tuple[int, ...], hf: str, gguf: str, kind: str = FLOAT) -> Weight:
        norm = name.endswith("norm")
        return Weight(
            f"{at}.{name}", shape, kind, f"{at}.{hf}", f"{blk}.{gguf}",
            share=c.moe.top_k / c.moe.experts if c.moe and kind == EXPERT else 1,
            prefill=1 if owns else 0, offset=c.norm_offset if norm else 0,
        )  # fmt: skip

    def linear(name: str, shape: tuple[int, int], hf: str, gguf: str, kind: str = "") -> Weight:
        return row(name, shape, f"{hf}.weight", f"{gguf}.weight", kind or "linear")

    def norm(name: str, width: int, hf: str, gguf: str) -> Weight:
        return row(name, (width,), f"{hf}.weight", f"{gguf}.weight")

    yield norm("attn_norm", d, "input_layernorm", "attn_norm")
    yield linear("attn.q", (q, d), "self_attn.q_proj", "attn_q")
    yield norm("attn.q_norm", a.head_dim, "self_attn.q_norm", "attn_q_norm")
    if owns:
        yield linear("attn.k", (kv, d), "self_attn.k_proj", "attn_k", KV)
        yield norm("attn.k_norm", a.head_dim, "self_attn.k_norm", "attn_k_norm")
        if not a.k_eq_v:
            yield linear("attn.v", (kv, d), "self_attn.v_proj", "attn_v", KV)
    yield linear("attn.out", (d, q), "self_attn.o_proj", "attn_output")
    yield norm("attn_out_norm", d, "post_attention_layernorm", "post_attention_norm")
    yield norm("mlp_norm", d, "pre_feedforward_layernorm", "ffn_norm")
    yield linear("mlp.gate", (width, d), "mlp.gate_proj", "ffn_gate")
    yield linear("mlp.up", (width, d), "mlp.up_proj", "ffn_up")
    yield linear("mlp.down", (d, width), "mlp.down_proj", "ffn_down")
    yield norm("mlp_out_norm", d, "post_feedforward_layernorm", "post_ffw_norm")
    if c.moe:
        e, w = c.moe.experts, c.moe.width
        gguf = f"ffn_gate_up_exps.weight | {blk}.ffn_gate_exps.weight + {blk}.ffn_up_exps.weight"
        yield norm("moe.dense_norm", d, "post_feedforward_layernorm_1", "post_ffw_norm_1")
        yield row("moe.router_scale", (d,), "router.scale", "ffn_gate_inp.scale")
        yield linear("moe.router", (e, d), "router.proj", "ffn_gate_inp", FLOAT)
        yield row("moe.expert_scale", (e,), "router.per_expert_scale", "ffn_down_exps.scale")
        yield norm("moe.in_norm", d, "pre_feedforward_layernorm_2", "pre_ffw_norm_2")
        yield row("moe.gate_up", (e, 2 * w, d), "experts.gate_up_proj", gguf, EXPERT)
        yield row("moe.down", (e, d, w), "experts.down_proj", "ffn_down_exps.weight", EXPERT)
        yield norm("moe.out_norm", d, "post_feedforward_layernorm_2", "post_ffw_norm_2")
    if c.ple_dim:
        p = c.ple_dim
        yield linear("ple.gate", (p, d), "per_layer_input_gate", "inp_gate", LINEAR8)
        yield linear("ple.proj", (d, p), "per_layer_projection", "proj", LINEAR8)
        yield norm("ple.norm", d, "post_per_layer_input_norm", "post_norm")
    if c.layer_scalar:
        yield row("scalar", (1,), "layer_scalar", "layer_output_scale.weight")
