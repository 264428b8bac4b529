"""DeepSeek V4: residual streams, one latent as key and value, blocks pooled from raw rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_kv.models.deepseek_v4 import SPARSE, WINDOW, Config
from edge_kv.nets import ops, parts
from edge_kv.nets.state import MASKED, Read, State
from edge_kv.nets.weights import Weights

Rope = tuple[Tensor, Tensor]
PAIRS = ops.PAIRS_LAST


class Pool(nn.Module):
    """Rows of the last one or two windows of `stride` positions, pooled into one block row.

    Every window a step touches is pooled and stored; a block is seen once its window is complete,
    so those of unfinished windows do no harm and are rewritten by the next step.
    """

    def __init__(self, c: Config, w: Weights, i: int, name: str, angles: parts.Angles):
        super().__init__()
        at = f"layers.{i}.attn.{name}"
        self.table, self.stride, self.windows = f"l{i}.{name}", c.stride(i), c.windows(i)
        self.eps, self.angles = c.norm_eps, angles
        self.value, self.gate = w.linear(f"{at}.value"), w.linear(f"{at}.gate")
        self.bias, self.norm = w.value(f"{at}.bias"), w.value(f"{at}.norm")

    def forward(self, x: Tensor, pos: Tensor, at: Tensor, state: State) -> None:
        n, stride, span = x.shape[0], self.stride, self.windows * self.stride
        gate = self.gate(x) + self.bias()[torch.remainder(at, stride)]
        state.put(f"{self.table}.raw", torch.cat((self.value(x), gate), -1)[:, None], pos)
        first = torch.div(pos, stride, rounding_mode="floor")
        blocks = first + torch.arange((n + stride - 2) // stride + 1, device=at.device)
        offset = torch.arange(span, device=at.device)
        rows = blocks[:, None] * stride - (span - stride) + offset
        last = at[-1:]
        raw = state.take(f"{self.table}.raw", torch.minimum(rows, last))[:, :, 0]
        value, gate = raw.chunk(2, -1)
        if self.windows == 2:  # the first half of the channels pools with the next window
            early = (offset < stride)[:, None]
            dim = value.shape[-1] // 2
            value, gate = (torch.where(early, y[..., :dim], y[..., dim:]) for y in (value, gate))
        gate = torch.where(((rows >= 0) & (rows <= last))[..., None], gate, MASKED)
        pooled = (value * gate.softmax(1)).sum(1)[:, None]
        rope: Rope = self.angles(blocks * stride)
        state.put(
            self.table,
            parts.norm_rope(pooled, self.norm(), *rope, eps=self.eps, style=PAIRS),
            first,
        )


class Attention(nn.Module):
    def __init__(self, c: Config, w: Weights, i: int, angles: parts.Angles):
        super().__init__()
        at = f"layers.{i}.attn"
        self.c, self.kv_table, self.block_table = c, f"l{i}.kv", f"l{i}.blocks"
        self.index_table = f"l{i}.index"
        self.q_down, self.q_norm = w.linear(f"{at}.q_down"), w.norm(f"{at}.q_norm", c.norm_eps)
        self.q_up = w.linear(f"{at}.q_up")
        self.kv, self.kv_norm = w.linear(f"{at}.kv"), w.value(f"{at}.kv_norm")
        self.sink = w.value(f"{at}.sink")
        self.blocks = Pool(c, w, i, "blocks", angles) if c.stride(i) else None
        self.index = None
        if c.pattern[i] == SPARSE:
            self.index = Pool(c, w, i, "index", angles)
            self.index_q, self.index_weight = (
                w.linear(f"{at}.index.q"),
                w.linear(f"{at}.index.weight"),
            )
        rank, groups = c.out_rank, range(c.out_groups)
        self.out_down = nn.ModuleList(
            w.linear(f"{at}.out_down", g * rank, (g + 1) * rank) for g in groups
        )
        self.out_up = w.linear(f"{at}.out_up")

    def forward(self, x: Tensor, rope: Rope, pos: Tensor, at: Tensor, state: State) -> Tensor:
        c = self.c
        low = self.q_norm(self.q_down(x))
        q = self.q_up(low).unflatten(-1, (-1, c.head_dim))
        q = parts.norm_rope(q, None, *rope, eps=c.norm_eps, style=PAIRS)
        kv = parts.norm_rope(
            self.kv(x)[:, None], self.kv_norm(), *rope, eps=c.norm_eps, style=PAIRS
        )
        state.put(self.kv_table, kv, pos)
        reads = [Read(self.kv_table, self.kv_table)]
        if self.blocks is not None:
            self.blocks(x, pos, at, state)
            picked = self.pick(x, low, rope, pos, at, state)
            reads.append(Read(self.block_table, self.block_table, picked))
        y = state.attend(q, reads, pos, c.head_dim**-0.5, self.sink())
        y = parts.norm_rope(y, None, rope[0], -rope[1], eps=-1.0, style=PAIRS)  # turned back
        groups = y.reshape(x.shape[0], c.out_groups, -1).unbind(1)
        down = [part(group) for part, group in zip(self.out_down, groups, strict=True)]
        return self.out_up(torch.cat(down, -1))

    def pick(
        self, x: Tensor, low: Tensor, rope: Rope, pos: Tensor, at: Tensor, state: State
    ) -> Tensor | None:
        """The blocks that the indexer chooses for each query; None: all of them."""
        if self.index is None:
            return None
        c = self.c
        self.index(x, pos, at, state)
        q = self.index_q(low).unflatten(-1, (-1, c.index_dim))
        q = parts.norm_rope(q, None, *rope, eps=-1.0, style=PAIRS)
        weight = self.index_weight(x) * (c.index_heads * c.index_dim) ** -0.5
        return state.select(self.index_table, q, weight, pos, c.index_top_k)


class Streams(nn.Module):
    """How one block reads and writes the residual streams x [T, k, D] (hyper-connections)."""

    def __init__(self, c: Config, w: Weights, at: str):
        super().__init__()
        self.c, self.values = c, w.values(f"{at}.")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The block's input [T, D], its output's share [T, k], the streams' mix [T, k, k]."""
        c, k, eps = self.c, self.c.streams, self.c.stream_eps
        scale = self.values["scale"]()
        logits = mixed(x, self.values["fn"](), c.norm_eps)
        into, out, mix = (
            a * scale[j] + b
            for j, (a, b) in enumerate(
                zip(
                    logits.split([k, k, k * k], -1),
                    self.values["base"]().split([k, k, k * k], -1),
                    strict=True,
                )
            )
        )
        mix = parts.sinkhorn(mix.unflatten(-1, (k, k)), c.sinkhorn_iters, eps)
        return gathered(x, torch.sigmoid(into) + eps), 2 * torch.sigmoid(out), mix


def mixed(x: Tensor, fn: Tensor, eps: float) -> Tensor:
    """Streams [T, k, D], normed as one vector, times fn [n, k*D]."""
    return parts.rms(x.flatten(1), None, eps) @ fn.T


def gathered(x: Tensor, share: Tensor) -> Tensor:
    """Sum of the streams [T, k, D] by their shares [T, k]."""
    return (share[..., None] * x).sum(1)


class MoE(nn.Module):
    def __init__(self, c: Config, w: Weights, i: int):
        super().__init__()
        self.c, at = c, f"layers.{i}.moe"
        self.router = w.linear(f"{at}.router")
        self.table = w.value(f"{at}.table") if i < c.hashed else None
        self.bias = None if i < c.hashed else w.value(f"{at}.router_bias")
        self.experts = w.experts(at, "silu", c.limit)
        self.shared = w.glu(f"{at}.shared", "silu", c.limit)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        score = parts.SCORES[self.c.score](self.router(x))
        if self.table is not None:
            index = self.table()[ids]
        else:
            index = (score + self.bias()).topk(self.c.top_k, -1).indices  # type: ignore[misc]
        weight = score.gather(-1, index)
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20) * self.c.routed_scale
        return self.experts(x, index, weight) + self.shared(x)


class Layer(nn.Module):
    def __init__(self, c: Config, w: Weights, i: int, angles: parts.Angles):
        super().__init__()
        at, eps = f"layers.{i}", c.norm_eps
        self.windowed = c.pattern[i] == WINDOW
        self.attn_streams, self.attn_norm = (
            Streams(c, w, f"{at}.attn_streams"),
            w.norm(f"{at}.attn_norm", eps),
        )
        self.attn = Attention(c, w, i, angles)
        self.mlp_streams, self.mlp_norm = (
            Streams(c, w, f"{at}.ffn_streams"),
            w.norm(f"{at}.mlp_norm", eps),
        )
        self.mlp = MoE(c, w, i)

    def forward(
        self,
        x: Tensor,
        ids: Tensor,
        ropes: tuple[Rope, Rope],
        pos: Tensor,
        at: Tensor,
        state: State,
    ) -> Tensor:
        y, out, mix = self.attn_streams(x)
        y = self.attn(self.attn_norm(y), ropes[0 if self.windowed else 1], pos, at, state)
        x = out[..., None] * y[:, None] + mix.transpose(1, 2) @ x
        y, out, mix = self.mlp_streams(x)
        y = self.mlp(self.mlp_norm(y), ids)
        return out[..., None] * y[:, None] + mix.transpose(1, 2) @ x


class Net(nn.Module):
    def __init__(self, c: Config, w: Weights):
        super().__init__()
        self.c = c
        self.embed = w.embedding("embed")
        self.angles, self.block_angles = parts.Angles(c.rope), parts.Angles(c.block_rope)
        self.layers = nn.ModuleList(Layer(c, w, i, self.block_angles) for i in range(c.layers))
        self.streams = w.values("streams.")
        self.norm, self.head = w.norm("norm", c.norm_eps), w.head()

    def forward(self, ids: Tensor, pos: Tensor, state: State, rows: Tensor | None = None) -> Tensor:
        x = self.embed(ids)[:, None].expand(-1, self.c.streams, -1)
        at = pos + torch.arange(ids.shape[0], device=pos.device)
        ropes = self.angles(at), self.block_angles(at)
        for layer in self.layers:
            x = layer(x, ids, ropes, pos, at, state)
        return x

    def logits(self, x: Tensor) -> Tensor:
        v = self.streams
        share = mixed(x, v["fn"](), self.c.norm_eps) * v["scale"]() + v["base"]()
        return self.head(self.norm(gathered(x, torch.sigmoid(share) + self.c.stream_eps)))

    def prefill(self, ids: Tensor, pos: Tensor, state: State, rows: Tensor | None = None) -> None:
        self(ids, pos, state, rows)
