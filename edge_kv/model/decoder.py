"""The Gemma 3 / Gemma 4 text decoder, written once, in reading order.

norm, rope, linear, embedding, attention, MLP, experts, per-layer embedding, layer, decoder.
Everything is plain PyTorch over [T, width] activations (batch 1); state is reached only through
`state.State`. Sources: architectures.md §1b; transformers' gemma4 and gemma3 as parity oracles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_kv.config import FULL, SLIDING, AttentionSpec, ModelConfig
from edge_kv.formats import Format
from edge_kv.kv_plan import KVPlan, LayerPlan
from edge_kv.model import ops
from edge_kv.model.state import HeadNorms, Rope, State

HEAD_BLOCKS = 8  # row blocks of the LM head: smaller transients than one [vocab, hidden] product


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class RopeTable(nn.Module):
    """Angles of one layer type; pairs beyond `rotated_pairs` have frequency 0: the identity."""

    inv_freq: Tensor

    def __init__(self, spec: AttentionSpec):
        super().__init__()
        pairs = torch.arange(0, spec.head_dim, 2, dtype=torch.float32)
        inv_freq = spec.rope_theta ** -(pairs / spec.head_dim) / spec.rope_factor
        inv_freq[spec.rotated_pairs :] = 0.0
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, positions: Tensor) -> Rope:
        angles = positions.to(torch.float32).unsqueeze(1) * self.inv_freq
        return Rope(torch.cos(angles), torch.sin(angles))


class Linear(nn.Module):
    """A float linear without bias: weight [out, in]."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class QuantLinear(nn.Module):
    """A linear over packed integers: see `ops.linear_q`."""

    packed: Tensor

    def __init__(self, n_in: int, n_out: int, fmt: Format):
        super().__init__()
        self.n_in, self.n_out, self.format = n_in, n_out, fmt
        self.register_buffer("packed", torch.empty(fmt.shape(n_out, n_in), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_q(x, self.packed, self.n_out, self.format.name)


class Embedding(nn.Module):
    """Float token rows: weight [vocab, hidden]."""

    def __init__(self, vocab: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, dim), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class QuantEmbedding(nn.Module):
    """Token rows from the packed region that is also the LM head: see `ops.embed_q`."""

    packed: Tensor

    def __init__(self, vocab: int, dim: int, fmt: Format):
        super().__init__()
        self.dim, self.format = dim, fmt
        self.register_buffer("packed", torch.empty(fmt.shape(vocab, dim), dtype=torch.uint8))

    def forward(self, ids: Tensor) -> Tensor:
        return ops.embed_q(ids, self.packed, self.dim, self.format.name)


class WeightFormat:
    """Builds the linear, embedding and expert modules: float here, packed in `QuantFormat`."""

    def linear(self, name: str, n_in: int, n_out: int) -> nn.Module:
        return Linear(n_in, n_out)

    def embedding(self, vocab: int, dim: int) -> nn.Module:
        return Embedding(vocab, dim)

    def experts(self, name: str, config: ModelConfig) -> nn.Module:
        return Experts(config)


class Attention(nn.Module):
    """Projections of one layer; the state norms, rotates, stores and attends."""

    def __init__(self, config: ModelConfig, plan: LayerPlan, fmt: WeightFormat, at: str):
        super().__init__()
        spec = config.spec(plan.layer)
        self.plan, self.k_eq_v, self.v_norm = plan, spec.k_eq_v, config.v_norm
        self.q_proj = fmt.linear(f"{at}.q_proj", config.hidden, spec.q_width)
        self.o_proj = fmt.linear(f"{at}.o_proj", spec.q_width, config.hidden)
        self.q_norm = RMSNorm(spec.head_dim, config.norm_eps)
        if plan.owns:
            self.k_norm = RMSNorm(spec.head_dim, config.norm_eps)
            self.k_proj = fmt.linear(f"{at}.k_proj", config.hidden, spec.kv_width)
            if not spec.k_eq_v:
                self.v_proj = fmt.linear(f"{at}.v_proj", config.hidden, spec.kv_width)

    def forward(self, x: Tensor, rope: Rope, pos: Tensor, state: State) -> Tensor:
        q, eps = self.q_proj(x), self.q_norm.eps
        if self.plan.owns:
            k = self.k_proj(x)
            v = k if self.k_eq_v else self.v_proj(x)
            norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, self.v_norm, eps)
            out = state.attend_own(self.plan, q, k, v, norms, rope, pos)
        else:
            norms = HeadNorms(self.q_norm.weight, None, self.v_norm, eps)
            out = state.attend_shared(self.plan, q, norms, rope, pos)
        return self.o_proj(out)


class GeluGate(nn.Module):
    """The tanh form of gelu of one tensor, times the other."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh") * up


class Softcap(nn.Module):
    """tanh(x / cap) * cap."""

    def __init__(self, cap: float):
        super().__init__()
        self.cap = cap

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / self.cap) * self.cap


class MLP(nn.Module):
    """GeGLU."""

    def __init__(self, hidden: int, width: int, fmt: WeightFormat, at: str):
        super().__init__()
        self.gate_proj = fmt.linear(f"{at}.gate_proj", hidden, width)
        self.up_proj = fmt.linear(f"{at}.up_proj", hidden, width)
        self.down_proj = fmt.linear(f"{at}.down_proj", width, hidden)
        self.gated = GeluGate()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))


class Experts(nn.Module):
    """Stacked float experts: see `ops.experts`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.moe
        e, w, d = config.moe.n_experts, config.moe.width, config.hidden
        self.gate_up = nn.Parameter(torch.empty(e, 2 * w, d), requires_grad=False)
        self.down = nn.Parameter(torch.empty(e, d, w), requires_grad=False)

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return ops.experts(x, index, weight, self.gate_up, self.down)


class QuantExperts(nn.Module):
    """Stacked packed experts: see `ops.experts_q`."""

    def __init__(self, config: ModelConfig, gate_up: Format, down: Format):
        super().__init__()
        assert config.moe
        e, w, d = config.moe.n_experts, config.moe.width, config.hidden
        self.width, self.formats = w, (gate_up.name, down.name)
        for name, fmt, shape in (("gate_up", gate_up, (2 * w, d)), ("down", down, (d, w))):
            packed = torch.empty(e, *fmt.shape(*shape), dtype=torch.uint8)
            self.register_buffer(f"{name}_packed", packed)

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return ops.experts_q(
            x, index, weight, self.gate_up_packed, self.down_packed, self.width, *self.formats
        )


class Router(nn.Module):
    """Softmax over experts, top k renormalised, times a learned scale per expert."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.moe
        self.top_k, self.eps = config.moe.top_k, config.norm_eps
        self.root = config.hidden**-0.5
        self.scale = nn.Parameter(torch.ones(config.hidden), requires_grad=False)
        self.proj = Linear(config.hidden, config.moe.n_experts)
        self.expert_scale = nn.Parameter(torch.ones(config.moe.n_experts), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: the raw residual [T, D] -> index and weight [T, top_k]."""
        normed = F.rms_norm(x, x.shape[-1:], None, self.eps) * self.scale * self.root
        weight, index = self.proj(normed).softmax(-1).topk(self.top_k, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        return index, weight * F.embedding(index, self.expert_scale.unsqueeze(1)).squeeze(-1)


class MoE(nn.Module):
    """Routed experts added to the dense MLP's output; they read the residual, not the MLP input."""

    def __init__(self, config: ModelConfig, fmt: WeightFormat, at: str):
        super().__init__()
        self.dense_norm = RMSNorm(config.hidden, config.norm_eps)
        self.router = Router(config)
        self.in_norm = RMSNorm(config.hidden, config.norm_eps)
        self.experts = fmt.experts(at, config)
        self.out_norm = RMSNorm(config.hidden, config.norm_eps)

    def forward(self, dense: Tensor, residual: Tensor) -> Tensor:
        index, weight = self.router(residual)
        routed = self.experts(self.in_norm(residual), index, weight)
        return self.dense_norm(dense) + self.out_norm(routed)


class PleGate(nn.Module):
    """The per-layer embedding's way into one layer: gated by the residual, projected, normed."""

    def __init__(self, config: ModelConfig, fmt: WeightFormat, at: str):
        super().__init__()
        self.gate = fmt.linear(f"{at}.gate", config.hidden, config.ple_dim)
        self.proj = fmt.linear(f"{at}.proj", config.ple_dim, config.hidden)
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.gated = GeluGate()

    def forward(self, x: Tensor, ple: Tensor) -> Tensor:
        return self.norm(self.proj(self.gated(self.gate(x), ple)))


class Layer(nn.Module):
    """One decoder layer over the residual x [T, D]."""

    def __init__(self, config: ModelConfig, plan: LayerPlan, fmt: WeightFormat):
        super().__init__()
        i, d, eps = plan.layer, config.hidden, config.norm_eps
        at = f"layers.{i}"
        self.kind = config.pattern[i]
        self.attn_norm = RMSNorm(d, eps)
        self.attn = Attention(config, plan, fmt, f"{at}.attn")
        self.post_attn_norm = RMSNorm(d, eps)
        self.mlp_norm = RMSNorm(d, eps)
        self.mlp = MLP(d, config.mlp(i), fmt, f"{at}.mlp")
        self.moe = MoE(config, fmt, f"{at}.moe") if config.moe else None
        self.post_mlp_norm = RMSNorm(d, eps)
        self.ple = PleGate(config, fmt, f"{at}.ple") if config.ple_dim else None
        scaled = config.family == "gemma4"
        self.scalar = nn.Parameter(torch.ones(1), requires_grad=False) if scaled else None

    def forward(
        self, x: Tensor, ple: Tensor | None, rope: dict[str, Rope], pos: Tensor, state: State
    ) -> Tensor:
        x = x + self.post_attn_norm(self.attn(self.attn_norm(x), rope[self.kind], pos, state))
        m = self.mlp(self.mlp_norm(x))
        if self.moe is not None:
            m = self.moe(m, x)
        x = x + self.post_mlp_norm(m)
        if self.ple is not None:
            x = x + self.ple(x, ple)
        return x if self.scalar is None else x * self.scalar


class PleInput(nn.Module):
    """Per-layer inputs: token rows (read outside the graph) plus a projection of the embedding.

    The projection is two row blocks, owners and sharers, so that prefill computes only the first.
    """

    def __init__(self, config: ModelConfig, fmt: WeightFormat):
        super().__init__()
        self.dim, self.n_own = config.ple_dim, config.n_own
        rows = {"own": config.n_own * self.dim, "shared": config.n_kv_shared * self.dim}
        self.proj = nn.ModuleDict(
            {k: fmt.linear("ple_proj", config.hidden, n) for k, n in rows.items() if n}
        )
        self.norm = RMSNorm(self.dim, config.norm_eps)
        self.root = config.hidden**-0.5

    def forward(self, x: Tensor, rows: Tensor) -> list[Tensor]:
        """x: scaled embeddings [T, D]; rows [T, n_layers or n_own, dim] -> one [T, dim] a layer."""
        parts = ["own"] if rows.shape[1] == self.n_own else list(self.proj)
        context = torch.cat([self.proj[k](x) for k in parts], -1).unflatten(-1, (-1, self.dim))
        mixed = (rows * self.dim**0.5 + self.norm(context * self.root)) * 2**-0.5
        return list(mixed.unbind(1))


class Decoder(nn.Module):
    """The whole model; `embed` is tied to `head`, whose row blocks cover the vocabulary."""

    def __init__(self, config: ModelConfig, plan: KVPlan, fmt: WeightFormat | None = None):
        super().__init__()
        fmt = fmt or WeightFormat()
        self.config = config
        self.embed = fmt.embedding(config.vocab_size, config.hidden)
        self.ple = PleInput(config, fmt) if config.ple_dim else None
        self.rope = self.rope_tables(config)
        self.layers = nn.ModuleList(Layer(config, p, fmt) for p in plan.layers)
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.head = nn.ModuleList(
            fmt.linear("embed", config.hidden, stop - start)
            for start, stop in head_blocks(config.vocab_size)
        )
        cap = config.final_softcap
        self.softcap = Softcap(cap) if cap else nn.Identity()

    @staticmethod
    def rope_tables(config: ModelConfig) -> nn.ModuleDict:
        """The angles of both layer types; they come from the config, not from a checkpoint."""
        return nn.ModuleDict({SLIDING: RopeTable(config.sliding), FULL: RopeTable(config.full)})

    def embed_tokens(
        self, ids: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """ids [T] and PLE rows [T, layers, dim] -> residual [T, D] and each layer's PLE input."""
        x = self.embed(ids) * self.config.hidden**0.5
        if self.ple is None:
            return x, [None] * self.config.n_layers
        assert rows is not None
        return x, self.ple(x, rows)

    def ropes(self, x: Tensor, pos: Tensor) -> dict[str, Rope]:
        """cos and sin of every layer type for the T tokens of x that start at pos [1]."""
        positions = pos + torch.arange(x.shape[0], device=pos.device)
        return {kind: self.rope[kind](positions) for kind in sorted(set(self.config.pattern))}

    def run_layers(
        self, x: Tensor, ple: Sequence[Tensor | None], pos: Tensor, state: State, stop: int
    ) -> Tensor:
        """Layers 0 … stop-1 over T tokens that start at position pos [1]."""
        rope = self.ropes(x, pos)
        for i in range(stop):
            x = self.layers[i](x, ple[i], rope, pos, state)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Final norm, tied head, softcap: [T, D] -> [T, vocab]."""
        x = self.norm(x)
        logits: Tensor = self.softcap(torch.cat([block(x) for block in self.head], -1))
        return logits

    def forward(self, ids: Tensor, pos: Tensor, rows: Tensor | None, state: State) -> Tensor:
        """Logits [T, vocab] of all T tokens."""
        x, ple = self.embed_tokens(ids, rows)
        return self.logits(self.run_layers(x, ple, pos, state, self.config.n_layers))

    def decode(self, ids: Tensor, pos: Tensor, rows: Tensor | None, state: State) -> Tensor:
        """Logits [vocab] of the last token."""
        x, ple = self.embed_tokens(ids, rows)
        return self.logits(self.run_layers(x, ple, pos, state, self.config.n_layers)[-1:])[0]

    def prefill(self, ids: Tensor, pos: Tensor, rows: Tensor | None, state: State) -> None:
        """Write the state of T prompt tokens: only the layers that own keys and values run."""
        x, ple = self.embed_tokens(ids, rows)
        self.run_layers(x, ple, pos, state, self.config.n_own)


def head_blocks(vocab: int) -> list[tuple[int, int]]:
    """Row ranges of the LM head's blocks, whole multiples of 64 rows except the last."""
    step = -(-vocab // HEAD_BLOCKS // 64) * 64 if vocab >= 64 * HEAD_BLOCKS else vocab
    return [(at, min(at + step, vocab)) for at in range(0, vocab, step)]
