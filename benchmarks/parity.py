"""Records how far the programs of every family are from transformers.

Tiny models, every parameter randomised, float weights, f32 state; mixed chunks, ring wraps and
rewinds (`tests/parity_runs.py`). Where a model has no programs of an engine, the exporter's reason
is recorded. Rows of models that are not asked for stay in the result file.

    python benchmarks/parity.py [--model llama --model zaya]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from common import RESULTS, run_main, say, write_result

from edge_kv.errors import ExportError

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from parity_runs import LENGTH, export, program_logits, reference
from tiny_models import NAMES

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
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", action="append", choices=NAMES, help="default: all")
    args = parser.parse_args()
    rows = json.loads((RESULTS / "parity.json").read_text(encoding="utf-8"))["families"]
    for name in args.model or NAMES:
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
