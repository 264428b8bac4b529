"""The decoder in plain PyTorch, written once: `decoder` reads top to bottom, `state` is its seam."""
