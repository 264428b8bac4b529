"""ZAYA1: attention over convolved queries and keys, one expert a token, routers linked in depth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from edge_kv.models import reading
from edge_kv.models.model import EMBED, EXPERT8, FLOAT, Model, Rope, Row, Weight
from edge_kv.plan import Sizes, Table
from edge_kv.weights.fields import Fields

SLIDING, FULL = "S", "F"


@dataclass(frozen=True, kw_only=True)
class Config(Model):
    """`pattern` has one letter a layer, S or F; class `experts` of the router is "no expert"."""

    pattern: str
    window: int = 0  # of sliding layers
    q_heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    sliding_rope: Rope
    experts: int
    expert_width: int
    router_width: int
    halves: bool = field(default=False, compare=False)  # names of the first release: see `_layer`

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from self.not_positive("head_dim", "experts", "expert_width", "router_width")
        yield from self.not_one_of("pattern", SLIDING + FULL)
        yield from self.uneven_heads(self.q_heads, self.kv_heads)
        if self.kv_heads % 2:
            yield f"kv_heads {self.kv_heads} must be even: half of them come from the token before"
        if SLIDING in self.pattern and self.window < 1:
            yield f"window {self.window} must be positive"

    @property
    def channels(self) -> int:
        """Width of queries and keys together, which the convolutions run over."""
        return (self.q_heads + self.kv_heads) * self.head_dim

    @property
    def delayed(self) -> int:
        """Width of the values that come from the token before."""
        return self.kv_heads * self.head_dim // 2


HF = ("zaya",)
GGUF = ()
_TYPES = {"hybrid": FULL, "hybrid_sliding": SLIDING}
# Of transformers' ZayaConfig.
_DEFAULTS = {
    "vocab_size": 262_272,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "moe_intermediate_size": 2048,
    "num_experts": 16,
    "router_hidden_size": 256,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 106,
}


def read_hf(raw: dict[str, Any], where: str) -> Config:
    """The config that a config.json describes, of the current or of the first release.

    Raises:
        ConfigError: a field that would change the computation, or a wrong value, by name.
    """
    halves = "zaya_layers" in raw or "cca" in raw
    fields = Fields(_current(raw, where) if halves else raw, where, _DEFAULTS)
    fields.refuse_unless("hidden_act", "silu")
    for key in ("attention_bias", "lm_head_bias"):
        fields.refuse_unless(key, False)
    fields.refuse_unless("tie_word_embeddings", True)
    fields.refuse_unless("quantization_config")
    fields.refuse_unless("num_experts_per_tok", 1)
    for key in ("cca_time0", "cca_time1"):
        fields.refuse_unless(key, 2)
    common = reading.sizes(fields)
    head_dim = fields.integer("head_dim")
    thetas = {"hybrid": 5e6, "hybrid_sliding": 1e4}
    ropes = reading.by_type(
        fields, list(_TYPES), head_dim,
        {t: {"rope_theta": theta, "partial_rotary_factor": 0.5} for t, theta in thetas.items()},
    )  # fmt: skip
    window = fields.get("sliding_window")
    return Config(
        **common,
        pattern=reading.letters(fields, "layer_types", _TYPES, common["layers"])
        or FULL * common["layers"],
        window=0 if window is None else fields.integer("sliding_window"),
        q_heads=fields.integer("num_attention_heads"),
        kv_heads=fields.integer("num_key_value_heads"),
        head_dim=head_dim,
        rope=ropes["hybrid"],
        sliding_rope=ropes["hybrid_sliding"],
        experts=fields.integer("num_experts"),
        expert_width=fields.integer("moe_intermediate_size"),
        router_width=fields.integer("router_hidden_size"),
        halves=halves,
    )


def _current(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The first release's config in the words of the current one.

    It counts attention and experts as layers of their own, and has lists with a 0 for layers that
    a value does not concern.
    """
    fields = Fields(raw, where, {"norm_epsilon": 1e-5, "rope_theta": 1e6, "moe_router_topk": 1})
    for flag in ("zaya_use_eda", "zaya_use_mod", "scale_residual_merge", "cca"):
        fields.refuse_unless(flag, True)
    if any(fields.get("swa_layers") or ()):
        raise fields.unsupported("swa_layers", fields.get("swa_layers"), "none")

    def largest(*keys: str) -> int:
        key = next((k for k in keys if fields.get(k) is not None), keys[-1])
        value = fields.get(key)
        if not isinstance(value, list):
            return fields.integer(key)
        return max(fields.per_layer(key, max(1, len(value))))

    layers, experts = fields.get("zaya_layers"), "num_experts"
    if isinstance(layers, list):
        count, n_experts = len(layers), max((x for x in layers if type(x) is int), default=0)
    else:
        count, n_experts = fields.n_layers("num_hidden_layers"), fields.integer(experts)
    if count % 2:
        raise fields.fault("num_hidden_layers", "an even number: attention and experts in turn")
    share = fields.get("partial_rotary_factor")
    kept = ("vocab_size", "hidden_size", "max_position_embeddings", "tie_word_embeddings",
            "eos_token_id", "bos_token_id", "pad_token_id", "attention_bias", "lm_head_bias",
            "cca_time0", "cca_time1")  # fmt: skip
    return {
        **{key: raw[key] for key in kept if key in raw},
        "num_hidden_layers": count // 2,
        "num_attention_heads": largest("cca_num_q_heads", "num_attention_heads"),
        "num_key_value_heads": largest("num_query_groups_list", "num_query_groups"),
        "head_dim": largest("head_dim", "kv_channels"),
        "num_experts": n_experts,
        "num_experts_per_tok": fields.integer("moe_router_topk"),
        # The first matrix of an expert holds gate and up.
        "moe_intermediate_size": largest("ffn_hidden_size_list", "ffn_hidden_size") // 2,
        "router_hidden_size": largest("zaya_mlp_expansion"),
        "rms_norm_eps": fields.number("norm_epsilon"),
        "rope_parameters": {
            "hybrid": {
                "rope_theta": fields.number("rope_theta"),
                "partial_rotary_factor": 0.5 if share is None else share,
            }
        },
    }


ROWS = {
    "zaya1-8b": Row(
        Config(
            vocab=262_272, hidden=2048, layers=40, max_ctx=131_072, norm_eps=1e-5, eos_ids=(106,),
            pattern=FULL * 40, q_heads=8, kv_heads=2, head_dim=128, rope=Rope.whole(5e6, 64),
            sliding_rope=Rope.whole(1e4, 64), experts=16, expert_width=2048, router_width=256,
        ),
        "Zyphra/ZAYA1-8B", "ZAYA1-8B, 0.8 B active",
    )
}  # fmt: skip


def ignored(c: Config, name: str) -> bool:
    """Whether checkpoints carry the tensor `name` and the text decoder does not use it."""
    return name == "lm_head.weight"


def tables(c: Config, s: Sizes) -> Iterator[Table]:
    for i in range(c.layers):
        keep = c.window if c.pattern[i] == SLIDING else 0
        for name in "kv":
            yield s.table(f"l{i}.{name}", (c.kv_heads, c.head_dim), layer=i, keep=keep)
        yield s.table(f"l{i}.qk", (1, c.channels), layer=i, keep=3, exact=True)
        yield s.table(f"l{i}.late", (1, c.delayed), layer=i, keep=2, exact=True)


def weights(c: Config) -> Iterator[Weight]:
    first = "layers.0.res_scale.hidden_states_" if c.halves else "input_hidden_states_"
    names = "embed_tokens.weight | lm_head.weight"
    yield Weight("embed", (c.vocab, c.hidden), EMBED, names, prefill=0)
    yield Weight("embed_bias", (c.hidden,), FLOAT, f"{first}bias")
    yield Weight(
        "embed_scale", (c.hidden,), FLOAT, f"{first}scale",
        drawn=(c.hidden**0.5, 0.1 * c.hidden**0.5),
    )  # fmt: skip
    for i in range(c.layers):
        yield from _layer(c, i)
    hf = "final_norm.weight" if c.halves else "norm.weight"
    yield Weight("norm", (c.hidden,), FLOAT, hf, prefill=0)


def _layer(c: Config, i: int) -> Iterator[Weight]:
    """Each foreign name is given for the current checkpoints and for those of the first release,
    which count attention and experts as layers of their own and keep the scales of a residual with
    the layer that reads it."""
    at, d, r, ch = f"layers.{i}", c.hidden, c.router_width, c.channels
    q, kv = c.q_heads * c.head_dim, c.kv_heads * c.head_dim
    attn, moe = f"layers.{2 * i}", f"layers.{2 * i + 1}"
    after = f"layers.{2 * i + 2}." if i + 1 < c.layers else ""
    qkv, old = f"{at}.self_attn.qkv_proj", f"{attn}.self_attn.qkv"
    gate, old_gate = f"{at}.mlp.gate", f"{moe}.zaya_block.router"
    one = f"{moe}.zaya_block.experts.local_experts.{{e}}"

    # Random weights keep the tokens of a text apart, so that they take different experts: a stream
    # of unit RMS, to which all blocks together add as much again, and no bias for an expert.
    level = (2 * c.layers) ** -0.5
    drawn = {
        "attn_mix.hidden_states_scale": (level, 0.1 * level),
        "mlp_mix.hidden_states_scale": (level, 0.1 * level),
        "attn_mix.residual_scale": (1.0, 0.01),
        "mlp_mix.residual_scale": (1.0, 0.01),
        "router.balancing_biases": (0.0, 0.0),
    }

    def row(name: str, shape: tuple[int, ...], now: str, before: str, kind: str = FLOAT) -> Weight:
        hf = before if c.halves else now
        return Weight(f"{at}.{name}", shape, kind, hf, drawn=drawn.get(name))

    def linear(
        name: str, n_out: int, n_in: int, now: str, before: str, kind: str = "linear"
    ) -> Weight:
        return row(name, (n_out, n_in), f"{now}.weight", f"{before}.weight", kind)

    def norm(name: str, width: int, now: str, before: str) -> Weight:
        return row(name, (width,), f"{now}.weight", f"{before}.weight")

    def conv(name: str, n_in: int, now: str, before: str) -> Iterator[Weight]:
        yield row(f"{name}.weight", (ch, n_in, 2), f"{now}.weight", f"{before}.weight")
        yield row(f"{name}.bias", (ch,), f"{now}.bias", f"{before}.bias")

    def residual(name: str, now: str, before: str) -> Iterator[Weight]:
        for values in ("hidden_states", "residual"):
            for part in (f"{values}_scale", f"{values}_bias"):
                own = f"{at}.{now}_residual_scale.{part}"
                yield row(f"{name}.{part}", (d,), own, f"{before}res_scale.{part}")

    yield norm("attn_norm", d, f"{at}.input_layernorm", f"{attn}.input_norm")
    yield linear("attn.q", q, d, f"{qkv}.q_proj", f"{old}.linear_q")
    yield linear("attn.k", kv, d, f"{qkv}.k_proj", f"{old}.linear_k")
    yield linear("attn.now", c.delayed, d, f"{qkv}.v_proj_current", f"{old}.val_proj1")
    yield linear("attn.late", c.delayed, d, f"{qkv}.v_proj_delayed", f"{old}.val_proj2")
    yield from conv("attn.depth", 1, f"{qkv}.conv_qk_depthwise", f"{old}.conv_qk.0")
    yield from conv("attn.group", c.head_dim, f"{qkv}.conv_qk_grouped", f"{old}.conv_qk.1")
    yield row("attn.temp", (c.kv_heads,), f"{at}.self_attn.qk_norm.temp", f"{old}.temp")
    yield linear("attn.out", d, q, f"{at}.self_attn.o_proj", f"{attn}.self_attn.o_proj")
    yield from residual("attn_mix", "post_attention", f"{moe}.")
    yield norm("mlp_norm", d, f"{at}.post_attention_layernorm", f"{moe}.input_norm")
    for name, n_in, now, before in (
        ("down", d, "down_proj", "down_proj"),
        ("fc1", r, "router_mlp.fc1", "router_mlp.0"),
        ("fc2", r, "router_mlp.fc2", "router_mlp.2"),
    ):
        now, before = f"{gate}.{now}", f"{old_gate}.{before}"
        yield linear(f"router.{name}", r, n_in, now, before, FLOAT)
        yield row(f"router.{name}.bias", (r,), f"{now}.bias", f"{before}.bias")
    classes = c.experts + 1
    now, before = f"{gate}.router_mlp.out_proj", f"{old_gate}.router_mlp.4"
    yield linear("router.out", classes, r, now, before, FLOAT)
    yield norm("router.norm", r, f"{gate}.router_mlp.norm", f"{old_gate}.rmsnorm_eda")
    for name, width in (("balancing_biases", classes), ("router_states_scale", r if i else 0)):
        if width:
            yield row(f"router.{name}", (width,), f"{gate}.{name}", f"{old_gate}.{name}")
    for name, n_out, n_in, now, before in (
        ("gate_up", 2 * c.expert_width, d, "gate_up_proj", "linear_fc1"),
        ("down", d, c.expert_width, "down_proj", "linear_fc2"),
    ):
        hf = f"{one}.{before}.weight" if c.halves else f"{at}.mlp.experts.{now}"
        shape = (c.experts, n_out, n_in)
        yield Weight(f"{at}.experts.{name}", shape, EXPERT8, hf, share=1 / c.experts)
    yield from residual("mlp_mix", "post_mlp", after)
