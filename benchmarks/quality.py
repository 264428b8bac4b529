"""What weight quantisation costs, on real weights and on tiny, measured through the runtime.

    python benchmarks/quality.py --model gemma3-270m
    python benchmarks/quality.py --model tiny

Every variant is an exported artifact; all of them decode the same text in step, teacher-forced:
independent windows of 512 tokens, then one long run. The float artifact is the reference for KL
and for the loss difference; transformers' own loss over the same tokens stands beside it.
State is f32 throughout, except in the last row, which is what `edge-kv export` makes by default.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    MODELS,
    Tally,
    Variant,
    exported,
    gguf_path,
    opened,
    read_text,
    run_main,
    say,
    show,
    teacher_force,
    windows,
    write_result,
)

from edge_kv.artifact import Artifact, read_artifact
from edge_kv.presets import get_preset
from edge_kv.runtime import Session, Tokenizer

WINDOW = 512
FLOAT = Variant("none")
VARIANTS = (
    FLOAT,
    Variant("int8", 32),
    Variant("int4", 32),
    Variant("int4", 64),
    Variant("int4", 128),
    Variant("int4", 32, kv="int8"),
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
    roots = {v.label: exported(args.model, v, args.work) for v in VARIANTS}
    artifacts = {label: read_artifact(root) for label, root in roots.items()}
    tokenizer = Tokenizer.of(artifacts[FLOAT.label])
    text = read_text(args.model, tokenizer, max(args.long, args.windows * (WINDOW - 1) + 1))
    parts = list(windows(text, WINDOW, args.windows))
    whole = text.ids[: args.long]
    reference = transformers_perplexity(args.model, {"windows": parts, "long": [whole]})
    say(f"transformers: {reference}")
    stored = {label: storage(a) for label, a in artifacts.items()}
    sessions = {v.label: opened(args.model, v, args.work, args.threads) for v in VARIANTS}
    measured: dict[str, dict[str, dict[str, Any]]] = {label: {} for label in sessions}
    for name, runs in (("windows", parts), ("long", [whole])):
        for label, result in run(sessions, runs).items():
            measured[label][name] = result
        write_result(
            f"quality_{args.model.replace('-', '_')}",
            {
                "model": args.model,
                "weights": gguf_path().name if args.model != "tiny" else "edge_kv/data/tiny",
                **text.card(),
                "windows": f"{args.windows} of {WINDOW} tokens",
                "long": f"one run of {args.long} tokens",
                "transformers_f32_perplexity": reference,
                "variants": [
                    {"run": label, **stored[label], **measured[label]} for label in sessions
                ],
            },
        )
        rows = [
            {"run": k, **{c: measured[k][name][c] for c in COLUMNS}, **brief(stored[k])}
            for k in sessions
        ]
        show(f"{args.model}, {name}", rows)


def run(sessions: dict[str, Session], runs: list[list[int]]) -> dict[str, dict[str, Any]]:
    """Decode every run from its start token on; what each session scored over all of them."""
    tallies = {label: Tally() for label in sessions}
    for ids in runs:
        teacher_force(sessions, ids, 0, tallies)
    return {label: tally.summary() for label, tally in tallies.items()}


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


def transformers_model(model: str) -> torch.nn.Module:
    """The same checkpoint in transformers: fp32, eager attention."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if model == "tiny":
        loaded = AutoModelForCausalLM.from_pretrained(get_preset("tiny").source, **options)
    else:
        path = gguf_path()
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
    evaluated: torch.nn.Module = loaded.eval()
    return evaluated


@torch.no_grad()
def transformers_perplexity(model: str, runs: dict[str, list[list[int]]]) -> dict[str, float]:
    """Perplexity of transformers over the same tokens, one uncached forward pass a run."""
    loaded = transformers_model(model)
    found = {}
    for name, group in runs.items():
        lost, count = 0.0, 0
        for ids in group:
            row = torch.tensor([ids])
            hidden = loaded.model(row, use_cache=False).last_hidden_state[0, :-1]
            for at in range(0, len(hidden), WINDOW):  # logits of a long run would take gigabytes
                logits = loaded.lm_head(hidden[at : at + WINDOW])
                if cap := getattr(loaded.config, "final_logit_softcapping", None):
                    logits = torch.tanh(logits / cap) * cap
                target = row[0, 1 + at : 1 + at + len(logits)]
                lost += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
                count += len(logits)
        found[name] = float(f"{math.exp(lost / count):.5g}")
    return found


if __name__ == "__main__":
    run_main(main)
