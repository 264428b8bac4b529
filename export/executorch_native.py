"""The decoder for our own engine: weights stay in the weight file, operators of ours between them.

A program names each weight by type, shape and place in the file (`weight_keys`), as a constant that
is outside of it; `runtime/native/weight_file.h` looks there for it. So the decoder is traced over
fakes, and lowering holds no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from executorch.exir.emit._emitter import _Emitter
from executorch.exir.schema import EValue, ExtraTensorInfo, TensorDataLocation
from executorch.exir.tensor import TensorSpec, make_tensor_value
from torch._subclasses.fake_tensor import FakeTensorMode

from edge_kv.export.weight_file import WeightLayout


def fakes() -> FakeTensorMode:
    """A context in which a decoder is built and traced without memory for its weights."""
    return FakeTensorMode(allow_non_fake_inputs=True)


Place = Callable[[str], tuple[str, int] | None]  # parameter -> (region, its first row), if stored


def weight_keys(exported: dict[str, Any], place: Place, layout: WeightLayout) -> dict[str, str]:
    """The keys of the weights of all methods by the names of their placeholders.

    A key is type, shape and place of a weight, "u8[1536,48,16]@8192".
    """
    keys = {}
    for program in exported.values():
        signature = program.graph_signature
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        for placeholder, path in held.items():
            found = place(path)
            if found is None:
                continue
            region = layout.regions[found[0]]
            sizes = ",".join(map(str, program.state_dict[path].shape))
            offset = region.offset + found[1] * region.row_bytes
            keys[placeholder] = f"{region.dtype}[{sizes}]@{offset}"
    return keys


@contextmanager
def weights_outside() -> Iterator[None]:
    """Emit a constant that was given a tag as one outside of the program, named by that tag.

    A view of one is a constant too, of the same values in another shape.
    """
    emit = _Emitter._tensor_spec_to_evalue

    def emit_outside(self: Any, spec: TensorSpec, constant_tag: str | None = None) -> EValue:
        of = spec.extra_tensor_info  # a view has that of the constant it is of
        if constant_tag is not None:
            key = constant_tag
        elif of is not None and of.location == TensorDataLocation.EXTERNAL:
            key = _reshaped(of.fully_qualified_name, spec.shape)
        else:
            return emit(self, spec, None)
        info = ExtraTensorInfo(fully_qualified_name=key, location=TensorDataLocation.EXTERNAL)
        if constant_tag is not None:
            spec.extra_tensor_info = info
        value = make_tensor_value(0, None, spec)
        value.extra_tensor_info = info
        return EValue(value)

    with patch.object(_Emitter, "_tensor_spec_to_evalue", emit_outside):
        yield


def _reshaped(key: str, shape: Sequence[int]) -> str:
    """The key of the same weight in another shape."""
    start, _, rest = key.partition("[")
    return f"{start}[{','.join(map(str, shape))}{rest[rest.index(']') :]}"
