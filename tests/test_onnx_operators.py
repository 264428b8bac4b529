"""The operators of runtime/native/ops.h in onnxruntime, in place of functions or alone."""

import gc
import resource

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from native_call import Operators
from onnx import TensorProto, helper
from test_native_operators import BAD, good_calls

from edge_kv.runtime import native_library

ONNX_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int64": 7, "float16": 10}
WRITTEN = {"put": (0, 1)}  # inputs that come back as outputs
OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid("edge_kv", 1)]


@pytest.fixture(scope="module")
def library():
    return str(native_library.build_onnx_operators())


def session_of(model, library, threads=2):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if library:
        options.add_session_config_entry("edge_kv.threads", str(threads))
        options.register_custom_ops_library(library)
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def model_of(name, arrays, attributes, functions=(), **node):
    """A program of one node, whose results have no shape of their own."""
    given = [None if a is None else f"i{i}" for i, a in enumerate(arrays)]
    while given[-1] is None:
        given.pop()
    inputs = [
        helper.make_tensor_value_info(n, ONNX_TYPES[a.dtype.name], list(a.shape))
        for n, a in zip(given, arrays, strict=False)
        if n
    ]
    kinds = [ONNX_TYPES[arrays[i].dtype.name] for i in WRITTEN.get(name, ()) if given[i]]
    kinds = kinds or [TensorProto.INT64 if name == "select" else TensorProto.FLOAT]
    outputs = [helper.make_tensor_value_info(f"o{i}", k, None) for i, k in enumerate(kinds)]
    made = helper.make_node(
        name, [n or "" for n in given], [o.name for o in outputs], domain="edge_kv", **attributes,
        **node,
    )  # fmt: skip
    graph = helper.make_graph([made], "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=10, functions=list(functions))


def feeds(arrays):
    return {f"i{i}": a for i, a in enumerate(arrays) if a is not None}


def run(name, arrays, attributes, library):
    return session_of(model_of(name, arrays, attributes), library).run(None, feeds(arrays))


@pytest.mark.parametrize("name", good_calls())
@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_onnxruntime_computes_what_the_kernels_do(library, name, storage):
    arrays, attributes = good_calls()[name]
    if name in ("put", "attend"):
        tables = {"put": (0, 1), "attend": (3, 4, 5, 6)}[name]
        for rows, scales in zip(tables[::2], tables[1::2], strict=True):
            arrays[rows] = np.random.default_rng(1).integers(-9, 9, (6, 2, 8)).astype(storage)
            arrays[scales] = arrays[scales] if storage == "int8" else None
    found = run(name, arrays, attributes, library)
    copies = [None if a is None else a.copy() for a in arrays]
    wanted = Operators().run(name, copies, isa="scalar", **attributes)
    wanted = [copies[i] for i in WRITTEN.get(name, ()) if copies[i] is not None] or [wanted]
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.sort(got), np.sort(want), rtol=2e-3, atol=2e-3)


def test_a_table_is_written_in_place_where_it_is_bound_so(library):
    arrays, _ = good_calls()["put"]
    session = session_of(model_of("put", arrays, {}), library)
    whole = session.run(None, feeds(arrays))
    assert not arrays[0].any(), "an input that is not bound as an output was written"
    binding = session.io_binding()
    held = [ort.OrtValue.ortvalue_from_numpy(a) for a in arrays]
    for i, value in enumerate(held):
        binding.bind_ortvalue_input(f"i{i}", value)
    for i in (0, 1):
        binding.bind_ortvalue_output(f"o{i}", held[i])
    session.run_with_iobinding(binding)
    for value, want in zip(held, whole, strict=False):
        np.testing.assert_array_equal(value.numpy(), want)


def constant_function(name, value, overload):
    """A function of two inputs whose result is `value`: not what the operator computes."""
    nodes = [
        helper.make_node("Constant", [], ["c"], value_float=value),
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Expand", ["c", "s"], ["y"]),
    ]
    return helper.make_function(
        "edge_kv", name, ["x", "w"], ["y"], nodes, OPSETS[:1], attributes=["eps", "style"],
        overload=overload,
    )  # fmt: skip


def test_one_operator_replaces_all_overloads_of_a_function(library):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 3, 8)).astype(np.float32), np.ones(8, np.float32)
    overloads = ["short", "long"]
    functions = [
        constant_function("norm_rope", v, o) for v, o in zip((5.0, 7.0), overloads, strict=True)
    ]
    nodes = [
        helper.make_node("norm_rope", ["x", "w"], [f"y{i}"], domain="edge_kv", overload=o,
                         eps=1e-6, style="halves")
        for i, o in enumerate(overloads)
    ]  # fmt: skip
    values = [helper.make_tensor_value_info(n, 1, s) for n, s in (("x", x.shape), ("w", w.shape))]
    results = [helper.make_tensor_value_info(f"y{i}", 1, x.shape) for i in range(2)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values, results),
        opset_imports=OPSETS, ir_version=10, functions=functions,
    )  # fmt: skip
    onnx.checker.check_model(model)
    stock = session_of(model, None).run(None, {"x": x, "w": w})
    assert [y.max() for y in stock] == [5.0, 7.0]
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    for got in session_of(model, library).run(None, {"x": x, "w": w}):
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(("name", "inputs", "attributes", "says"), BAD)
def test_what_does_not_fit_is_an_error_of_the_engine(library, name, inputs, attributes, says):
    arrays, values = good_calls()[name]
    arrays = [inputs.get(i, a) for i, a in enumerate(arrays)]
    with pytest.raises(Exception, match=f"{says}|[Tt]ype"):
        run(name, arrays, {**values, **attributes}, library)


def test_a_missing_attribute_is_an_error(library):
    arrays, _ = good_calls()["sinkhorn"]
    with pytest.raises(Exception, match="eps"):
        run("sinkhorn", arrays, {"iters": 3}, library)


def test_sessions_share_their_operators(library):
    """Loading a program again and again does not add to the process."""
    arrays, attributes = good_calls()["sinkhorn"]
    model = model_of("sinkhorn", arrays, attributes)

    def load(times):
        for _ in range(times):
            session_of(model, library, threads=1).run(None, feeds(arrays))
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    first = load(30)
    assert load(100) - first < 1000  # kB
