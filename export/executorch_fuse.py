"""Puts the operators of our own engine into a traced program, where they compute several nodes.

A net is traced in stock operators; what lies between two products becomes one operator each here,
and so does a product with float weights. It is the graph that is matched, so nets say nothing of
it, and a form that is not matched is computed by the stock operators it was traced in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from edge_kv.export import executorch_ops as op
from edge_kv.nets.ops import GELU, SILU

_aten: Any = torch.ops.aten


def fuse(program: ExportedProgram) -> None:
    """Replace what our engine has an operator for, in place."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        rewrite = _REWRITES.get(node.target) if node.op == "call_function" else None
        if rewrite:
            rewrite(graph, node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def call(graph: Graph, like: Node, target: Any, *args: Any) -> Node:
    """A node before `like`, with the shape and the origin of that one."""
    with graph.inserting_before(like):
        made: Node = graph.call_function(target, args)
    made.meta = dict(like.meta)
    return made


def _linear(graph: Graph, node: Node) -> None:
    x, weight, *bias = _args(node)
    made = call(graph, node, op.linear.default, x, weight)
    if bias and bias[0] is not None:
        made = call(graph, node, _aten.add.Tensor, made, bias[0])
    node.replace_all_uses_with(made)


def _norm(graph: Graph, node: Node) -> None:
    x, shape, weight, eps = _args(node)
    if isinstance(shape, (list, tuple)) and len(shape) == 1 and eps is not None:
        node.replace_all_uses_with(call(graph, node, op.rms_norm.default, x, weight, eps))


def _gated(graph: Graph, node: Node) -> None:
    """`nets.ops.gated`: act(gate) * up, both bounded where there is a limit."""
    activated, up = _args(node)
    if _is(activated, _aten.silu.default):
        act = SILU
    elif _is(activated, _aten.gelu.default) and activated.kwargs.get("approximate") == "tanh":
        act = GELU
    else:
        return
    gate, limit = activated.args[0], 0.0
    if not isinstance(up, Node) or gate.meta["val"].shape != up.meta["val"].shape:
        return
    if _is(gate, _aten.clamp.default) and _is(up, _aten.clamp.default):
        bound = gate.args[-1]
        if gate.args[1] is None and up.args[1:] == (-bound, bound) and bound > 0:
            gate, up, limit = gate.args[0], up.args[0], float(bound)
    node.replace_all_uses_with(call(graph, node, op.gated.default, gate, up, act, limit))


def _args(node: Node) -> tuple[Any, ...]:
    return node.args


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.target is target


_REWRITES: dict[Any, Callable[[Graph, Node], None]] = {
    _aten.linear.default: _linear,
    _aten.rms_norm.default: _norm,
    _aten.mul.Tensor: _gated,
}
