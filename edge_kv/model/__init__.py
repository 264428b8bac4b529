"""The decoder in plain PyTorch, written once; `state` is the seam to every backend."""
