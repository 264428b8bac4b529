"""Gemma 3 and Gemma 4: normed in and out, sharing layers, per-layer embeddings, routed experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edge_kv.models.gemma import FULL, SLIDING, Config
from edge_kv.nets import parts
from edge_kv.nets.state import Read, State
from edge_kv.nets.weights import Weights

Ropes = dict[str, tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """A layer that owns keys and values stores them; a sharing layer reads its source's."""

    def __init__(self, c: Config, w: Weights, i: int, at: str):
        super().__init__()
        source = c.source(i)
        self.spec, self.kind, self.eps = c.attention(i), c.pattern[i], c.norm_eps
        self.scale, self.v_norm, self.owns = c.attention_scale, c.v_norm, i < c.owners
        self.k_table, self.v_table = f"l{source}.k", f"l{source}.v"
        self.q, self.q_norm = w.linear(f"{at}.q"), w.value(f"{at}.q_norm")
        if self.owns:
            self.k, self.k_norm = w.linear(f"{at}.k"), w.value(f"{at}.k_norm")
            self.v = None if self.spec.k_eq_v else w.linear(f"{at}.v")
        self.out = w.linear(f"{at}.out")

    def forward(self, x: Tensor, ropes: Ropes, pos: Tensor, state: State) -> Tensor:
        rope, dim = ropes[self.kind], self.spec.head_dim
        q = self.q(x).unflatten(-1, (-1, dim))
        q = parts.norm_rope(q, self.q_norm(), *rope, eps=self.eps)
        if self.owns:
            k = self.k(x).unflatten(-1, (-1, dim))
            # V is taken before the key norm, also where it is the key projection.
            v = k if self.v is None else self.v(x).unflatten(-1, (-1, dim))
            k = parts.norm_rope(k, self.k_norm(), *rope, eps=self.eps)
            v = parts.norm_rope(v, None, None, None, eps=self.eps if self.v_norm else -1.0)
            state.put(self.k_table, k, pos)
            state.put(self.v_table, v, pos)
        reads = [Read(self.k_table, self.v_table)]
        return self.out(state.attend(q, reads, pos, self.scale).flatten(1))


class MoE(nn.Module):
    """Routed experts added to the dense MLP's output; they read the residual, not the MLP input."""

    def __init__(self, c: Config, w: Weights, at: str):
        super().__init__()
        assert c.moe
        self.top_k, self.eps, self.root = c.moe.top_k, c.norm_eps, c.hidden**-0.5
        self.dense_norm = w.norm(f"{at}.dense_norm", c.norm_eps)
        self.router, self.router_scale = w.linear(f"{at}.router"), w.value(f"{at}.router_scale")
        self.expert_scale = w.value(f"{at}.expert_scale")
        self.in_norm = w.norm(f"{at}.in_norm", c.norm_eps)
        self.experts = w.experts(at, "gelu_tanh")
        self.out_norm = w.norm(f"{at}.out_norm", c.norm_eps)

    def forward(self, dense: Tensor, residual: Tensor) -> Tensor:
        scaled = parts.rms(residual, None, self.eps) * self.router_scale() * self.root
        weight, index = self.router(scaled).softmax(-1).topk(self.top_k, -1)
        weight = weight / weight.sum(-1, keepdim=True) * self.expert_scale()[index]
        routed = self.experts(self.in_norm(residual), index, weight)
        return self.dense_norm(dense) + self.out_norm(routed)


class PleGate(nn.Module):
    """The per-layer embedding's way into one layer: gated by the residual, projected, normed."""

    def __init__(self, c: Config, w: Weights, at: str):
        super().__init__()
        self.gate, self.norm = w.gate(at, "gelu_tanh"), w.norm(f"{at}.norm", c.norm_eps)

    def forward(self, x: Tensor, ple: Tensor, scale: Tensor | None) -> Tensor:
        """The residual x behind it, times `scale`."""
        return self.norm.add(x, self.gate(x, ple), scale)


class Layer(nn.Module):
    """Layer `i`, whose weights are called `at`.…"""

    def __init__(self, c: Config, w: Weights, i: int, at: str):
        super().__init__()
        eps = c.norm_eps
        self.attn_norm = w.norm(f"{at}.attn_norm", eps)
        self.attn = Attention(c, w, i, f"{at}.attn")
        self.attn_out_norm = w.norm(f"{at}.attn_out_norm", eps)
        self.mlp_norm = w.norm(f"{at}.mlp_norm", eps)
        self.mlp = w.glu(f"{at}.mlp", "gelu_tanh")
        self.moe = MoE(c, w, f"{at}.moe") if c.moe else None
        self.mlp_out_norm = w.norm(f"{at}.mlp_out_norm", eps)
        self.ple = PleGate(c, w, f"{at}.ple") if c.ple_dim else None
        self.scalar = w.value(f"{at}.scalar") if c.layer_scalar else None

    def forward(
        self, x: Tensor, ple: Tensor | None, ropes: Ropes, pos: Tensor, state: State
    ) -> Tensor:
        x = self.attn_out_norm.add(x, self.attn(self.attn_norm(x), ropes, pos, state))
        y = self.mlp(self.mlp_norm(x))
        if self.moe is not None:
            y = self.moe(y, x)
        scale = None if self.scalar is None else self.scalar()
        if self.ple is None:
            return self.mlp_out_norm.add(x, y, scale)
        return self.ple(self.mlp_out_norm.add(x, y), ple, scale)


class PleInput(nn.Module):
    """Per-layer inputs: token rows (read outside the net) plus a projection of the embedding.

    The projection is two row blocks, owners and sharers, so that prefill computes only the first.
    """

    def __init__(self, c: Config, w: Weights):
        super().__init__()
        self.dim, self.owners, self.root = c.ple_dim, c.owners, c.hidden**-0.5
        cut = c.owners * c.ple_dim
        self.own = w.linear("ple.proj", 0, cut)
        self.shared = w.linear("ple.proj", cut) if c.shared else None
        self.norm = w.norm("ple.norm", c.norm_eps)

    def forward(self, x: Tensor, rows: Tensor) -> Sequence[Tensor]:
        """x: scaled embeddings [T, D]; rows [T, layers or owners, dim] -> one [T, dim] a layer."""
        context = self.own(x)
        if self.shared is not None and rows.shape[1] > self.owners:
            context = torch.cat((context, self.shared(x)), -1)
        context = self.norm(context.unflatten(-1, (-1, self.dim)) * self.root)
        return ((rows * self.dim**0.5 + context) * 2**-0.5).flatten(1).split(self.dim, -1)


def angles(c: Config) -> nn.ModuleDict:
    """The rotary embedding of each layer type there is."""
    kinds = {SLIDING: c.sliding, FULL: c.full}
    return nn.ModuleDict({kind: parts.Angles(kinds[kind].rope) for kind in sorted(set(c.pattern))})


class Net(nn.Module):
    def __init__(self, c: Config, w: Weights):
        super().__init__()
        self.c = c
        self.embed = w.embedding("embed")
        self.ple = PleInput(c, w) if c.ple_dim else None
        self.angles = angles(c)
        self.layers = nn.ModuleList(Layer(c, w, i, f"layers.{i}") for i in range(c.layers))
        self.norm, self.head = w.norm("norm", c.norm_eps), w.head(cap=c.softcap)

    def forward(self, ids: Tensor, pos: Tensor, state: State, rows: Tensor | None = None) -> Tensor:
        return self.run(ids, pos, state, rows, self.c.layers)

    def run(self, ids: Tensor, pos: Tensor, state: State, rows: Tensor | None, stop: int) -> Tensor:
        """Layers 0 … stop-1; rows [T, layers or owners, ple_dim]."""
        x = self.embed(ids) * self.c.hidden**0.5
        ple: Sequence[Tensor | None] = [None] * stop
        if self.ple is not None:
            ple = self.ple(x, rows)
        at = pos + torch.arange(ids.shape[0], device=pos.device)
        ropes = {kind: turn(at) for kind, turn in self.angles.items()}
        for i in range(stop):
            x = self.layers[i](x, ple[i], ropes, pos, state)
        return x

    def hidden(self, x: Tensor) -> Tensor:
        """What a drafter takes up [T, hidden]: the residual x behind the last norm."""
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.hidden(x))
        return out

    def prefill(self, ids: Tensor, pos: Tensor, state: State, rows: Tensor | None = None) -> None:
        """Sharing layers write no state: tokens of a prompt stop at the last owner."""
        self.run(ids, pos, state, rows, self.c.owners)
