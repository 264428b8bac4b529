"""The decoder for our own engine: weights stay in the weight file, operators of ours between them.

A program names each weight by type, shape and place in the file (`region_key`), as a constant that
is outside of it; `runtime/native/weight_file.h` looks there for it. So the decoder is traced over
fakes, and lowering holds no weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from executorch.exir.emit._emitter import _Emitter
from executorch.exir.schema import EValue, ExtraTensorInfo, TensorDataLocation
from executorch.exir.tensor import TensorSpec, make_tensor_value
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edge_kv.config import ModelConfig
from edge_kv.export import executorch_ops as op
from edge_kv.export.weight_file import WeightLayout
from edge_kv.model.binding import parameter_rows
from edge_kv.model.decoder import Attention, GeluGate, Linear, RMSNorm, Softcap


class NativeLinear(nn.Module):
    """`Linear` on the engine's own threads."""

    def __init__(self, source: Linear):
        super().__init__()
        self.weight = source.weight

    def forward(self, x: Tensor) -> Tensor:
        return op.linear(x, self.weight)


class NativeNorm(nn.Module):
    """`RMSNorm` as one operator."""

    def __init__(self, source: RMSNorm):
        super().__init__()
        self.weight, self.eps = source.weight, source.eps

    def forward(self, x: Tensor) -> Tensor:
        return op.rms_norm(x, self.weight, self.eps)


class NativeGate(nn.Module):
    """`GeluGate` as one operator."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return op.gelu_mul(gate, up)


class NativeSoftcap(nn.Module):
    """`Softcap` as one operator."""

    def __init__(self, source: Softcap):
        super().__init__()
        self.cap = source.cap

    def forward(self, x: Tensor) -> Tensor:
        return op.softcap(x, self.cap)


def for_engine(module: nn.Module) -> None:
    """Replace what our engine has an operator for.

    The norms of an attention's heads are left: the state computes with their weights.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, Linear):
            setattr(module, name, NativeLinear(child))
        elif isinstance(child, RMSNorm) and not isinstance(module, Attention):
            setattr(module, name, NativeNorm(child))
        elif isinstance(child, GeluGate):
            setattr(module, name, NativeGate())
        elif isinstance(child, Softcap):
            setattr(module, name, NativeSoftcap(child))
        else:
            for_engine(child)


def fakes() -> FakeTensorMode:
    """A context in which a decoder is built and traced without memory for its weights."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def weight_keys(
    exported: dict[str, Any], config: ModelConfig, layout: WeightLayout
) -> dict[str, str]:
    """The keys of the weights of all methods by the names of their placeholders."""
    keys = {}
    for program in exported.values():
        signature = program.graph_signature
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        for placeholder, path in held.items():
            name = path.removeprefix("decoder.")
            if path in program.state_dict and name != path:
                shape = tuple(program.state_dict[path].shape)
                keys[placeholder] = region_key(config, layout, name, shape)
    return keys


def region_key(config: ModelConfig, layout: WeightLayout, path: str, shape: tuple[int, ...]) -> str:
    """Type, shape and place of a decoder parameter: "u8[1536,48,16]@8192"."""
    rows = parameter_rows(config, path)
    region = layout.regions[rows.region]
    sizes = ",".join(map(str, shape))
    return f"{region.dtype}[{sizes}]@{region.offset + rows.start * region.row_bytes}"


@contextmanager
def weights_outside() -> Iterator[None]:
    """Emit a constant that was given a tag as one outside of the program, named by that tag."""
    emit = _Emitter._tensor_spec_to_evalue

    def emit_outside(self: Any, spec: TensorSpec, constant_tag: str | None = None) -> EValue:
        if constant_tag is None:
            return emit(self, spec, None)
        spec.extra_tensor_info = ExtraTensorInfo(
            fully_qualified_name=constant_tag, location=TensorDataLocation.EXTERNAL
        )
        return EValue(make_tensor_value(0, None, spec))

    with patch.object(_Emitter, "_tensor_spec_to_evalue", emit_outside):
        yield
