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
        t = self._stored(f"{name}.weight")
        return Linear(n_in, n_out) if t.bits == 32 else QuantLinear(n_in, n_out, t.bits, t.block)

    def embedding(self, vocab: int, dim: int) -> nn.Module:
        t = self._stored("embed.weight")
        return (
            Embedding(vocab, dim) if t.bits == 32 else QuantEmbedding(vocab, dim, t.bits, t.block)
        )

    def experts(self, name: str, config: ModelConfig) -> nn.Module:
        into, down = self._stored(f"{name}.gate_up"), self._stored(f"{name}.down")
        if into.bits != down.bits:
            raise ExportError(
                f"{name}: expert width {down.spec.shape[-1]} cannot be quantised in blocks; "
                "use --quant none."
            )
        if into.bits == 32:
            return Experts(config)
        return QuantExperts(config, into.bits, into.block, down.block)

    def _stored(self, name: str) -> StoredTensor:
        return self.layout.by_name[name]
