"""docs/errors.md, proven: every row of its table is provoked here and its message compared.

python tests/test_bad_input.py    writes the table anew
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import gguf
import pytest
from fake_artifact import edit_manifest, write_artifact
from typer.testing import CliRunner

from edge_kv import models
from edge_kv.cli import app
from edge_kv.manifest import LONGEST_MANIFEST

TABLE = Path(__file__).parent.parent / "docs" / "errors.md"
# What is said once, when a machine's native code is compiled.
FIRST_START = re.compile(r"^(Compiling native code for this machine|… \d+ of).*\n", re.MULTILINE)
BEGIN, END = "<!-- table: tests/test_bad_input.py -->", "<!-- end of table -->"


@dataclass(frozen=True)
class Case:
    """One row: what is wrong, the command that meets it, and how it came about in a directory."""

    area: str
    given: str
    command: str
    prepare: Callable[[Path], object] = lambda _: None
    stdin: bytes = b""


# --- what the directory holds before the command is run ------------------------------------------


def checkpoint(root: Path) -> Path:
    """DIR/model: the shipped checkpoint."""
    return Path(shutil.copytree(models.get_row("tiny").weights, root / "model"))


def config(**changes: object) -> Callable[[Path], None]:
    """DIR/model with other values in its config.json."""

    def prepare(root: Path) -> None:
        path = checkpoint(root) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return prepare


def described(model_type: str, **fields: object) -> Callable[[Path], None]:
    """DIR/model with a config.json of another family, defaults beside `fields`, and no weights."""

    def prepare(root: Path) -> None:
        (root / "model").mkdir()
        values = {"model_type": model_type, **fields}
        (root / "model" / "config.json").write_text(json.dumps(values))

    return prepare


def tensors(edit: Callable[[dict], None]) -> Callable[[Path], None]:
    """DIR/model with other tensors."""

    def prepare(root: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = checkpoint(root) / "model.safetensors"
        held = load_file(path)
        edit(held)
        save_file(held, path)

    return prepare


def three_faults(held: dict) -> None:
    del held["model.norm.weight"]
    held["model.layers.0.self_attn.q_proj.weight"] = held["model.layers.0.self_attn.q_proj.weight"][
        :64
    ].clone()
    held["model.layers.1.adapter.weight"] = held["model.layers.0.input_layernorm.weight"].clone()


def not_a_number(held: dict) -> None:
    held["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")


def file(path: str, content: bytes) -> Callable[[Path], None]:
    """DIR/path with `content`, directories made as needed."""

    def prepare(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)

    return prepare


def also(path: str, content: bytes) -> Callable[[Path], None]:
    """DIR/model, and in it DIR/path with `content`."""
    return lambda root: (checkpoint(root), file(path, content)(root))


def checkpoint_file(name: str, change: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    """DIR/model with the bytes of one file changed; None removes it."""

    def prepare(root: Path) -> None:
        _change(checkpoint(root) / name, change)

    return prepare


def gguf_metadata(arch: str, **keys: int) -> Callable[[Path], None]:
    """DIR/model.gguf without tensors."""

    def prepare(root: Path) -> None:
        writer = gguf.GGUFWriter(root / "model.gguf", arch)
        for key, value in keys.items():
            writer.add_uint32(key.replace("__", "."), value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return prepare


def cut_gguf(root: Path) -> None:
    gguf_metadata("gemma4", gemma4__block_count=35)(root)
    _change(root / "model.gguf", lambda raw: raw[:-40])


def artifact(**options: object) -> Callable[[Path], Path]:
    """DIR/art: a toy artifact."""
    return lambda root: write_artifact(root / "art", **options)


def artifact_file(name: str, change: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    """DIR/art with the bytes of one file changed; None removes it."""
    return lambda root: _change(artifact()(root) / name, change)


def manifest(**changes: object) -> Callable[[Path], None]:
    """DIR/art with other values in its manifest."""
    return lambda root: edit_manifest(artifact()(root), **changes)


def manifest_entry(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    """DIR/art with its manifest edited in place."""

    def prepare(root: Path) -> None:
        path = artifact()(root) / "manifest.json"
        held = json.loads(path.read_text())
        edit(held)
        path.write_text(json.dumps(held))

    return prepare


def damaged_graph(root: Path) -> None:
    """Digests are only read by `verify`: `run` meets the bytes themselves."""
    path = artifact()(root) / "onnx" / "decode.onnx"
    path.write_bytes(b"\xff" * path.stat().st_size)


def empty_text(root: Path) -> None:
    artifact()(root)
    (root / "empty.txt").touch()


def link_outside(root: Path) -> None:
    ple = artifact()(root) / "ple.bin"
    shutil.move(ple, root / "elsewhere.bin")
    ple.symlink_to(root / "elsewhere.bin")


def refusing_template(root: Path) -> None:
    art = artifact()(root)
    text = "{{ raise_exception('only questions are answered') }}"
    (art / "chat_template.jinja").write_text(text)
    entry = {"size": len(text), "sha256": sha256(text.encode()).hexdigest()}
    files = json.loads((art / "manifest.json").read_text())["files"]
    edit_manifest(art, files=files | {"chat_template.jinja": entry})


def snapshot(change: Callable[[bytes], bytes] = bytes, **other: object) -> Callable[[Path], None]:
    """DIR/art and DIR/chat.kv, a snapshot taken there or from an artifact made with `other`."""

    def prepare(root: Path) -> None:
        art = artifact()(root)
        if other:
            art = write_artifact(root / "other", **other)
        command = ["run", str(art), "hi", "--max-new-tokens", "2", "--snapshot"]
        assert CliRunner().invoke(app, [*command, str(root / "chat.kv")]).exit_code == 0
        _change(root / "chat.kv", change)

    return prepare


def _change(path: Path, change: Callable[[bytes], bytes | None]) -> None:
    content = change(path.read_bytes())
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def gone(_: bytes) -> None:
    return None


# --- the rows ------------------------------------------------------------------------------------

PLAN = "plan --weights DIR/model --ctx 512"
EXPORT = "export --weights DIR/model --ctx 64 --out DIR/out"
GGUF = "plan --weights DIR/model.gguf --ctx 512"
INSPECT = "inspect DIR/art"
RUN = "run DIR/art hi"
RESTORE = "run DIR/art hi --restore DIR/chat.kv"
INDEX = "model/model.safetensors.index.json"
index = json.dumps({"weight_map": {"a": "../other.safetensors"}}).encode()
parts = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}).encode()

CASES = [
    Case("flags", "no model", "plan --ctx 4k"),
    Case("flags", "a preset that does not exist", "plan --model e2 --ctx 4k"),
    Case("flags", "a checkpoint as --model", "plan --model google/gemma-4-E2B --ctx 4k"),
    Case("flags", "an artifact as --weights", "export --weights DIR/art --ctx 64", artifact()),
    Case("flags", "a size that is none", "plan --model e2b --ctx 4kk"),
    Case("flags", "no context at all", "plan --model e2b --ctx 0"),
    Case("flags", "a context beyond the model's", "plan --model e2b --ctx 1m"),
    Case("flags", "more drafts than a pass checks", "plan --model e2b --ctx 4k --drafts 9"),
    Case("flags", "an unknown KV storage", "plan --model e2b --ctx 4k --kv int9"),
    Case("flags", "an unknown weight storage", "plan --model e2b --ctx 4k --quant int3"),
    Case("flags", "a weight format nobody packs", "plan --model e2b --ctx 4k --store kv=int5-s8"),
    Case("flags", "no kind of tensor", "plan --model e2b --ctx 4k --store keys=int8-s8"),
    Case("flags", "a kind without a format", "plan --model e2b --ctx 4k --store kv"),
    Case("flags", "an unknown backend", "export --model tiny --ctx 64 --backend onxx"),
    Case("flags", "an unknown attention", "export --model tiny --ctx 64 --attention portabel"),
    Case(
        "flags", "an attention of another backend",
        "export --model tiny --ctx 64 --attention portable",
    ),
    Case(
        "flags",
        "portable programs of a model that the stock runtime cannot compute",
        "export --model zaya1-8b --ctx 64 --weights random --backend executorch "
        "--attention portable",
    ),
    Case("flags", "a target that exists", EXPORT, lambda d: (checkpoint(d), (d / "out").mkdir())),
    Case("flags", "an unknown engine", f"{RUN} --engine onx", artifact()),
    Case("flags", "an engine it was not exported for", RUN, artifact(programs=False)),
    Case("flags", "no threads", f"{RUN} --threads 0", artifact()),
    Case("flags", "sampling out of range", f"{RUN} --top-p 2 --temperature -1", artifact()),
    Case("flags", "an unknown policy", f"{RUN} --on-full slid", artifact()),
    Case("flags", "thinking neither on nor off", f"{RUN} --think maybe", artifact()),
    Case(
        "flags", "a schema that is not JSON", f"{RUN} --json-schema DIR/schema",
        lambda d: (artifact()(d), file("schema", b"{")(d)),
    ),
    Case(
        "flags", "a schema nobody can meet", f"{RUN} --json-schema DIR/schema",
        lambda d: (artifact()(d), file("schema", b'{"type": "objekt"}')(d)),
    ),
    Case("flags", "a regular expression that is none", f"{RUN} --regex 'a('", artifact()),
    Case("flags", "two grammars", f"{RUN} --regex a --grammar DIR/lark", artifact()),
    Case(
        "flags", "tools that are no list", f"{RUN} --tools DIR/tools",
        lambda d: (artifact()(d), file("tools", b'{"name": "weather"}')(d)),
    ),
    Case(
        "flags", "a tool without a name", f"{RUN} --tools DIR/tools",
        lambda d: (artifact()(d), file("tools", b'[{"function": {}}]')(d)),
    ),
    Case("flags", "a bias of no token", f"{RUN} --logit-bias newline=-1", artifact()),
    Case("flags", "a bias of no id of the model", f"{RUN} --logit-bias 99999=1", artifact()),
    Case("flags", "more log-probabilities than are kept", f"{RUN} --logprobs 999", artifact()),
    Case("flags", "less RAM than planned", f"{RUN} --ram-limit 1m", artifact()),
    Case("flags", "an amount of RAM that is none", f"{RUN} --ram-limit lots", artifact()),
    Case("flags", "a depth beyond the context", "bench DIR/art --ctx 4k", artifact()),
    Case("flags", "an unknown comparison", "bench DIR/art --compare jax", artifact()),
    Case("flags", "a plot of a kind nobody draws", "bench DIR/art --plot DIR/a.xyz", artifact()),
    Case("commands", "a word of another tool", "quantize model.gguf"),
    Case("commands", "help as a command", "help"),
    Case("commands", "a command that does not exist", "frobnicate"),
    Case("commands", "no artifact", "run"),
    Case("commands", "a prompt without quotes", "run DIR/art hello world", artifact()),
    Case("commands", "a model where an artifact belongs", "run e2b hello"),
    Case(
        "commands", "a .gguf where an artifact belongs",
        "run DIR/m.gguf hi", file("m.gguf", b"GGUF"),
    ),
    Case("commands", "a checkpoint where an artifact belongs", "run DIR/model hi", checkpoint),
    Case("commands", "a folder of artifacts", "run DIR hi", artifact()),
    Case("commands", "a file where an artifact belongs", "bench DIR/a.txt", file("a.txt", b"a")),
    Case("commands", "a folder that does not exist", "list DIR/none"),
    Case("commands", "a model without --model", "plan e2b --ctx 4k"),
    Case("commands", "a hub id without --weights", "export google/gemma-3-270m-it --ctx 4k"),
    Case("commands", "an export without a context", "export --model e2b"),
    Case("commands", "a plan without a context", "plan --model e2b"),
    Case("commands", "no text to evaluate", "eval DIR/art", artifact()),
    Case("commands", "llama.cpp's -m", "run -m model.gguf -p hi"),
    Case("commands", "llama.cpp's -p", "run DIR/art -p hi", artifact()),
    Case("commands", "llama.cpp's -n", "run DIR/art hi -n 20", artifact()),
    Case("commands", "ollama's --num-ctx", "run DIR/art hi --num-ctx 8192", artifact()),
    Case("commands", "OpenAI's --max-tokens", "run DIR/art hi --max-tokens 20", artifact()),
    Case("commands", "vLLM's --dtype", "export --model e2b --ctx 4k --dtype int8"),
    Case("commands", "layers for a GPU", "run DIR/art hi --n-gpu-layers 99", artifact()),
    Case("commands", "an option nobody has", "run DIR/art hi --fast", artifact()),
    Case("commands", "an option before any command", "--quiet run DIR/art hi"),
    Case("commands", "an option without its value", "run DIR/art hi --top-k", artifact()),
    Case("commands", "words where a number belongs", "run DIR/art hi --top-k many", artifact()),
    Case("commands", "more than it takes", "bench DIR/art now", artifact()),
    Case("commands", "a prompt before the artifact", "run hello DIR/art", artifact()),
    Case("commands", "a device before the artifact", "deploy pi@board DIR/art", artifact()),
    Case("commands", "llama.cpp's -ngl", f"{RUN} -ngl 99", artifact()),
    Case("commands", "an option before its command", "--engine onnx run DIR/art hi", artifact()),
    Case("commands", "a preset as --weights", "plan --weights e2b --ctx 4k"),
    Case("commands", "a name that is nearly right", "run DIR/ort hi", artifact()),
    Case("commands", "a hub id where an artifact belongs", "run google/gemma-3-270m-it hi"),
    Case("commands", "a file for a run's --json", f"{RUN} --json out.json", artifact()),
    Case("commands", "a word too much", "plan --model e2b --ctx 32768 tokens"),
    Case("commands", "a context for a run", f"{RUN} --ctx 4k", artifact()),
    Case("commands", "a model for a run", f"{RUN} --model e2b", artifact()),
    Case("commands", "transformers' --device", f"{RUN} --device cuda", artifact()),
    Case("commands", "a switch for streaming", f"{RUN} --stream", artifact()),
    Case("commands", "less than the least", f"{RUN} --max-new-tokens 0", artifact()),
    Case("commands", "a cache that is to be cleared", "cache clear"),
    Case("flags", "llama.cpp's name of a storage", "plan --model e2b --ctx 4k --quant q4_k_m"),
    Case("flags", "transformers' name of a storage", "plan --model e2b --ctx 4k --quant bf16"),
    Case("flags", "llama.cpp's name of a cache", "plan --model e2b --ctx 4k --kv q8_0"),
    Case("flags", "a list of backends", "export --model tiny --ctx 64 --backend onnx,executorch"),
    Case("flags", "a limit without its unit", "plan --model e2b --fits 2"),
    Case(
        "flags", "a page of the hub",
        "plan --weights https://huggingface.co/google/gemma-3-270m-it --ctx 4k",
    ),
    Case("flags", "a model in another spelling", "plan --model Gemma-4-E2B-it --ctx 4k"),
    Case(
        "flags", "a revision of no hub id",
        "plan --model e2b --weights random --revision v1 --ctx 4k",
    ),
    Case("flags", "a limit that is none", "plan --model e2b --fits 2x"),
    Case("flags", "a limit below the least", "plan --model e2b --fits 100m"),
    Case(
        "flags", "a result where nothing can be",
        "bench DIR/art --json DIR/no/b.json", artifact(),
    ),
    Case("flags", "a result that is a directory", "bench DIR/art --json DIR", artifact()),
    Case(
        "flags", "one of several engines unknown",
        "bench DIR/art --engine onnx,tensorrt", artifact(),
    ),
    Case(
        "flags", "an ssh command with an open quote",
        'deploy DIR/art pi@board --ssh "ssh -i \'key"', artifact(),
    ),
    Case("flags", "a port that is none", "serve DIR/art --port 99999", artifact()),
    Case(
        "flags", "a plan of an engine without one",
        f"{RUN} --ram-limit 2g --engine onnx-stock", artifact(),
    ),
    Case("config", "no config.json", PLAN, checkpoint_file("config.json", gone)),
    Case("config", "config.json cut off", PLAN, checkpoint_file("config.json", lambda b: b[:1])),
    Case("config", "config.json is a list", PLAN, checkpoint_file("config.json", lambda _: b"[]")),
    Case("config", "another architecture", PLAN, config(model_type="gemma2")),
    Case("config", "a multimodal file without its text half", PLAN, config(model_type="gemma4")),
    Case("config", "text where a number belongs", PLAN, config(hidden_size="wide")),
    Case("config", "heads that do not divide", PLAN, config(num_key_value_heads=3)),
    Case("config", "more sharing layers than layers", PLAN, config(num_kv_shared_layers=9)),
    Case("config", "a layer type of another model", PLAN, config(layer_types=["linear"] * 8)),
    Case("config", "a layer without a type", PLAN, config(layer_types=["full_attention"] * 7)),
    Case("config", "biases", PLAN, config(attention_bias=True)),
    Case(
        "config", "a rope that is not computed", PLAN,
        described(
            "llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=512, rope_scaling={"type": "longrope"},
        ),
    ),
    Case(
        "config", "more experts a token than there are", PLAN,
        described("laguna", num_experts=8, num_experts_per_tok=9),
    ),
    Case("config", "DeepSeek V4.1", PLAN, described("deepseek_v4", engram_layers=[1, 14])),
    Case("config", "another convolution", PLAN, described("zaya", cca_time0=4)),
    Case("config", "a norm that divides by nothing", PLAN, config(rms_norm_eps=0)),
    Case("config", "a token outside the vocabulary", PLAN, config(eos_token_id=[1, 4096])),
    Case(
        "config", "weights already quantised", PLAN,
        config(quantization_config={"quant_method": "gptq"}),
    ),
    Case(
        "config", "rope scaling of another model", PLAN,
        config(rope_parameters={"full_attention": {"rope_type": "yarn", "rope_theta": 1e6}}),
    ),
    Case(
        "config", "another model than the one named", f"{PLAN} --model tiny",
        config(sliding_window=32),
    ),
    Case("weights", "nothing there", EXPORT),
    Case("weights", "a file of another kind", EXPORT, file("model", b"weights")),
    Case("weights", "no tensors", EXPORT, checkpoint_file("model.safetensors", gone)),
    Case("weights", "missing, surplus and misshaped tensors", PLAN, tensors(three_faults)),
    Case("weights", "a value that is not a number", EXPORT, tensors(not_a_number)),
    Case(
        "weights", "a download that was cut off", EXPORT,
        checkpoint_file("model.safetensors", lambda b: b[:-1000]),
    ),
    Case(
        "weights", "a header that is cut off", EXPORT,
        checkpoint_file("model.safetensors", lambda b: b[:100]),
    ),
    Case(
        "weights", "a shard that is missing", EXPORT,
        lambda d: (checkpoint_file("model.safetensors", gone)(d), file(INDEX, parts)(d)),
    ),
    Case(
        "weights", "a shard outside the directory", EXPORT,
        lambda d: (checkpoint_file("model.safetensors", gone)(d), file(INDEX, index)(d)),
    ),
    Case("weights", "an adapter", EXPORT, also("model/adapter_config.json", b"{}")),
    Case(
        "weights", "weights under another name", EXPORT,
        lambda d: (checkpoint(d) / "model.safetensors").rename(d / "model" / "tuned.safetensors"),
    ),
    Case(
        "weights", "sampling that cannot be", EXPORT,
        also("model/generation_config.json", b'{"top_p": 95}'),
    ),
    Case("weights", "a tokenizer that is none", EXPORT, also("model/tokenizer.json", b"{}")),
    Case("weights", "random weights of no model", "plan --weights random --ctx 512"),
    Case("weights", "a seed that is none", "plan --model e2b --weights random:x --ctx 512"),
    Case("GGUF", "not GGUF", GGUF, file("model.gguf", b"PK\x03\x04 something else")),
    Case(
        "GGUF", "an old version", GGUF,
        file("model.gguf", struct.pack("<4sIQQ", b"GGUF", 1, 0, 0)),
    ),
    Case("GGUF", "a download that was cut off", GGUF, cut_gguf),
    Case("GGUF", "another architecture", GGUF, gguf_metadata("mamba")),
    Case("GGUF", "metadata without a length", GGUF, gguf_metadata("gemma3")),
    Case("GGUF", "one part of several", GGUF, gguf_metadata("gemma3", split__count=2)),
    Case("GGUF", "a vision projector", GGUF, gguf_metadata("clip")),
    Case(
        "GGUF", "a folder of several", "plan --weights DIR --ctx 512",
        lambda d: (file("q4.gguf", b"GGUF")(d), file("q8.gguf", b"GGUF")(d)),
    ),
    Case(
        "GGUF", "a key that comes twice", GGUF,
        lambda d: (gguf_metadata("gemma3", gemma3__aa=1, gemma3__bb=1)(d),
                   _change(d / "model.gguf", lambda raw: raw.replace(b"3.bb", b"3.aa"))),
    ),
    Case("artifact", "nothing there", INSPECT),
    Case("artifact", "the name of a model", "run e2b Hello"),
    Case(
        "artifact", "a manifest of megabytes", INSPECT,
        artifact_file("manifest.json", lambda b: b.ljust(LONGEST_MANIFEST + 1)),
    ),
    Case("artifact", "a checkpoint", "run DIR/model Hello", checkpoint),
    Case("artifact", "a GGUF file", "run DIR/model.gguf Hello", file("model.gguf", b"GGUF")),
    Case("artifact", "a folder of artifacts", "run DIR Hello", artifact()),
    Case("artifact", "another directory", INSPECT, file("art/notes.txt", b"")),
    Case(
        "artifact", "a manifest that is cut off", INSPECT,
        artifact_file("manifest.json", lambda b: b[:1]),
    ),
    Case("artifact", "a later version", INSPECT, manifest(schema_version=9)),
    Case("artifact", "a field from elsewhere", INSPECT, manifest(comment="edited")),
    Case("artifact", "a field that is missing", INSPECT, manifest_entry(lambda m: m.pop("plan"))),
    Case("artifact", "an earlier version", INSPECT, manifest(schema_version=1)),
    Case(
        "artifact", "a plan that was edited", INSPECT,
        manifest_entry(lambda m: m["plan"]["tables"][0].update(slots=2)),
    ),
    Case(
        "artifact", "more drafts than a chunk has room for", INSPECT,
        manifest_entry(lambda m: m["plan"].update(drafts=3)),
    ),
    Case(
        "artifact", "per-layer rows of another model", INSPECT,
        manifest_entry(lambda m: m["ple"].update(dim=2)),
    ),
    Case(
        "artifact", "a path that leaves the directory", INSPECT,
        manifest_entry(lambda m: m["files"].update({"../secret": {"size": 1, "sha256": "0" * 64}})),
    ),
    Case("artifact", "a link that leaves the directory", INSPECT, link_outside),
    Case("artifact", "a file that is missing", RUN, artifact_file("ple.bin", gone)),
    Case("artifact", "a copy that was cut off", RUN, artifact_file("ple.bin", lambda b: b[:7])),
    Case("artifact", "a changed byte", "verify DIR/art", artifact_file("ple.bin", flip(0))),
    Case(
        "artifact", "a changed byte, asked for at a run", f"{RUN} --check",
        artifact_file("ple.bin", flip(0)),
    ),
    Case("artifact", "a program that is not ONNX", RUN, damaged_graph),
    Case("artifact", "no chat template", RUN, artifact(template=False)),
    Case("artifact", "no tokenizer", f"{RUN} --raw", manifest(tokenizer=None)),
    Case("artifact", "no reference logits", "verify DIR/art", artifact(verify=False)),
    Case("artifact", "a text without tokens", "eval DIR/art --text DIR/empty.txt", empty_text),
    Case("snapshot", "nothing there", RESTORE, artifact()),
    Case(
        "snapshot", "a file of another kind", "run DIR/art hi --restore DIR/art/ple.bin",
        artifact(),
    ),
    Case("snapshot", "a later version", RESTORE, snapshot(lambda b: b[:8] + b"\x09" + b[9:])),
    Case("snapshot", "a snapshot that was cut off", RESTORE, snapshot(lambda b: b[:-1])),
    Case("snapshot", "a changed byte", RESTORE, snapshot(flip(-50))),
    Case("snapshot", "another model's", RESTORE, snapshot(seed=1)),
    Case("snapshot", "another context's", RESTORE, snapshot(ctx=48)),
    Case(
        "snapshot", "a place that cannot be written", f"{RUN} --snapshot DIR/no/chat.kv", artifact()
    ),
    Case("prompt", "nothing", "run DIR/art", artifact()),
    Case("prompt", "a prompt and a file", f"{RUN} --file DIR/art/ple.bin", artifact()),
    Case("prompt", "a file that does not exist", "run DIR/art --file DIR/prompt.txt", artifact()),
    Case("prompt", "a file that never ends", "run DIR/art --file /dev/zero", artifact()),
    Case("prompt", "bytes that are no text", "run DIR/art", artifact(), b"caf\xe9"),
    Case(
        "prompt", "more than the context",
        "run DIR/art 'which is longer than all of the context that was exported'", artifact(),
    ),
    Case("prompt", "a turn the template refuses", RUN, refusing_template),
    Case(
        "prompt", "a template that never ends", RUN,
        artifact(template="{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    ),
]  # fmt: skip


def provoke(case: Case, root: Path) -> str:
    """Run the command in `root`: the one line it ends with, volatile parts taken out."""
    case.prepare(root)
    before = sorted(root.rglob("*"))
    args = shlex.split(case.command.replace("DIR", str(root)))
    result = CliRunner().invoke(app, args, input=case.stdin)
    assert result.exit_code in (1, 2), (result.exit_code, result.output, result.exception)
    said = FIRST_START.sub("", result.stderr)
    assert said.startswith("Error: ") and said.count("\n") == 1, result.stderr
    assert sorted(root.rglob("*")) == before, "something was left behind"
    message = said.strip().replace(str(root), "DIR")
    for volatile in (
        r"\b[0-9a-f]{12}\b…?",
        r"(?<=need up to )[\d.]+ \w+",
        r"(?<=needs )[\d.]+ [kMG]B",
    ):
        message = re.sub(volatile, "…", message)
    return message


def row(case: Case, message: str) -> str:
    command = f"{case.command} < FILE" if case.stdin else case.command
    cells = (case.area, case.given, f"`edge-kv {command}`", message.removeprefix("Error: "))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def written() -> list[str]:
    """The rows docs/errors.md shows."""
    table = TABLE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    return table.strip().splitlines()[2:]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.area}: {c.given}")
def test_message_is_the_one_in_the_table(case, tmp_path, request):
    if "--ram-limit" in case.command:
        request.getfixturevalue("compiler")
    assert row(case, provoke(case, tmp_path)) in written()


def test_table_has_a_row_for_every_case_and_no_other():
    assert len({(c.area, c.given) for c in CASES}) == len(CASES) == len(written())


def rewrite() -> None:
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as root:
            rows.append(row(case, provoke(case, Path(root))))
    head = ["| input | given | command | message |", "|---|---|---|---|"]
    before, rest = TABLE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    table = "\n".join([BEGIN, *head, *rows, END])
    TABLE.write_text(before + table + after, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(rewrite())
