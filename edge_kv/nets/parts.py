"""What several nets compute alike: norms, rotary embedding, gated units, experts, heads.

Functions that a lowering may replace by one operator (`norm_rope`, `experts`, `sinkhorn`) are
called by every net through this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_kv.models.model import Rope, Yarn

if TYPE_CHECKING:
    from edge_kv.nets.weights import Weights

HALVES, PAIRS_LAST = "halves", "pairs_last"  # which dims of a head turn together
HEAD_BLOCKS = 8  # row blocks of the LM head: smaller transients than one [vocab, hidden] product


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) [* weight] over the last axis."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float,
    style: str = HALVES,
) -> Tensor:  # fmt: skip
    """RMS norm of each head, then rotation: x [T, heads, dim], cos and sin [T, n].

    `weight` None: a norm without one; eps < 0: no norm; cos None: no rotation.
    """
    if eps >= 0:
        x = rms(x, weight, eps)
    return x if cos is None or sin is None else rotate(x, cos, sin, style)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, style: str) -> Tensor:
    """Turn n pairs of dims of each head by its angle; the other dims pass.

    "halves": dim j with dim n + j, of the first 2n dims. "pairs_last": dims 2j and 2j + 1 of the
    last 2n dims.
    """
    n = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if style == HALVES:
        a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)
    rest, turned = x[..., : -2 * n], x[..., -2 * n :].unflatten(-1, (n, 2))
    a, b = turned[..., 0], turned[..., 1]
    pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((rest, pairs.flatten(-2)), -1)


class Angles(nn.Module):
    """cos and sin [T, n] of one rope at positions [T]."""

    frequency: Tensor

    def __init__(self, rope: Rope):
        super().__init__()
        self.gain = rope.gain
        # Made on the CPU also where the net is on the meta device: they come from no checkpoint.
        with torch.device("cpu"):
            self.register_buffer("frequency", frequencies(rope), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions.to(torch.float32).unsqueeze(1) * self.frequency
        cos, sin = torch.cos(angle), torch.sin(angle)
        return (cos, sin) if self.gain == 1.0 else (cos * self.gain, sin * self.gain)


def frequencies(rope: Rope) -> Tensor:
    """Radians a position turns each pair [dim / 2], in f32 as transformers computes them."""
    pairs = torch.arange(0, rope.dim, 2, dtype=torch.float32)
    base = 1.0 / (rope.theta ** (pairs / rope.dim))
    base[rope.pairs :] = 0.0
    scaling = rope.scaling
    if scaling is None:
        return base / rope.factor if rope.factor != 1.0 else base
    if isinstance(scaling, Yarn):
        # YaRN (arXiv 2309.00071): pairs that turn often keep their frequency, slow ones divide it
        # by the factor, with a ramp between.
        def pair(turns: float) -> float:
            return (
                rope.dim
                * math.log(scaling.original / (turns * 2 * math.pi))
                / (2 * math.log(rope.theta))
            )

        low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
        low, high = max(math.floor(low), 0), min(math.ceil(high), rope.dim - 1)
        ramp = (torch.arange(rope.dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)
        keep = 1 - ramp.clamp(0, 1)
        return base / rope.factor * (1 - keep) + base * keep
    # Llama 3: wavelengths beyond original/low are divided by the factor, those below
    # original/high are kept, those between are blended.
    wavelength = 2 * math.pi / base
    blend = (scaling.original / wavelength - scaling.low) / (scaling.high - scaling.low)
    mixed = (1 - blend) * base / rope.factor + blend * base
    scaled = torch.where(wavelength > scaling.original / scaling.low, base / rope.factor, base)
    medium = (wavelength >= scaling.original / scaling.high) & (
        wavelength <= scaling.original / scaling.low
    )
    return torch.where(medium, mixed, scaled)


def gated(gate: Tensor, up: Tensor, act: str, limit: float = 0.0) -> Tensor:
    """act(gate) * up; with a `limit`, gate is cut above it and up on both sides."""
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ACTIVATIONS[act](gate) * up


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": _gelu_tanh}


class GLU(nn.Module):
    """down(act(gate(x)) * up(x)): the linears `at`.gate, `at`.up and `at`.down."""

    def __init__(self, w: Weights, at: str, act: str, limit: float = 0.0):
        super().__init__()
        self.act, self.limit = act, limit
        self.gate, self.up = w.linear(f"{at}.gate"), w.linear(f"{at}.up")
        self.down = w.linear(f"{at}.down")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gated(self.gate(x), self.up(x), self.act, self.limit))


def experts(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, act: str, limit: float
) -> Tensor:
    """Sum over the chosen experts of weight * down_e(act(gate_e x) * up_e x).

    x [T, D]; index, weight [T, k]; gate_up [E, 2I, D] (gate first); down [E, D, I]. An index that
    names no expert adds nothing.
    """
    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        token, place = (index == e).nonzero(as_tuple=True)
        if token.numel():
            gate, up = (x[token] @ gate_up[e].T).chunk(2, -1)
            y = gated(gate, up, act, limit) @ down[e].T
            out.index_add_(0, token, weight[token, place, None] * y)
    return out


def sinkhorn(x: Tensor, iters: int, eps: float) -> Tensor:
    """Logits [T, k, k] to nearly doubly stochastic matrices: rows, then columns, `iters` times."""
    x = x.softmax(-1) + eps
    x = x / (x.sum(1, keepdim=True) + eps)
    for _ in range(iters - 1):
        x = x / (x.sum(2, keepdim=True) + eps)
        x = x / (x.sum(1, keepdim=True) + eps)
    return x


class Head(nn.Module):
    """Logits of normed rows [T, hidden]: row blocks of `head`, or of `embed` where tied."""

    def __init__(self, w: Weights):
        super().__init__()
        name = "head" if "head" in w else "embed"
        self.blocks = nn.ModuleList(
            w.linear(name, start, stop) for start, stop in head_blocks(w.rows[name].shape[0])
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([block(x) for block in self.blocks], -1)


def head_blocks(vocab: int) -> Sequence[tuple[int, int]]:
    """Row ranges of the LM head's blocks, whole multiples of 64 rows except the last."""
    step = -(-vocab // HEAD_BLOCKS // 64) * 64 if vocab >= 64 * HEAD_BLOCKS else vocab
    return [(at, min(at + step, vocab)) for at in range(0, vocab, step)]
