"""Do ONNX Runtime and ExecuTorch say the same? Greedy text of both, and where they part, why.

    python benchmarks/engines_agree.py --model tiny           results/engines_agree_tiny.json
    python benchmarks/engines_agree.py --model gemma3-270m    results/engines_agree_gemma3_270m.json

ONNX Runtime continues each prompt greedily; the other engine reads the same tokens and is asked at
every step for its own likeliest one. Up to the first difference both would have said the same text.
There the gap between ONNX Runtime's two likeliest tokens is compared with the noise: how much the
engines differ about such gaps, as a standard deviation over all steps of the run. Each backend
quantises activations (and, at 4 bits, weights) on grids of its own, so quantised runs do differ.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import MODELS, Variant, exported, read_text, run_main, say, show, write_result
from real_weights import PROMPTS

from edge_kv.artifact import read_artifact
from edge_kv.runtime import Session, Tokenizer, load

NEW = 256
CTX = 2048
EXPLAINED = 3.0  # gaps up to this many standard deviations of the noise may close
LONG = 700  # tokens: past Gemma's window of 512
SHOWN = ("prompt_tokens", "equal", "gap_at_difference", "noise", "same_top1", "max_abs_logit")
TINY_PROMPTS = (
    "In the beginning",
    "And it came to pass in those days, that",
    "The LORD is my shepherd;",
)
# What each model is compared as: stored how, run by which engine.
RUNS = {
    "tiny": (
        (Variant("none", ctx=CTX), "executorch", "native"),
        (Variant("none", ctx=CTX), "executorch-python", "portable"),
        (Variant("int8", kv="int8", ctx=CTX), "executorch", "native"),
        (Variant("int4", kv="int8", ctx=CTX), "executorch", "native"),
        (Variant("int4", kv="int8", ctx=CTX), "executorch-python", "portable"),
    ),
    "gemma3-270m": (
        (Variant("none", ctx=CTX), "executorch", "native"),
        (Variant("int8", kv="int8", ctx=CTX), "executorch", "native"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("artifacts"), help="exports go here")
    args = parser.parse_args()
    runs = []
    for variant, engine, attention in RUNS[args.model]:
        root = exported(args.model, variant, args.work, both=attention)
        with (
            load(root, "onnx", args.threads, cache=False) as first,
            load(root, engine, args.threads, cache=False) as second,
        ):
            prompts = prompts_of(args.model, Tokenizer.of(read_artifact(root)))
            rows = [compare(first, second, prompt, ids) for prompt, ids in prompts.items()]
        runs.append(
            {"run": variant.label, "engine": engine, "attention": attention, "prompts": rows}
        )
        title = f"{args.model}, {variant.label}: {engine} ({attention}) against onnx"
        show(
            title,
            [{k: v for k, v in row.items() if k not in ("prompt", "text", "ids")} for row in rows],
        )
    write_result(
        f"engines_agree_{args.model.replace('-', '_')}",
        {
            "model": args.model,
            "new_tokens": NEW,
            "explained_within": EXPLAINED,
            "passed": all(row["passed"] for run in runs for row in run["prompts"]),
            "runs": runs,
        },
    )


def prompts_of(model: str, tokenizer: Tokenizer) -> dict[str, list[int]]:
    if model == "tiny":
        return {prompt: tokenizer.encode(prompt) for prompt in TINY_PROMPTS}
    prompts = {prompt: tokenizer.encode(prompt) for prompt in PROMPTS[:3]}
    text = read_text(model, tokenizer, LONG)
    return {**prompts, f"the first {LONG} tokens of {text.name}": text.ids}


def compare(first: Session, second: Session, prompt: str, ids: list[int]) -> dict[str, Any]:
    """Greedy tokens of `first`, and what `second` makes of the same context at each step."""
    for session in (first, second):
        session.reset()
        session.prefill(ids[:-1])
    token, said, gaps, others, same = ids[-1], [], [], [], []
    worst = 0.0
    for _ in range(NEW):
        ours, theirs = first.decode(token), second.decode(token)
        pair = np.argpartition(ours, -2)[-2:]
        runner_up, top = (int(i) for i in pair[np.argsort(ours[pair])])
        gaps.append(float(ours[top] - ours[runner_up]))
        others.append(float(theirs[top] - theirs[runner_up]))
        same.append(int(theirs.argmax()) == top)
        worst = max(worst, float(np.abs(ours - theirs).max()))
        said.append(top)
        token = top
    equal = same.index(False) if False in same else NEW
    noise = float(np.std(np.array(gaps) - np.array(others)))
    gap = None if equal == NEW else gaps[equal]
    row = {
        "prompt_tokens": len(ids),
        "equal": equal,
        "gap_at_difference": gap if gap is None else float(f"{gap:.3g}"),
        "noise": float(f"{noise:.3g}"),
        "same_top1": round(float(np.mean(same)), 4),
        "max_abs_logit": float(f"{worst:.3g}"),
        "passed": gap is None or gap <= EXPLAINED * noise,
        "prompt": prompt,
        "ids": said,
        "text": Tokenizer.of(first.artifact).decode(said),
    }
    say(f"{equal} of {NEW} equal, noise {noise:.3g}, gap {gap}: {prompt[:40]!r}")
    return row


if __name__ == "__main__":
    run_main(main)
