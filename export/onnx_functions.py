"""The operators of a net as calls and functions of an ONNX program.

A program calls an operator by its name in the domain `edge_kv`. For every distinct signature (the
types and shapes of its inputs, its attributes) it brings a function of that name, told apart by
ONNX's overload field, made of standard operators: a stock onnxruntime inlines those, and one
registered native operator stands in for all overloads of its name. Functions are traced from the
operators' own meaning in `edge_kv.nets.ops`, except where onnxruntime has a kernel for the whole
thing (`_WRITTEN`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import onnx
import onnx.parser
import onnx_ir as ir
import torch
from onnxscript import evaluator
from onnxscript.values import Opset
from torch import Tensor, nn

from edge_kv.export import stored_in_onnx
from edge_kv.formats import Format, find_format
from edge_kv.nets.ops import OPERATORS, SILU, Operator, bind, row_blocks

DOMAIN = "edge_kv"
CONTRIB = "com.microsoft"
OPSET = 24
_TORCH = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT64: torch.int64,
}
_EXAMPLE_SIZES = (3, 5, 7, 11, 13)  # of the axes a trace leaves open
_onnx: Any = Opset("", OPSET)

# Attributes that a body refers to: that they are above 0 matters, and not their values.
_REFERRED = {
    "linear_q": ("step", "out_step", "cap"),
    "glu_q": ("step", "gate_step", "up_step", "down_step", "out_step"),
}
_BODIES: dict[Any, bytes] = {}  # signature -> function: a trace takes seconds

Trace = Callable[[nn.Module, tuple[Any, ...], tuple[Any, ...]], ir.Model]


def translation_table() -> dict[Any, Callable[..., Any]]:
    """For torch's exporter: how each operator, and what their bodies need, becomes nodes."""
    table: dict[Any, Callable[..., Any]] = {o.overload: _call(o) for o in OPERATORS.values()}
    table[torch.ops.aten.index_copy.default] = _index_copy
    table[torch.ops.aten.arange.default] = _arange
    table[torch.ops.aten.remainder.Scalar] = _remainder
    return table


def _call(operator: Operator) -> Callable[..., Any]:
    """A translation to one node: tensors as inputs, absent ones empty, the rest attributes."""

    def record(*args: Any, **kwargs: Any) -> Any:
        given = bind(operator, args, kwargs)
        inputs = [given[name] for name in operator.tensors]
        results = sum(given[name] is not None for name in operator.rewrites) or 1
        while inputs[-1] is None:
            inputs.pop()
        attributes = {n: given[n] for n, is_tensor in operator.parameters if not is_tensor}
        node = ir.node(operator.name, inputs, attributes, domain=DOMAIN, num_outputs=results)
        evaluator.default().nodes.append(node)  # type: ignore[attr-defined]
        return list(node.outputs) if operator.rewrites else node.outputs[0]

    return record


def _index_copy(table: Any, axis: int, index: Any, rows: Any) -> Any:
    """Rows written in place: ScatterND takes the memory of its input where that is bound so."""
    assert axis == 0
    return _onnx.ScatterND(table, _onnx.Unsqueeze(index, _onnx.Constant(value_ints=[1])), rows)


def _arange(end: Any, **kwargs: Any) -> Any:
    """0 … end-1 as int64: torch's own translation leaves a CastLike that ORT cannot fold."""
    stop = _onnx.Constant(value_int=end) if isinstance(end, int) else _onnx.Cast(end, to=7)
    return _onnx.Range(_onnx.Constant(value_int=0), stop, _onnx.Constant(value_int=1))


def _remainder(x: Any, divisor: Any) -> Any:
    """Of whole numbers, also where the divisor is the length of an open axis."""
    return _onnx.Mod(x, _onnx.Constant(value_int=divisor) if isinstance(divisor, int) else divisor)


def attach_functions(model: ir.Model, trace: Trace) -> None:
    """Give `model` a function for every signature with which it calls an operator of ours.

    `trace` makes an ONNX graph of a module, example inputs and their open axes.
    """
    made: dict[Any, str] = {}  # signature -> overload
    counts: dict[str, int] = {}
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        key = _signature(node)
        if key not in made:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
            made[key] = str(counts[node.op_type])
            if key not in _BODIES:
                body = _WRITTEN[node.op_type](node) if node.op_type in _WRITTEN else (
                    _traced(node, trace)
                )  # fmt: skip
                _BODIES[key] = ir.serde.serialize_function(body).SerializeToString()
            function = _read_function(_BODIES[key])
            function.overload = made[key]
            model.functions[function.identifier()] = function
        node.overload = made[key]
    model.graph.opset_imports.setdefault(DOMAIN, 1)


def _read_function(data: bytes) -> ir.Function:
    return ir.serde.deserialize_function(onnx.FunctionProto.FromString(data))


def _signature(node: ir.Node) -> tuple[Any, ...]:
    """What a function body depends on: open axes count by where they occur first."""
    axes: dict[str, int] = {}
    inputs = [
        v and (v.dtype, *(d if isinstance(d, int) else ("axis", axes.setdefault(str(d), len(axes)))
                          for d in _shape(v)))
        for v in node.inputs
    ]  # fmt: skip
    referred = _REFERRED.get(node.op_type, ())
    attributes = [
        (a.name, a.value > 0 if a.name in referred else str(a.value))
        for a in node.attributes.values()
    ]
    return (node.op_type, tuple(inputs), tuple(attributes), len(node.outputs))


def _shape(value: ir.Value) -> list[Any]:
    assert value.shape is not None
    return list(value.shape)


class _Body(nn.Module):
    """An operator's meaning as a module of the inputs one call has."""

    def __init__(self, operator: Operator, present: list[str], attributes: dict[str, Any]):
        super().__init__()
        self.operator, self.present, self.attributes = operator, present, attributes

    def forward(self, *inputs: Tensor) -> Any:
        given: dict[str, Any] = dict.fromkeys(self.operator.tensors)
        given |= dict(zip(self.present, inputs, strict=True)) | self.attributes
        out = self.operator.eager(**given)
        return tuple(out) if self.operator.rewrites else out


def _traced(node: ir.Node, trace: Trace) -> ir.Function:
    operator = OPERATORS[node.op_type]
    names = operator.tensors[: len(node.inputs)]
    present = [n for n, v in zip(names, node.inputs, strict=True) if v is not None]
    attributes = {a.name: _python(a) for a in node.attributes.values()}
    sizes: dict[str, int] = {}
    examples, axes = [], []
    for value in node.inputs:
        if value is None:
            continue
        shape = _shape(value)
        opened = {i: str(d) for i, d in enumerate(shape) if not isinstance(d, int)}
        for name in opened.values():
            sizes.setdefault(name, _EXAMPLE_SIZES[len(sizes)])
        assert value.dtype is not None
        example = [sizes[opened[i]] if i in opened else d for i, d in enumerate(shape)]
        examples.append(torch.empty(example, dtype=_TORCH[value.dtype], device="meta"))
        order = list(sizes)
        axes.append({i: f"axis{order.index(name)}" for i, name in opened.items()} or None)
    graph = trace(_Body(operator, present, attributes), tuple(examples), (tuple(axes),)).graph
    _inline_constants(graph)
    given = iter(list(graph.inputs))
    graph.inputs[:] = [ir.Value(name=f"no_{n}") if v is None else next(given)
                       for n, v in zip(names, node.inputs, strict=True)]  # fmt: skip
    declared = [ir.Attr(a.name, a.type, None) for a in node.attributes.values()]
    return ir.Function(DOMAIN, node.op_type, graph=graph, attributes=declared)


def _python(attribute: ir.Attr) -> Any:
    value = attribute.value
    return list(value) if isinstance(value, tuple) else value


def _inline_constants(graph: ir.Graph) -> None:
    """Make every initializer a Constant node: a function has no initializers."""
    for value in list(graph.initializers.values()):
        assert value.const_value is not None
        constant = ir.node("Constant", [], {"value": value.const_value})
        graph.insert_before(graph[0], constant)
        value.replace_all_uses_with(constant.outputs[0])
    graph.initializers.clear()


def _parse(text: str) -> ir.Function:
    head = f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}, "{CONTRIB}": 1]>\n'
    return ir.serde.deserialize_function(onnx.parser.parse_function(head + text))


def linear_body(rows: int, cols: int, fmt: Format, given: Collection[str] = ()) -> ir.Function:
    """`linear_q` for one shape of matrix and those of `step`, `out_step`, `cap` that are above 0.

    A matrix of many rows is taken in blocks of them.
    """
    x, text = _rounded("x", "step", given)
    texts, products = [text], []
    blocks = row_blocks(rows)
    for i, (first, stop) in enumerate(blocks):
        packed = "packed" if len(blocks) == 1 else f"packed{i}"
        if len(blocks) > 1:
            texts.append(stored_in_onnx.rows_of("packed", first, stop, packed))
        products.append(f"product{i}")
        texts.append(
            stored_in_onnx.product(
                fmt, x, packed, stop - first, cols, products[i], f"w{i}", rounded="step" in given
            )
        )
    made = products[0]
    if len(products) > 1:
        made = "products"
        texts.append(f"products = Concat <axis = -1> ({', '.join(products)})")
    out, text = _rounded(made, "out_step", given)
    texts.append(text)
    if "cap" in given:
        texts.append(stored_in_onnx.bounded(out, "cap", "bounded"))
        out = "bounded"
    texts.append(f"y = Identity ({out})")
    body = "\n".join(texts)
    return _parse(f"linear_q <rows, format, step, out_step, cap> (x, packed) => (y) {{\n{body}\n}}")


def _rounded(x: str, step: str, given: Collection[str]) -> tuple[str, str]:
    """What stands for `x` rounded to the attribute `step`, if that is among those `given`, and the
    text that makes it."""
    if step not in given:
        return x, ""
    return f"{x}_rounded", stored_in_onnx.to_steps(x, step, f"{x}_rounded")


def _given(node: ir.Node) -> list[str]:
    """The attributes a body refers to that are above 0."""
    return [n for n in _REFERRED[node.op_type] if node.attributes[n].as_float() > 0]


def embed_body(cols: int, fmt: Format) -> ir.Function:
    """`embed_q` for rows of `cols` values."""
    text = stored_in_onnx.lookup(fmt, "ids", "packed", cols, "y")
    return _parse(f"embed_q <width, format> (ids, packed) => (y) {{\n{text}\n}}")


def _linear(node: ir.Node) -> ir.Function:
    x = node.inputs[0]
    assert x is not None
    return linear_body(
        node.attributes["rows"].as_int(), _shape(x)[-1], _format(node, "format"), _given(node)
    )


def _embed(node: ir.Node) -> ir.Function:
    return embed_body(node.attributes["width"].as_int(), _format(node, "format"))


def _format(node: ir.Node, name: str) -> Format:
    return find_format(node.attributes[name].as_string())


def _experts(node: ir.Node) -> ir.Function:
    """A loop over the experts some token chose; each takes its tokens' rows together."""
    x, gate_up = node.inputs[0], node.inputs[3]
    assert x is not None and gate_up is not None
    dim, width = _shape(x)[-1], node.attributes["width"].as_int()
    limit = node.attributes["limit"].as_float()
    act = node.attributes["act"].as_string()
    into = _product("tokens", "gate_up", "into", 2 * width, dim, node.attributes["format"])
    out = _product("hidden", "down", "out", dim, width, node.attributes["down_format"])
    return _parse(f"""experts_q <width, format, down_format, act, limit>
        (x, index, weight, gate_up, down) => (y) {{
        none = Constant <value_int = 0> ()
        nothing = Constant <value_float = 0.0> ()
        count = Constant <value_int = {_shape(gate_up)[0]}> ()
        last = Constant <value_ints = [1]> ()
        first = Constant <value_ints = [0]> ()
        from_zero = GreaterOrEqual (index, none)
        below = Less (index, count)
        named = And (from_zero, below)
        which = Where (named, index, none)
        share = Where (named, weight, nothing)
        chosen, at, back, often = Unique <sorted = 1> (which)
        steps = Size (chosen)
        shape = Shape (x)
        start = ConstantOfShape (shape)
        go = Constant <value = bool {{1}}> ()
        y = Loop <body = one (int64 i, bool still, float[t, d] sum)
                => (bool on, float[t, d] more) {{
            on = Identity (still)
            e = Gather (chosen, i)
            hit = Equal (which, e)
            shares = Where (hit, share, nothing)
            of_token = ReduceSum <keepdims = 0> (shares, last)
            hit_number = Cast <to = 7> (hit)
            hits = ReduceMax <keepdims = 0> (hit_number, last)
            rows_row = NonZero (hits)
            rows = Squeeze (rows_row, first)
            tokens = Gather (x, rows)
            {into}
            gate, up = Split <axis = -1, num_outputs = 2> (into)
            {gated_text("gate", "up", act, limit)}
            {out}
            weights = Gather (of_token, rows)
            weights_column = Unsqueeze (weights, last)
            part = Mul (out, weights_column)
            where = Unsqueeze (rows, last)
            more = ScatterND <reduction = "add"> (sum, where, part)
        }}> (steps, go, start)
    }}""")


def _product(tokens: str, stack: str, out: str, rows: int, cols: int, format: ir.Attr) -> str:
    """Text of `out` = tokens times the matrix [rows, cols] of expert e."""
    name = format.as_string()
    matrix = f"{stack}_e = Gather <axis = 0> ({stack}, e)\n"
    if not name:
        return f"""{matrix}
            {stack}_t = Transpose <perm = [1, 0]> ({stack}_e)
            {out} = MatMul ({tokens}, {stack}_t)"""
    fmt = find_format(name)
    return matrix + stored_in_onnx.product(fmt, tokens, f"{stack}_e", rows, cols, out, stack)


def _glu(node: ir.Node) -> ir.Function:
    x, factor = node.inputs[0], node.inputs[3]
    assert x is not None
    cols, width, given = _shape(x)[-1], node.attributes["width"].as_int(), _given(node)
    into, text = _rounded("x", "step", given)
    texts = [text]

    def multiply(
        x: str, matrix: str, rows: int, cols: int, form: str, step: str, out_step: str
    ) -> str:
        fmt, out = _format(node, form), f"{matrix}_product"
        texts.append(
            stored_in_onnx.product(fmt, x, matrix, rows, cols, out, matrix, rounded=step in given)
        )
        out, text = _rounded(out, out_step, given)
        texts.append(text)
        return out

    opened = multiply(into, "gate", width, cols, "format", "step", "gate_step")
    other = "factor"
    if factor is None:
        other = multiply(into, "up", width, cols, "up_format", "step", "up_step")
    act, limit = node.attributes["act"].as_string(), node.attributes["limit"].as_float()
    texts.append(gated_text(opened, other, act, limit))
    hidden, text = _rounded("hidden", "down_step", given)
    texts.append(text)
    out = multiply(hidden, "down", cols, width, "down_format", "down_step", "out_step")
    steps = ", ".join(_REFERRED["glu_q"])
    body = "\n".join([*texts, f"y = Identity ({out})"])
    return _parse(f"""glu_q <width, format, up_format, down_format, act, limit, {steps}>
        (x, gate, up, factor, down) => (y) {{
        {body}
    }}""")


def gated_text(gate: str, up: str, act: str, limit: float) -> str:
    """Text of `hidden`, the gated product of two values; a limit above 0 bounds them first."""
    bounded = f"""
            most = Constant <value_float = {limit:.9g}> ()
            least = Neg (most)
            bounded_gate = Clip ({gate}, , most)
            bounded_up = Clip ({up}, least, most)""" if limit else f"""
            bounded_gate = Identity ({gate})
            bounded_up = Identity ({up})"""  # fmt: skip
    turned = """
            squashed = Sigmoid (bounded_gate)
            opened = Mul (bounded_gate, squashed)""" if act == SILU else """
            opened = Gelu <approximate = "tanh"> (bounded_gate)"""  # fmt: skip
    return f"""{bounded}{turned}
            hidden = Mul (opened, bounded_up)"""


_WRITTEN: dict[str, Callable[[ir.Node], ir.Function]] = {
    "linear_q": _linear,
    "embed_q": _embed,
    "experts_q": _experts,
    "glu_q": _glu,
}
