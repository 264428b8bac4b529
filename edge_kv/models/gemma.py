"""Gemma 3 and Gemma 4: sliding and full layers, shared keys and values, per-layer embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_kv.models.model import (
    EMBED,
    EXPERT,
    FLOAT,
    HEAD,
    KV,
    LINEAR8,
    OF_STATE,
    PLE_TABLE,
    Model,
    Rope,
    Row,
    TokenRows,
    Weight,
)
from edge_kv.plan import Sizes, Table

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
    softcap: float = 0.0  # of the logits; 0: none
    tied: bool = True  # the token table is the head
    norm_offset: float = field(default=0.0, compare=False)  # Gemma 3 stores w for 1 + w
    ple_rows: int = field(default=0, compare=False)  # tokens in a stored per-layer table; 0: all

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from self.not_positive("window", "mlp_width", "attention_scale")
        yield from self.not_one_of("pattern", SLIDING + FULL)
        for name, a in (("sliding ", self.sliding), ("full ", self.full)):
            yield from self.uneven_heads(a.q_heads, a.kv_heads, name)
            if a.head_dim < 1 or a.rope.dim > a.head_dim:
                yield f"{name}rope of {a.rope.dim} dims must fit head_dim {a.head_dim}"
        yield from self.sharing_faults()
        for name in ("ple_dim", "shared_mlp_width"):
            if (width := getattr(self, name)) < 0:
                yield f"{name} {width} must not be negative"
        if not 0 <= self.softcap < inf:
            yield f"softcap {self.softcap:g} must be a number from 0"
        if self.moe:
            if min(self.moe.experts, self.moe.width) < 1:
                yield f"{self.moe.experts} experts of width {self.moe.width} must be positive"
            if not 1 <= self.moe.top_k <= self.moe.experts:
                yield f"top_k {self.moe.top_k} must be from 1 to the {self.moe.experts} experts"

    def sharing_faults(self) -> Iterator[str]:
        if not 0 <= self.shared < max(1, self.layers):
            yield f"{self.shared} sharing layers must be fewer than all {self.layers}"
        elif lost := set(self.pattern[self.owners :]) - set(self.pattern[: self.owners]):
            yield f"sharing layers of type {''.join(sorted(lost))} have no owner to read from"

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
_GGUF_TOWERS = {"v", "a", "mm"}  # vision, audio and their projector, in the file of the text model
# Tensors of sharing layers that published checkpoints still hold.
_SHARED = {
    "k_proj.weight", "v_proj.weight", "k_norm.weight", "v_norm.weight",
    "attn_k.weight", "attn_v.weight", "attn_k_norm.weight",
}  # fmt: skip


def ignored(c: Config, name: str) -> bool:
    """Whether checkpoints carry the tensor `name` and the text decoder does not use it."""
    parts = name.split(".")
    if _TOWERS & set(parts) or parts[0] in _GGUF_TOWERS or name == "rope_freqs.weight":
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
    from edge_kv.models import gemma_files

    return gemma_files.read_hf(raw, where)


def read_gguf(file: GGUFFile, where: str) -> Config:
    """The config that a GGUF file's metadata and tensors describe.

    Raises:
        ConfigError: a field that would change the computation, or a wrong value, by name.
    """
    from edge_kv.models import gemma_files

    return gemma_files.read_gguf(file, where)


def gemma3(**fields: Any) -> Config:
    """A decoder of the third generation: raw values, no factor behind a layer."""
    return Config(v_norm=False, layer_scalar=False, **fields)


def gemma4(**fields: Any) -> Config:
    """A decoder of the fourth generation: normed values, attention at scale 1."""
    return Config(v_norm=True, layer_scalar=True, attention_scale=1.0, **fields)


def _row4(
    pattern: str, hidden: int, q_heads: int, kv_sliding: int, kv_full: int, mlp_width: int,
    k_eq_v: bool = False, **fields: Any,
) -> Config:  # fmt: skip
    """Head dims 256 sliding (theta 1e4) and 512 full (theta 1e6, 64 pairs turn)."""
    return gemma4(
        vocab=262_144,
        hidden=hidden,
        layers=len(pattern),
        pattern=pattern,
        sliding=Attention(q_heads, kv_sliding, 256, Rope.whole(1e4, 256)),
        full=Attention(q_heads, kv_full, 512, Rope(1e6, 512, 64), k_eq_v),
        mlp_width=mlp_width,
        softcap=30.0,
        eos_ids=(1, 106),
        **fields,
    )


def _row3(pattern: str, hidden: int, mlp_width: int) -> Config:
    """Head dim 256, four heads over one KV head, a window of 512."""
    return gemma3(
        vocab=262_144,
        hidden=hidden,
        layers=len(pattern),
        pattern=pattern,
        window=512,
        sliding=Attention(4, 1, 256, Rope.whole(1e4, 256)),
        full=Attention(4, 1, 256, Rope.whole(1e6, 256)),
        mlp_width=mlp_width,
        max_ctx=32_768,
        attention_scale=256**-0.5,
        norm_offset=1.0,
        eos_ids=(1, 106),
    )


_E2B = _row4(
    "SSSSF" * 7, 1536, 8, 1, 1, 6144, shared_mlp_width=12_288, window=512, shared=20, ple_dim=256,
    max_ctx=131_072,
)  # fmt: skip
_E4B = _row4(
    "SSSSSF" * 7, 2560, 8, 2, 2, 10_240, window=512, shared=18, ple_dim=256, max_ctx=131_072
)
_12B = _row4("SSSSSF" * 8, 3840, 16, 8, 1, 15_360, True, window=1024, max_ctx=262_144)
_26B = _row4(
    "SSSSSF" * 5, 2816, 16, 8, 2, 2112, True, moe=MoE(128, 8, 704), window=1024, max_ctx=262_144
)
_31B = _row4("SSSSSF" * 10, 5376, 32, 16, 4, 21_504, True, window=1024, max_ctx=262_144)
_TINY = gemma4(
    vocab=2048, hidden=128, layers=8, pattern="SSSF" * 2, window=64,
    sliding=Attention(4, 1, 32, Rope.whole(1e4, 32)), full=Attention(4, 1, 64, Rope(1e6, 64, 8)),
    mlp_width=256, shared_mlp_width=512, shared=4, ple_dim=32, max_ctx=32_768, softcap=30.0,
)  # fmt: skip
ROWS = {
    "e2b": Row(_E2B, "google/gemma-4-E2B-it", "Gemma 4 E2B, 2.3 B effective parameters"),
    "e4b": Row(_E4B, "google/gemma-4-E4B-it", "Gemma 4 E4B, 4.5 B effective parameters"),
    "12b": Row(_12B, "google/gemma-4-12B-it", "Gemma 4 12B, dense"),
    "26b-a4b": Row(_26B, "google/gemma-4-26B-A4B-it", "Gemma 4 26B-A4B, mixture of experts"),
    "31b": Row(_31B, "google/gemma-4-31B-it", "Gemma 4 31B, dense"),
    "gemma3-270m": Row(
        _row3("SSSSSF" * 3, 640, 2048), "google/gemma-3-270m-it", "Gemma 3 270M"
    ),
    "tiny": Row(
        _TINY, "", "A 2.4 M parameter Gemma 4 trained for this project; ships with it",
        Path(__file__).parents[1] / "data" / "tiny",
    ),
    "gemma3-1b": Row(
        _row3("SSSSSF" * 4 + "SS", 1152, 6912), "google/gemma-3-1b-it", "Gemma 3 1B"
    ),
}  # fmt: skip


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
    tied = " | lm_head.weight" if c.tied else ""  # tied weights are stored under either name
    yield Weight(
        "embed", (c.vocab, c.hidden), EMBED, f"embed_tokens.weight{tied}", "token_embd.weight",
        share=1 if c.tied else 0, prefill=0,
    )  # fmt: skip
    if c.ple_dim:
        width = c.layers * c.ple_dim
        yield Weight(
            _PLE_TABLE, (c.vocab, width), PLE_TABLE,
            "embed_tokens_per_layer.weight", "per_layer_token_embd.weight", share=0, prefill=0,
            drawn=(0.0, c.ple_dim**-0.5),
            # Token tables that were resized are longer: as in Gemma 3n, tokens behind the table's
            # end read the padding token's row.
            filled=(c.ple_rows, min(c.pad_id or 0, c.ple_rows - 1)) if c.ple_rows else None,
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
        yield from layer_weights(c, i, f"layers.{i}")
    yield Weight(
        "norm", (c.hidden,), FLOAT, "norm.weight", "output_norm.weight", offset=c.norm_offset
    )
    if not c.tied:
        hf = "lm_head.weight | language_model.lm_head.weight"
        yield Weight("head", (c.vocab, c.hidden), HEAD, hf, "output.weight", prefill=0)


def layer_weights(c: Config, i: int, at: str) -> Iterator[Weight]:
    """The weights of layer `i`, called `at`.… here."""
    a, d, blk = c.attention(i), c.hidden, f"blk.{i}"
    owns = i < c.owners
    q, kv = a.q_heads * a.head_dim, a.kv_heads * a.head_dim
    width = c.mlp_width if owns else c.shared_mlp_width or c.mlp_width

    # Queries and keys have unit RMS before their norms' weights w, so that the deviation of a score
    # is attention_scale * sqrt(head_dim) * w * w: random weights make it 2.
    level = (2 / (c.attention_scale * a.head_dim**0.5)) ** 0.5
    drawn = {
        "attn.q_norm": (level, 0.1 * level),
        "attn.k_norm": (level, 0.1 * level),
        "scalar": (1.0, 0.04),
        "moe.router": (0.0, 2.0),  # its input is scaled by hidden**-0.5
    }

    def row(name: str, shape: tuple[int, ...], hf: str, gguf: str, kind: str = FLOAT) -> Weight:
        norm = name.endswith("norm")
        return Weight(
            f"{at}.{name}", shape, kind, f"layers.{i}.{hf}", f"{blk}.{gguf}",
            share=c.moe.top_k / c.moe.experts if c.moe and kind == EXPERT else 1,
            prefill=1 if owns and (i < c.owners - 1 or name in OF_STATE) else 0,
            offset=c.norm_offset if norm else 0, drawn=drawn.get(name),
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
