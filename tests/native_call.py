"""Operators of runtime/native/ops.h called on numpy arrays, on this machine or an emulated one."""

from __future__ import annotations

import ctypes
import struct

import numpy as np
from kernel_library import EMULATED, start_emulator

from edge_kv.runtime.native_library import build_kernels

TYPES = {"float32": 1, "float16": 2, "int8": 3, "uint8": 4, "int64": 5}
DTYPES = {number: np.dtype(name) for name, number in TYPES.items()}
OTHER = 6  # a type that no operator takes
KINDS = {  # attribute names of each operator in order
    "put": (),
    "attend": ("scale", "strides", "keeps"),
    "select": ("k", "stride"),
    "norm_rope": ("eps", "style"),
    "norm_add": ("eps",),
    "sinkhorn": ("iters", "eps"),
    "softcap": ("cap",),
    "linear_q": ("rows", "format", "step", "out_step", "cap"),
    "embed_q": ("width", "format"),
    "experts_q": ("width", "format", "down_format", "act", "limit"),
    "glu_q": (
        "width", "format", "up_format", "down_format", "act", "limit",
        "step", "gate_step", "up_step", "down_step", "out_step",
    ),
}  # fmt: skip
MOST_ATTRIBUTES = 11


class Refused(Exception):
    """An operator said why it does not run."""


class Tensor(ctypes.Structure):
    """edge_kv_tensor of kernel_interface.cpp."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 8),
    ]


class Attribute(ctypes.Structure):
    """edge_kv_attribute of kernel_interface.cpp."""

    _fields_ = [
        ("real", ctypes.c_double),
        ("whole", ctypes.c_int64),
        ("list", ctypes.POINTER(ctypes.c_int64)),
        ("length", ctypes.c_int64),
        ("text", ctypes.c_char_p),
    ]


def tensor_of(array):
    if array is None:
        return Tensor()
    return Tensor(
        array.ctypes.data,
        TYPES.get(array.dtype.name, OTHER),
        array.ndim,
        (ctypes.c_int64 * 8)(*array.shape),
    )


def attribute_of(value):
    if isinstance(value, str):
        return Attribute(text=value.encode())
    if isinstance(value, (list, tuple)):
        return Attribute(list=(ctypes.c_int64 * max(1, len(value)))(*value), length=len(value))
    if isinstance(value, float):
        return Attribute(real=value)
    return Attribute(whole=value)


class Operators:
    """The operators by name: `run("attend", [q, pos, …], scale=…)` returns the first output.

    Tables are written in place. Raises Refused with the operator's sentence.
    """

    def __init__(self, native=None, cpu="max"):
        self.native = native or ctypes.CDLL(str(build_kernels()))
        self.cpu = cpu
        self.emulator = None

    def run(self, name, inputs, isa="scalar", threads=1, **attributes):
        assert tuple(attributes) == KINDS[name]
        inputs = [x if x is None else np.ascontiguousarray(x) for x in inputs]
        if isa in EMULATED:
            return self._emulated(name, inputs, isa, threads, list(attributes.values()))
        tensors = (Tensor * 13)(*map(tensor_of, inputs))
        values = (Attribute * MOST_ATTRIBUTES)(*map(attribute_of, attributes.values()))
        outputs = (Tensor * 2)()
        why = ctypes.create_string_buffer(1000)
        status = self.native.edge_kv_call(
            isa.encode(), threads, name.encode(), tensors, values, outputs, why, len(why)
        )
        assert status != 1, f"no {isa} kernels on a CPU that has it, or no {name}"
        if status:
            raise Refused(why.value.decode())
        found = outputs[0]
        if not found.data:
            return None
        dtype, shape = DTYPES[found.type], tuple(found.shape[: found.rank])
        size = int(np.prod(shape)) * dtype.itemsize
        made = np.frombuffer(ctypes.string_at(found.data, size), dtype).reshape(shape)
        free = ctypes.CDLL(None).free
        free.argtypes = [ctypes.c_void_p]
        free(found.data)
        return made

    def _emulated(self, name, inputs, isa, threads, attributes):
        self.emulator = self.emulator or start_emulator(self.cpu, "ops")
        pipe = self.emulator
        head = struct.pack("<16s16s3q", isa.partition(":")[2].encode(), name.encode(), threads,
                           len(inputs), len(attributes))  # fmt: skip
        parts = [head]
        for x in inputs:
            described = tensor_of(x)
            parts.append(
                struct.pack("<2q8q", described.type, described.rank, *described.shape)
                + (b"" if x is None else x.tobytes())
            )
        for value in attributes:
            listed = list(value) if isinstance(value, (list, tuple)) else []
            text = value.encode() if isinstance(value, str) else b""
            whole = value if isinstance(value, int) else 0
            real = value if isinstance(value, float) else 0.0
            listed += [0] * (15 - len(listed)) + [len(listed)]
            parts.append(struct.pack("<dq16s16q", real, whole, text, *listed))
        pipe.stdin.write(b"".join(parts))
        pipe.stdin.flush()
        status, type_, rank, *shape = struct.unpack("<11q", pipe.stdout.read(88))
        for x in inputs:  # tables as they were left
            if x is not None:
                x[...] = np.frombuffer(pipe.stdout.read(x.nbytes), x.dtype).reshape(x.shape)
        assert status != 1, f"no {isa} kernels"
        if status:
            raise Refused(pipe.stdout.read(type_).decode())
        if not type_:
            return None
        shape = tuple(shape[:rank])
        size = int(np.prod(shape)) * DTYPES[type_].itemsize
        return np.frombuffer(pipe.stdout.read(size), DTYPES[type_]).reshape(shape)

    def close(self):
        if self.emulator:
            self.emulator.stdin.close()
            self.emulator.wait()
            self.emulator.stdout.close()
