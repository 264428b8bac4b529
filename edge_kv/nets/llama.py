"""Llama 3, Qwen3, SmolLM2: pre-norm attention and SwiGLU; q/k norms and biases where stored."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_kv.models.llama import Config
from edge_kv.nets import parts
from edge_kv.nets.state import Read, State
from edge_kv.nets.weights import Weights


class Attention(nn.Module):
    def __init__(self, c: Config, w: Weights, i: int):
        super().__init__()
        at = f"layers.{i}.attn"
        self.c, self.k_table, self.v_table = c, f"l{i}.k", f"l{i}.v"
        self.q, self.k, self.v = (w.linear(f"{at}.{n}") for n in "qkv")
        self.out = w.linear(f"{at}.out")
        norms = {n: w.value(f"{at}.{n}_norm") for n in "qk"} if c.qk_norm else None
        self.norms = nn.ModuleDict(norms) if norms else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], pos: Tensor, state: State) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.c.head_dim)) for p in (self.q, self.k, self.v))
        q, k = self.normed(q, "q", rope), self.normed(k, "k", rope)
        state.put(self.k_table, k, pos)
        state.put(self.v_table, v, pos)
        reads = [Read(self.k_table, self.v_table)]
        return self.out(state.attend(q, reads, pos, self.c.head_dim**-0.5).flatten(1))

    def normed(self, x: Tensor, norm: str, rope: tuple[Tensor, Tensor]) -> Tensor:
        if self.norms is None:
            return parts.norm_rope(x, None, *rope, eps=-1.0)
        return parts.norm_rope(x, self.norms[norm](), *rope, eps=self.c.norm_eps)


class Layer(nn.Module):
    def __init__(self, c: Config, w: Weights, i: int):
        super().__init__()
        at = f"layers.{i}"
        self.attn_norm = w.norm(f"{at}.attn_norm", c.norm_eps)
        self.attn = Attention(c, w, i)
        self.mlp_norm = w.norm(f"{at}.mlp_norm", c.norm_eps)
        self.mlp = w.glu(f"{at}.mlp", "silu")

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], pos: Tensor, state: State) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rope, pos, state)
        return x + self.mlp(self.mlp_norm(x))


class Net(nn.Module):
    def __init__(self, c: Config, w: Weights):
        super().__init__()
        self.embed = w.embedding("embed")
        self.angles = parts.Angles(c.rope)
        self.layers = nn.ModuleList(Layer(c, w, i) for i in range(c.layers))
        self.norm = w.norm("norm", c.norm_eps)
        self.head = w.head()

    def forward(self, ids: Tensor, pos: Tensor, state: State, rows: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        rope = self.angles(pos + torch.arange(ids.shape[0], device=pos.device))
        for layer in self.layers:
            x = layer(x, rope, pos, state)
        return x

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))

    def prefill(self, ids: Tensor, pos: Tensor, state: State, rows: Tensor | None = None) -> None:
        self(ids, pos, state, rows)
