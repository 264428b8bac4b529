"""Records how far the nets and programs of every family are from transformers.

Tiny models, every parameter randomised, float weights, f32 state; mixed chunks, passes with wrong
drafts, ring wraps, open blocks, rewinds, snapshots into memory full of other rows
(`tests/parity_runs.py`). The limit of a model is 2e-4, or four times what its own logits in float32
are from those in float64 where that is more. Where a model has no programs of an engine, the
exporter's reason is recorded. Rows of models that are not asked for stay in the result file.

    python benchmarks/parity.py [--model llama --model zaya]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from common import read_result, run_main, say, write_result

from edge_kv.errors import ExportError
from edge_kv.models.checkpoint import open_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from parity_runs import LENGTH, Run, allowed, export, program_logits, reference
from tiny_models import NAMES

# Exports, and the column of each engine that runs them.
PROGRAMS = {
    ("onnx", "native"): {"onnx": "onnx", "onnx_stock": "onnx-stock"},
    ("executorch", "native"): {"executorch": "executorch"},
    ("executorch", "portable"): {"executorch_portable": "executorch-python"},
}
BLOCK = 32  # three blocks to a buffer of full attention, so that the portable loop really loops


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Largest |Δlogit| against transformers, what it may be, and the spread of the logits."""
    ids, expected, noise = reference(name, folder / "hf")
    row: dict[str, Any] = {
        "pytorch": Run(open_checkpoint(folder / "hf"), ids, expected, "f32").run()
    }
    for (backend, attention), engines in PROGRAMS.items():
        out = folder / f"{backend}-{attention}"
        try:
            export(folder / "hf", out, backend, attention)
        except ExportError as e:
            row |= dict.fromkeys(engines) | {"why_not": str(e)}
            continue
        for column, engine in engines.items():
            got = program_logits(out, ids.numpy(), engine)
            row[column] = max(float(np.abs(x - expected[i].numpy()).max()) for i, x in got)
    worst = max(error for error in row.values() if isinstance(error, float))
    limit = allowed(noise)
    return {
        **row, "noise": noise, "limit": limit, "passed": worst <= limit,
        "spread": float(expected.std()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", action="append", choices=NAMES, help="default: all")
    args = parser.parse_args()
    held = read_result("parity")["families"]
    for name in args.model or NAMES:
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch("edge_kv.export.executorch_portable.BLOCK", BLOCK),
        ):
            held[name] = measure(name, Path(folder))
        say(f"{name}: {held[name]}")
        write_result(
            "parity",
            {
                "what": "largest |Δlogit| against transformers in fp32, quant none, KV f32",
                "tokens": LENGTH,
                "families": held,
            },
        )


if __name__ == "__main__":
    run_main(main)
