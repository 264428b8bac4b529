"""Damaged files through the real command line: each is served or refused in one sentence.

    python tests/fuzz_inputs.py --cases 2000 [--seed 7] [--artifact DIR] [--case 123]

Cases are seeded and of every kind of file that users bring: checkpoints (config.json,
generation_config.json, tokenizer.json, shard index, safetensors, GGUF) through `plan` and `export`,
which is stopped before it lowers programs; artifacts (manifest, tokenizer, template, ONNX and .pte
programs, with and without digests that fit) through `run`, `verify` and `inspect`; snapshots and
the packed weights of the cache through `run`. Every case is a forked copy of one process that has
imported everything. A traceback, a signal, another exit status, a message of several lines, more
than LIMIT seconds of processor time are failures. So are more than WALL seconds, twice: a case that
seems to hang is run again, and the result counts those whose second run ended. `--case` runs one.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np
import onnx
import onnxruntime  # noqa: F401, so that the copies have it
import torch
from fake_artifact import write_artifact
from weights_gguf import write_gguf
from weights_models import tiny_hf

import edge_kv.export
import edge_kv.runtime.onnx_session  # noqa: F401
from edge_kv.artifact import read_artifact
from edge_kv.cli import main
from edge_kv.cli.terminal import Bar
from edge_kv.errors import ExportError
from edge_kv.runtime import packed

LIMIT = 30  # seconds of processor time that one case may take
WALL = 180  # seconds that it may take on a busy machine
LONGEST_WAIT = 1.0  # seconds between two looks; what is beyond, this process was stopped
MOST_MEMORY = 24 << 30  # bytes of address space
KINDS = (
    "checkpoint", "checkpoint", "checkpoint", "manifest", "tokenizer", "template", "program .onnx",
    "program .pte", "snapshot", "cache",
)  # fmt: skip
STAGE = Bar.stage
Env = dict[str, str]
Change = Callable[[Path, random.Random], None]
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 0.0, -0.5, 1e-300, 1e300, float("nan"),
    float("inf"), "", "x", "\ud800", "1", [], [1], [[]], {}, {"a": 1}, [None] * 3,
    ["full_attention"], 10**400,
]  # fmt: skip
JINJA = (
    "{{ 1 / 0 }}", "{{ messages[99] }}", "{{ none.x.y }}", "{{ 'x' * 10 ** 10 }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}", "{{ ''.__class__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ cycler.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}", "{{ raise_exception('no') }}", "{% if %}", "{{", "{% break %}",
    "{% set x = namespace() %}{{ x.y.z }}", "{{ messages | tojson(indent='x') }}",
    "{% generation %}a{% endgeneration %}", "{{ bos_token * -1 }}", "{{ strftime_now('%') }}",
    "{{ messages | map('length') | list }}", "\x00{{ messages | tojson }}",
)  # fmt: skip


# --- what is damaged -----------------------------------------------------------------------------


def make_checkpoints(root: Path) -> list[Path]:
    """Whole checkpoints: directories of three families, one sharded, and two GGUF files."""
    bases = []
    for name, options in (("e2b", {}), ("26b", {"max_shard_size": "150KB"}), ("gemma3", {})):
        folder = root / name
        tiny_hf(name).save_pretrained(folder, **options)
        (folder / "tokenizer.json").write_text(tokenizer(), encoding="utf-8")
        sampling = {
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 64,
            "top_p": 0.95,
            "eos_token_id": [1, 50],
        }
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


# --- artifacts, snapshots and what is kept for the device ----------------------------------------


def agree(root: Path) -> None:
    """Give the manifest the sizes and digests of the files as they are now: a forger would."""
    path = root / "manifest.json"
    held = json.loads(path.read_bytes())
    for name, entry in held["files"].items():
        data = (root / name).read_bytes()
        entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    path.write_text(json.dumps(held))


def template(path: Path, rng: random.Random) -> None:
    """Jinja in odd places, or lines lost."""
    text = path.read_text(encoding="utf-8")
    at = rng.randrange(len(text) + 1)
    if rng.random() < 0.2:
        text = text[at:] if rng.random() < 0.5 else text[:at]
    else:
        text = text[:at] + rng.choice(JINJA) + text[at:]
    path.write_text(text, encoding="utf-8")


def graph(path: Path, rng: random.Random) -> None:
    """One fact of an ONNX program: an attribute, a name, a type, a shape, a constant, a node."""
    model = onnx.load(path, load_external_data=False)
    holder = rng.choice([model.graph, *model.functions]) if rng.random() < 0.3 else model.graph
    nodes = holder.node
    node = rng.choice(nodes)
    what = rng.randrange(7)
    if what == 0 and node.attribute:
        attribute = rng.choice(node.attribute)
        if attribute.type == onnx.AttributeProto.INT:
            attribute.i = rng.choice((0, 1, -1, 7, 2**31, -(2**63)))
        elif attribute.type == onnx.AttributeProto.FLOAT:
            attribute.f = rng.choice((0.0, -1.0, float("nan"), float("inf")))
        else:
            node.attribute.remove(attribute)
    elif what == 1 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(nodes).output[0]
    elif what == 2:
        node.op_type = rng.choice([n.op_type for n in nodes] + ["Nothing"])
    elif what == 3:
        nodes.remove(node)
    elif what == 4:
        value = rng.choice([*model.graph.input, *model.graph.output])
        shape = value.type.tensor_type.shape.dim
        if shape:
            rng.choice(shape).dim_value = rng.choice((0, 1, 3, 2**31, -1))
    elif what == 5:
        value = rng.choice([*model.graph.input, *model.graph.output])
        value.type.tensor_type.elem_type = rng.choice((1, 2, 3, 7, 10, 99))
    elif model.graph.initializer:
        constant = rng.choice(model.graph.initializer)
        if constant.external_data:
            rng.choice(constant.external_data).value = rng.choice(
                ("0", "-1", "7", str(2**62), "../../etc/passwd", "x")
            )
        elif constant.raw_data:
            raw = bytearray(constant.raw_data)
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            constant.raw_data = bytes(raw)
    path.write_bytes(model.SerializeToString())


def snapshot_header(path: Path, rng: random.Random) -> None:
    """Another header, or other rows, with a digest that fits."""
    raw = path.read_bytes()
    magic, version, length = struct.unpack("<8sII", raw[:16])
    header, rows = json.loads(raw[16 : 16 + length]), bytearray(raw[16 + length : -32])
    if rng.random() < 0.8:
        header = replaced(header, rng)
    else:
        rows[rng.randrange(len(rows))] ^= 255
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    body = struct.pack("<8sII", magic, version, len(text)) + text + bytes(rows)
    path.write_bytes(body + hashlib.sha256(body).digest())


class Bases:
    """The whole inputs that cases are copied from."""

    def __init__(self, root: Path, artifact: Path | None) -> None:
        """Make them in `root`; without an `artifact` a toy is written, which has no .pte."""
        self.checkpoints = make_checkpoints(root / "checkpoints")
        self.artifact = artifact or write_artifact(root / "toy")
        self.snapshot = root / "talk.kv"
        self.cache = root / "cache"
        run = ["run", str(self.artifact), "hi", "--max-new-tokens", "2", "--threads", "1"]
        for engine in read_artifact(self.artifact).manifest.backends:
            command = [sys.executable, "-m", "edge_kv", *run, "--engine", engine]
            subprocess.run(command, check=True, capture_output=True)  # compiles what is missing
        made = child([*run, "--snapshot", str(self.snapshot)], root, {})
        packed = child([*run, "--engine", "onnx-stock"], root, {"EDGE_KV_CACHE": str(self.cache)})
        assert (made, packed) == ("served", "served"), (made, packed)
        lacking = [".pte"] * (not self._programs(".pte")) + ["cache"] * (not self.cache.exists())
        self.kinds = [kind for kind in KINDS if kind.split()[-1] not in lacking]

    def _programs(self, ending: str) -> list[Path]:
        return sorted(self.artifact.rglob(f"*{ending}"))

    def case(self, kind: str, rng: random.Random, place: Path) -> tuple[str, list[str], Env]:
        """(what was damaged, arguments, environment) of one case of `kind`, made in `place`."""
        if kind == "checkpoint":
            return self._checkpoint(rng, place)
        root = place / self.artifact.name
        shutil.copytree(self.artifact, root)
        run = ["run", str(root), "hi", "--max-new-tokens", "2", "--threads", "1"]
        if kind == "snapshot":
            path = Path(shutil.copy(self.snapshot, place))
            name = self._change(path, rng, [snapshot_header] * 3 + [flip_header, cut])
            return name, [*run, "--restore", str(path)], {}
        if kind == "cache":
            cache = place / "cache"
            shutil.copytree(self.cache, cache)
            files = sorted(p for p in cache.rglob("*") if p.is_file() and p.stat().st_size)
            path = rng.choice(files)
            name = self._change(path, rng, [flip_header, cut, json_or_bytes])
            return name, [*run, "--engine", "onnx-stock"], {"EDGE_KV_CACHE": str(cache)}
        changes: list[Change]
        if kind == "manifest":
            file, changes = root / "manifest.json", [json_value] * 5 + [flip_header, cut]
        elif kind == "tokenizer":
            file, changes = root / "tokenizer.json", [json_value] * 5 + [flip_header, cut]
        elif kind == "template":
            file, changes = root / "chat_template.jinja", [template] * 5 + [flip_header, cut]
        else:
            ending = kind.split()[-1]
            file = rng.choice(self._programs(ending))
            file = root / file.relative_to(self.artifact)
            changes = [graph] * 4 if ending == ".onnx" else []
            changes += [flip_header, cut]
        name = self._change(file, rng, changes)
        if kind != "manifest" and rng.random() < (0.3 if kind == "program .pte" else 0.7):
            agree(root)
        if kind == "program .pte":
            return name, [*run, "--engine", "executorch"], {}
        others = [["inspect", str(root)], ["verify", str(root), "--threads", "1"]]
        return name, rng.choice([run, run, run, *others]), {}

    def _change(self, path: Path, rng: random.Random, changes: list[Change]) -> str:
        change = rng.choice(changes)
        change(path, rng)
        return f"{path.suffix or path.name} {change.__name__}"

    def _checkpoint(self, rng: random.Random, place: Path) -> tuple[str, list[str], Env]:
        base = rng.choice(self.checkpoints)
        path = place / base.name
        (shutil.copytree if base.is_dir() else shutil.copy)(base, path)
        name = damage(path, rng)
        for _ in range(rng.choice((0, 0, 1, 2))):
            damage_again(path, rng)
        command = ["plan", "--weights", str(path), "--ctx", "64"]
        if rng.random() < 0.5:
            out = ["--out", str(place / "out"), "--calibration", "none"]
            command = ["export", "--weights", str(path), "--ctx", "64", *out]
        return name, command, {}


def json_or_bytes(path: Path, rng: random.Random) -> None:
    (json_value if path.suffix == ".json" else flip_header)(path, rng)


def damage_again(path: Path, rng: random.Random) -> None:
    try:
        damage(path, rng)
    except (ValueError, KeyError, IndexError, UnicodeError):  # gguf cannot read it any more
        flip_header(path, rng)


# --- how it is run -------------------------------------------------------------------------------


def child(arguments: list[str], place: Path, environment: Env) -> str:
    """What the command line makes of `arguments`, in a forked copy of this process."""
    process = os.fork()
    if not process:
        _be_command(arguments, place, environment)
    waited, last = 0.0, time.monotonic()
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            break
        now = time.monotonic()
        if not stopped(process):
            waited += min(now - last, LONGEST_WAIT)
        last = now
        if waited > WALL:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return f"hang: more than {WALL} s"
        time.sleep(0.002)
    said = (place / "stderr").read_text(errors="replace")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU:
            return f"hang: more than {LIMIT} s of processor time"
        return f"signal: {signal.Signals(number).name}, {said[-200:]!r}"
    code = os.WEXITSTATUS(status)
    if "Traceback" in said:
        return f"traceback: {said[-300:]!r}"
    if code == 0:
        return "served"
    errors = [line for line in said.splitlines() if line.startswith("Error: ")]
    if code == 1 and len(errors) == 1 and said.rstrip().endswith(errors[0]):
        return "refused"
    return f"no sentence: status {code}, {said[-300:]!r}"


def stopped(process: int) -> bool:
    """Whether a child was sent SIGSTOP, by whoever measures something else on this machine."""
    stat = Path(f"/proc/{process}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] in "Tt"


def _be_command(arguments: list[str], place: Path, environment: Env) -> NoReturn:
    """Run the command line as a process of its own would, and end."""
    code = 70
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 1))
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number, name, flags in (
            (0, os.devnull, os.O_RDONLY), (1, str(place / "stdout"), os.O_WRONLY | os.O_CREAT),
            (2, str(place / "stderr"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):  # fmt: skip
            os.dup2(os.open(name, flags, 0o600), number)
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(number, mode) for number, mode in ((0, "r"), (1, "w"), (2, "w"))
        )
        os.environ.update(environment)
        packed.WORTH_PACKING = 0  # small artifacts have a cache too
        Bar.stage = up_to_programs  # type: ignore[method-assign]
        sys.argv = ["edge-kv", *arguments]
        main()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def up_to_programs(self: Bar, name: str, *unit: str) -> None:
    """Stands for `Bar.stage`: an export ends where its programs would be lowered."""
    if name.startswith("programs"):
        raise ExportError("Stopped before the programs.")
    STAGE(self, name, *unit)


def attempt(number: int, seed: int, bases: Bases, root: Path) -> tuple[int, str, str]:
    """(number, kind, outcome) of a case; the outcome is "served", "refused" or what went wrong."""
    rng = random.Random(f"{seed}/{number}")
    kind = bases.kinds[number % len(bases.kinds)]
    place = Path(tempfile.mkdtemp(dir=root))
    try:
        name, arguments, environment = bases.case(kind, rng, place)
        return number, f"{kind}: {name}", child(arguments, place, environment)
    finally:
        shutil.rmtree(place)


def fuzz(numbers: range, seed: int, artifact: Path | None) -> Iterator[tuple[int, str, str]]:
    """Every case, made and run; what seems to hang is run again at once."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="edge-kv-fuzz-") as folder:
        bases = Bases(Path(folder), artifact)
        gc.freeze()  # pages of what is imported stay shared with the children
        for number in numbers:
            result = attempt(number, seed, bases, Path(folder))
            yield result
            if result[2].startswith("hang"):
                yield attempt(number, seed, bases, Path(folder))


def command_line() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--case", type=int, help="run this one alone")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--artifact", type=Path, help="exported for both engines; else a toy")
    parser.add_argument("--write", action="store_true", help="keep it as a result")
    args = parser.parse_args()
    numbers = range(args.cases) if args.case is None else range(args.case, args.case + 1)
    begin = time.monotonic()
    found: dict[int, tuple[str, str]] = {}
    again = 0
    for number, kind, result in fuzz(numbers, args.seed, args.artifact):
        again += number in found
        found[number] = (kind.partition(":")[0], result.partition(":")[0])
        if result not in ("served", "refused"):
            print(f"case {number} ({kind}): {result}", file=sys.stderr, flush=True)
    outcomes: dict[str, dict[str, int]] = {}
    for (kind, result), count in sorted(Counter(found.values()).items()):
        outcomes.setdefault(kind, {})[result] = count
    summary = {
        "benchmark": "fuzz_inputs",
        "cases": len(found),
        "seed": args.seed,
        "artifact": args.artifact.name if args.artifact else "toy",
        "seconds": round(time.monotonic() - begin),
        "outcomes": outcomes,
        "failures": sum(result not in ("served", "refused") for _, result in found.values()),
        "run_twice": again,
    }
    print(json.dumps(summary, indent=1))
    if args.write:
        from common import write_result

        write_result("fuzz_inputs", summary)
    return int(summary["failures"] > 0)


if __name__ == "__main__":
    sys.exit(command_line())
