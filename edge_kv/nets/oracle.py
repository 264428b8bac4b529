"""The slow truth: a whole text in one step, over a net that never has more than a matrix in memory.

A module reads its weights when it is called and drops them when it is done, so that the float
reference of a full-size model needs no more memory than its largest matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edge_kv import models
from edge_kv.models.model import Model
from edge_kv.nets import make_net
from edge_kv.nets.state import StaticState
from edge_kv.nets.weights import Holder, Read, Weights, holders, load, replace
from edge_kv.parity import Scores

_MANY_ROWS = 100  # a table of fewer rows than that for each one asked for is read as a whole
TokenValues = Callable[[Tensor], Tensor]  # ids [T] -> f32 [T, layers, dim] of a per-layer table


@dataclass(frozen=True)
class Run:
    """A text `ids` [T] that a net has read: its residual x [T, …], and the state of every token."""

    ids: Tensor
    net: Any
    x: Tensor
    state: StaticState

    @torch.no_grad()
    def logits(self, start: int = 0) -> Tensor:
        """Logits [T - start, vocab] of positions start … T-1."""
        logits: Tensor = self.net.logits(self.x[start:])
        return logits

    @torch.no_grad()
    def hidden(self, at: int) -> Tensor:
        """What a drafter takes up of the token at position `at`: [1, width]."""
        hidden: Tensor = self.net.hidden(self.x[at : at + 1])
        return hidden


@torch.no_grad()
def oracle(
    config: Model,
    weights: Weights,
    read: Read,
    ids: Tensor,
    *,
    kv: str = "f32",
    token_values: TokenValues | None = None,
    on_module: Callable[[int, int], None] = lambda done, total: None,
) -> Run:
    """The net of `config` over `ids` [T].

    Args:
        weights: makes the net's modules, float or packed; `read` yields what they hold.
        kv: storage that keys and values pass through, as in the tables of a plan.
        token_values: rows of the per-layer embedding, for models that have one.
        on_module: is told how many modules of how many have run.
    """
    with torch.device("meta"):
        net = make_net(config, weights)
    assert isinstance(net, nn.Module)
    _stream(net, read, on_module)
    plan = models.plan(config, ctx=len(ids), chunk=len(ids), kv=kv)
    rows = token_values(ids) if token_values else None
    state = StaticState(plan)
    return Run(ids, net, net(ids, torch.tensor([0]), state, rows), state)


@torch.no_grad()
def oracle_drafts(
    drafter: Model, weights: Weights, read: Read, run: Run, bursts: Iterable[range]
) -> list[Scores]:
    """What a drafter says behind the tokens of `run` at the positions of each of `bursts`.

    A burst begins where a token is to be written: from the hidden state of the one before.
    """
    with torch.device("meta"):
        net: Any = make_net(drafter, weights)
    _stream(net, read)
    found = []
    for burst in bursts:
        hidden = run.hidden(burst.start - 1)
        for at in burst:
            y = net(run.ids[at : at + 1], hidden, torch.tensor([burst.start]), run.state)
            hidden = net.carry(y)
            logits, tokens = net.logits(y)
            found.append(Scores(logits.numpy(), None if tokens is None else tokens.numpy()))
    return found


def table_values(config: Model, read: Callable[[str, int, int], Any]) -> TokenValues | None:
    """The rows of a checkpoint's per-layer table, one token's at a time; None without one."""
    rows = config.token_rows
    if rows is None:
        return None

    def values(ids: Tensor) -> Tensor:
        parts = [torch.from_numpy(read(rows.name, int(i), int(i) + 1)) for i in ids]
        return torch.cat(parts).view(len(ids), rows.layers, rows.dim)

    return values


def _stream(
    net: nn.Module, read: Read, on_module: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Have every module read its weights when it is called and drop them when it is done.

    Of a token table, which may be larger than everything else, it reads the rows of its tokens
    where these are few.
    """
    found = holders(net)
    empty = {h: {name: getattr(h, name).data for name in h.held} for h in found}  # on meta
    done = 0

    def fill(module: nn.Module, args: Any) -> Any:
        assert isinstance(module, Holder)
        if not module.group:
            load(module, read)
            return None
        (ids,) = args
        [(name, rows)] = module.held.items()
        unique, rank = (ids // module.group).unique(return_inverse=True)
        if len(unique) * _MANY_ROWS > len(getattr(module, name)):
            load(module, read)
            return None
        parts = [read(rows.name, int(i), int(i) + 1) for i in unique]
        replace(module, name, torch.cat(parts))
        return (rank * module.group + ids % module.group,)

    def drop(module: nn.Module, args: Any, out: Any) -> None:
        nonlocal done
        assert isinstance(module, Holder)
        for name in module.held:
            replace(module, name, empty[module][name])
        done = min(done + 1, len(found))  # some run again behind the last
        on_module(done, len(found))

    for holder in found:
        holder.register_forward_pre_hook(fill)
        holder.register_forward_hook(drop)
