"""The slow truth: a whole-sequence forward without any cache, one layer in memory at a time.

Runs the same decoder as every lowering. Because layers are loaded, run and dropped in turn, the
float reference of a full-size model needs no more memory than its largest layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edge_kv.config import ModelConfig
from edge_kv.formats import GROUP
from edge_kv.kv_plan import KVPlan
from edge_kv.model.binding import ReadRows, load_parameters, unload_parameters
from edge_kv.model.decoder import Decoder, QuantEmbedding, WeightFormat
from edge_kv.model.state import UncachedState, stored_rows

PleRows = Callable[[Tensor], Tensor]  # ids [T] -> f32 [T, n_layers, ple_dim]


@torch.no_grad()
def oracle_logits(
    config: ModelConfig,
    plan: KVPlan,
    read: ReadRows,
    ids: Tensor,
    *,
    start: int = 0,
    fmt: WeightFormat | None = None,
    ple_rows: PleRows | None = None,
    exact_state: bool = True,
    on_layer: Callable[[int], None] = lambda i: None,
) -> Tensor:
    """Logits [T - start, vocab] of positions start … T-1 of `ids` [T].

    `read` yields stored rows; `fmt` says whether they are float (default) or packed. With
    `exact_state` false, keys and values pass through the plan's storage, as in the static buffers.
    """
    with torch.device("meta"):
        decoder = Decoder(config, plan, fmt)
    state = UncachedState(None if exact_state else stored_rows(plan))
    pos = torch.zeros(1, dtype=torch.int64)

    def loaded(name: str) -> torch.nn.Module:
        module = decoder.get_submodule(name)
        load_parameters(module, config, read, f"{name}.")
        return module

    decoder.rope = Decoder.rope_tables(config)
    if config.ple_dim:
        loaded("ple")
    per = GROUP if isinstance(decoder.embed, QuantEmbedding) else 1  # token rows of a stored one
    unique, rank = (ids // per).unique(return_inverse=True)
    load_parameters(decoder.embed, config, _only(read, unique), "embed.", rows=len(unique))
    x, ple = decoder.embed_tokens(rank * per + ids % per, ple_rows(ids) if ple_rows else None)
    unload_parameters(decoder.embed)
    rope = decoder.ropes(x, pos)
    for i in range(config.n_layers):
        layer = loaded(f"layers.{i}")
        x = layer(x, ple[i], rope, pos, state)
        unload_parameters(layer)
        on_layer(i)
    loaded("norm")
    normed = decoder.norm(x[start:])
    return decoder.softcap(
        torch.cat(
            [_run_and_drop(loaded(f"head.{i}"), normed) for i in range(len(decoder.head))],
            -1,
        )
    )


def _only(read: ReadRows, ids: Tensor) -> ReadRows:
    """Just the stored rows `ids`: a full-size table is over a gigabyte in f32."""
    return lambda region, start, stop: torch.cat([read(region, int(i), int(i) + 1) for i in ids])


def _run_and_drop(module: torch.nn.Module, x: Tensor) -> Tensor:
    out: Tensor = module(x)
    unload_parameters(module)
    return out
