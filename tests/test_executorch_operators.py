"""The operators of runtime/native/ops.h as ExecuTorch calls them, and its errors."""

import ctypes
import hashlib
from pathlib import Path

import pytest
import test_native_operators as rows
from native_call import Operators

from edge_kv.runtime import native_library


@pytest.fixture(scope="module")
def operators():
    """The driver over the operators of the engine: a process may register them only once."""
    native_library.load_library()
    sources, libraries = native_library._over_wheel(native_library._wheel())
    flags = sources[native_library.ENGINE[0]]
    driver = Path(__file__).parent / "executorch_call.cpp"
    digest = hashlib.sha256(driver.read_bytes()).hexdigest()
    link = ("-shared", "-fPIC", "-std=c++17", *flags, f"-I{native_library.SOURCES}",
            f"-DDRIVER={digest}", str(driver), *libraries)  # fmt: skip
    kept = dict.fromkeys(native_library.KERNELS, ())
    return Operators(
        ctypes.CDLL(str(native_library.build("executorch_call", kept, link, suffix=".so")))
    )


@pytest.mark.parametrize("storage", ["f32", "f16", "int8"])
def test_state(operators, storage):
    rows.test_rows_are_put_where_they_belong(operators, "avx512vnni", storage)
    rows.test_attend_to_everything(operators, "avx512vnni", storage, 2, 4, 32)
    rows.test_attend_to_two_tables(operators, "avx512vnni", storage, 2, True)
    rows.test_select_takes_the_best(operators, "avx512vnni", storage, 6, 8, 37)


@pytest.mark.parametrize("style", ["halves", "pairs_last"])
def test_rows_on_their_way(operators, style):
    rows.test_norm_rope(operators, "scalar", style, 2, 65, 7)
    rows.test_sinkhorn(operators)


def test_put_tells_where_the_next_row_goes(operators):
    """What follows `put_in_place` waits for its result, the index after the last row."""
    inputs, _ = rows.good_calls()["put"]
    assert operators.run("put", inputs).tolist() == [4 + 3]


def test_experts(operators):
    rows.test_experts_q(operators, "avx512vnni", ("code4-s8", "int8-s8"), "gelu_tanh", 0.0)
    rows.test_experts_q(operators, "avx512vnni", None, "silu", 0.8)


@pytest.mark.parametrize(("name", "inputs", "attributes", "says"), rows.BAD)
def test_what_does_not_fit_is_logged(operators, name, inputs, attributes, says):
    rows.test_what_does_not_fit_is_one_sentence(operators, name, inputs, attributes, says)
