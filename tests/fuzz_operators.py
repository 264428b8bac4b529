"""Random and broken calls of every native operator, under AddressSanitizer and UBSan.

    python tests/fuzz_operators.py --count 100000 --seed 0

starts itself in a process with the sanitizers. A call either runs or is refused in one sentence;
anything else is a report of the sanitizers, a signal or a failed assertion. Every input is memory
of exactly the size that its shape says, as an engine hands it over.
"""

import argparse
import collections
import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from kernel_library import MACHINE_ISAS
from native_call import Operators, Refused

from edge_kv.formats import FORMATS
from edge_kv.runtime.native_library import build_kernels

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
DTYPES = [np.float32, np.float16, np.int8, np.uint8, np.int64, np.float64]
TABLES = [np.float32, np.float16, np.int8]
AXES = [0, 1, 1, 2, 3, 4, 5, 8, 16, 17, 64, 129]
WHOLE = [0, 1, 2, 3, -1, 7, 2**31, -(2**31), 2**47, 2**48, 2**62, 2**63 - 1, -(2**63)]
REAL = [0.0, 1e-6, 1.0, -1.0, 0.5, 1e38, float("inf"), float("nan")]
TEXT = ["halves", "pairs_last", "silu", "gelu_tanh", "", "int3", "x" * 15, *FORMATS]
MOST = 1 << 15  # values of an input


class Fuzz:
    """Calls that are good, and what may be wrong with them."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def pick(self, values):
        return values[int(self.rng.integers(len(values)))]

    def chance(self, share):
        return self.rng.random() < share

    def size(self, most):
        return int(self.rng.integers(1, most + 1))

    def filled(self, dtype, *shape):
        """Numbers of a type; now and then some that a program should not hold."""
        if np.dtype(dtype).kind == "f":
            with np.errstate(over="ignore"):
                out = (self.rng.standard_normal(shape) * self.pick([1, 1, 30, 1e30])).astype(dtype)
            if out.size and self.chance(0.05):
                out.flat[self.rng.integers(out.size)] = self.pick([np.nan, np.inf, -np.inf])
            return out
        if dtype == np.int64:
            out = self.rng.integers(-1, 12, shape)
            if out.size and self.chance(0.2):
                out.flat[self.rng.integers(out.size)] = self.pick(WHOLE)
            return out
        return self.rng.integers(-128, 128, shape).astype(dtype)

    def table(self, *shape):
        rows = self.filled(self.pick(TABLES), *shape)
        return [rows, self.filled(np.float32, *shape[:2], 1) if rows.dtype == np.int8 else None]

    def packed(self, name, rows, cols, *before):
        return self.filled(np.uint8, *before, *FORMATS[name].shape(rows, cols))

    def put(self):
        slots, heads, dim = self.size(9), self.size(3), self.size(70)
        rows = self.filled(np.float32, self.size(slots), heads, dim)
        return [*self.table(slots, heads, dim), rows, np.array([self.size(40)])], {}

    def attend(self):
        tokens, heads, group, dim = self.size(9), self.size(2), self.size(5), self.pick([1, 20, 64])
        pos, strides, keeps = int(self.rng.integers(0, 300)), [], []
        inputs = [self.filled(np.float32, tokens, heads * group, dim), np.array([pos])]
        inputs.append(self.filled(np.float32, heads * group) if self.chance(0.3) else None)
        for _ in range(self.size(2)):
            keep = self.pick([0, 1, 5, 40])
            stride = 1 if keep else self.pick([1, 1, 4, 128])
            least = keep + tokens - 1 if keep else (pos + tokens) // stride
            shape = (max(1, least) + int(self.rng.integers(0, 3)), heads, dim)
            keys = self.table(*shape)
            values = [None if x is None else x.copy() for x in keys] if self.chance(0.5) else keys
            picked = self.filled(np.int64, tokens, self.size(9)) if self.chance(0.3) else None
            inputs += [*keys, *values, picked]
            strides.append(stride)
            keeps.append(keep)
        inputs += [None] * (13 - len(inputs))
        return inputs, {"scale": 0.3, "strides": strides, "keeps": keeps}

    def select(self):
        tokens, heads, dim, stride = self.size(4), self.size(9), self.size(40), self.size(4)
        rows = self.table(self.size(60), 1, dim)
        pos = int(self.rng.integers(0, max(1, len(rows[0]) * stride - tokens + 1)))
        q, weight = (
            self.filled(np.float32, tokens, heads, dim),
            self.filled(np.float32, tokens, heads),
        )
        return [q, weight, np.array([pos]), *rows], {"k": self.size(30), "stride": stride}

    def norm_rope(self):
        tokens, heads, dim = self.size(4), self.size(3), self.size(40)
        angles = [None, None]
        if dim > 1 and self.chance(0.7):
            n = self.size(dim // 2)
            angles = [self.filled(np.float32, tokens, n) for _ in range(2)]
        weight = self.filled(np.float32, dim) if self.chance(0.5) else None
        x = self.filled(np.float32, tokens, heads, dim)
        return [x, weight, *angles], {"eps": self.pick([1e-6, -1.0]), "style": self.pick(TEXT[:2])}

    def sinkhorn(self):
        k = self.size(6)
        return [self.filled(np.float32, self.size(4), k, k)], {"iters": self.size(5), "eps": 1e-6}

    def linear_q(self):
        rows, cols, name = self.size(40), self.size(70), self.pick(list(FORMATS))
        x = self.filled(np.float32, self.size(9), cols)
        return [x, self.packed(name, rows, cols)], {
            "rows": rows, "format": name, **self.steps("step", "out_step", "cap"),
        }  # fmt: skip

    def steps(self, *names):
        return {name: self.pick([0.0, 0.0, 0.1]) for name in names}

    def embed_q(self):
        rows, width, name = self.size(40), self.size(70), self.pick(list(FORMATS))
        ids = self.rng.integers(0, rows, self.size(5))
        return [ids, self.packed(name, rows, width)], {"width": width, "format": name}

    def experts_q(self):
        tokens, k, experts = self.size(6), self.size(3), self.size(4)
        dim, width = self.size(50), self.size(40)
        names = [self.pick(list(FORMATS)) for _ in range(2)]
        if self.chance(0.3):
            stacks = [self.filled(np.float32, experts, 2 * width, dim),
                      self.filled(np.float32, experts, dim, width)]  # fmt: skip
        else:
            stacks = [self.packed(names[0], 2 * width, dim, experts),
                      self.packed(names[1], dim, width, experts)]  # fmt: skip
        x, weight = self.filled(np.float32, tokens, dim), self.filled(np.float32, tokens, k)
        return [x, self.filled(np.int64, tokens, k), weight, *stacks], {
            "width": width, "format": names[0], "down_format": names[1],
            "act": self.pick(TEXT[2:4]), "limit": self.pick([0.0, 2.0]),
        }  # fmt: skip

    def norm_add(self):
        tokens, dim = self.size(4), self.size(70)
        x, residual = (self.filled(np.float32, tokens, dim) for _ in range(2))
        scale = self.filled(np.float32, 1) if self.chance(0.5) else None
        return [x, self.filled(np.float32, dim), residual, scale], {"eps": 1e-6}

    def softcap(self):
        return [self.filled(np.float32, self.size(4), self.size(70))], {"cap": 30.0}

    def glu_q(self):
        tokens, dim, width = self.size(9), self.size(70), self.size(60)
        names = [self.pick(list(FORMATS)) for _ in range(3)]
        gate, up = (self.packed(n, width, dim) for n in names[:2])
        factor = self.filled(np.float32, tokens, width) if self.chance(0.5) else None
        x, down = self.filled(np.float32, tokens, dim), self.packed(names[2], dim, width)
        return [x, gate, up if factor is None else None, factor, down], {
            "width": width, "format": names[0], "up_format": names[1], "down_format": names[2],
            "act": self.pick(TEXT[2:4]), "limit": self.pick([0.0, 2.0]),
            **self.steps("step", "gate_step", "up_step", "down_step", "out_step"),
        }  # fmt: skip

    def broken(self, inputs, attributes):
        """The same call with something changed."""
        inputs, attributes = list(inputs), dict(attributes)
        at = int(self.rng.integers(len(inputs)))
        array = inputs[at]
        what = self.pick(["shape", "shape", "type", "absent", "value", "attribute", "attribute"])
        if what == "attribute" and attributes:
            name = self.pick(list(attributes))
            value = attributes[name]
            if isinstance(value, list):
                length = self.pick([0, 1, 2, 2, 3])
                attributes[name] = [self.pick(WHOLE) for _ in range(length)]
            elif isinstance(value, str):
                attributes[name] = self.pick(TEXT)
            else:
                attributes[name] = self.pick(REAL if isinstance(value, float) else WHOLE)
        elif what == "absent":
            inputs[at] = None if array is not None else self.filled(self.pick(DTYPES), 2, 2)
        elif array is None:
            inputs[at] = self.filled(self.pick(DTYPES), *self.shape())
        elif what == "type":
            inputs[at] = self.filled(self.pick(DTYPES), *array.shape)
        elif what == "value":
            inputs[at] = self.filled(array.dtype.type, *array.shape)
        else:
            shape = list(array.shape)
            if self.chance(0.2) or not shape:
                shape = self.shape()
            else:
                axis = int(self.rng.integers(len(shape)))
                shape[axis] = self.pick([*AXES, shape[axis] + 1, max(0, shape[axis] - 1)])
            if np.prod(shape, dtype=np.int64) <= MOST:
                inputs[at] = self.filled(array.dtype.type, *shape)
        return inputs, attributes

    def shape(self):
        return [self.pick(AXES[:9]) for _ in range(int(self.rng.integers(0, 5)))]


def fuzz(operators, count, seed):
    """Run `count` calls; returns how many of each operator ran and were refused."""
    made = Fuzz(seed)
    names = ("put", "attend", "attend", "select", "norm_rope", "sinkhorn", "linear_q", "embed_q",
             "experts_q", "norm_add", "softcap", "glu_q")  # fmt: skip
    done = collections.Counter()
    for _ in range(count):
        name = made.pick(names)
        inputs, attributes = getattr(made, name)()
        for _ in range(made.pick([0, 1, 1, 2])):
            inputs, attributes = made.broken(inputs, attributes)
        how = {"isa": made.pick(MACHINE_ISAS), "threads": made.pick([1, 2])}
        try:
            operators.run(name, inputs, **how, **attributes)
            done[name, "ran"] += 1
        except Refused as refused:
            sentence = str(refused)
            assert sentence.startswith(f"{name}: ") and sentence.endswith("."), sentence
            done[name, "refused"] += 1
    return done


def preloaded():
    """Environment of a process that loads a library with the sanitizers."""
    libraries = [  # the second, since the first looks for what throws exceptions when it is loaded
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    options = "detect_leaks=0:allocator_may_return_null=1"
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": options}


def run_sanitized(count, seed):
    """Run this file in a process with the sanitizers. Returns its result."""
    path = build_kernels(*FLAGS)
    return subprocess.run(
        [sys.executable, __file__, "--count", str(count), "--seed", str(seed), "--library", path],
        env={**os.environ, **preloaded()}, capture_output=True, text=True,
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.library:
        result = run_sanitized(given.count, given.seed)
        print(result.stdout, result.stderr[:4000], sep="", end="")
        sys.exit(result.returncode)
    done = fuzz(Operators(ctypes.CDLL(str(given.library))), given.count, given.seed)
    for (name, what), count in sorted(done.items()):
        print(f"{name} {what}: {count}")
    print(f"{sum(done.values())} calls, nothing found")


if __name__ == "__main__":
    main()
