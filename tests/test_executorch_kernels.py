"""The native kernels against float64 attention: every instruction set, storage, shape and edge.

Where a cross-compiler and an emulator for aarch64 are installed (Debian: g++-aarch64-linux-gnu and
qemu-user), its kernels take the same tests: correctness, not speed.
"""

import ctypes
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from kernel_library import ALL_ISAS, EMULATED, Layer, Step, start_emulator

from edge_kv.runtime.native_library import build_kernels

EPS = 1e-6
DTYPES = {"f32": np.float32, "f16": np.float16, "int8": np.int8}
STORAGES = ["f32", "f16", "int8", "int8+128"]  # the last: int8 with keys stored plus 128


FLOATING = ("scalar", "neon")  # these multiply int8 rows in floats, the others in 16-bit integers
LARGEST = 127 * 256  # of those integers


class Library:
    """The kernels of this machine, and through a pipe those that an emulator runs."""

    def __init__(self, native=None, cpu="max"):
        self.native = native or ctypes.CDLL(str(build_kernels()))
        self.cpu = cpu
        self.emulator = None

    def attention(self, isa, cache, request, arrays, out):
        """Run one step; fills the cache and `out`, returns the status."""
        if isa in EMULATED:
            return self._emulated(isa, cache, request, arrays, out)
        rows, scales = cache.rows, cache.scales
        address = [s.ctypes.data if cache.storage == "int8" else None for s in scales]
        layer = Layer(
            rows[0].ctypes.data, address[0], rows[1].ctypes.data, address[1],
            request["slots"], request["kv_heads"], request["dim"], request["storage"],
            request["key_zero"],
        )  # fmt: skip
        step = Step(
            arrays["cos"].ctypes.data, arrays["sin"].ctypes.data, request["position"],
            request["tokens"], request["q_heads"], request["window"], request["eps"],
            request["scale"], request["v_norm"], request["threads"],
        )  # fmt: skip
        return self.native.edge_kv_attention(
            isa.encode(), ctypes.byref(layer), ctypes.byref(step),
            *(ctypes.c_void_p(a.ctypes.data if a.size else None) for a in (
                arrays[n] for n in ("q", "k", "v", "q_norm", "k_norm"))),
            ctypes.c_void_p(out.ctypes.data),
        )  # fmt: skip

    def _emulated(self, isa, cache, request, arrays, out):
        self.emulator = self.emulator or start_emulator(self.cpu)
        scales = cache.scales if cache.storage == "int8" else [np.empty(0, np.float32)] * 2
        state = [cache.rows[0], scales[0], cache.rows[1], scales[1]]
        fields = ("storage", "key_zero", "kv_heads", "slots", "dim", "position", "tokens",
                  "q_heads", "window", "v_norm", "threads")  # fmt: skip
        has = (arrays["q"].size > 0, arrays["k"].size > 0)
        head = struct.pack(
            "<16s13q2d", isa.partition(":")[2].encode(), *(int(request[f]) for f in fields), *has,
            request["eps"], request["scale"],
        )  # fmt: skip
        parts = [arrays[n] for n in ("cos", "sin", "q_norm", "k_norm")]
        parts += state + [arrays[n] for n in ("q", "k", "v")]
        pipe = self.emulator
        pipe.stdin.write(head + b"".join(np.ascontiguousarray(p).tobytes() for p in parts))
        pipe.stdin.flush()
        (status,) = struct.unpack("<q", pipe.stdout.read(8))
        for array in (*state, out):
            array[...] = np.frombuffer(pipe.stdout.read(array.nbytes), array.dtype).reshape(
                array.shape
            )
        return status

    def close(self):
        if self.emulator:
            self.emulator.stdin.close()
            self.emulator.wait()
            self.emulator.stdout.close()


@pytest.fixture(scope="module")
def library():
    made = Library()
    yield made
    made.close()


class Cache:
    """Static buffers of one layer and the float64 truth of what the kernels must compute."""

    def __init__(self, library, isa, storage, *, slots, kv_heads=1, group=8, dim=64, window=0,
                 scale=1.0, v_norm=True, threads=1):  # fmt: skip
        self.library, self.isa, self.threads = library, isa, threads
        self.slots, self.kv_heads, self.group, self.dim = slots, kv_heads, group, dim
        self.window, self.scale, self.v_norm = window, scale, v_norm
        self.storage, _, zero = storage.partition("+")
        self.key_zero = int(zero or 0)
        self.rows = [np.zeros((kv_heads, slots, dim), DTYPES[self.storage]) for _ in "kv"]
        if self.key_zero:
            self.rows[0] = np.full((kv_heads, slots, dim), self.key_zero, np.uint8)
        self.scales = [np.zeros((kv_heads, slots), np.float32) for _ in "kv"]
        rng = np.random.default_rng(0)
        self.q_norm, self.k_norm = rng.uniform(0.5, 1.5, (2, dim)).astype(np.float32)

    def angles(self, position, tokens):
        at = np.arange(position, position + tokens)[:, None]
        freq = 1e4 ** -(np.arange(0, self.dim, 2) / self.dim)
        return np.cos(at * freq).astype(np.float32), np.sin(at * freq).astype(np.float32)

    def run(self, position, q=None, k=None, v=None):
        tokens = len(q if q is not None else k)
        cos, sin = self.angles(position, tokens)
        request = {
            "slots": self.slots, "kv_heads": self.kv_heads, "dim": self.dim,
            "storage": list(DTYPES).index(self.storage), "key_zero": self.key_zero,
            "position": position, "tokens": tokens, "q_heads": self.kv_heads * self.group,
            "window": self.window, "eps": EPS, "scale": self.scale, "v_norm": self.v_norm,
            "threads": self.threads,
        }  # fmt: skip
        arrays = {"cos": cos, "sin": sin, "q_norm": self.q_norm, "k_norm": self.k_norm}
        for name, x in zip("qkv", (q, k, v), strict=True):
            arrays[name] = np.ascontiguousarray([] if x is None else x, np.float32)
        out = np.full((tokens, self.kv_heads * self.group * self.dim), np.nan, np.float32)
        status = self.library.attention(self.isa, self, request, arrays, out)
        assert status == 0, f"no {self.isa} kernels on a CPU that has it"
        return out

    def prepared(self, x, heads, weight, position, *, rotate):
        """Raw [T, heads*dim] normed and, for q and k, rotated: float64 [T, heads, dim]."""
        x = np.asarray(x, np.float64).reshape(len(x), heads, self.dim)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
        if not rotate:
            return x
        x = x * weight
        cos, sin = (a[:, None].astype(np.float64) for a in self.angles(position, len(x)))
        a, b = np.split(x, 2, -1)
        return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)

    def stored(self, which):
        """What the buffer holds as float64 [kv_heads, slots, dim]."""
        rows = self.rows[which].astype(np.float64) - (self.key_zero if which == 0 else 0)
        return rows * self.scales[which][..., None] if self.storage == "int8" else rows

    def check(self, got, position, q, written, tolerance=3e-6):
        """Hold `got` against float64 attention over the stored rows of positions below `written`.

        `tolerance` is of the largest output. Integer kernels may add what 16 bits do: rounding a
        query moves each score by half a step times the root of the summed squares of a key, over
        sqrt(3) and five deviations of it; rounding a weight, by half a step of the largest.
        """
        want = self.expected(position, q, written)
        allowed = tolerance * np.abs(want).max()
        if self.storage == "int8" and self.isa.rpartition(":")[2] not in FLOATING:
            heads = self.kv_heads * self.group
            queries = self.prepared(q, heads, self.q_norm, position, rotate=True) * self.scale
            half_step = np.abs(queries).max() / LARGEST / 2
            norm = np.sqrt((self.stored(0) ** 2).sum(-1)).max()
            score = 5 * half_step * norm / 3**0.5
            allowed += (score + 1 / LARGEST) * np.abs(self.stored(1)).max()
        assert np.isfinite(got).all()
        np.testing.assert_array_less(np.abs(got - want).max(), max(allowed, 1e-30))

    def expected(self, position, q, written):
        """Attention over the stored rows of positions below `written`."""
        tokens = len(q)
        heads = self.kv_heads * self.group
        q = self.prepared(q, heads, self.q_norm, position, rotate=True) * self.scale
        held = np.arange(max(0, written - self.slots), written)
        keys, values = (self.stored(i)[:, held % self.slots] for i in (0, 1))
        q = q.reshape(tokens, self.kv_heads, self.group, self.dim)
        scores = np.einsum("tkgd,ksd->tkgs", q, keys)
        at = np.arange(position, position + tokens)[:, None]
        seen = held <= at
        if self.window:
            seen &= held > at - self.window
        scores = np.where(seen[:, None, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("tkgs,ksd->tkgd", weights, values).reshape(tokens, -1)


def tokens_of(rng, n, cache, spread=1.0):
    width = cache.kv_heads * cache.dim
    return [rng.normal(0, spread, (n, w)) for w in (width * cache.group, width, width)]


def close(got, want, tolerance=3e-6):
    scale = np.abs(want).max()
    np.testing.assert_array_less(np.abs(got - want).max(), tolerance * max(scale, 1e-30))


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("kv_heads", "group", "dim"),
    [
        (1, 8, 64),
        (2, 4, 32),
        (4, 1, 48),
        (1, 5, 8),
        (2, 3, 20),
        (1, 16, 256),
        (2, 1, 128),
        (1, 2, 256),
        (1, 70, 32),
    ],
)
def test_steps_of_every_length_match_float64(library, isa, storage, kv_heads, group, dim):
    rng = np.random.default_rng(dim)
    cache = Cache(library, isa, storage, slots=200, kv_heads=kv_heads, group=group, dim=dim,
                  scale=dim**-0.5)  # fmt: skip
    at = 0
    for n in (1, 2, 3, 17, 64, 1, 33, 1, 70):
        q, k, v = tokens_of(rng, n, cache)
        got = cache.run(at, q, k, v)
        cache.check(got, at, q, at + n)
        at += n


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("storage", ["f32", "int8", "int8+128"])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_rings_wrap(library, isa, storage, threads):
    rng = np.random.default_rng(1)
    window, chunk = 140, 24  # long enough for a chunk to be spread over threads
    cache = Cache(library, isa, storage, slots=window + chunk - 1, window=window, dim=64,
                  scale=0.125, threads=threads)  # fmt: skip
    at = 0
    for n in (1, 24, 24, 7, 1, 24, 24, 1, 1, 24, 13, 24, 24, 1, *(24,) * 7):
        q, k, v = tokens_of(rng, n, cache)
        got = cache.run(at, q, k, v)
        cache.check(got, at, q, at + n)
        at += n
    assert at > 2 * cache.slots


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_rows_are_normed_rotated_and_stored(library, isa):
    rng = np.random.default_rng(2)
    for storage, tolerance in (("f32", 2e-6), ("f16", 6e-4), ("int8", 5e-3), ("int8+128", 5e-3)):
        for v_norm in (True, False):
            cache = Cache(library, isa, storage, slots=50, kv_heads=2, group=2, v_norm=v_norm)
            _, k, v = tokens_of(rng, 9, cache)
            cache.run(41, k=k, v=v)
            keys = cache.prepared(k, 2, cache.k_norm, 41, rotate=True)
            values = cache.prepared(v, 2, None, 41, rotate=False)
            if not v_norm:
                values = v.reshape(9, 2, -1)
            for which, want in ((0, keys), (1, values)):
                got = cache.stored(which)[:, 41:].transpose(1, 0, 2)
                close(got, want, tolerance)
            assert not cache.stored(0)[:, :41].any()


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_adversarial_scores(library, isa):
    """Huge norms, equal scores and one key that outweighs all others."""
    rng = np.random.default_rng(3)
    for scale, spread in ((1.0, 1e4), (100.0, 1.0), (0.0, 1.0), (1.0, 1e-12)):
        cache = Cache(library, isa, "int8", slots=300, dim=64, scale=scale, threads=2)
        _, k, v = tokens_of(rng, 299, cache, spread)
        cache.run(0, k=k, v=v)
        _, k, v = tokens_of(rng, 1, cache, spread)
        # a query along a stored key makes that key dominate
        got = cache.run(299, np.tile(k, (1, 8)), k, v)
        tolerance = 3e-6 if scale < 50 else 3e-4  # scores near 6400 carry f32 steps of 5e-4
        cache.check(got, 299, np.tile(k, (1, 8)), 300, tolerance)


@pytest.mark.parametrize("isa", [i for i in ALL_ISAS if "scalar" not in i])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_long_caches(library, isa, threads):
    rng = np.random.default_rng(4)
    rows = 131_072
    cache = Cache(library, isa, "int8", slots=rows, dim=32, threads=threads, scale=32**-0.5)
    for i in (0, 1):
        cache.rows[i][:] = rng.integers(-127, 128, cache.rows[i].shape)
        cache.scales[i][:] = rng.uniform(0.005, 0.02, cache.scales[i].shape)
    q, k, v = tokens_of(rng, 1, cache)
    got = cache.run(rows - 1, q, k, v)
    cache.check(got, rows - 1, q, rows, 2e-5)
    cache.rows[0][0, 77_777] = 127  # a key that outweighs all others
    cache.rows[0][0, 77_777, ::2] = -127
    cache.scales[0][0, 77_777] = 4.0
    q = np.tile(cache.rows[0][0, 77_777].astype(np.float64), (1, 8))
    cache.check(cache.run(rows - 1, q, k, v), rows - 1, q, rows, 2e-5)
    cache.window, at = 100_000, rows + 30_000  # the same rows as a ring, wrapped within the window
    cache.check(cache.run(at, q), at, q, at + 1, 2e-5)


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("dim", [512, 1024])
def test_the_largest_products_fit(library, isa, dim):
    """Every factor at its limit: the sums of a row fill an int32."""
    rng = np.random.default_rng(8)
    for storage in ("int8", "int8+128"):
        cache = Cache(library, isa, storage, slots=130, dim=dim, group=2, scale=1e-4)
        cache.q_norm[:] = 1
        signs = rng.choice([-1.0, 1.0], (1, dim))
        cache.angles = lambda position, tokens, dim=dim: (
            np.ones((tokens, dim // 2), np.float32), np.zeros((tokens, dim // 2), np.float32),
        )  # fmt: skip
        for i, zero in ((0, cache.key_zero), (1, 0)):
            cache.rows[i][:] = 127 * signs + zero
            cache.scales[i][:] = rng.uniform(0.005, 0.02, cache.scales[i].shape)
        cache.rows[0][:, ::2] = -127 * signs + cache.key_zero
        for position in (0, 1, 2, 63, 64, 129):
            q = np.tile(signs, (1, 2))
            cache.check(cache.run(position, q), position, q, position + 1)


@pytest.mark.skipif(not EMULATED, reason="no emulator for aarch64")
def test_dot_products_are_for_cpus_that_have_them(library):
    for cpu, has in (("cortex-a72", False), ("cortex-a76", True)):
        emulated = Library(library.native, cpu)
        q, k, v = (np.ones((1, 64)) for _ in range(3))
        try:
            cache = Cache(emulated, "aarch64:dotprod", "int8", slots=4, group=1)
            if has:
                cache.check(cache.run(0, q, k, v), 0, q, 1)
            else:
                with pytest.raises(AssertionError, match="no aarch64:dotprod kernels"):
                    cache.run(0, q, k, v)
        finally:
            emulated.close()


def test_thread_counts_and_instruction_sets_agree(library):
    rng = np.random.default_rng(5)
    outputs = []
    inputs = None
    for isa in ALL_ISAS:
        for threads in (1, 2, 4):
            cache = Cache(library, isa, "int8", slots=2000, kv_heads=2, threads=threads)
            inputs = inputs or (tokens_of(rng, 1500, cache), tokens_of(rng, 1, cache))
            cache.run(0, k=inputs[0][1], v=inputs[0][2])
            outputs.append(cache.run(1500, *inputs[1]))
    for other in outputs[1:]:
        close(other, outputs[0], 2e-3)  # a key may round to the neighbouring int8 step
    scale = np.abs(outputs[0]).max()
    assert np.mean([np.abs(o - outputs[0]).mean() for o in outputs]) < 1e-5 * scale


def test_half_precision_is_numpys(library):
    library = library.native
    library.edge_kv_to_half.argtypes = [ctypes.c_float]
    library.edge_kv_to_half.restype = ctypes.c_uint16
    library.edge_kv_from_half.argtypes = [ctypes.c_uint16]
    library.edge_kv_from_half.restype = ctypes.c_float
    rng = np.random.default_rng(6)
    values = np.concatenate(
        [rng.normal(0, 10.0**e, 200) for e in range(-9, 6)]
        + [[0.0, -0.0, 65504.0, 65519.9, 65520.0, 1e-8, 2**-24, 2**-25, 2**-14]]
    ).astype(np.float32)
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    got = np.array([library.edge_kv_to_half(float(v)) for v in values], np.uint16)
    np.testing.assert_array_equal(got, halves.view(np.uint16))
    back = [library.edge_kv_from_half(int(h)) for h in got]
    np.testing.assert_array_equal(np.float32(back), halves.astype(np.float32))


def test_sanitizers_find_nothing(tmp_path):
    """The steps, wraps and edges above in a process built with AddressSanitizer and UBSan."""
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
    path = build_kernels(*flags)
    preload = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    code = f"""
import ctypes, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_executorch_kernels as t
import test_weight_kernels as w
from kernel_library import MACHINE_ISAS
library = t.Library(ctypes.CDLL({str(path)!r}))
for isa in MACHINE_ISAS:
    for storage in t.STORAGES:
        for shape in ((2, 3, 20), (1, 5, 8), (1, 70, 32)):
            t.test_steps_of_every_length_match_float64(library, isa, storage, *shape)
    for threads in (1, 4):
        t.test_rings_wrap(library, isa, "int8", threads)
    t.test_adversarial_scores(library, isa)
    t.test_the_largest_products_fit(library, isa, 512)
    for name in w.FORMATS:
        for cols, rows in w.SHAPES:
            w.Product(name, cols, rows, tokens=15).run(library.native, isa)
        w.Product(name, 100, 5, step=0.1).run(library.native, isa)
for name in w.FORMATS:
    w.test_an_embedded_row_is_the_dequantised_one(library.native, name)
print("clean")
"""
    environment = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-2000:]
