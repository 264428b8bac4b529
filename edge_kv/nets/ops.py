"""The operators of a net: one row each, from which everything else about it follows.

A function marked with `@op` is the meaning of an operator. From its signature come a torch custom
op of the same name (functional, and traceable on the meta device), its shape function, its `.out`
form for ExecuTorch, and the node of an ONNX program: tensors are inputs in this order, everything
else is an attribute. `OPERATORS` lists them for the lowerings; `export.onnx_functions` traces the
same functions into bodies of standard ONNX operators.

Tables are [slots, heads, dim] as `edge_kv.plan` describes them, positions are int64 [1], and T is
the number of tokens of a step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op, infer_schema

from edge_kv.formats import GROUP, dequantise, find_format, unpack
from edge_kv.nets.state import MASKED, Read, held_rows, quantize_rows, visible
from edge_kv.plan import Plan

NAMESPACE = "edge_kv"
ROW_BLOCK = 32_768  # rows of a matrix that are floats at a time: a head has many more
HALVES, PAIRS_LAST = "halves", "pairs_last"  # styles of rotation
SILU, GELU = "silu", "gelu_tanh"  # activations of gated products; gelu is the tanh form

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Operator:
    """One operator: what it computes, the torch op that stands for it, and its parameters."""

    name: str
    eager: Callable[..., Any]
    overload: Any  # torch.ops.edge_kv.<name>.default
    parameters: tuple[tuple[str, bool], ...]  # (name, is a tensor), in order
    rewrites: tuple[str, ...] = ()  # inputs it returns anew, those of them that are present

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the inputs, present or not."""
        return tuple(name for name, is_tensor in self.parameters if is_tensor)


OPERATORS: dict[str, Operator] = {}


def op(
    *, like: str | Callable[..., Any] = "", rewrites: tuple[str, ...] = ()
) -> Callable[[_Function], Any]:
    """Register a function as an operator.

    Args:
        like: what the result looks like: the parameter whose shape and dtype it has, or a function
            of all arguments that makes an empty result.
        rewrites: parameters that the operator returns with new content, as a list, instead. Where
            an engine binds them to the memory they came in, they are written in place.
    """

    def register(eager: _Function) -> Any:
        name = eager.__name__
        made = custom_op(f"{NAMESPACE}::{name}", mutates_args=())(eager)
        signature = inspect.signature(eager)

        def shape(*args: Any, **kwargs: Any) -> Any:
            if callable(like):
                return like(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            if rewrites:
                return [_like(given[name]) for name in rewrites if given[name] is not None]
            return _like(given[like])

        made.register_fake(shape)
        _add(name, eager, made, rewrites)
        if not rewrites:
            _out_form(name, infer_schema(eager, mutates_args=()), eager)
        return made

    return register


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _add(name: str, eager: Callable[..., Any], made: Any, rewrites: tuple[str, ...] = ()) -> None:
    parameters = tuple(
        (p.name, "Tensor" in str(p.annotation))
        for p in inspect.signature(eager).parameters.values()
    )
    OPERATORS[name] = Operator(name, eager, made._opoverload, parameters, rewrites)


_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _out_form(name: str, schema: str, eager: Callable[..., Any]) -> None:
    def out_of(*args: Any, out: Tensor, **kwargs: Any) -> Tensor:
        return out.copy_(eager(*args, **kwargs))

    inputs = schema[1 : schema.rindex(")")]
    _library.define(f"{name}.out({inputs}, *, Tensor(a!) out) -> Tensor(a!)")
    _library.impl(f"{name}.out", out_of, "CompositeExplicitAutograd")


def _linear_shape(
    x: Tensor, packed: Tensor, rows: int, format: str, step: float = 0.0, out_step: float = 0.0,
    cap: float = 0.0,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], rows)


@op(like=_linear_shape)
def linear_q(
    x: Tensor, packed: Tensor, rows: int, format: str, step: float = 0.0, out_step: float = 0.0,
    cap: float = 0.0,
) -> Tensor:  # fmt: skip
    """x [T, in] times the matrix [rows, in] behind `packed` (uint8, see `edge_kv.formats`).

    A `step` above 0 rounds x to that many of its steps, -128 … 127; without one, an operator may
    round x to 8 bits as it sees fit. An `out_step` above 0 rounds the products to its steps, a
    `cap` above 0 then bounds them as `softcap` does.
    """
    x = _stepped(x, step)
    parts = [
        x @ stored_values(packed[a // GROUP : -(-b // GROUP)], b - a, x.shape[-1], format).T
        for a, b in row_blocks(rows)
    ]
    out = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    out = _stepped(out, out_step)
    return torch.tanh(out / cap) * cap if cap else out


def row_blocks(rows: int) -> list[tuple[int, int]]:
    """(first, behind the last) of the blocks that a matrix of many rows is taken in."""
    return [(at, min(at + ROW_BLOCK, rows)) for at in range(0, rows, ROW_BLOCK)]


def to_steps(x: Tensor, step: float) -> Tensor:
    """x as whole numbers of `step`, -128 … 127 of them."""
    return (x / step).round().clamp(-128, 127) * step


def _embed_shape(ids: Tensor, packed: Tensor, width: int, format: str) -> Tensor:
    return torch.empty(ids.shape[0], width, device=ids.device)


@op(like=_embed_shape)
def embed_q(ids: Tensor, packed: Tensor, width: int, format: str) -> Tensor:
    """Rows `ids` [T] of the matrix [rows, width] behind `packed`."""
    groups, back = torch.unique(ids // GROUP, return_inverse=True)
    values = stored_values(packed[groups], len(groups) * GROUP, width, format)
    return values[back * GROUP + ids % GROUP]


@op(rewrites=("table", "scales"))
def put(table: Tensor, scales: Tensor | None, rows: Tensor, start: Tensor) -> list[Tensor]:
    """The table with `rows` [n, heads, dim] f32 at rows start … start + n - 1, modulo its length.

    A table with `scales` [slots, heads, 1] is int8 and every head of a row gets a scale of its
    own; other tables hold the rows in their own dtype. Returns [table] or [table, scales].
    """
    slot = torch.remainder(start + _range(rows.shape[0], rows), table.shape[0])
    if scales is None:
        return [table.index_copy(0, slot, rows.to(table.dtype))]
    values, steps = quantize_rows(rows)
    return [table.index_copy(0, slot, values), scales.index_copy(0, slot, steps)]


@op(like="q")
def attend(
    q: Tensor, pos: Tensor, sink: Tensor | None,
    keys1: Tensor, key_scales1: Tensor | None, values1: Tensor, value_scales1: Tensor | None,
    picked1: Tensor | None, keys2: Tensor | None, key_scales2: Tensor | None,
    values2: Tensor | None, value_scales2: Tensor | None, picked2: Tensor | None,
    scale: float, strides: list[int], keeps: list[int],
) -> Tensor:  # fmt: skip
    """Queries [T, heads, dim] at pos … pos + T - 1 over the rows of one or two pairs of tables.

    There is one softmax over everything read, plus an optional logit per head, `sink` [heads],
    that takes weight and adds nothing. A read with `picked` [T, k] sees only those of its rows
    (-1: none). `strides` and `keeps` are those of the keys' tables, one for each read. Returns
    [T, heads, dim].
    """
    tokens, heads, dim = q.shape
    kv_heads = keys1.shape[1]
    group = heads // kv_heads
    at = pos + _range(tokens, pos)
    reads = [(keys1, key_scales1, values1, value_scales1, picked1)]
    if keys2 is not None:
        assert values2 is not None
        reads.append((keys2, key_scales2, values2, value_scales2, picked2))
    folded = _by_head(q, kv_heads, group)
    scores = []
    for (keys, key_scales, _, _, picked), stride, keep in zip(reads, strides, keeps, strict=True):
        rows = held_rows(at[-1:], keys.shape[0], keep)
        seen = visible(at, rows, stride, keep)
        if picked is not None:
            seen = seen & _chosen(picked, keys.shape[0])
        found = folded @ _rows_last(keys)
        if key_scales is not None:
            found = found * _rows_last(key_scales)
        found = found.unflatten(1, (tokens, group)) * scale
        scores.append(torch.where(seen.unsqueeze(1), found, MASKED).flatten(1, 2))
    if sink is not None:
        logit = sink.reshape(kv_heads, 1, group).expand(kv_heads, tokens, group)
        scores.append(logit.reshape(kv_heads, tokens * group, 1))
    weights = (torch.cat(scores, -1) if len(scores) > 1 else scores[0]).softmax(-1)
    mixed: Tensor | None = None
    start = 0
    for _, _, values, value_scales, _ in reads:
        share = weights
        if len(scores) > 1:
            share = weights[:, :, start : start + values.shape[0]]
            start += values.shape[0]
        if value_scales is not None:
            share = share * _rows_last(value_scales)
        part = share @ _rows_first(values)
        mixed = part if mixed is None else mixed + part
    assert mixed is not None
    if tokens == 1:
        return mixed.reshape(1, heads, dim)
    return mixed.unflatten(1, (tokens, group)).transpose(0, 1).reshape(tokens, heads, dim)


Tables = Callable[[str], tuple[Tensor, Tensor | None]]  # a table's values and its scales by name


def attend_reads(
    q: Tensor, pos: Tensor, sink: Tensor | None, reads: Sequence[Read], tables: Tables,
    plan: Plan, scale: float,
) -> Tensor:  # fmt: skip
    """`attend` over `reads` of the tables of a `plan`, at most two."""
    operands: list[Tensor | None] = []
    for read in reads:
        operands += [*tables(read.keys), *tables(read.values), read.picked]
    operands += [None] * (10 - len(operands))
    strides, keeps = zip(*((t.stride, t.keep) for t in (plan[r.keys] for r in reads)), strict=True)
    out: Tensor = attend(q, pos, sink, *operands, scale, list(strides), list(keeps))
    return out


def _by_head(q: Tensor, kv_heads: int, group: int) -> Tensor:
    """[T, kv_heads * group, dim] -> [kv_heads, T * group, dim]."""
    tokens, _, dim = q.shape
    if tokens == 1 or kv_heads == 1:
        return q.reshape(kv_heads, tokens * group, dim)
    return q.reshape(tokens, kv_heads, group, dim).transpose(0, 1).flatten(1, 2)


def _rows_first(table: Tensor) -> Tensor:
    """[slots, heads, dim] -> f32 [heads, slots, dim]."""
    rows = table.to(torch.float32)
    if table.shape[1] == 1:
        return rows.reshape(1, table.shape[0], table.shape[2])
    return rows.transpose(0, 1)


def _rows_last(table: Tensor) -> Tensor:
    """[slots, heads, dim] -> f32 [heads, dim, slots]."""
    return _rows_first(table).transpose(1, 2)


def _chosen(picked: Tensor, slots: int) -> Tensor:
    """Row numbers [T, k], -1 for none, as bool [T, slots]."""
    flags = torch.zeros(picked.shape[0], slots + 1, device=picked.device)
    where = torch.where(picked < 0, slots, picked)
    return flags.scatter(1, where, torch.ones_like(where, dtype=flags.dtype))[:, :slots] > 0


def _select_shape(q: Tensor, weight: Tensor, pos: Tensor, rows: Tensor, scales: Tensor | None,
                  k: int, stride: int) -> Tensor:  # fmt: skip
    return pos.new_empty(q.shape[0], k)


@op(like=_select_shape)
def select(
    q: Tensor, weight: Tensor, pos: Tensor, rows: Tensor, scales: Tensor | None, k: int, stride: int
) -> Tensor:
    """The `k` visible rows that score highest for each token: int64 [T, k], -1 where fewer are.

    The score of one of `rows` [live, 1, dim] is the sum over heads of weight * relu(q . row), with
    q [T, heads, dim] and weight [T, heads]. The order of the result says nothing.
    """
    at = pos + _range(q.shape[0], pos)
    products = q @ _rows_last(rows)  # [T, heads, live]
    if scales is not None:
        products = products * _rows_last(scales)
    scores = (weight.unsqueeze(1) @ products.relu()).squeeze(1)
    seen = visible(at, _range(rows.shape[0], pos), stride, 0)
    scores = torch.where(seen, scores, MASKED)
    nothing = torch.full((q.shape[0], k), MASKED, dtype=scores.dtype, device=scores.device)
    top = torch.cat((scores, nothing), -1).topk(k, -1)
    return torch.where(top.values > MASKED / 2, top.indices, -1)


@op(like="x")
def norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, style: str
) -> Tensor:
    """x [T, heads, dim] normed over dim, then rotated by the angles behind cos and sin [T, n].

    The norm is RMS, times `weight` [dim] where given; a negative `eps` leaves it out. Style
    "halves" turns dims i and i + n for i < n; "pairs_last" turns neighbours of the last 2n dims.
    """
    x = F.rms_norm(x, x.shape[-1:], weight, eps) if eps >= 0 else x
    if cos is None or sin is None:
        return x.clone() if eps < 0 else x
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    n, dim = cos.shape[-1], x.shape[-1]
    if style == HALVES:
        a, b = x[..., :n], x[..., n : 2 * n]
        turned = [a * cos - b * sin, b * cos + a * sin]
        return torch.cat(turned if 2 * n == dim else [*turned, x[..., 2 * n :]], -1)
    pairs = x[..., dim - 2 * n :].unflatten(-1, (n, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    turned_pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return turned_pairs if 2 * n == dim else torch.cat((x[..., : dim - 2 * n], turned_pairs), -1)


@op(like="x")
def sinkhorn(x: Tensor, iters: int, eps: float) -> Tensor:
    """Logits [T, k, k] as matrices whose rows and columns sum to one, nearly.

    A softmax over each row, then `iters` times every column and, between them, every row divided
    by its sum. `eps` is added after the softmax and to every sum.
    """
    mix = x.softmax(-1) + eps
    mix = mix / (mix.sum(1, keepdim=True) + eps)
    for _ in range(iters - 1):
        mix = mix / (mix.sum(2, keepdim=True) + eps)
        mix = mix / (mix.sum(1, keepdim=True) + eps)
    return mix


@op(like="x")
def norm_add(
    x: Tensor, weight: Tensor, residual: Tensor, scale: Tensor | None, eps: float
) -> Tensor:
    """The residual plus the RMS norm of x, both [T, D], times `scale` [1] where given."""
    out = residual + F.rms_norm(x, x.shape[-1:], weight, eps)
    return out if scale is None else out * scale


@op(like="x")
def softcap(x: Tensor, cap: float) -> Tensor:
    """x bounded smoothly to -cap … cap: tanh(x / cap) * cap."""
    return torch.tanh(x / cap) * cap


@op(like="x")
def glu_q(
    x: Tensor, gate: Tensor, up: Tensor | None, factor: Tensor | None, down: Tensor, width: int,
    format: str, up_format: str, down_format: str, act: str, limit: float, step: float = 0.0,
    gate_step: float = 0.0, up_step: float = 0.0, down_step: float = 0.0, out_step: float = 0.0,
) -> Tensor:  # fmt: skip
    """down(gated(gate(x), up(x))) for x [T, D]; instead of up(x) it may be `factor` [T, width].

    gate and up are packed matrices [width, D] and down one [D, width], each with its format. Steps
    above 0 round x, what gate and up give, what down takes and gives: see `linear_q`.
    """
    cols = x.shape[-1]
    x = _stepped(x, step)
    opened = _stepped(x @ stored_values(gate, width, cols, format).T, gate_step)
    if factor is None:
        assert up is not None
        factor = _stepped(x @ stored_values(up, width, cols, up_format).T, up_step)
    hidden = _stepped(gated(opened, factor, act, limit), down_step)
    return _stepped(hidden @ stored_values(down, cols, width, down_format).T, out_step)


def _stepped(x: Tensor, step: float) -> Tensor:
    return to_steps(x, step) if step else x


def gated(gate: Tensor, up: Tensor, act: str, limit: float) -> Tensor:
    """act(gate) * up; a `limit` above 0 first bounds gate from above and up on both sides."""
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (F.silu(gate) if act == SILU else F.gelu(gate, approximate="tanh")) * up


@op(like="x")
def experts_q(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, width: int,
    format: str, down_format: str, act: str, limit: float,
) -> Tensor:  # fmt: skip
    """The sum over the chosen experts e of weight * down_e(gated(gate_up_e(x))).

    x [T, D]; index int64 and weight [T, k], an index outside 0 … E - 1 names no expert; gate_up
    [E, 2I, D] (gate first) and down [E, D, I] with I = `width`, packed where the formats are not
    empty. Only chosen experts are read.
    """
    out = torch.zeros_like(x)
    chosen = [e for e in index.unique().tolist() if 0 <= e < gate_up.shape[0]]
    for e in chosen:
        share = torch.where(index == e, weight, 0.0).sum(-1, keepdim=True)
        into = _matrix(gate_up[e], 2 * width, x.shape[-1], format)
        gate, up = (x @ into.T).chunk(2, -1)
        hidden = gated(gate, up, act, limit)
        out = out + share * (hidden @ _matrix(down[e], x.shape[-1], width, down_format).T)
    return out


def _matrix(stored: Tensor, rows: int, cols: int, format: str) -> Tensor:
    return stored_values(stored, rows, cols, format) if format else stored


def _range(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, device=like.device)


def stored_values(packed: Tensor, rows: int, cols: int, format: str) -> Tensor:
    """The matrix [rows, cols] behind packed groups [groups, bytes of a group], in f32."""
    fmt = find_format(format)
    return torch.from_numpy(dequantise(fmt, unpack(fmt, packed.numpy(), rows, cols)))


def bind(operator: Operator, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of one call by name, defaults included."""
    bound = inspect.signature(operator.eager).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)
