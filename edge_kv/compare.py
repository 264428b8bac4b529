"""The eager PyTorch net as a subject of `bench --compare torch`: a process of its own.

It runs the very modules the programs were lowered from, over the artifact's own stored weights
(unpacked to float once, as eager PyTorch has no kernel for packed ones) and the plan's tables.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edge_kv import models
from edge_kv.artifact import Artifact
from edge_kv.errors import ArtifactError
from edge_kv.export.backends import WEIGHTS
from edge_kv.export.weight_file import StoredWeights, WeightLayout
from edge_kv.formats import GROUP
from edge_kv.models.checkpoint import recorded_config
from edge_kv.nets import make_net
from edge_kv.nets.ops import stored_values
from edge_kv.nets.state import StaticState
from edge_kv.nets.weights import Weights, load
from edge_kv.ple import PleTable
from edge_kv.runtime.bench import Job, serve
from edge_kv.runtime.session import Ids, Logits, Session


class EagerSession(Session):
    """A session on eager PyTorch, float32."""

    engine = "torch"

    def __init__(self, artifact: Artifact, threads: int) -> None:
        """Load the net with the stored weights of `artifact`.

        Raises:
            ArtifactError: the artifact has no weight file that PyTorch could read, or its manifest
                does not say what model it is of.
        """
        super().__init__(artifact)
        torch.set_num_threads(threads)
        name = f"onnx/{WEIGHTS}"
        if name not in artifact.manifest.files:
            raise ArtifactError(f"{artifact.root} has no {name} to read weights from.")
        config = recorded_config(artifact.manifest.made)
        rows = models.weights(config)
        layout = WeightLayout(rows, artifact.manifest.quant.formats)
        read = _FloatRows(StoredWeights(layout, artifact.path(name)), layout)
        with torch.device("meta"):
            self._net = make_net(config, Weights(rows))
        assert isinstance(self._net, nn.Module)
        load(self._net, read)
        entry, self._shape = artifact.manifest.ple, config.token_rows
        self._ple = PleTable(artifact.path(entry.file), entry) if entry else None
        self._rows = StaticState(self.plan)
        self._rows.tables = {n: torch.from_numpy(b) for n, b in self.state.items()}

    @torch.no_grad()
    def _run_prefill(self, ids: Ids, pos: int) -> None:
        layers = self._shape.prefill if self._shape else 0
        at = torch.tensor([pos])
        self._net.prefill(torch.from_numpy(ids), at, self._rows, self._values(ids, layers))

    @torch.no_grad()
    def _run_decode(self, ids: Ids, pos: int) -> Logits:
        layers = self._shape.layers if self._shape else 0
        at = torch.tensor([pos])
        x = self._net(torch.from_numpy(ids), at, self._rows, self._values(ids, layers))
        logits: Logits = self._net.logits(x).numpy()
        return logits

    def _values(self, ids: Ids, layers: int) -> Tensor | None:
        return torch.from_numpy(self._ple.rows(ids, layers)) if self._ple else None

    def _close_engine(self) -> None:
        if self._ple:
            self._ple.close()
        self._rows.tables = {}


class _FloatRows:
    """Rows of a weight as float32, whatever the file stores."""

    def __init__(self, stored: StoredWeights, layout: WeightLayout) -> None:
        self._stored, self._layout = stored, layout

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        tensor = self._layout.by_name[name]
        region = self._layout.region(tensor).name
        if tensor.format is None:
            return self._stored.read(region, start, stop)
        *_, rows, cols = tensor.spec.shape
        fmt = tensor.format.name
        if len(tensor.spec.shape) == 3:
            stack = self._stored.read(region, start, stop)
            return torch.stack([stored_values(m, rows, cols, fmt) for m in stack])
        first = start // GROUP
        packed = self._stored.read(region, first, -(-stop // GROUP))
        values = stored_values(packed, len(packed) * GROUP, cols, fmt)
        return values[start - first * GROUP : stop - first * GROUP]


def _open(artifact: Artifact, job: Job) -> Any:
    return EagerSession(artifact, job.threads)


if __name__ == "__main__":
    serve(_open)
