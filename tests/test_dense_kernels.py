"""The integer products of the native library, against float64, for every CPU."""

from __future__ import annotations

import ctypes
import struct

import numpy as np
import pytest
from kernel_library import EMULATED, MACHINE_ISAS, linear, start_emulator

from edge_kv.runtime.native_library import build_kernels


@pytest.fixture(scope="module")
def native():
    return ctypes.CDLL(str(build_kernels()))


@pytest.fixture(scope="module")
def emulator():
    """The aarch64 build, started when it is first asked for."""
    started = []

    def pipe():
        if not started:
            started.append(start_emulator("max", "dense"))
        return started[0]

    yield pipe
    for process in started:
        process.stdin.close()
        process.wait()
        process.stdout.close()


class Product:
    """Packed weights [n_out, n_in] and activations x [tokens, n_in]."""

    def __init__(self, bits, block, n_in, n_out=37, tokens=2, seed=0):
        rng = np.random.default_rng(seed)
        self.shape = (tokens, n_out, n_in, bits, block)
        spread = np.exp(2 * rng.standard_normal((1, n_in)))  # outlier channels
        self.x = (rng.standard_normal((tokens, n_in)) * spread).astype(np.float32)
        self.packed = rng.integers(0, 256, (n_out, n_in * bits // 8), dtype=np.uint8)
        self.scales = rng.random((n_out, n_in // block)).astype(np.float32) + 0.01

    def exact(self, rounded):
        """The product in float64, over x as it is or rounded to 8 bits a block."""
        tokens, n_out, n_in, bits, block = self.shape
        x = self.x.astype(np.float64).reshape(tokens, -1, block)
        if rounded:
            step = np.abs(x).max(-1, keepdims=True) / 127
            x = np.rint(x / step) * step
        if bits == 4:
            values = np.stack((self.packed & 15, self.packed >> 4), -1).reshape(n_out, n_in) - 8.0
        else:
            values = self.packed - 128.0
        weights = values.reshape(n_out, -1, block) * self.scales[..., None]
        return x.reshape(tokens, n_in) @ weights.reshape(n_out, n_in).T

    def run(self, native, isa, threads=2):
        tokens, n_out, _, bits, block = self.shape
        out = np.full((tokens, n_out), np.nan, np.float32)
        status = linear(
            native, isa, threads, True, self.x, self.packed, self.scales, bits, block, out
        )
        assert status == 0, f"no {isa} kernels on a CPU that has it"
        return out

    def emulate(self, process, isa):
        head = struct.pack("<16s5q", isa.partition(":")[2].encode(), *self.shape)
        parts = (self.x, self.packed, self.scales)
        process.stdin.write(head + b"".join(p.tobytes() for p in parts))
        process.stdin.flush()
        (status,) = struct.unpack("<q", process.stdout.read(8))
        assert status == 0
        tokens, n_out = self.shape[:2]
        return np.frombuffer(process.stdout.read(tokens * n_out * 4), np.float32).reshape(
            tokens, n_out
        )


SHAPES = [  # bits, block, n_in: vectors inside a block, blocks inside a vector, and neither
    (4, 128, 1536), (4, 32, 512), (4, 64, 384), (4, 16, 256), (4, 256, 768), (4, 48, 480),
    (8, 128, 640), (8, 32, 256), (8, 16, 192), (8, 64, 320),
]  # fmt: skip


@pytest.mark.parametrize("isa", MACHINE_ISAS + EMULATED)
@pytest.mark.parametrize("tokens", [2, 19], ids="{} tokens".format)
@pytest.mark.parametrize(("bits", "block", "n_in"), SHAPES)
def test_product_is_that_of_the_rounded_activations(
    native, emulator, isa, bits, block, n_in, tokens
):
    """Shapes that no vector covers go through floats and are exact: nearer still to the truth.

    19 tokens and 37 rows leave a part of a tile over, in both directions.
    """
    product = Product(bits, block, n_in, tokens=tokens)
    got = product.emulate(emulator(), isa) if isa in EMULATED else product.run(native, isa)
    rounded, true = product.exact(True), product.exact(False)
    size = np.linalg.norm(true)
    nearest = min(np.linalg.norm(got - rounded), np.linalg.norm(got - true)) / size
    assert nearest < 2e-6
    assert np.linalg.norm(got - true) / size < 0.03


@pytest.mark.parametrize("isa", MACHINE_ISAS)
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 70], ids="{} tokens".format)
def test_rows_are_split_over_threads_without_a_trace(native, isa, tokens, threads):
    product = Product(4, 128, 1024, n_out=1031, tokens=tokens)
    np.testing.assert_array_equal(product.run(native, isa, threads), product.run(native, isa, 1))
    assert np.isfinite(product.run(native, isa, threads)).all()


@pytest.mark.parametrize("isa", MACHINE_ISAS)
@pytest.mark.parametrize("tokens", [1, 7], ids="{} tokens".format)
def test_extremes_do_not_overflow(native, isa, tokens):
    """Every nibble 15, every activation at the largest step, over the longest rows in use."""
    for bits in (4, 8):
        product = Product(bits, 128, 16_384, n_out=5, tokens=tokens)
        product.packed[:] = 255
        product.x[:] = np.where(np.arange(16_384) % 2, -3.0, 3.0)
        product.x[:, ::128] = 3.0
        np.testing.assert_allclose(product.run(native, isa), product.exact(False), rtol=1e-4)
        product.x[:] = 3.0
        np.testing.assert_allclose(product.run(native, isa), product.exact(False), rtol=3e-5)
        product.x[:] = 0.0
        assert (product.run(native, isa) == 0).all()
