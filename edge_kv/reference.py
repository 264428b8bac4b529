"""Logits of a float checkpoint, window by window: what `edge-kv eval --against` compares with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from edge_kv import models
from edge_kv.artifact import Artifact
from edge_kv.errors import ConfigError
from edge_kv.models.checkpoint import recorded_config
from edge_kv.models.sources import open_weights
from edge_kv.nets.oracle import oracle, table_values
from edge_kv.nets.weights import Weights
from edge_kv.runtime.evaluate import Reference


def float_reference(spec: str, artifact: Artifact) -> Reference:
    """The float model of checkpoint `spec`, to be held against `artifact`.

    One matrix is in memory at a time, and the logits of one window.

    Raises:
        WeightsError: the checkpoint cannot be read.
        ConfigError: it has another vocabulary than the artifact.
    """
    own = recorded_config(artifact.manifest.made) if spec.startswith("random") else None
    source = open_weights(spec, own, artifact.manifest.quant.formats)
    if source.config.vocab != artifact.tokens.vocab:
        raise ConfigError(
            f"{source.label} has {source.config.vocab} tokens, {artifact.root} has "
            f"{artifact.tokens.vocab}; compare with the checkpoint it was exported from."
        )
    source.check()
    weights = Weights(models.weights(source.config))
    values = table_values(source.config, source.read)

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(source.read(name, start, stop))

    def logits(ids: Sequence[int]) -> Iterator[npt.NDArray[np.float32]]:
        fed = torch.tensor(ids[:-1])
        run = oracle(source.config, weights, read, fed, token_values=values)
        yield from run.logits().numpy()

    return logits
