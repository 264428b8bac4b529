"""ZAYA1: two causal convolutions before attention, delayed values, one expert chosen over depth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_kv.models.zaya import FULL, SLIDING, Config
from edge_kv.nets import parts
from edge_kv.nets.state import Read, State
from edge_kv.nets.weights import Weights

Ropes = dict[str, tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """Half of the values come from the token before, all queries and keys from the last three."""

    def __init__(self, c: Config, w: Weights, i: int):
        super().__init__()
        at = f"layers.{i}.attn"
        self.c, self.i, self.kind = c, i, c.pattern[i]
        self.q, self.k = w.linear(f"{at}.q"), w.linear(f"{at}.k")
        self.now, self.late = w.linear(f"{at}.now"), w.linear(f"{at}.late")
        self.depth, self.group = w.values(f"{at}.depth."), w.values(f"{at}.group.")
        self.temp, self.out = w.value(f"{at}.temp"), w.linear(f"{at}.out")

    def forward(self, x: Tensor, ropes: Ropes, pos: Tensor, at: Tensor, state: State) -> Tensor:
        c, i = self.c, self.i
        q, k = self.q(x), self.k(x)
        mixed = self.convolve(torch.cat((q, k), -1), pos, state)
        q = (
            q.unflatten(-1, (c.kv_heads, -1, c.head_dim)) + k.unflatten(-1, (-1, 1, c.head_dim))
        ) / 2
        k = l2(mixed[:, c.q_heads :] + q.mean(2)) * self.temp()[:, None]
        q = l2(mixed[:, : c.q_heads] + q.flatten(1, 2))
        state.put(f"l{i}.late", self.late(x)[:, None], pos)
        late = state.take(f"l{i}.late", at - 1)[:, 0]
        v = torch.cat((self.now(x), late), -1).unflatten(-1, (-1, c.head_dim))
        q, k = (parts.norm_rope(y, None, *ropes[self.kind], eps=-1.0) for y in (q, k))
        state.put(f"l{i}.k", k, pos)
        state.put(f"l{i}.v", v, pos)
        y = state.attend(q, [Read(f"l{i}.k", f"l{i}.v")], pos, c.head_dim**-0.5)
        return self.out(y.flatten(1))

    def convolve(self, raw: Tensor, pos: Tensor, state: State) -> Tensor:
        """Two causal convolutions of width 2 over raw [T, channels]: [T, heads, head_dim].

        Zeros stand before the text, once: the second convolution sees what the first makes of
        them, its bias.
        """
        n, dim = raw.shape[0], self.c.head_dim
        heads = self.c.channels // dim
        state.put(f"l{self.i}.qk", raw[:, None], pos)
        at = pos - 2 + torch.arange(n + 2, device=pos.device)
        rows = state.take(f"l{self.i}.qk", at)[:, 0]
        tap = self.depth["weight"]()[:, 0]
        rows = rows[:-1] * tap[:, 0] + rows[1:] * tap[:, 1] + self.depth["bias"]()
        pairs = torch.stack((rows[:-1], rows[1:]), -1).reshape(n, heads, 2 * dim)
        # The weight is the left factor, so that it is multiplied as it is stored: [out, in, 2].
        taps = self.group["weight"]().reshape(heads, dim, 2 * dim)
        mixed = torch.matmul(taps, pairs.permute(1, 2, 0)).permute(2, 0, 1)
        return mixed + self.group["bias"]().reshape(heads, dim)


def l2(x: Tensor) -> Tensor:
    """Each head scaled to the length sqrt(dim)."""
    length = x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)
    return x * (x.shape[-1] ** 0.5 / length)


class Router(nn.Module):
    """One of `experts` + 1 classes a token, the last of which is no expert.

    Its hidden state goes on to the next layer's router: `before` is that of the layer below.
    """

    def __init__(self, c: Config, w: Weights, at: str):
        super().__init__()
        self.eps = c.norm_eps
        self.down, self.out = w.linear(f"{at}.down"), w.linear(f"{at}.out")
        self.fc1, self.fc2 = w.linear(f"{at}.fc1"), w.linear(f"{at}.fc2")
        self.norm, self.balance = (
            w.norm(f"{at}.norm", c.norm_eps),
            w.value(f"{at}.balancing_biases"),
        )
        deep = f"{at}.router_states_scale"
        self.depth_scale = w.value(deep) if deep in w else None

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Index and weight [T, 1], and the hidden state [T, router_width]."""
        hidden = self.down(x)
        if self.depth_scale is not None and before is not None:
            hidden = hidden + before * self.depth_scale()
        y = F.gelu(self.fc2(F.gelu(self.fc1(self.norm(hidden)))))
        share = self.out(y).softmax(-1)
        index = (share + self.balance()).argmax(-1, keepdim=True)
        return index, share.gather(-1, index), hidden


class Mix(nn.Module):
    """Residual and a block's output, each shifted and scaled channel by channel."""

    def __init__(self, w: Weights, at: str):
        super().__init__()
        self.values = w.values(f"{at}.")

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        v = self.values
        y = (y + v["hidden_states_bias"]()) * v["hidden_states_scale"]()
        return y + (x + v["residual_bias"]()) * v["residual_scale"]()


class Layer(nn.Module):
    def __init__(self, c: Config, w: Weights, i: int):
        super().__init__()
        at = f"layers.{i}"
        self.attn_norm, self.attn = w.norm(f"{at}.attn_norm", c.norm_eps), Attention(c, w, i)
        self.attn_mix = Mix(w, f"{at}.attn_mix")
        self.mlp_norm, self.router = (
            w.norm(f"{at}.mlp_norm", c.norm_eps),
            Router(c, w, f"{at}.router"),
        )
        self.experts, self.mlp_mix = w.experts(f"{at}.experts", "silu"), Mix(w, f"{at}.mlp_mix")

    def forward(
        self, x: Tensor, before: Tensor | None, ropes: Ropes, pos: Tensor, at: Tensor, state: State
    ) -> tuple[Tensor, Tensor]:
        x = self.attn_mix(self.attn(self.attn_norm(x), ropes, pos, at, state), x)
        h = self.mlp_norm(x)
        index, weight, routed = self.router(h, before)
        return self.mlp_mix(self.experts(h, index, weight), x), routed


class Net(nn.Module):
    def __init__(self, c: Config, w: Weights):
        super().__init__()
        self.embed = w.embedding("embed")
        self.bias, self.scale = w.value("embed_bias"), w.value("embed_scale")
        ropes = {FULL: c.rope, SLIDING: c.sliding_rope}
        self.angles = nn.ModuleDict({k: parts.Angles(ropes[k]) for k in sorted(set(c.pattern))})
        self.layers = nn.ModuleList(Layer(c, w, i) for i in range(c.layers))
        self.norm, self.head = w.norm("norm", c.norm_eps), w.head()

    def forward(self, ids: Tensor, pos: Tensor, state: State, rows: Tensor | None = None) -> Tensor:
        x = (self.embed(ids) + self.bias()) * self.scale()
        at = pos + torch.arange(ids.shape[0], device=pos.device)
        ropes = {kind: angles(at) for kind, angles in self.angles.items()}
        routed = None
        for layer in self.layers:
            x, routed = layer(x, routed, ropes, pos, at, state)
        return x

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))

    def prefill(self, ids: Tensor, pos: Tensor, state: State, rows: Tensor | None = None) -> None:
        self(ids, pos, state, rows)
