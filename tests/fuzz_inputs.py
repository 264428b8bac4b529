"""Damaged checkpoints through the real commands: an input is served or refused in one sentence.

    python tests/fuzz_inputs.py --cases 2000 [--seed 7]

Every case is a checkpoint with one to three seeded mutations (config.json, generation_config.json,
tokenizer.json, the shard index, the headers of safetensors and GGUF files, cut and flipped bytes),
given to `edge-kv plan` or to `edge-kv export`, which is stopped when the weights are written. A
traceback, an unknown exit status, a message of several lines, a signal or more than LIMIT seconds
is a failure; the case can be made again from its seed and number.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
from typer.testing import CliRunner
from weights_gguf import write_gguf
from weights_models import tiny_hf

from edge_kv.cli import app
from edge_kv.errors import ExportError

LIMIT = 30  # seconds that one case may take
BATCH = 50  # cases of one process
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 0.0, -0.5, 1e-300, 1e300, float("nan"),
    float("inf"), "", "x", "\ud800", "1", [], [1], [[]], {}, {"a": 1}, [None] * 3,
    ["full_attention"], 10**400,
]  # fmt: skip


class Hang(BaseException):
    """A case that takes too long."""


# --- what is damaged -----------------------------------------------------------------------------


def make_bases(root: Path) -> list[Path]:
    """Whole checkpoints: directories of three families, one sharded, and two GGUF files."""
    bases = []
    for name, options in (("e2b", {}), ("26b", {"max_shard_size": "150KB"}), ("gemma3", {})):
        folder = root / name
        tiny_hf(name).save_pretrained(folder, **options)
        (folder / "tokenizer.json").write_text(tokenizer(), encoding="utf-8")
        sampling = {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "eos_token_id": [1, 50]}
        (folder / "generation_config.json").write_text(json.dumps(sampling))
        bases.append(folder)
    for name in ("gemma3", "26b"):
        bases.append(write_gguf(root / f"{name}.gguf", tiny_hf(name), metadata=vocabulary(name)))
    return bases


def pieces() -> list[str]:
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"]
    letters = [*"▁abcdefghijklmnopqrstuvwxyz", "▁▁", "▁▁▁", "th", "the", "▁the"]
    return marks + letters + [f"<unused{i}>" for i in range(128 - len(marks) - len(letters))]


def tokenizer() -> str:
    from edge_kv.weights.gguf_tokenizer import hf_tokenizer_json

    return hf_tokenizer_json({**vocabulary("gemma3"), "general.name": "x"}, "x") or ""


def vocabulary(name: str) -> dict[str, Any]:
    """GGUF metadata of a small tokenizer, spelt with scores or with merges."""
    tokens = pieces()
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if name == "gemma3" else "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 6 + [1] * (len(tokens) - 6),
        "tokenizer.ggml.add_space_prefix": False,
    }
    if name == "gemma3":
        return keys | {"tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))]}
    return keys | {"tokenizer.ggml.merges": ["t h", "th e", "▁ the"]}


def damage(path: Path, rng: random.Random) -> str:
    """Mutate the checkpoint at `path`; returns which kind of mutation it was."""
    if path.is_file():
        kind, change = rng.choice(
            [("gguf bytes", flip_header), ("gguf numbers", big_number), ("cut", cut),
             ("gguf keys", gguf_value)]
        )  # fmt: skip
        change(path, rng)
        return kind
    file = rng.choice(sorted(p for p in path.iterdir() if p.is_file()))
    if file.suffix == ".json":
        kind, change = rng.choice([("values", json_value)] * 4 + [("bytes", flip_header)])
    else:
        kind, change = rng.choice(
            [("header", safetensors_entry)] * 3 + [("bytes", flip_header), ("cut", cut)]
        )
    change(file, rng)
    return f"{file.name.split('-')[0]} {kind}"


def flip_header(path: Path, rng: random.Random) -> None:
    """Other bytes, most of them near the beginning."""
    raw = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 4, 32))):
        if raw:
            raw[rng.randrange(min(len(raw), rng.choice((64, 4096, len(raw)))))] = rng.randrange(256)
    path.write_bytes(raw)


def cut(path: Path, rng: random.Random) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: rng.randrange(len(raw) + 1)])


def big_number(path: Path, rng: random.Random) -> None:
    """A length, count, type or offset of a GGUF header becomes another number."""
    raw = bytearray(path.read_bytes())
    at = rng.randrange(4, 9000)
    value = rng.choice((0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1))
    raw[at : at + 8] = struct.pack("<Q", value)
    path.write_bytes(raw)


def gguf_value(path: Path, rng: random.Random) -> None:
    """The file written again with one key of another value or type."""
    reader = gguf.GGUFReader(path)
    held = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    tensors = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    key = rng.choice(sorted(held))
    odd = rng.choice([0, 1, -1, 2**31, -(2**31), 0.0, -2.5, float("nan"), float("inf"), "", "x",
                      True, [1, 2], ["a"], [0.5], None])  # fmt: skip
    writer = gguf.GGUFWriter(path, str(held.pop("general.architecture")))
    for name, value in held.items():
        new = odd if name == key else value
        if isinstance(new, bool):
            writer.add_bool(name, new)
        elif isinstance(new, int):
            writer.add_int64(name, new)
        elif isinstance(new, float):
            writer.add_float32(name, new)
        elif isinstance(new, str):
            writer.add_string(name, new)
        elif new is not None:
            writer.add_array(name, new)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def json_value(path: Path, rng: random.Random) -> None:
    """One value anywhere in the file, an odd one or none."""
    try:
        raw = json.loads(path.read_bytes())
    except ValueError:
        return flip_header(path, rng)
    path.write_text(json.dumps(replaced(raw, rng)), encoding="utf-8", errors="surrogatepass")
    return None


def replaced(value: Any, rng: random.Random) -> Any:
    """`value` with one part of it, at any depth, replaced or taken out."""
    if not value or not isinstance(value, (dict, list)) or rng.random() < 0.05:
        return rng.choice(ODD)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, copy = rng.choice(keys), value.copy()
    if rng.random() < 0.15:
        del copy[key]
    elif isinstance(value[key], (dict, list)) and rng.random() < 0.7:
        copy[key] = replaced(value[key], rng)
    else:
        copy[key] = rng.choice(ODD)
    return copy


def safetensors_entry(path: Path, rng: random.Random) -> None:
    """One entry of the header describes its tensor otherwise."""
    raw = path.read_bytes()
    try:
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        text = json.dumps(replaced(header, rng)).encode("utf-8", "surrogatepass")
    except (ValueError, struct.error):
        return flip_header(path, rng)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return None


# --- how it is run -------------------------------------------------------------------------------


def attempt(number: int, seed: int, bases: list[Path], root: Path) -> tuple[str, str]:
    """(kind, outcome) of one case; the outcome is "served", "refused" or what went wrong."""
    rng = random.Random(f"{seed}/{number}")
    base = rng.choice(bases)
    place = Path(tempfile.mkdtemp(dir=root))
    path = place / base.name
    (shutil.copytree if base.is_dir() else shutil.copy)(base, path)
    kind = damage(path, rng)
    for _ in range(rng.choice((0, 0, 1, 2))):
        damage_again(path, rng)
    command = ["plan", "--weights", str(path), "--ctx", "64"]
    if rng.random() < 0.5:
        command = ["export", "--weights", str(path), "--ctx", "64", "--out", str(place / "out")]
    try:
        return kind, outcome(command)
    finally:
        shutil.rmtree(place)


def damage_again(path: Path, rng: random.Random) -> None:
    try:
        damage(path, rng)
    except (ValueError, KeyError, IndexError, UnicodeError):  # gguf cannot read it any more
        flip_header(path, rng)


def outcome(command: list[str]) -> str:
    def out_of_time(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(LIMIT)
    try:
        with mock.patch("edge_kv.export.pipeline._Job.run", weights_alone):
            result = CliRunner().invoke(app, command)
    except Hang:
        return f"hang: more than {LIMIT} s"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if result.exit_code == 0:
        return "served"
    if result.exception and not isinstance(result.exception, SystemExit):
        return f"traceback: {type(result.exception).__name__}: {str(result.exception)[:200]}"
    lines = result.stderr.strip().splitlines()
    if result.exit_code != 1 or len(lines) != 1 or not lines[0].startswith("Error: "):
        return f"no sentence: status {result.exit_code}, {result.stderr[:200]!r}"
    return "refused"


def weights_alone(job: Any) -> None:
    """Stands for an export's work up to its programs."""
    job._begin()
    try:
        job._weights()
        job._tokenizer()
    finally:
        shutil.rmtree(job.root)
    raise ExportError("Stopped after the weights.")


def batch(numbers: range, seed: int, root: Path) -> Iterator[tuple[int, str, str]]:
    """(number, kind, outcome) of every case, run in this process."""
    bases = make_bases(root / "bases")
    for number in numbers:
        yield number, *attempt(number, seed, bases, root)


def apart(numbers: range, seed: int) -> list[tuple[int, str, str]]:
    """The cases of `batch` in processes of their own; one that dies is the outcome of its case."""
    found: list[tuple[int, str, str]] = []
    while len(found) < len(numbers):
        left = numbers[len(found) :][:BATCH]
        command = [sys.executable, __file__, "--batch", f"{left[0]}:{left[-1] + 1}"]
        done = subprocess.run(
            [*command, "--seed", str(seed)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            check=False,
        )  # fmt: skip
        answers = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == b"["]
        if len(answers) < len(left):
            number = left[len(answers)]
            answers.append([number, "process", f"signal: ended with status {done.returncode}"])
        for number, kind, result in answers:
            if result not in ("served", "refused"):
                print(f"case {number} ({kind}): {result}", flush=True)
            found.append((number, kind, result))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the counts and failures here")
    parser.add_argument("--batch", help="run FROM:TO here and print a line for each case")
    args = parser.parse_args()
    if args.batch:
        first, last = map(int, args.batch.split(":"))
        with tempfile.TemporaryDirectory() as folder:
            for answer in batch(range(first, last), args.seed, Path(folder)):
                print(json.dumps(answer), flush=True)
        return 0
    found = apart(range(args.cases), args.seed)
    kinds = Counter(f"{kind}: {result.partition(':')[0]}" for _, kind, result in found)
    failures = [f for f in found if f[2] not in ("served", "refused")]
    summary = {
        "cases": len(found),
        "seed": args.seed,
        "outcomes": dict(sorted(kinds.items())),
        "failures": failures,
    }
    print(json.dumps(summary, indent=1))
    if args.json:
        args.json.write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
