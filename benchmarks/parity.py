"""Records how far the decoder and its programs are from transformers, family by family.

Tiny models, every parameter randomised, float weights, f32 state; mixed chunks, ring wraps and
rewinds (`tests/parity_runs.py`). `tests/test_parity.py` bounds what this writes to results/.
Mixtures of experts have no ExecuTorch programs: the exporter's reason is recorded.

    python benchmarks/parity.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from common import run_main, say, write_result

from edge_kv.errors import ExportError

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from parity_runs import LENGTH, export, program_logits, reference
from weights_models import NAMES

# What is run: engine and attention of each column.
PROGRAMS = {
    "onnx": ("onnx", "native"),
    "executorch": ("executorch", "native"),
    "executorch_portable": ("executorch-python", "portable"),
}
BLOCK = 32  # three blocks to a buffer of full attention, so that the portable loop really loops


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Largest |Δlogit| against transformers and the spread of its logits."""
    ids, expected = reference(name, folder / "hf")
    row: dict[str, Any] = {}
    for column, (engine, attention) in PROGRAMS.items():
        say(f"{name}: {column}")
        try:
            backend = "onnx" if engine == "onnx" else "executorch"
            export(folder / "hf", folder / column, backend, attention)
            got = program_logits(folder / column, ids.numpy(), engine)
        except ExportError as e:
            row[column] = None
            row["why_not"] = str(e)
        else:
            row[column] = max(float(abs(logits - expected[i].numpy()).max()) for i, logits in got)
    return {**row, "spread": float(expected.std())}


def main() -> None:
    rows = {}
    for name in NAMES:
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch("edge_kv.export.executorch_portable.BLOCK", BLOCK),
        ):
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
    run_main(main)
