"""Laguna: query heads counted layer by layer, gated attention, routed experts with a shared one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from edge_kv.models import reading
from edge_kv.models.model import EMBED, EXPERT, FLOAT, HEAD, KV, Model, Rope, Row, Weight, Yarn
from edge_kv.plan import Sizes, Table
from edge_kv.weights.fields import Fields

SLIDING, FULL = "S", "F"
DENSE, SPARSE = "D", "M"


@dataclass(frozen=True, kw_only=True)
class Config(Model):
    """`pattern` and `mlps` have one letter a layer: S or F, and D (dense) or M (experts)."""

    pattern: str
    mlps: str
    window: int
    q_heads: tuple[int, ...]  # of each layer
    kv_heads: int
    head_dim: int
    rope: Rope  # of full layers
    sliding_rope: Rope
    gate: str = "head"  # softplus gate on the attention's output: "head" | "element" | "" (none)
    mlp_width: int  # of dense layers
    experts: int
    top_k: int
    expert_width: int
    shared_width: int
    score: str = "sigmoid"  # what router logits become: see `parts.SCORES`
    routed_scale: float = 1.0
    router_softcap: float = 0.0  # 0: none
    tied: bool = False

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from self.not_positive("head_dim", "window", "mlp_width", "experts", "top_k")
        yield from self.not_positive("expert_width", "shared_width")
        yield from self.not_one_of("pattern", SLIDING + FULL)
        yield from self.not_one_of("mlps", DENSE + SPARSE)
        if len(self.q_heads) != self.layers:
            yield f"q_heads has {len(self.q_heads)} numbers, expected one for each layer"
        for q_heads in sorted(set(self.q_heads)):
            yield from self.uneven_heads(q_heads, self.kv_heads)
        if self.top_k > self.experts:
            yield f"top_k {self.top_k} must be at most the number of experts {self.experts}"
        if self.router_softcap < 0:
            yield f"router_softcap {self.router_softcap:g} must not be negative"
        if max(self.rope.dim, self.sliding_rope.dim) > self.head_dim:
            yield f"rope dims must fit head_dim {self.head_dim}"


HF = ("laguna",)
GGUF = ()
_TYPES = {"sliding_attention": SLIDING, "full_attention": FULL}
_GATES = {True: "head", "per-head": "head", "per-element": "element", False: "", None: "head"}


def read_hf(raw: dict[str, Any], where: str) -> Config:
    """The config that a config.json describes.

    Raises:
        ConfigError: a field that would change the computation, or a wrong value, by name.
    """
    fields = Fields(raw, where, _DEFAULTS)
    fields.refuse_unless("hidden_act", "silu")
    fields.refuse_unless("attention_bias", False)
    fields.refuse_unless("quantization_config")
    fields.refuse_unless("moe_apply_router_weight_on_input", False)
    fields.refuse_unless("moe_router_use_sigmoid", True)
    common = reading.sizes(fields)
    layers = common["layers"]
    gate = fields.get("gating")
    kinds = fields.get("gating_types")
    if isinstance(kinds, list):
        if len(set(map(str, kinds))) != 1:
            raise fields.unsupported("gating_types", kinds, "one kind of gate for all layers")
        gate = kinds[0]
    if not isinstance(gate, (str, bool)) or gate not in _GATES:
        raise fields.unsupported("gating", gate, "true, false, per-head and per-element")
    head_dim = fields.integer("head_dim")
    ropes = reading.by_type(
        fields,
        list(_TYPES),
        head_dim,
        {
            "sliding_attention": {"rope_theta": 1e4},
            "full_attention": {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
        },
        # Some releases keep the numbers of YaRN beside rope_parameters instead of in it.
        loose=("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    )
    mlps = reading.letters(fields, "mlp_layer_types", {"dense": DENSE, "sparse": SPARSE}, layers)
    if mlps is None and isinstance(dense := fields.get("mlp_only_layers"), list):
        mlps = "".join(DENSE if i in dense else SPARSE for i in range(layers))
    return Config(
        **common,
        pattern=reading.letters(fields, "layer_types", _TYPES, layers) or FULL * layers,
        mlps=mlps or DENSE + SPARSE * (layers - 1),
        window=fields.integer("sliding_window"),
        q_heads=tuple(
            fields.per_layer(
                "num_attention_heads_per_layer"
                if fields.get("num_attention_heads_per_layer") is not None
                else "num_attention_heads",
                layers,
            )
        ),
        kv_heads=fields.integer("num_key_value_heads"),
        head_dim=head_dim,
        rope=ropes["full_attention"],
        sliding_rope=ropes["sliding_attention"],
        gate=_GATES[gate],
        mlp_width=fields.integer("intermediate_size"),
        experts=fields.integer("num_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        expert_width=fields.integer("moe_intermediate_size"),
        shared_width=fields.integer("shared_expert_intermediate_size"),
        routed_scale=fields.number("moe_routed_scaling_factor"),
        router_softcap=fields.number("moe_router_logit_softcapping"),
        tied=fields.flag("tie_word_embeddings"),
    )


# Of transformers' LagunaConfig.
_DEFAULTS = {
    "vocab_size": 100_352,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 40,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 8,
    "num_experts": 256,
    "gating": True,
    "moe_routed_scaling_factor": 1.0,
    "moe_router_logit_softcapping": 0.0,
}


def _preset(max_ctx: int, original: int, gain: float) -> Config:
    rope = Rope(5e5, 64, 32, 32.0, Yarn(original, 64.0, 1.0), gain)
    return Config(
        vocab=100_352, hidden=2048, layers=40, max_ctx=max_ctx, eos_ids=(2, 24), bos_id=2, pad_id=9,
        pattern="FSSS" * 10, mlps=DENSE + SPARSE * 39, window=512, q_heads=(48, 64, 64, 64) * 10,
        kv_heads=8, head_dim=128, rope=rope, sliding_rope=Rope.whole(1e4, 128), mlp_width=8192,
        experts=256, top_k=8, expert_width=512, shared_width=512, routed_scale=2.5,
    )  # fmt: skip


ROWS = {
    "laguna-xs2": Row(
        _preset(131_072, 4096, 1.0), "poolside/Laguna-XS.2", "Laguna XS.2, 33 B, 3 B active"
    ),
    "laguna-xs2.1": Row(
        _preset(262_144, 8192, 1.3465736),
        "poolside/Laguna-XS-2.1",
        "Laguna XS 2.1, 33 B, 3 B active",
    ),
}


def ignored(c: Config, name: str) -> bool:
    """Whether checkpoints carry the tensor `name` and the text decoder does not use it."""
    parts = name.split(".")
    return parts[-1] in ("k_scale", "v_scale", "inv_freq") or (c.tied and name == "lm_head.weight")


def tables(c: Config, s: Sizes) -> Iterator[Table]:
    for i in range(c.layers):
        keep = c.window if c.pattern[i] == SLIDING else 0
        for name in "kv":
            yield s.table(f"l{i}.{name}", (c.kv_heads, c.head_dim), layer=i, keep=keep)


def weights(c: Config) -> Iterator[Weight]:
    yield Weight(
        "embed", (c.vocab, c.hidden), EMBED, "embed_tokens.weight",
        share=1 if c.tied else 0, prefill=0, drawn=(0.0, c.hidden**-0.5 if c.tied else 1.0),
    )  # fmt: skip
    for i in range(c.layers):
        yield from _layer(c, i)
    yield Weight("norm", (c.hidden,), FLOAT, "norm.weight", prefill=0)
    if not c.tied:
        yield Weight("head", (c.vocab, c.hidden), HEAD, "lm_head.weight", prefill=0)


def _layer(c: Config, i: int) -> Iterator[Weight]:
    at, d, h = f"layers.{i}", c.hidden, c.head_dim
    q, kv = c.q_heads[i] * h, c.kv_heads * h

    def into_residual(n_in: int) -> tuple[float, float]:
        """Random weights keep the tokens of a text apart, so that they take different experts: to
        a stream of unit RMS all blocks together add about as much again."""
        return 0.0, (2 * c.layers * n_in) ** -0.5

    def norm(name: str, width: int, hf: str) -> Weight:
        return Weight(f"{at}.{name}", (width,), FLOAT, f"{at}.{hf}.weight")

    def linear(name: str, n_out: int, n_in: int, hf: str, kind: str = "linear") -> Weight:
        return Weight(f"{at}.{name}", (n_out, n_in), kind, f"{at}.{hf}.weight")

    def glu(name: str, width: int, *hf: str) -> Iterator[Weight]:
        for part, shape in (("gate", (width, d)), ("up", (width, d)), ("down", (d, width))):
            own = " | ".join(f"{at}.{n}.{part}_proj.weight" for n in hf)
            drawn = into_residual(width) if part == "down" else None
            yield Weight(f"{at}.{name}.{part}", shape, hf=own, drawn=drawn)

    yield norm("attn_norm", d, "input_layernorm")
    yield linear("attn.q", q, d, "self_attn.q_proj")
    yield linear("attn.k", kv, d, "self_attn.k_proj", KV)
    yield linear("attn.v", kv, d, "self_attn.v_proj", KV)
    if c.gate:
        yield linear("attn.gate", q if c.gate == "element" else c.q_heads[i], d, "self_attn.g_proj")
    yield norm("attn.q_norm", h, "self_attn.q_norm")
    yield norm("attn.k_norm", h, "self_attn.k_norm")
    yield replace(linear("attn.out", d, q, "self_attn.o_proj"), drawn=into_residual(q))
    yield norm("mlp_norm", d, "post_attention_layernorm")
    if c.mlps[i] == DENSE:
        yield from glu("mlp", c.mlp_width, "mlp")
        return
    e, w, mlp = c.experts, c.expert_width, f"{at}.mlp"
    one = f"{mlp}.experts.{{e}}"
    yield linear("moe.router", e, d, "mlp.gate", FLOAT)
    yield Weight(
        f"{at}.moe.router_bias", (e,), FLOAT,
        f"{mlp}.experts.e_score_correction_bias | {mlp}.gate.e_score_correction_bias",
    )  # fmt: skip
    yield Weight(
        f"{at}.moe.gate_up", (e, 2 * w, d), EXPERT,
        f"{mlp}.experts.gate_up_proj | {one}.gate_proj.weight + {one}.up_proj.weight",
        share=c.top_k / e,
    )  # fmt: skip
    yield Weight(
        f"{at}.moe.down", (e, d, w), EXPERT,
        f"{mlp}.experts.down_proj | {one}.down_proj.weight", share=c.top_k / e,
        drawn=into_residual(w),
    )  # fmt: skip
    yield from glu("moe.shared", c.shared_width, "mlp.shared_expert", "mlp.shared_experts")
