"""Products of stored matrices in the native library, against float64, for every CPU and format."""

from __future__ import annotations

import ctypes
import struct

import numpy as np
import pytest
from kernel_library import EMULATED, MACHINE_ISAS, start_emulator

from edge_kv.formats import BLOCK, FORMATS, Quantised, dequantise, pack
from edge_kv.runtime.native_library import build_kernels

SHAPES = [  # cols, rows: whole groups and lines, ragged ones, a single value
    (256, 48), (576, 37), (100, 5), (1, 1), (1536, 19),
]  # fmt: skip


@pytest.fixture(scope="module")
def native():
    return ctypes.CDLL(str(build_kernels()))


@pytest.fixture(scope="module")
def emulator():
    """The aarch64 build, started when it is first asked for."""
    started = []

    def pipe():
        if not started:
            started.append(start_emulator("max", "weights"))
        return started[0]

    yield pipe
    for process in started:
        process.stdin.close()
        process.wait()
        process.stdout.close()


class Product:
    """A random matrix [rows, cols] of a format and activations x [tokens, cols]."""

    def __init__(self, name, cols, rows=37, tokens=2, step=0.0, seed=0):
        rng = np.random.default_rng(seed)
        self.format, self.step, self.shape = FORMATS[name], step, (tokens, rows, cols)
        spread = np.exp(2 * rng.standard_normal((1, cols)))  # outlier channels
        self.x = (rng.standard_normal((tokens, cols)) * spread).astype(np.float32)
        codes = rng.integers(self.format.low, self.format.high + 1, (rows, cols)).astype(np.int8)
        blocks = row = None
        if self.format.block_scale is not None:
            shape = (rows, self.format.blocks(cols))
            numbers = rng.integers(-128, 128, shape)
            blocks = (numbers if self.format.scale == "s8" else numbers / 100).astype(
                self.format.block_scale
            )
        if self.format.has_row_scales:
            row = (rng.standard_normal(rows) + 0.01).astype(np.float32)
        self.matrix = Quantised(codes, blocks, row)

    def rounded(self):
        """x as it is rounded: a step a block, or the step given."""
        tokens, _, cols = self.shape
        x = np.zeros((tokens, -(-cols // BLOCK) * BLOCK))
        x[:, :cols] = self.x
        blocks = x.reshape(tokens, -1, BLOCK)
        if self.step:
            return np.clip(np.rint(x / np.float32(self.step)), -128, 127)[:, :cols] * self.step
        steps = np.maximum(np.abs(blocks).max(-1, keepdims=True), 1e-20) / 127
        return (np.rint(blocks / steps) * steps).reshape(tokens, -1)[:, :cols]

    def exact(self, x):
        """The product in float64, and what its error is measured by: the sum of magnitudes."""
        weights = dequantise(self.format, self.matrix).astype(np.float64)
        return x @ weights.T, np.abs(x) @ np.abs(weights).T

    def run(self, native, isa, threads=2):
        tokens, rows, cols = self.shape
        data, at, wide = pack(self.format, self.matrix), ctypes.c_void_p, ctypes.c_int64
        assert native.edge_kv_weight_bytes(self.format.name.encode(), *map(wide, (rows, cols))) == (
            data.nbytes
        )
        out = np.full((tokens, rows), np.nan, np.float32)
        status = native.edge_kv_linear_q(
            isa.encode(), threads, self.format.name.encode(), at(self.x.ctypes.data), wide(tokens),
            at(data.ctypes.data), wide(rows), wide(cols), ctypes.c_float(self.step),
            at(out.ctypes.data),
        )  # fmt: skip
        assert status == 0, f"no {isa} kernels on a CPU that has it"
        return out

    def emulate(self, process, isa):
        data = pack(self.format, self.matrix)
        names = (isa.partition(":")[2].encode(), self.format.name.encode())
        head = struct.pack("<16s16s3qd", *names, *self.shape, self.step)
        process.stdin.write(head + self.x.tobytes() + data.tobytes())
        process.stdin.flush()
        (status,) = struct.unpack("<q", process.stdout.read(8))
        assert status == 0
        tokens, rows, _ = self.shape
        out = process.stdout.read(tokens * rows * 4)
        return np.frombuffer(out, np.float32).reshape(tokens, rows)


@pytest.mark.parametrize("isa", MACHINE_ISAS + EMULATED)
@pytest.mark.parametrize("tokens", [1, 15], ids="{} tokens".format)
@pytest.mark.parametrize("name", FORMATS)
def test_product_is_that_of_the_rounded_activations(native, emulator, isa, name, tokens):
    for cols, rows in SHAPES:
        product = Product(name, cols, rows, tokens)
        got = product.emulate(emulator(), isa) if isa in EMULATED else product.run(native, isa)
        want, size = product.exact(product.rounded())
        assert (np.abs(got - want) <= 2e-6 * size + 1e-30).all(), (cols, rows)


@pytest.mark.parametrize("isa", MACHINE_ISAS + EMULATED)
@pytest.mark.parametrize("name", FORMATS)
def test_tokens_together_give_what_each_gives_alone(native, emulator, isa, name):
    """To the bit, for every number of tokens that has a kernel of its own and some beyond."""
    for cols, rows in ((192, 37), (100, 16)):
        product = Product(name, cols, rows, tokens=11)
        x, (_, *shape) = product.x, product.shape

        def run(first, count, product=product, x=x, shape=shape):
            product.x, product.shape = x[first : first + count], (count, *shape)
            if isa in EMULATED:
                return product.emulate(emulator(), isa)
            return product.run(native, isa)

        alone = np.concatenate([run(token, 1) for token in range(11)])
        for count in range(2, 12):
            np.testing.assert_array_equal(run(11 - count, count), alone[11 - count :])


@pytest.mark.parametrize("isa", MACHINE_ISAS + EMULATED)
@pytest.mark.parametrize("name", ["int2-row", "int4-row", "int8-row", "int4-s8"])
def test_a_given_step_rounds_and_cuts_off(native, emulator, isa, name):
    product = Product(name, 192, 21, tokens=3, step=0.0625)
    product.x[0, :4] = [7.9, -8.0, 30.0, -30.0]  # 126.4, -128, beyond either end
    product.x[1] = -50.0  # -128 everywhere: the largest sums
    got = product.emulate(emulator(), isa) if isa in EMULATED else product.run(native, isa)
    want, size = product.exact(product.rounded())
    assert np.abs(product.rounded()).max() == 8.0
    assert (np.abs(got - want) <= 2e-6 * size).all()


@pytest.mark.parametrize("isa", MACHINE_ISAS)
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 11], ids="{} tokens".format)
def test_rows_are_split_over_threads_without_a_trace(native, isa, tokens, threads):
    product = Product("int4-s8", 1024, 1031, tokens)
    alone = product.run(native, isa, 1)
    np.testing.assert_array_equal(product.run(native, isa, threads), alone)
    assert np.isfinite(alone).all()


@pytest.mark.parametrize("isa", MACHINE_ISAS + EMULATED)
@pytest.mark.parametrize("name", FORMATS)
def test_extremes_do_not_overflow(native, emulator, isa, name):
    """Every code at an end of its range, every activation at the largest step, in long rows."""
    for code in (FORMATS[name].low, FORMATS[name].high):
        product = Product(name, 4096, 3, tokens=2)
        product.matrix.codes[:] = code
        product.x[:] = -3.0
        product.x[1, ::2] = 3.0
        got = product.emulate(emulator(), isa) if isa in EMULATED else product.run(native, isa)
        want, size = product.exact(product.rounded())
        assert (np.abs(got - want) <= 2e-6 * size).all()
    product.x[:] = 0.0
    got = product.emulate(emulator(), isa) if isa in EMULATED else product.run(native, isa)
    assert (got == 0).all()


@pytest.mark.parametrize("name", FORMATS)
def test_an_embedded_row_is_the_dequantised_one(native, name):
    for cols, rows in SHAPES:
        product = Product(name, cols, rows)
        data, want = (
            pack(product.format, product.matrix),
            dequantise(product.format, product.matrix),
        )
        at, wide = ctypes.c_void_p, ctypes.c_int64
        for row in {0, rows // 2, rows - 1}:
            out = np.full(cols, np.nan, np.float32)
            native.edge_kv_embed_row(
                name.encode(), at(data.ctypes.data), wide(rows), wide(cols), wide(row),
                at(out.ctypes.data),
            )  # fmt: skip
            np.testing.assert_array_equal(out, want[row])


def test_an_unknown_format_is_refused(native):
    assert native.edge_kv_weight_bytes(b"int5-s8", ctypes.c_int64(16), ctypes.c_int64(32)) == -1
