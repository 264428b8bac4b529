"""DeepSeek V4: one latent as key and value, compressed blocks, an indexer, residual streams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edge_kv.models import reading
from edge_kv.models.model import (
    EMBED,
    EXPERT,
    FLOAT,
    HEAD,
    KV,
    LINEAR8,
    TABLE,
    Model,
    Rope,
    Row,
    Weight,
    Yarn,
)  # fmt: skip
from edge_kv.plan import Sizes, Table
from edge_kv.weights.fields import Fields

WINDOW, SPARSE, DENSE = "W", "S", "D"


@dataclass(frozen=True, kw_only=True)
class Config(Model):
    """`pattern` has one letter a layer. All attend over a window of the newest positions; S (CSA)
    also over the blocks of `sparse_stride` positions that its indexer picks, D (HCA) over all
    blocks of `dense_stride` positions."""

    pattern: str
    window: int
    q_heads: int
    head_dim: int
    q_rank: int
    out_groups: int
    out_rank: int  # of each group
    rope: Rope  # of layers with a window only
    block_rope: Rope  # of the others
    sparse_stride: int = 4
    dense_stride: int = 128
    index_heads: int
    index_dim: int
    index_top_k: int
    experts: int
    top_k: int
    expert_width: int
    shared_experts: int = 1
    hashed: int  # first layers whose experts follow from the token id
    score: str = "sqrtsoftplus"
    routed_scale: float
    limit: float  # of the gated units' inputs
    streams: int = 4  # residual streams
    sinkhorn_iters: int = 20
    stream_eps: float = 1e-6

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from self.not_positive("window", "q_heads", "head_dim", "q_rank", "out_groups")
        yield from self.not_positive("out_rank", "sparse_stride", "dense_stride", "index_heads")
        yield from self.not_positive("index_dim", "index_top_k", "experts", "top_k", "expert_width")
        yield from self.not_positive("shared_experts", "limit", "streams", "sinkhorn_iters")
        yield from self.not_positive("stream_eps")
        yield from self.not_one_of("pattern", WINDOW + SPARSE + DENSE)
        if self.out_groups > 0 and self.q_heads % self.out_groups:
            yield f"q_heads {self.q_heads} must be a multiple of out_groups {self.out_groups}"
        if self.top_k > self.experts:
            yield f"top_k {self.top_k} must be at most the number of experts {self.experts}"
        if min(self.sparse_stride, self.dense_stride) < 2:
            yield "strides of blocks must be at least 2"
        if max(self.rope.dim, self.block_rope.dim) > min(self.head_dim, self.index_dim):
            yield "rope dims must fit head_dim and index_dim"

    def stride(self, layer: int) -> int:
        """Positions a block of `layer` stands for; 0: no blocks."""
        return {WINDOW: 0, SPARSE: self.sparse_stride, DENSE: self.dense_stride}[
            self.pattern[layer]
        ]

    def windows(self, layer: int) -> int:
        """Windows of raw rows a block is pooled from: sparse ones overlap with the one before."""
        return 2 if self.pattern[layer] == SPARSE else 1


HF = ("deepseek_v4",)
GGUF = ()
_SHARE = 64 / 512  # of a head, that turns where a config does not say it
_TYPES = {
    "sliding_attention": WINDOW,
    "compressed_sparse_attention": SPARSE,
    "heavily_compressed_attention": DENSE,
}
# Of transformers' DeepseekV4Config.
_DEFAULTS = {
    "vocab_size": 129_280,
    "hidden_size": 4096,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "head_dim": 512,
    "q_lora_rank": 1024,
    "num_experts_per_tok": 6,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "routed_scaling_factor": 1.5,
    "max_position_embeddings": 1_048_576,
    "rope_theta": 1e4,
    "compress_rope_theta": 1.6e5,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "num_hash_layers": 3,
    "swiglu_limit": 10.0,
    "sliding_window": 128,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def read_hf(raw: dict[str, Any], where: str) -> Config:
    """The config that a config.json describes.

    Raises:
        ConfigError: a field that would change the computation, or a wrong value, by name.
    """
    fields = Fields(raw, where, _DEFAULTS)
    for key in raw:
        if "engram" in key or key.startswith(("kv_share", "index_share")):
            raise fields.unsupported(key, raw[key], "DeepSeek V4, not V4.1")
    fields.refuse_unless("hidden_act", "silu")
    for key in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        fields.refuse_unless(key, False)
    fields.refuse_unless("num_key_value_heads", 1)
    fields.refuse_unless("norm_topk_prob", True)
    fields.refuse_unless("scoring_func", "sqrtsoftplus", "sigmoid", "softmax")
    if quantized := reading.nested(fields, "quantization_config"):
        stored = Fields(quantized, f"{where}: quantization_config")
        stored.refuse_unless("quant_method", "fp8")
        stored.refuse_unless("weight_block_size", [128, 128])
    common = reading.sizes(fields)
    sparse, dense = "compressed_sparse_attention", "heavily_compressed_attention"
    strides = dict(reading.nested(fields, "compress_rates") or {sparse: 4, dense: 128})
    for key, older in ((sparse, "compress_rate_csa"), (dense, "compress_rate_hca")):
        if fields.get(older) is not None:  # which counts, as in transformers
            strides[key] = fields.get(older)
    rates = Fields(strides, f"{where}: compress_rates")
    head_dim = fields.integer("head_dim")
    rope, block_rope = _ropes(fields, head_dim)
    return Config(
        **common,
        pattern=_pattern(fields, common["layers"]),
        window=fields.integer("sliding_window"),
        q_heads=fields.integer("num_attention_heads"),
        head_dim=head_dim,
        q_rank=fields.integer("q_lora_rank"),
        out_groups=fields.integer("o_groups"),
        out_rank=fields.integer("o_lora_rank"),
        rope=rope,
        block_rope=block_rope,
        sparse_stride=rates.integer(sparse),
        dense_stride=rates.integer(dense),
        index_heads=fields.integer("index_n_heads"),
        index_dim=fields.integer("index_head_dim"),
        index_top_k=fields.integer("index_topk"),
        experts=fields.integer("n_routed_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        expert_width=fields.integer("moe_intermediate_size"),
        shared_experts=fields.integer("n_shared_experts"),
        hashed=_hashed(fields, common["layers"]),
        score=str(fields.get("scoring_func")),
        routed_scale=fields.number("routed_scaling_factor"),
        limit=fields.number("swiglu_limit"),
        streams=fields.integer("hc_mult"),
        sinkhorn_iters=fields.integer("hc_sinkhorn_iters"),
        stream_eps=fields.number("hc_eps"),
    )


def _pattern(fields: Fields, layers: int) -> str:
    """`layer_types`, or the older `compress_ratios`, whose entries beyond the layers are of the
    block that predicts further tokens."""
    if (pattern := reading.letters(fields, "layer_types", _TYPES, layers)) is not None:
        return pattern
    ratios = fields.get("compress_ratios")
    known = {0: WINDOW, 4: SPARSE, 128: DENSE}
    if not isinstance(ratios, list) or len(ratios) < layers:
        raise fields.fault("compress_ratios", f"a list of {layers} numbers")
    for ratio in ratios[:layers]:
        if type(ratio) is not int or ratio not in known:
            raise fields.unsupported("compress_ratios", ratio, "0, 4 and 128")
    return "".join(known[ratio] for ratio in ratios[:layers])


def _hashed(fields: Fields, layers: int) -> int:
    kinds = reading.letters(fields, "mlp_layer_types", {"hash_moe": "H", "moe": "M"}, layers)
    if kinds is None:
        return min(layers, fields.integer("num_hash_layers"))
    hashed = kinds.count("H")
    if kinds != "H" * hashed + "M" * (layers - hashed):
        raise fields.unsupported("mlp_layer_types", fields.get("mlp_layer_types"), "hash_moe first")
    return hashed


def _ropes(fields: Fields, head_dim: int) -> tuple[Rope, Rope]:
    """The ropes of window layers and of the others, from either style of config.

    Where they are one object, cos and sin are not multiplied by YaRN's own factor.
    """
    share = fields.get("partial_rotary_factor")
    # As in transformers, the older name counts before the newer one.
    given = reading.nested(fields, "rope_scaling") or reading.nested(fields, "rope_parameters")
    theta = {"rope_theta": fields.number("rope_theta")}
    if isinstance(given.get("main"), dict) and isinstance(given.get("compress"), dict):
        both = {"main": given["main"], "compress": given["compress"]}
        rest = theta if share is None else {**theta, "partial_rotary_factor": share}
        defaults, gain = {"main": rest, "compress": rest}, None
    else:
        if share is None:
            turned = fields.get("qk_rope_head_dim")
            share = (
                _SHARE if turned is None else fields.integer("qk_rope_head_dim") / max(head_dim, 1)
            )
        kept = {k: v for k, v in given.items() if k not in ("rope_theta", "partial_rotary_factor")}
        both, gain = {"main": {}, "compress": kept}, 1.0
        thetas = {"main": "rope_theta", "compress": "compress_rope_theta"}
        defaults = {
            key: {"rope_theta": fields.number(name), "partial_rotary_factor": share}
            for key, name in thetas.items()
        }
    main, compress = (
        reading.rope(
            Fields(both[key], f"{fields.where}: rope_parameters.{key}"),
            head_dim, defaults[key], gain=gain,
        )
        for key in both
    )  # fmt: skip
    return main, compress


def _preset(**sizes: Any) -> Config:
    return Config(
        vocab=129_280, max_ctx=1_048_576, bos_id=0, eos_ids=(1,), pad_id=None, window=128,
        head_dim=512, out_rank=1024, rope=Rope.whole(1e4, 64),
        block_rope=Rope(1.6e5, 64, 32, 16.0, Yarn(65_536)), index_heads=64, index_dim=128, top_k=6,
        hashed=3, limit=10.0, **sizes,
    )  # fmt: skip


ROWS = {
    "deepseek-v4-flash": Row(
        _preset(
            hidden=4096, layers=43, pattern="WW" + "SD" * 20 + "S", q_heads=64, q_rank=1024,
            out_groups=8, index_top_k=512, experts=256, expert_width=2048, routed_scale=1.5,
        ),
        "deepseek-ai/DeepSeek-V4-Flash", "DeepSeek V4 Flash, 284 B, 13 B active",
    ),
    "deepseek-v4-pro": Row(
        _preset(
            hidden=7168, layers=61, pattern="DD" + "SD" * 29 + "S", q_heads=128, q_rank=1536,
            out_groups=16, index_top_k=1024, experts=384, expert_width=3072, routed_scale=2.5,
        ),
        "deepseek-ai/DeepSeek-V4-Pro", "DeepSeek V4 Pro, 1.6 T, 49 B active",
    ),
}  # fmt: skip


def ignored(c: Config, name: str) -> bool:
    """Whether checkpoints carry the tensor `name` and the text decoder does not use it."""
    return name.startswith("mtp.")


def tables(c: Config, s: Sizes) -> Iterator[Table]:
    for i, kind in enumerate(c.pattern):
        yield s.table(f"l{i}.kv", (1, c.head_dim), layer=i, keep=c.window)
        if kind == WINDOW:
            continue
        pools = [("blocks", c.head_dim, c.index_top_k if kind == SPARSE else 0)]
        if kind == SPARSE:
            pools.append(("index", c.index_dim, 0))
        stride, windows = c.stride(i), c.windows(i)
        for name, dim, picks in pools:
            yield s.table(f"l{i}.{name}", (1, dim), layer=i, stride=stride, picks=picks)
            yield s.table(
                f"l{i}.{name}.raw", (1, 2 * windows * dim), layer=i, keep=windows * stride,
                exact=True,
            )  # fmt: skip


def weights(c: Config) -> Iterator[Weight]:
    k, d = c.streams, c.hidden
    yield Weight(
        "embed", (c.vocab, d), EMBED, "embed.weight | embed_tokens.weight", share=0, prefill=0
    )
    for i in range(c.layers):
        yield from _layer(c, i)
    for name, shape in (("fn", (k, k * d)), ("base", (k,)), ("scale", (1,))):
        hf = f"hc_head_{name} | hc_head.hc_{name}"
        yield Weight(f"streams.{name}", shape, FLOAT, hf, prefill=0)
    yield Weight("norm", (d,), FLOAT, "norm.weight", prefill=0)
    yield Weight("head", (c.vocab, d), HEAD, "head.weight | lm_head.weight", prefill=0)


def _layer(c: Config, i: int) -> Iterator[Weight]:
    """Names of the published checkpoints, then those of transformers' modules."""
    at, d, h, k = f"layers.{i}", c.hidden, c.head_dim, c.streams
    hub, own = f"{at}.attn", f"{at}.self_attn"
    share = c.top_k / c.experts

    def row(name: str, shape: tuple[int, ...], *hf: str, kind: str = FLOAT) -> Weight:
        return Weight(f"{at}.{name}", shape, kind, " | ".join(hf))

    def linear(name: str, n_out: int, n_in: int, *hf: str, kind: str = "linear") -> Weight:
        return row(name, (n_out, n_in), *(f"{n}.weight" for n in hf), kind=kind)

    def streams(site: str) -> Iterator[Weight]:
        n = (2 + k) * k
        for part, shape in (("fn", (n, k * d)), ("base", (n,)), ("scale", (3,))):
            hf = (f"{at}.hc_{site}_{part}", f"{at}.{site}_hc.{part}")
            yield row(f"{site}_streams.{part}", shape, *hf)

    def pool(name: str, dim: int, hub: str, own: str) -> Iterator[Weight]:
        wide, kind = c.windows(i) * dim, LINEAR8
        yield linear(f"{name}.value", wide, d, f"{hub}.wkv", f"{own}.kv_proj", kind=kind)
        yield linear(f"{name}.gate", wide, d, f"{hub}.wgate", f"{own}.gate_proj", kind=kind)
        yield row(f"{name}.bias", (c.stride(i), wide), f"{hub}.ape", f"{own}.position_bias")
        yield row(f"{name}.norm", (dim,), f"{hub}.norm.weight", f"{own}.kv_norm.weight")

    yield from streams("attn")
    yield row("attn_norm", (d,), f"{at}.attn_norm.weight", f"{at}.input_layernorm.weight")
    yield linear("attn.q_down", c.q_rank, d, f"{hub}.wq_a", f"{own}.q_a_proj")
    yield row("attn.q_norm", (c.q_rank,), f"{hub}.q_norm.weight", f"{own}.q_a_norm.weight")
    yield linear("attn.q_up", c.q_heads * h, c.q_rank, f"{hub}.wq_b", f"{own}.q_b_proj")
    yield linear("attn.kv", h, d, f"{hub}.wkv", f"{own}.kv_proj", kind=KV)
    yield row(
        "attn.kv_norm", (h,), f"{hub}.kv_norm.weight", f"{hub}.norm.weight", f"{own}.kv_norm.weight"
    )
    yield row("attn.sink", (c.q_heads,), f"{hub}.attn_sink", f"{own}.sinks")
    if c.stride(i):
        yield from pool("attn.blocks", h, f"{hub}.compressor", f"{own}.compressor")
    if c.pattern[i] == SPARSE:
        indexer, scorer = f"{hub}.indexer", f"{own}.compressor.indexer"
        yield from pool("attn.index", c.index_dim, f"{indexer}.compressor", scorer)
        yield linear(
            "attn.index.q",
            c.index_heads * c.index_dim,
            c.q_rank,
            f"{indexer}.wq_b",
            f"{scorer}.q_b_proj",
        )
        yield linear(
            "attn.index.weight",
            c.index_heads,
            d,
            f"{indexer}.weights_proj",
            f"{scorer}.scorer.weights_proj",
            kind=LINEAR8,
        )
    groups, rank = c.out_groups, c.out_rank
    yield linear(
        "attn.out_down", groups * rank, c.q_heads * h // groups, f"{hub}.wo_a", f"{own}.o_a_proj"
    )
    yield linear("attn.out_up", d, groups * rank, f"{hub}.wo_b", f"{own}.o_b_proj")
    yield from streams("ffn")
    yield row("mlp_norm", (d,), f"{at}.ffn_norm.weight", f"{at}.post_attention_layernorm.weight")
    ffn, mlp = f"{at}.ffn", f"{at}.mlp"
    yield linear("moe.router", c.experts, d, f"{ffn}.gate", f"{mlp}.gate", kind=FLOAT)
    if i < c.hashed:
        names = (f"{ffn}.gate.tid2eid", f"{mlp}.gate.tid2eid")
        yield Weight(
            f"{at}.moe.table", (c.vocab, c.top_k), TABLE, " | ".join(names), share=0, prefill=0
        )
    else:
        yield row(
            "moe.router_bias",
            (c.experts,),
            f"{ffn}.gate.bias",
            f"{mlp}.gate.e_score_correction_bias",
        )
    w, one = c.expert_width, f"{ffn}.experts.{{e}}"
    yield Weight(
        f"{at}.moe.gate_up", (c.experts, 2 * w, d), EXPERT,
        f"{one}.w1.weight + {one}.w3.weight | {mlp}.experts.gate_up_proj", share=share,
    )  # fmt: skip
    yield Weight(
        f"{at}.moe.down", (c.experts, d, w), EXPERT,
        f"{one}.w2.weight | {mlp}.experts.down_proj", share=share,
    )  # fmt: skip
    wide = c.shared_experts * w
    for name, w_, shape in (
        ("gate", "w1", (wide, d)),
        ("down", "w2", (d, wide)),
        ("up", "w3", (wide, d)),
    ):
        names = (f"{ffn}.shared_experts.{w_}", f"{mlp}.shared_experts.{name}_proj")
        yield linear(f"moe.shared.{name}", *shape, *names)
