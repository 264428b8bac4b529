"""What weight quantisation costs, on real weights and on tiny, measured through the runtime.

    python benchmarks/quality.py --model gemma3-270m
    python benchmarks/quality.py --model tiny

Every variant is an exported artifact; all of them decode the same text in step, teacher-forced:
independent windows of 512 tokens, then one long run. The reference for perplexity and KL is
transformers in fp32 on the float weights. State is f32: int8 state is `kv_quality.py`'s subject.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    MODELS,
    Scored,
    Tally,
    Variant,
    exported,
    gguf_path,
    opened,
    read_text,
    run_main,
    show,
    teacher_force,
    windows,
    write_result,
)

from edge_kv import models
from edge_kv.artifact import Artifact, read_artifact
from edge_kv.runtime import Tokenizer

WINDOW = 512
ROWS = 64  # positions whose float logits are held at a time
VARIANTS = (
    Variant("int8"),
    Variant("int4"),
    Variant("int4", ("embed=int4-s8", "linear=int4-s8")),
    Variant("int4", ("embed=int8-s8",)),
)
COLUMNS = ("tokens", "perplexity", "perplexity_ratio", "mean_kl", "top1_agreement")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--windows", type=int, default=4, help=f"windows of {WINDOW} tokens")
    parser.add_argument("--long", type=int, default=2049, help="tokens of the long run")
    parser.add_argument("--work", type=Path, default=Path("artifacts"), help="exports go here")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    artifacts = {v.label: read_artifact(exported(args.model, v, args.work)) for v in VARIANTS}
    stored = {label: storage(a) for label, a in artifacts.items()}
    tokenizer = Tokenizer.of(artifacts[VARIANTS[0].label])
    text = read_text(args.model, tokenizer, max(args.long, args.windows * (WINDOW - 1) + 1))
    reference = transformers_model(args.model)
    sessions = {v.label: opened(args.model, v, args.work, args.threads) for v in VARIANTS}
    measured: dict[str, dict[str, dict[str, Any]]] = {label: {} for label in sessions}
    floats: dict[str, float] = {}
    groups = {"windows": list(windows(text, WINDOW, args.windows)), "long": [text.ids[: args.long]]}
    for name, runs in groups.items():
        tallies = {label: Tally() for label in sessions}
        for ids in runs:
            teacher_force(sessions, ids, 0, tallies, float_logits(reference, ids))
            floats[name] = next(iter(tallies.values())).reference_perplexity
            for label, tally in tallies.items():
                measured[label][name] = tally.summary()
            write_result(
                f"quality_{args.model.replace('-', '_')}",
                {
                    "model": args.model,
                    "weights": gguf_path().name if args.model != "tiny" else "edge_kv/data/tiny",
                    **text.card(),
                    "windows": f"{args.windows} of {WINDOW} tokens",
                    "long": f"one run of {args.long} tokens",
                    "float": "transformers, fp32, eager attention",
                    "float_perplexity": floats,
                    "variants": [
                        {"run": label, **stored[label], **measured[label]} for label in sessions
                    ],
                },
            )
        rows = [
            {"run": k, **{c: measured[k][name][c] for c in COLUMNS}, **brief(stored[k])}
            for k in sessions
        ]
        show(f"{args.model}, {name}; float: perplexity {floats[name]}", rows)


def storage(artifact: Artifact) -> dict[str, Any]:
    """Bytes of the weights and what rounding them lost, from the manifest.

    Relative error of a tensor: ||w - q(w)|| / ||w||.
    """
    manifest = artifact.manifest
    weights = {
        name: entry.size
        for name, entry in manifest.files.items()
        if name.endswith("weights.bin") or name == "ple.bin"
    }
    errors = [t.error for t in manifest.quant.tensors.values()]
    embed = manifest.quant.tensors.get("embed.weight")
    return {
        "weight_bytes": sum(weights.values()),
        "mean_relative_error": round(float(np.mean(errors)), 5) if errors else 0.0,
        "worst_relative_error": round(max(errors), 5) if errors else 0.0,
        "embedding_relative_error": round(embed.error, 5) if embed else 0.0,
    }


def brief(stored: dict[str, Any]) -> dict[str, Any]:
    return {
        "relative_error": stored["mean_relative_error"],
        "MB": round(stored["weight_bytes"] / 1e6, 1),
    }


def transformers_model(model: str) -> Any:
    """The same checkpoint in transformers: fp32, eager attention."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if model == "tiny":
        loaded = AutoModelForCausalLM.from_pretrained(
            str(models.get_row("tiny").weights), **options
        )
    else:
        path = gguf_path()
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
    return loaded.eval()


@torch.no_grad()
def float_logits(model: Any, ids: list[int]) -> Iterator[Scored]:
    """Logits behind every id but the last, from one uncached forward pass.

    They are made a few rows at a time: those of a long run would take gigabytes.
    """
    hidden = model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, :-1]
    cap = getattr(model.config, "final_logit_softcapping", None)
    for at in range(0, len(hidden), ROWS):
        logits = model.lm_head(hidden[at : at + ROWS])
        if cap:
            logits = torch.tanh(logits / cap) * cap
        for row in logits.numpy():
            yield Scored(row)


if __name__ == "__main__":
    run_main(main)
