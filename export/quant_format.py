"""Builds the decoder's modules as a weight layout stores them: packed where it packs."""

from __future__ import annotations

from torch import nn

from edge_kv.config import ModelConfig
from edge_kv.errors import ExportError
from edge_kv.export.weight_file import StoredTensor, WeightLayout
from edge_kv.model.decoder import (
    Embedding,
    Experts,
    Linear,
    QuantEmbedding,
    QuantExperts,
    QuantLinear,
    WeightFormat,
)


class QuantFormat(WeightFormat):
    """Module kinds from a `WeightLayout`; an all-float layout yields the float modules."""

    def __init__(self, layout: WeightLayout):
        self.layout = layout

    def linear(self, name: str, n_in: int, n_out: int) -> nn.Module:
        fmt = self._stored(f"{name}.weight").format
        return QuantLinear(n_in, n_out, fmt) if fmt else Linear(n_in, n_out)

    def embedding(self, vocab: int, dim: int) -> nn.Module:
        fmt = self._stored("embed.weight").format
        return QuantEmbedding(vocab, dim, fmt) if fmt else Embedding(vocab, dim)

    def experts(self, name: str, config: ModelConfig) -> nn.Module:
        gate_up, down = (self._stored(f"{name}.{n}") for n in ("gate_up", "down"))
        if bool(gate_up.format) != bool(down.format):
            raise ExportError(
                f"{name}: expert width {down.spec.shape[-1]} cannot be quantised in blocks; "
                "use --quant none."
            )
        if gate_up.format and down.format:
            return QuantExperts(config, gate_up.format, down.format)
        return Experts(config)

    def _stored(self, name: str) -> StoredTensor:
        return self.layout.by_name[name]
