"""edge_kv.export: the torch side. Quantise, lower, prove parity, write the artifact."""

from edge_kv.export.pipeline import export_model

__all__ = ["export_model"]
