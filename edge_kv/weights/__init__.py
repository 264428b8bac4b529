"""File formats of checkpoints: safetensors, GGUF, tokenizers. No model, no torch."""
