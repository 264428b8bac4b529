"""What several nets compute alike: norms, rotary embedding, gated units, experts, heads.

Functions that a lowering may replace by one operator (`norm_rope`, `experts`, `sinkhorn`,
`softcap`) are called by every net through this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_kv.models.model import Divisors, Rope, Yarn
from edge_kv.nets import ops
from edge_kv.nets.ops import HALVES, gated, row_blocks

if TYPE_CHECKING:
    from edge_kv.nets.weights import Weights


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) [* weight] over the last axis."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float,
    style: str = HALVES,
) -> Tensor:  # fmt: skip
    """RMS norm of each head, then rotation: see `ops.norm_rope`."""
    out: Tensor = ops.norm_rope(x, weight, cos, sin, eps, style)
    return out


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
    if isinstance(scaling, Divisors):
        return base / torch.tensor(scaling.values)
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


def _sqrt_softplus(x: Tensor) -> Tensor:
    return F.softplus(x).sqrt()


def _softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


# What a router's logits [T, experts] become.
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": _softmax,
    "sqrtsoftplus": _sqrt_softplus,
}


class GLU(nn.Module):
    """down(act(gate(x)) * up(x)): the linears `at`.gate, `at`.up and `at`.down."""

    def __init__(self, w: Weights, at: str, act: str, limit: float = 0.0):
        super().__init__()
        self.act, self.limit = act, limit
        self.gate, self.up = w.linear(f"{at}.gate"), w.linear(f"{at}.up")
        self.down = w.linear(f"{at}.down")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gated(self.gate(x), self.up(x), self.act, self.limit))


class Gate(nn.Module):
    """proj(act(gate(x)) * factor): the linears `at`.gate and `at`.proj."""

    def __init__(self, w: Weights, at: str, act: str):
        super().__init__()
        self.act = act
        self.gate, self.proj = w.linear(f"{at}.gate"), w.linear(f"{at}.proj")

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        return self.proj(gated(self.gate(x), factor, self.act, 0.0))


def experts(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, act: str, limit: float
) -> Tensor:
    """Sum over the chosen experts of float stacks: see `ops.experts_q`."""
    out: Tensor = ops.experts_q(x, index, weight, gate_up, down, down.shape[-1], "", "", act, limit)
    return out


def sinkhorn(x: Tensor, iters: int, eps: float) -> Tensor:
    """Logits [T, k, k] to nearly doubly stochastic matrices: see `ops.sinkhorn`."""
    out: Tensor = ops.sinkhorn(x, iters, eps)
    return out


def softcap(x: Tensor, cap: float) -> Tensor:
    """tanh(x / cap) * cap: see `ops.softcap`."""
    out: Tensor = ops.softcap(x, cap)
    return out


class Head(nn.Module):
    """Logits of normed rows [T, hidden], bounded by a `cap` above 0.

    The weight `name` is taken in blocks of rows: smaller transients than one [vocab, hidden] has.
    """

    def __init__(self, w: Weights, name: str, cap: float):
        super().__init__()
        self.cap = cap
        blocks = row_blocks(w.rows[name].shape[0])
        self.blocks = nn.ModuleList(w.linear(name, start, stop) for start, stop in blocks)

    def forward(self, x: Tensor) -> Tensor:
        parts = [block(x) for block in self.blocks]
        out = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        return softcap(out, self.cap) if self.cap else out
