"""Which rows of which tensor each module parameter holds.

The decoder has a few parameters that are row blocks of one tensor (the LM head of the embedding,
the two parts of the per-layer projection). Loading an eager model and placing a graph's
initializers in the weight file both follow this one mapping.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edge_kv.config import ModelConfig
from edge_kv.formats import GROUP
from edge_kv.model.decoder import head_blocks


@dataclass(frozen=True)
class Rows:
    """Rows `start` … of stored array `region` ("layers.0.attn.q_proj.packed", "norm.weight").

    The rows of a packed array are groups of rows of its matrix.
    """

    region: str
    start: int = 0


def parameter_rows(config: ModelConfig, path: str) -> Rows:
    """The stored rows behind the decoder parameter at `path` ("head.3.packed")."""
    if match := re.fullmatch(r"head\.(\d+)\.(\w+)", path):
        start, _ = head_blocks(config.vocab_size)[int(match[1])]
        return _rows("embed", match[2], start)
    if match := re.fullmatch(r"ple\.proj\.(own|shared)\.(\w+)", path):
        return _rows(
            "ple_proj", match[2], 0 if match[1] == "own" else config.n_own * config.ple_dim
        )
    if path == "ple.norm.weight":
        return Rows("ple_norm.weight")
    if match := re.fullmatch(r"(layers\.\d+\.moe)\.experts\.(gate_up|down)(?:_(packed))?", path):
        return Rows(f"{match[1]}.{match[2]}" + (f".{match[3]}" if match[3] else ""))
    return Rows(path)


def _rows(base: str, leaf: str, start: int) -> Rows:
    return Rows(f"{base}.{leaf}", start // GROUP if leaf == "packed" else start)


ReadRows = Callable[[str, int, int], Tensor]  # (region, start row, stop row) -> tensor


def load_parameters(
    module: nn.Module, config: ModelConfig, read: ReadRows, at: str = "", rows: int | None = None
) -> None:
    """Fill every parameter and persistent buffer of `module` (on meta or not) from stored rows.

    `at` is the module's own path in the decoder, with a trailing dot ("layers.3."). `rows` cuts
    tables to as many rows as `read` is going to yield.
    """
    for name, value in module.state_dict().items():
        held = parameter_rows(config, at + name)
        shape = value.shape if rows is None else (rows, *value.shape[1:])
        tensor = read(held.region, held.start, held.start + shape[0]).reshape(shape)
        _replace(module, name, tensor)


def unload_parameters(module: nn.Module) -> None:
    """Put every parameter and persistent buffer of `module` back on the meta device."""
    for name, value in module.state_dict().items():
        _replace(module, name, torch.empty_like(value, device="meta"))


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    parent = module.get_submodule(owner)
    if leaf in parent._parameters:
        parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        parent._buffers[leaf] = tensor
