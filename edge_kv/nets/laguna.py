"""Laguna: attention gated by the layer's input, routed experts beside a shared one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_kv.models.laguna import DENSE, FULL, SLIDING, Config
from edge_kv.nets import parts
from edge_kv.nets.state import Read, State
from edge_kv.nets.weights import Weights

Ropes = dict[str, tuple[Tensor, Tensor]]


class Attention(nn.Module):
    def __init__(self, c: Config, w: Weights, i: int):
        super().__init__()
        at = f"layers.{i}.attn"
        self.dim, self.kind, self.eps = c.head_dim, c.pattern[i], c.norm_eps
        self.k_table, self.v_table = f"l{i}.k", f"l{i}.v"
        self.q, self.k, self.v = (w.linear(f"{at}.{n}") for n in "qkv")
        self.q_norm, self.k_norm = w.value(f"{at}.q_norm"), w.value(f"{at}.k_norm")
        self.gate = w.linear(f"{at}.gate") if c.gate else None
        self.gate_dims = -1 if c.gate == "element" else 1  # a gate for each dim or for all
        self.out = w.linear(f"{at}.out")

    def forward(self, x: Tensor, ropes: Ropes, pos: Tensor, state: State) -> Tensor:
        rope = ropes[self.kind]
        q, k, v = (p(x).unflatten(-1, (-1, self.dim)) for p in (self.q, self.k, self.v))
        q = parts.norm_rope(q, self.q_norm(), *rope, eps=self.eps)
        k = parts.norm_rope(k, self.k_norm(), *rope, eps=self.eps)
        state.put(self.k_table, k, pos)
        state.put(self.v_table, v, pos)
        y = state.attend(q, [Read(self.k_table, self.v_table)], pos, self.dim**-0.5)
        if self.gate is not None:
            y = y * F.softplus(self.gate(x)).reshape(*y.shape[:2], self.gate_dims)
        return self.out(y.flatten(1))


class MoE(nn.Module):
    def __init__(self, c: Config, w: Weights, at: str):
        super().__init__()
        self.c = c
        self.router, self.bias = w.linear(f"{at}.router"), w.value(f"{at}.router_bias")
        self.experts = w.experts(at, "silu")
        self.shared = w.glu(f"{at}.shared", "silu")

    def forward(self, x: Tensor) -> Tensor:
        score = self.router(x)
        if cap := self.c.router_softcap:
            score = torch.tanh(score / cap) * cap
        score = parts.SCORES[self.c.score](score)
        # The bias steers which experts are chosen, not what they weigh.
        index = (score + self.bias()).topk(self.c.top_k, -1).indices
        weight = score.gather(-1, index)
        weight = weight / weight.sum(-1, keepdim=True) * self.c.routed_scale
        return self.experts(x, index, weight) + self.shared(x)


class Layer(nn.Module):
    def __init__(self, c: Config, w: Weights, i: int):
        super().__init__()
        at = f"layers.{i}"
        self.attn_norm, self.attn = w.norm(f"{at}.attn_norm", c.norm_eps), Attention(c, w, i)
        self.mlp_norm = w.norm(f"{at}.mlp_norm", c.norm_eps)
        dense = c.mlps[i] == DENSE
        self.mlp = w.glu(f"{at}.mlp", "silu") if dense else MoE(c, w, f"{at}.moe")

    def forward(self, x: Tensor, ropes: Ropes, pos: Tensor, state: State) -> Tensor:
        x = x + self.attn(self.attn_norm(x), ropes, pos, state)
        return x + self.mlp(self.mlp_norm(x))


class Net(nn.Module):
    def __init__(self, c: Config, w: Weights):
        super().__init__()
        self.embed = w.embedding("embed")
        ropes = {FULL: c.rope, SLIDING: c.sliding_rope}
        self.angles = nn.ModuleDict({k: parts.Angles(ropes[k]) for k in sorted(set(c.pattern))})
        self.layers = nn.ModuleList(Layer(c, w, i) for i in range(c.layers))
        self.norm, self.head = w.norm("norm", c.norm_eps), w.head()

    def forward(self, ids: Tensor, pos: Tensor, state: State, rows: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        at = pos + torch.arange(ids.shape[0], device=pos.device)
        ropes = {kind: angles(at) for kind, angles in self.angles.items()}
        for layer in self.layers:
            x = layer(x, ropes, pos, state)
        return x

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))

    def prefill(self, ids: Tensor, pos: Tensor, state: State, rows: Tensor | None = None) -> None:
        self(ids, pos, state, rows)
