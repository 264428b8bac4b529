"""The eager PyTorch decoder as a subject of `bench --compare torch`: a process of its own.

It runs the very modules the programs were lowered from, over the artifact's own stored weights
(unpacked to float once, as eager PyTorch has no kernel for packed ones) and the plan's buffers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_kv.artifact import Artifact
from edge_kv.errors import ArtifactError
from edge_kv.export.old_backends import WEIGHTS
from edge_kv.export.weight_file import StoredWeights, WeightLayout
from edge_kv.formats import GROUP
from edge_kv.model.binding import load_parameters
from edge_kv.model.decoder import Decoder
from edge_kv.model.ops import stored_values
from edge_kv.model.state import StaticState
from edge_kv.ple import PleTable
from edge_kv.runtime.bench import Job, serve
from edge_kv.runtime.session import Ids, Logits, Session
from edge_kv.tensors import tensor_table


class EagerSession(Session):
    """A session on eager PyTorch, float32."""

    engine = "torch"

    def __init__(self, artifact: Artifact, threads: int) -> None:
        """Load the decoder with the stored weights of `artifact`.

        Raises:
            ArtifactError: the artifact has no weight file that PyTorch could read.
        """
        super().__init__(artifact)
        torch.set_num_threads(threads)
        name = f"onnx/{WEIGHTS}"
        if name not in artifact.manifest.files:
            raise ArtifactError(f"{artifact.root} has no {name} to read weights from.")
        quant = artifact.manifest.quant
        layout = WeightLayout(tensor_table(self.config), quant.formats)
        read = _FloatRows(StoredWeights(layout, artifact.path(name)), layout)
        with torch.device("meta"):
            self._decoder = Decoder(self.config, self.plan).eval()
        self._decoder.rope = Decoder.rope_tables(self.config)
        load_parameters(self._decoder, self.config, read)
        entry = artifact.manifest.ple
        self._ple = PleTable(artifact.path(entry.file), entry) if entry else None
        self._rows = StaticState(self.plan)
        self._rows.buffers = {n: torch.from_numpy(b) for n, b in self.state.items()}

    @torch.no_grad()
    def _run_prefill(self, ids: Ids, pos: int) -> None:
        self._decoder.prefill(*self._inputs(ids, pos, self.config.n_own), self._rows)

    @torch.no_grad()
    def _run_decode(self, token: int, pos: int) -> Logits:
        inputs = self._inputs(np.array([token], np.int64), pos, self.config.n_layers)
        logits: Logits = self._decoder.decode(*inputs, self._rows).numpy()
        return logits

    def _inputs(self, ids: Ids, pos: int, layers: int) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = torch.from_numpy(self._ple.rows(ids, layers)) if self._ple else None
        return torch.from_numpy(ids), torch.tensor([pos]), rows

    def _close_engine(self) -> None:
        if self._ple:
            self._ple.close()
        self._rows.buffers = {}


class _FloatRows:
    """Rows of a parameter as float32, whatever the file stores."""

    def __init__(self, stored: StoredWeights, layout: WeightLayout) -> None:
        self._stored, self._layout = stored, layout

    def __call__(self, region: str, start: int, stop: int) -> Tensor:
        if region in self._layout.regions:
            return self._stored.read(region, start, stop)
        base = region.removesuffix(".weight")
        tensor = self._layout.by_name.get(region) or self._layout.by_name[f"{base}.weight"]
        *_, rows, cols = tensor.spec.shape
        assert tensor.format
        name = tensor.format.name
        if len(tensor.spec.shape) == 3:
            stack = self._stored.read(f"{base}.packed", start, stop)
            return torch.stack([stored_values(m, rows, cols, name) for m in stack])
        first = start // GROUP
        packed = self._stored.read(f"{base}.packed", first, -(-stop // GROUP))
        values = stored_values(packed, len(packed) * GROUP, cols, name)
        return values[start - first * GROUP : stop - first * GROUP]


def _open(artifact: Artifact, job: Job) -> Any:
    return EagerSession(artifact, job.threads)


if __name__ == "__main__":
    serve(_open)
