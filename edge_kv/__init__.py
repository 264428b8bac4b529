"""edge-kv: KV-efficient language models from checkpoint to phone, with the memory known first."""

__version__ = "0.1.0"
