"""Constrained replies: 200 of tiny against 20 schemas, all to be valid; what a token's mask costs.

tiny was trained on running text: nothing it says by itself is JSON. The masks are timed beside an
unconstrained step of the same session, with the vocabulary of the artifact; the share of a token of
a larger model follows from the time of its own token, the median of the first subject's rows at the
smallest depth (the shortest tokens) in a result of full_size.py that `--beside` names.

python benchmarks/constrained.py artifacts/tiny --tokenizer GEMMA/tokenizer.json \\
    --beside benchmarks/results/full_size_e2b_today.json --write
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
from common import machine, write_result

from edge_kv.runtime import Generator, Message, Options, Template, Tokenizer, load
from edge_kv.runtime.chat import RAW_TEMPLATE
from edge_kv.runtime.constraints import Engine, Grammar

NAME = {"type": "string", "maxLength": 20}
POINT = {
    "type": "object",
    "properties": {"x": {"type": "number"}, "y": {"type": "number"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
SCHEMAS = [
    {"type": "boolean"},
    {"type": "integer", "minimum": -5, "maximum": 99},
    {"type": "number"},
    {"type": "null"},
    {"type": "string"},
    {"type": "string", "maxLength": 8},
    {"type": "string", "pattern": "^[a-z]{3}-[0-9]{2}$"},
    {"type": "string", "format": "date"},
    {"enum": ["red", "green", "blue", 7, None]},
    {"const": {"ok": True}},
    {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 5},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "boolean"}], "items": False,
     "minItems": 2},
    POINT,
    {"type": "object", "additionalProperties": {"type": "boolean"}},
    {"type": "object", "properties": {"name": NAME, "tags": {"type": "array", "items": NAME}},
     "required": ["name", "tags"], "additionalProperties": False},
    {"anyOf": [POINT, {"type": "null"}]},
    {"type": "object", "properties": {"from": {"$ref": "#/$defs/p"}, "to": {"$ref": "#/$defs/p"}},
     "required": ["from", "to"], "additionalProperties": False, "$defs": {"p": POINT}},
    {"type": "object", "properties": {"kind": {"const": "a"}, "deep": {"type": "object",
     "properties": {"deeper": {"type": "array", "items": POINT, "minItems": 1}},
     "required": ["deeper"], "additionalProperties": False}},
     "required": ["kind", "deep"], "additionalProperties": False},
    {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "number"}]}, "maxItems": 4},
    {"type": "object"},
]  # fmt: skip
REPLIES = 10  # of each schema
TOKENS = 160  # at most, of a reply


def valid(generator: Generator, schema: dict, seed: int) -> bool:
    """Whether a sampled reply is JSON of `schema`, by the jsonschema package."""
    options = Options(max_new_tokens=TOKENS, temperature=1.0, seed=seed)
    question = [Message("user", "And it came to pass")]
    turn = generator.reply(question, options=options, grammar=Grammar.json_schema(schema))
    text = "".join(p.text for p in turn)
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError) as e:
        print(f"{json.dumps(schema)[:80]} seed {seed}: {text!r}: {str(e)[:80]}", file=sys.stderr)
        return False
    return True


def costs(generator: Generator, schema: dict) -> dict[str, float]:
    """Median seconds: a decoded token, and the mask of one (allowed ids and accepting one)."""
    session = generator.session
    session.reset()
    session.prefill(generator.tokenizer.encode("And it came to pass"))
    engine = Engine(generator.tokenizer, session.artifact.tokens.vocab, generator.stop_ids)
    steps, masks = [], []
    for _ in range(3):
        text = engine.start(Grammar.json_schema(schema))
        for _ in range(40):
            begin = time.perf_counter()
            logits = session.decode(9) if session.pos < session.plan.ctx else logits  # noqa: F821
            middle = time.perf_counter()
            allowed = np.where(text.allowed(1 << 20), logits, np.float32(-np.inf))
            text.accept(int(allowed.argmax()))
            end = time.perf_counter()
            steps.append(middle - begin)
            masks.append(end - middle)
            if text.ended:
                break
    return {"decode": statistics.median(steps), "mask": statistics.median(masks)}


def mask_seconds(tokenizer: Tokenizer, schema: dict) -> float:
    """Median seconds of one token's mask over the vocabulary of a tokenizer."""
    size = tokenizer.vocab_size
    engine = Engine(tokenizer, size, [1])
    logits = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    times = []
    for _ in range(5):
        text = engine.start(Grammar.json_schema(schema))
        for _ in range(60):
            begin = time.perf_counter()
            allowed = np.where(text.allowed(1 << 20), logits, np.float32(-np.inf))
            text.accept(int(allowed.argmax()))
            times.append(time.perf_counter() - begin)
            np.random.default_rng(len(times)).shuffle(logits)
            if text.ended:
                break
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--engine", default="onnx")
    parser.add_argument("--replies", type=int, default=REPLIES, help="of each schema")
    parser.add_argument("--tokenizer", type=Path, help="time masks over this vocabulary too")
    parser.add_argument("--beside", type=Path, help="times of a token the mask is a share of")
    parser.add_argument("--write", action="store_true", help="keep it as a result")
    args = parser.parse_args()
    with load(args.artifact, args.engine) as session:
        generator = Generator(session, template=Template(RAW_TEMPLATE))
        counts = [
            sum(valid(generator, schema, seed) for seed in range(args.replies))
            for schema in SCHEMAS
        ]
        document = {
            "benchmark": "constrained",
            "command": " ".join(["python", *sys.argv]),
            "machine": machine(),
            "artifact": session.artifact.manifest.name,
            "vocabulary": session.artifact.tokens.vocab,
            "schemas": len(SCHEMAS),
            "replies": args.replies * len(SCHEMAS),
            "valid": sum(counts),
            "seconds": costs(generator, {"type": "object", "additionalProperties": NAME}),
        }
    if args.tokenizer:
        large = Tokenizer(args.tokenizer, bos_id=2)
        document["large"] = {
            "vocabulary": large.vocab_size,
            "mask_seconds": mask_seconds(large, {"type": "object", "additionalProperties": NAME}),
        }
    if args.tokenizer and args.beside:
        rows = json.loads(args.beside.read_text())["rows"]
        subject = rows[0]["subject"]
        depth = min(r["depth"] for r in rows)
        own = [r for r in rows if r["subject"] == subject and r["depth"] == depth]
        token = statistics.median(r["decode_seconds"]["p50"] for r in own)
        document["large"] |= {
            "beside": f"{args.beside.stem}: {subject}",
            "token_seconds": token,
            "share_of_token": document["large"]["mask_seconds"] / token,
        }
    print(json.dumps(document, indent=1))
    if args.write:
        write_result("constrained", document)
    sys.exit(sum(counts) != args.replies * len(SCHEMAS))


if __name__ == "__main__":
    main()
