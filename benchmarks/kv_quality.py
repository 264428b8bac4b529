"""What int8 keys and values cost: the same float weights over int8 and over f32 state.

    python benchmarks/kv_quality.py --model gemma3-270m
    python benchmarks/kv_quality.py --model tiny

Both sessions read the same text to the same depth (prefill included, so that errors in the stored
rows propagate as they do in use), then decode it on, teacher-forced. Reported at each depth: KL of
the next-token distributions, perplexity of both, top-1 agreement.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import (
    MODELS,
    Tally,
    Variant,
    exported,
    opened,
    read_text,
    run_main,
    show,
    teacher_force,
    write_result,
)

from edge_kv.amounts import parse_size
from edge_kv.artifact import read_artifact
from edge_kv.runtime import Tokenizer

COLUMNS = ("context", "tokens", "f32_perplexity", "perplexity", "mean_kl", "top1_agreement")
REFERENCE, INT8 = "f32 KV", "int8 KV"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--depths", default="2k,16k", help="tokens of context, e.g. 2k,16k")
    parser.add_argument("--steps", type=int, default=512, help="decode steps scored at each depth")
    parser.add_argument("--work", type=Path, default=Path("artifacts"), help="exports go here")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    depths = [parse_size(d) for d in args.depths.split(",")]
    variants = {
        REFERENCE: Variant("none", kv="f32"),
        INT8: Variant("none", kv="int8"),
    }
    root = exported(args.model, variants[REFERENCE], args.work)
    tokenizer = Tokenizer.of(read_artifact(root))
    text = read_text(args.model, tokenizer, max(depths) + args.steps + 1)
    sessions = {k: opened(args.model, v, args.work, args.threads) for k, v in variants.items()}
    sizes = {k: s.plan.bytes for k, s in sessions.items()}
    rows = []
    for depth in depths:
        tallies = {name: Tally() for name in sessions}
        teacher_force(sessions, text.ids[: depth + args.steps + 1], depth, tallies)
        rows.append(
            {
                "context": depth,
                "f32_perplexity": tallies[REFERENCE].summary()["perplexity"],
                **tallies[INT8].summary(),
            }
        )
        write_result(
            f"kv_quality_{args.model.replace('-', '_')}",
            {
                "model": args.model,
                "weights": "float",
                "ctx": variants[INT8].ctx,
                "int8_kv": "append buffers int8 with one f32 scale a row; rings f32",
                "kv_bytes": sizes,
                **text.card(),
                "depths": rows,
            },
        )
    show(
        f"int8 KV against f32 KV, {args.model}",
        [{column: row[column] for column in COLUMNS} for row in rows],
    )


if __name__ == "__main__":
    run_main(main)
