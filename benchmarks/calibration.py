"""What the default export loses, and what calibration gains: perplexity and KL through the runtime.

    python benchmarks/calibration.py --model tiny
    python benchmarks/calibration.py --model gemma3-270m

Each row is one exported artifact that predicts the same text as `edge-kv eval` does, in windows of
512 tokens: stored weights, 8-bit activations, f32 state. The reference is the float checkpoint in
this project's own decoder. Bits a weight count scales, norms and filling. Rows that are already
in the result file and are not asked for again stay in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import MODELS, gguf_path, read_result, read_text, run_main, say, show, write_result

from edge_kv import models
from edge_kv.artifact import Artifact, read_artifact
from edge_kv.cli.terminal import Bar
from edge_kv.export import export_model
from edge_kv.export.weight_file import WeightLayout
from edge_kv.models.checkpoint import recorded_config
from edge_kv.reference import float_reference
from edge_kv.runtime import Tokenizer, load
from edge_kv.runtime.evaluate import evaluate, readable

WINDOW, WINDOWS = 512, 4
VARIANTS: dict[str, dict[str, Any]] = {
    "int4": {"quant": "int4"},
    "int4, not calibrated": {"quant": "int4", "calibration": "none"},
    "int4 without levels": {"quant": "int4", "store": ("embed=int4-s8", "linear=int4-s8")},
    "int8": {"quant": "int8"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="default: all")
    parser.add_argument("--work", type=Path, default=Path("artifacts"), help="exports go here")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    name = f"calibration_{args.model.replace('-', '_')}"
    weights = str(models.get_row("tiny").weights) if args.model == "tiny" else str(gguf_path())
    rows = _measured(name)
    for label in args.variant or VARIANTS:
        root = args.work / f"{args.model}-{label.replace(' ', '-').replace(',', '')}"
        if not root.exists():
            _export(weights, root, VARIANTS[label])
        artifact = read_artifact(root)
        text = read_text(args.model, Tokenizer.of(artifact), WINDOWS * (WINDOW - 1) + 1)
        with load(artifact, threads=args.threads, cache=False) as session:
            found = evaluate(
                session,
                text.ids[1:],
                bos=text.ids[0],
                window=WINDOW,
                reference=float_reference(weights, artifact),
                on_token=lambda done, total: done % 256 or say(f"{done} of {total}"),
            )
        measured = readable(found, str)
        measured["against"].pop("worst")
        rows[label] = {
            "run": label,
            "bits": bits(artifact),
            "weight_bytes": artifact.manifest.files["onnx/weights.bin"].size,
            "formats": artifact.manifest.quant.formats,
            "calibration": artifact.manifest.made.get("calibration"),
            **measured,
        }
        source = Path(weights).name
        content = {"model": args.model, "weights": source, **text.card(), "rows": [*rows.values()]}
        write_result(name, content)
    show(
        f"{args.model}; float: perplexity {measured['against']['perplexity']:.5g}",
        [
            {
                "run": row["run"],
                "bits": row["bits"],
                "perplexity": round(row["perplexity"], 3),
                "mean_kl": round(row["against"]["mean_kl"], 5),
                "top1": round(row["against"]["top1"], 4),
            }
            for row in rows.values()
        ],
    )


def bits(artifact: Artifact) -> float:
    """Bits of all stored tensors, scales and filling included, for each weight in them."""
    layout = WeightLayout(
        models.weights(recorded_config(artifact.manifest.made)), artifact.manifest.quant.formats
    )
    size = sum(region.bytes for region in layout.regions.values())
    return round(8 * size / sum(t.spec.elements for t in layout.tensors), 3)


def _export(weights: str, root: Path, options: dict[str, Any]) -> None:
    say(f"exporting {root.name}")
    root.parent.mkdir(parents=True, exist_ok=True)
    with Bar() as bar:
        export_model(
            weights=weights,
            ctx=2048,
            kv="f32",
            out=root,
            open_session=load,
            progress=bar,
            **options,
        )


def _measured(name: str) -> dict[str, Any]:
    return {row["run"]: row for row in read_result(name).get("rows", ())}


if __name__ == "__main__":
    run_main(main)
