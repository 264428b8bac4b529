"""The modules that hold weights, and the provider that makes them from a model's weight rows.

A net asks the provider for each of its parts by name and never states a shape: shapes are in the
rows of `models.x.weights`. The provider here makes float modules; one for packed weights overrides
`linear`, `embedding` and `experts`. Every module knows which rows of which stored tensor it holds,
so that loading, placing graph initializers and streaming need no names but these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_kv.models.model import Weight
from edge_kv.nets import parts
from edge_kv.nets.ops import to_steps
from edge_kv.nets.state import State


class Decoder(Protocol):
    """What every net offers; T tokens `ids` [T] start at absolute position `pos` [1].

    `rows` are the token rows of a per-layer embedding [T, layers, dim], for nets that have one.
    """

    def __call__(
        self, ids: Tensor, pos: Tensor, state: State, rows: Tensor | None = None
    ) -> Tensor:
        """Write the state of all tokens; the residual [T, …] that `logits` takes."""

    def logits(self, x: Tensor) -> Tensor:
        """Logits [T, vocab] of a residual."""

    def prefill(self, ids: Tensor, pos: Tensor, state: State, rows: Tensor | None = None) -> None:
        """Write the state of all tokens and nothing else."""


class Drafter(Protocol):
    """What the net of a drafter offers, which reads the state of its target and writes none."""

    def __call__(self, ids: Tensor, hidden: Tensor, pos: Tensor, state: State) -> Tensor:
        """A row [1, …] that `carry` and `logits` take.

        Args:
            ids: the last token [1], whose own rows are not in the state yet.
            hidden: [1, width] of the token before it: at the start of a burst of drafts what the
                target hands out (`hidden` of its net), then what `carry` made.
            pos: position [1] of the token the burst started from, constant in it.
        """

    def carry(self, y: Tensor) -> Tensor:
        """The `hidden` [1, width] of the next draft."""

    def logits(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [n] of some tokens, and which these are [n]; None where they are all."""


class Rows(NamedTuple):
    """Rows `start` … of the stored tensor `name`."""

    name: str
    start: int = 0


class Holder(nn.Module):
    """A module whose parameters are stored tensors; `held` says which rows of which.

    Args:
        held: parameter or buffer of this module -> the stored rows in it.
    """

    group = 0  # token ids of one stored row, in modules that look rows up by token id

    def __init__(self, **held: Rows):
        super().__init__()
        self.held = held

    def hold(self, name: str, shape: tuple[int, ...], rows: Rows) -> None:
        """A parameter called `name` for the stored `rows`."""
        self.held[name] = rows
        self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=False))


class Linear(Holder):
    """x [..., in] -> [..., out], weight [out, in], with a bias where one is stored."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, row: Weight, bias: Weight | None, start: int, stop: int):
        super().__init__()
        self.hold("weight", (stop - start, *row.shape[1:]), Rows(row.name, start))
        self.register_parameter("bias", None)
        if bias is not None:
            self.hold("bias", (stop - start,), Rows(bias.name, start))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Stepped(nn.Module):
    """A linear whose inputs and outputs are rounded to 8 bits of fixed steps; 0: not rounded."""

    def __init__(self, linear: nn.Module, before: float, after: float):
        super().__init__()
        self.linear, self.before, self.after = linear, before, after

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(to_steps(x, self.before) if self.before else x)
        return to_steps(out, self.after) if self.after else out


class Embedding(Holder):
    """Rows of a table: ids [T] -> [T, dim]."""

    weight: Tensor
    group = 1

    def __init__(self, row: Weight):
        super().__init__()
        self.hold("weight", row.shape, Rows(row.name))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Norm(Holder):
    """RMS norm over the last axis, times a weight."""

    weight: Tensor

    def __init__(self, row: Weight, eps: float):
        super().__init__()
        self.eps = eps
        self.hold("weight", row.shape, Rows(row.name))

    def forward(self, x: Tensor) -> Tensor:
        return parts.rms(x, self.weight, self.eps)

    def add(self, residual: Tensor, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The residual plus the norm of x, times `scale` where given."""
        out = residual + self(x)
        return out if scale is None else out * scale


class Experts(Holder):
    """Stacked experts, of which each token runs a few: see `parts.experts`."""

    gate_up: Tensor
    down: Tensor

    def __init__(self, gate_up: Weight, down: Weight, act: str, limit: float):
        super().__init__()
        self.act, self.limit = act, limit
        self.hold("gate_up", gate_up.shape, Rows(gate_up.name))
        self.hold("down", down.shape, Rows(down.name))

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return parts.experts(x, index, weight, self.gate_up, self.down, self.act, self.limit)


class Value(Holder):
    """One small tensor that a net computes with: calling it gives the tensor."""

    value: Tensor

    def __init__(self, row: Weight):
        super().__init__()
        if row.dtype == "i64":
            self.held["value"] = Rows(row.name)
            self.register_buffer("value", torch.zeros(row.shape, dtype=torch.int64))
        else:
            self.hold("value", row.shape, Rows(row.name))

    def forward(self) -> Tensor:
        return self.value


class Weights:
    """Makes the modules of a net in float.

    Args:
        rows: all weights of its model.
        steps: linears whose activations are rounded: name -> steps of (input, output).
    """

    def __init__(
        self, rows: Iterable[Weight], steps: Mapping[str, tuple[float, float]] | None = None
    ):
        self.rows = {row.name: row for row in rows}
        self.steps = steps or {}

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    def linear(self, name: str, start: int = 0, stop: int | None = None) -> nn.Module:
        """The linear `name`, or the part of it that computes outputs start … stop-1."""
        row = self.rows[name]
        made = Linear(
            row, self.rows.get(f"{name}.bias"), start, row.shape[0] if stop is None else stop
        )
        return Stepped(made, *self.steps[name]) if name in self.steps else made

    @property
    def head_name(self) -> str:
        """The linear that logits come from: `head`, or `embed` where tied."""
        return "head" if "head" in self else "embed"

    def head(self, name: str = "", cap: float = 0.0) -> nn.Module:
        """The linear `name` as a head, `head_name` if left out: see `parts.Head`."""
        return parts.Head(self, name or self.head_name, cap)

    def embedding(self, name: str) -> nn.Module:
        return Embedding(self.rows[name])

    def experts(self, name: str, act: str, limit: float = 0.0) -> nn.Module:
        """The experts `name`.gate_up [E, 2I, D] and `name`.down [E, D, I]."""
        return Experts(self.rows[f"{name}.gate_up"], self.rows[f"{name}.down"], act, limit)

    def glu(self, at: str, act: str, limit: float = 0.0) -> nn.Module:
        """down(act(gate(x)) * up(x)): see `parts.GLU`."""
        return parts.GLU(self, at, act, limit)

    def gate(self, at: str, act: str) -> nn.Module:
        """proj(act(gate(x)) * factor) of x and a factor: see `parts.Gate`."""
        return parts.Gate(self, at, act)

    def norm(self, name: str, eps: float) -> Norm:
        return Norm(self.rows[name], eps)

    def value(self, name: str) -> Value:
        return Value(self.rows[name])

    def values(self, at: str) -> nn.ModuleDict:
        """Every tensor called `at` and one more word, by that word."""
        names = [n for n in self.rows if n.startswith(at) and "." not in n[len(at) :]]
        return nn.ModuleDict({n[len(at) :]: self.value(n) for n in names})


Read = Callable[[str, int, int], Tensor]  # (stored tensor, start row, stop row) -> values


def holders(net: nn.Module) -> list[Holder]:
    """Every module of `net` that holds weights."""
    return [module for module in net.modules() if isinstance(module, Holder)]


def load(module: nn.Module, read: Read) -> None:
    """Fill all weights of `module` (on the meta device or not) with what `read` yields."""
    for holder in holders(module):
        for name, rows in holder.held.items():
            old: Tensor = getattr(holder, name)
            values = read(rows.name, rows.start, rows.start + old.shape[0])
            replace(holder, name, values.reshape(old.shape).to(old.dtype))


def replace(holder: Holder, name: str, tensor: Tensor) -> None:
    """Put `tensor` in the place of the parameter or buffer `name`."""
    if name in holder._parameters:
        holder._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        holder._buffers[name] = tensor
