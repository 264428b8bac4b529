"""Gemma 3 270M from its GGUF file: the same first tokens as transformers, and what it says.

    python benchmarks/real_weights.py greedy        results/greedy_gemma3_270m.json
    python benchmarks/real_weights.py transcript    results/transcript_gemma3_270m.txt

`greedy` decodes 64 tokens from each prompt with the float artifact (--quant none --kv f32) and with
transformers in fp32, both from the GGUF's dequantised weights. `transcript` talks to the artifact
that `edge-kv export` makes by default (int4 weights, int8 KV). The checkpoint is the base model,
which knows no chat template, so the conversation is laid out as a dialogue to be continued.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Variant, exported, opened, read_text, run_main, say, show, write_result
from quality import transformers_model

from edge_kv.artifact import read_artifact
from edge_kv.runtime import Chat, Tokenizer
from edge_kv.runtime.chat import Options, Template

MODEL = "gemma3-270m"
NEW = 64
TIE = 0.05  # logits this close may be ordered either way by another summation order
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "Photosynthesis is the process by which",
    "Die Hauptstadt von Deutschland ist",
    "El agua hierve a una temperatura de",
    "Q: What is the tallest mountain on Earth?\nA:",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to",
)
LONG_PROMPT = 700  # tokens of the language reference: past the window of 512 and the ring's wrap

SYSTEM = (
    "A friendly teacher answers the questions of a student. The answers are short, clear and "
    "correct."
)
QUESTIONS = (
    "What is the capital of France?",
    "What can I see there?",
    "Why is the sky blue?",
    "How many legs does a spider have?",
    "Can you name three planets?",
    "Thank you for your help!",
)
DIALOGUE = Template(
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'user' %}Student: {{ m['content'] }}\nTeacher:"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def greedy(args: argparse.Namespace) -> None:
    root = exported(MODEL, Variant("none"), args.work)
    tokenizer = Tokenizer.of(read_artifact(root))
    text = read_text(MODEL, tokenizer, LONG_PROMPT)
    prompts = {prompt: tokenizer.encode(prompt) for prompt in PROMPTS}
    prompts[f"the first {LONG_PROMPT} tokens of {text.name}"] = text.ids
    reference = transformers_model(MODEL)
    rows = []
    with opened(MODEL, Variant("none"), args.work, args.threads) as session:
        for prompt, ids in prompts.items():
            expected, theirs = transformers_greedy(reference, ids)
            session.reset()
            session.prefill(ids[:-1])
            token, ours, made = ids[-1], [], []
            for _ in range(NEW):
                ours.append(session.decode(token))
                token = int(ours[-1].argmax())
                made.append(token)
            rows.append(compare(expected, theirs, made, ours))
            rows[-1] |= {"prompt": prompt, "prompt_tokens": len(ids), "ids": expected}
            rows[-1]["text"] = tokenizer.decode(expected)
            say(f"{rows[-1]['equal']} of {NEW} equal, {prompt[:40]!r}: {rows[-1]['text'][:60]!r}")
    write_result(
        "greedy_gemma3_270m",
        {
            "model": MODEL,
            "new_tokens": NEW,
            "tie": TIE,
            "passed": all(row["passed"] for row in rows),
            "prompts": rows,
        },
    )
    columns = ("prompt_tokens", "equal", "smallest_gap", "max_abs_logit", "passed")
    show("greedy tokens equal to transformers'", [{c: row[c] for c in columns} for row in rows])


@torch.no_grad()
def transformers_greedy(model: Any, ids: list[int]) -> tuple[list[int], np.ndarray[Any, Any]]:
    """64 greedy ids and the logits [64, vocab] they were taken from."""
    out = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
    made, logits = [], []
    while True:
        logits.append(out.logits[0, -1].numpy())
        made.append(int(logits[-1].argmax()))
        if len(made) == NEW:
            return made, np.stack(logits)
        out = model(torch.tensor([made[-1:]]), cache=out.cache)


def compare(
    expected: list[int],
    theirs: np.ndarray[Any, Any],
    made: list[int],
    ours: list[np.ndarray[Any, Any]],
) -> dict[str, Any]:
    """How far two greedy runs agree; after the first difference they read different text."""
    same = next((i for i, (a, b) in enumerate(zip(expected, made, strict=True)) if a != b), NEW)
    common = min(NEW, same + 1)  # logits of the differing step still have the same past
    top = np.sort(theirs[:common], -1)[:, -2:]
    gaps = top[:, 1] - top[:, 0]
    return {
        "equal": same,
        "gap_at_difference": None if same == NEW else round(float(gaps[same]), 4),
        "smallest_gap": round(float(gaps.min()), 4),
        "max_abs_logit": float(f"{np.abs(theirs[:common] - np.stack(ours[:common])).max():.3g}"),
        "passed": bool(same == NEW or gaps[same] <= TIE),
    }


def transcript(args: argparse.Namespace) -> None:
    variant = Variant("int4", kv="int8")
    options = Options(max_new_tokens=60, repetition_penalty=1.1)
    with opened(MODEL, variant, args.work, args.threads) as session:
        chat = Chat(session, template=DIALOGUE, options=options, system=SYSTEM)
        for question in QUESTIONS:
            answer = chat.send(question)
            for piece in answer:
                if "\n" in piece:  # the end of a turn in this layout
                    break
            answer.close()
            say(f"{question} {chat.messages[-1]['content'].strip()}")
        lines = [
            f"$ {shlex.join(['python', *sys.argv])}",
            f"# {MODEL} (base model), {variant.label}, ctx {variant.ctx}; greedy, repetition "
            "penalty 1.1.",
            "# The student's lines are the input.",
            "",
            *(turn(m["role"], m["content"]) for m in chat.messages),
        ]
    path = RESULTS / "transcript_gemma3_270m.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    say(f"wrote {path}")


def turn(role: str, content: str) -> str:
    names = {"system": "", "user": "Student: ", "assistant": "Teacher: "}
    return names[role] + content.strip() + ("\n" if role != "user" else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("greedy", "transcript"))
    parser.add_argument("--work", type=Path, default=Path("artifacts"), help="exports go here")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    {"greedy": greedy, "transcript": transcript}[args.what](args)


if __name__ == "__main__":
    run_main(main)
