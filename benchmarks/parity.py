"""Records how far the decoder and its ONNX programs are from transformers, family by family.

Tiny models, every parameter randomised, float weights, f32 state; mixed chunks, ring wraps and
rewinds (`tests/parity_runs.py`). `tests/test_parity.py` bounds what this writes to results/.

    python benchmarks/parity.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from common import say, write_result

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from parity_runs import LENGTH, Eager, onnx_logits, reference, static_logits
from weights_models import NAMES


def measure(name: str, folder: Path) -> dict[str, float]:
    """Largest |Δlogit| against transformers and the spread of its logits."""
    ids, expected = reference(name, folder / "hf")
    static = static_logits(Eager(folder / "hf"), ids)
    onnx = onnx_logits(folder / "hf", folder / "artifact", ids.numpy())
    return {
        "pytorch": max(float((row - expected[i]).abs().max()) for i, row in static.items()),
        "onnx": max(float(abs(row - expected[i].numpy()).max()) for i, row in onnx),
        "spread": float(expected.std()),
    }


def main() -> None:
    rows = {}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = measure(name, Path(folder))
        say(f"{name}: {rows[name]}")
    write_result(
        "parity",
        {
            "what": "largest |Δlogit| against transformers in fp32, quant none, KV f32",
            "tokens": LENGTH,
            "families": rows,
        },
    )


if __name__ == "__main__":
    main()
