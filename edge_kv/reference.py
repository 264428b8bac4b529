"""Logits of a float checkpoint, window by window: what `edge-kv eval --against` compares with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from edge_kv.artifact import Artifact
from edge_kv.errors import ConfigError
from edge_kv.export.gate import float_rows
from edge_kv.kv_plan import plan_kv
from edge_kv.model.oracle import oracle_logits
from edge_kv.runtime.evaluate import Reference
from edge_kv.weights import check_weights, open_weights


def float_reference(spec: str, artifact: Artifact) -> Reference:
    """The float model of checkpoint `spec`, to be held against `artifact`.

    One layer is in memory at a time, and the logits of one window.

    Raises:
        WeightsError: the checkpoint cannot be read.
        ConfigError: it has another vocabulary than the artifact.
    """
    source = open_weights(spec, artifact.config if spec.startswith("random") else None)
    config = source.config
    if config.vocab_size != artifact.config.vocab_size:
        raise ConfigError(
            f"{source.label} has {config.vocab_size} tokens, {artifact.root} has "
            f"{artifact.config.vocab_size}; compare with the checkpoint it was exported from."
        )
    check_weights(source)
    rows = float_rows(config, source.read) if config.ple_dim else None

    def logits(ids: Sequence[int]) -> Iterator[npt.NDArray[np.float32]]:
        yield from oracle_logits(
            config,
            plan_kv(config, ctx=len(ids), kv="f32"),
            lambda region, a, b: torch.from_numpy(source.read(region, a, b)),
            torch.tensor(ids[:-1]),
            ple_rows=rows,
        ).numpy()

    return logits
