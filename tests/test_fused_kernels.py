"""What lies between two products, and float products, against float64 on every instruction set."""

import ctypes
import math

import numpy as np
import pytest
from kernel_library import MACHINE_ISAS

from edge_kv.runtime.native_library import build_kernels


@pytest.fixture(scope="module")
def library():
    return ctypes.CDLL(str(build_kernels()))


def call(function, isa, threads, *arguments):
    given = [
        ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray)
        else ctypes.c_float(a) if isinstance(a, float) else ctypes.c_int64(a)
        for a in arguments
    ]  # fmt: skip
    assert function(isa.encode(), ctypes.c_int(threads), *given) == 0, f"no {isa} kernels"


# Every remainder of a vector, more than one task, and arguments beyond the range of exp.
EDGES = [0.0, -0.0, 1e-30, -1e-30, 12.0, -12.0, 87.0, -87.0, 1e4, -1e4, 1e20, -1e20]


@pytest.mark.parametrize("isa", MACHINE_ISAS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 33, 50_001])
def test_gates_and_softcaps(library, isa, threads, count):
    rng = np.random.default_rng(count)
    x, up = rng.normal(0, 4, (2, count)).astype(np.float32)
    x[: min(count, len(EDGES))] = EDGES[:count]
    out = np.full(count, np.nan, np.float32)
    wide, y = x.astype(np.float64), up.astype(np.float64)
    with np.errstate(over="ignore"):
        inner = np.clip(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3), -400, 400)
    call(library.edge_kv_gelu_times, isa, threads, x, up, count, out)
    want = 0.5 * wide * (1 + np.tanh(inner)) * y
    np.testing.assert_allclose(out, want, rtol=2e-6, atol=1e-6)
    call(library.edge_kv_softcap, isa, threads, x, count, 30.0, out)
    np.testing.assert_allclose(out, 30 * np.tanh(wide / 30), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("isa", MACHINE_ISAS)
def test_a_softcap_does_not_hide_what_is_not_finite(library, isa):
    x = np.zeros(40, np.float32)
    x[[0, 17, 39]] = np.nan, np.inf, np.nan
    out = np.zeros_like(x)
    call(library.edge_kv_softcap, isa, 1, x, len(x), 30.0, out)
    assert np.flatnonzero(~np.isfinite(out)).tolist() == [0, 17, 39]


@pytest.mark.parametrize("isa", MACHINE_ISAS)
@pytest.mark.parametrize(("rows", "dim"), [(1, 5), (3, 64), (70, 1537)])
def test_norms(library, isa, rows, dim):
    rng = np.random.default_rng(dim)
    x = rng.normal(0, 100, (rows, dim)).astype(np.float32)
    weight = rng.uniform(0.5, 1.5, dim).astype(np.float32)
    out = np.full_like(x, np.nan)
    call(library.edge_kv_norm_rows, isa, 2, x, rows, dim, weight, 1e-6, out)
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * weight
    np.testing.assert_allclose(out, want, rtol=2e-6)


@pytest.mark.parametrize("isa", MACHINE_ISAS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("tokens", "n_in", "n_out"), [(1, 7, 1), (1, 64, 333), (9, 50, 31), (33, 1030, 71)]
)
def test_float_products(library, isa, threads, tokens, n_in, n_out):
    rng = np.random.default_rng(tokens)
    x = rng.normal(size=(tokens, n_in)).astype(np.float32)
    rows = rng.normal(size=(n_out, n_in)).astype(np.float32)
    out = np.full((tokens, n_out), np.nan, np.float32)
    call(library.edge_kv_linear_float, isa, threads, x, tokens, rows, n_out, n_in, out)
    want = x.astype(np.float64) @ rows.astype(np.float64).T
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-6 * n_in)
