"""A hand-made artifact whose two ONNX programs are small enough to be checked by hand.

Its "model": a token's row in a buffer is `embed[id] + ple[id, layer]`; the logits are a linear map
of position-weighted sums over what each layer may see. `oracle` computes the same from the ids
alone, without any state, and `NumpySession` runs it over the plan's buffers without an engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np

from edge_kv.artifact import Artifact, sha256_file, write_manifest
from edge_kv.manifest import Manifest, PlanEntry, logits_shape, table_shape, tokens_axis
from edge_kv.plan import SCALE, Plan, Sizes
from edge_kv.runtime.session import Session

STEP = 0.0625  # rows are multiples of this, so that int8 storage is exact
DIM, HEADS = 4, 2
SPECIALS = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
VOCAB = len(SPECIALS) + 256
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


LAYERS, OWNERS = 3, 2
SOURCES = (0, 1, 0)  # the layer whose rows each layer reads


def make_plan(
    ctx: int = 64, chunk: int = 3, kv: str = "f32", window: int = 5, heads: int = HEADS,
    drafts: int = 2,
) -> Plan:  # fmt: skip
    """A layer with a window, one without, and a layer that shares the window's rows."""
    chunk = min(chunk, ctx)
    sizes = Sizes(ctx, chunk, kv, min(drafts, chunk - 1))
    return Plan.of(
        [
            sizes.table(f"l{layer}.{name}", (heads, DIM), layer=layer, keep=keep, readers=readers)
            for layer, keep, readers in ((0, window, (0, 2)), (1, 0, (1,)))
            for name in "kv"
        ],
        sizes,
    )


class Toy:
    """The numbers of the toy model, seeded."""

    def __init__(self, ple: bool = True, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.has_ple = ple
        self.embed = (rng.integers(-40, 40, (VOCAB, HEADS, DIM)) * STEP).astype(np.float32)
        self.ple = (rng.integers(-20, 20, (VOCAB, LAYERS, DIM)) * STEP).astype(np.float32)
        if not ple:
            self.ple[:] = 0
        width = LAYERS * 2 * HEADS * DIM + DIM
        self.head = rng.standard_normal((width, VOCAB)).astype(np.float32) * 0.2

    @classmethod
    def of(cls, artifact: Artifact, seed: int = 0) -> Toy:
        return cls(artifact.manifest.ple is not None, seed)

    def rows(self, ids: np.ndarray, layer: int) -> np.ndarray:
        """K rows [n, heads, dim]; V rows are twice that."""
        return self.embed[ids] + self.ple[ids, layer][:, None]

    def weight(self, positions: np.ndarray) -> np.ndarray:
        """How much a row at a position counts: makes an exchanged position visible."""
        return (1.0 + (positions % 3)).astype(np.float32)

    def logits(self, sums: list[np.ndarray], token: int) -> np.ndarray:
        last = self.ple[token, -1].astype(np.float32)
        return (np.concatenate([*(s.reshape(-1) for s in sums), last]) / 8) @ self.head


def oracle(toy: Toy, plan: Plan, ids: Sequence[int]) -> np.ndarray:
    """Logits after `ids`, from the ids alone: float32 [vocab]."""
    at = np.arange(len(ids))
    row = np.asarray(ids)
    sums = []
    for source in SOURCES:
        seen = at[-plan[f"l{source}.k"].keep :]
        k = toy.rows(row[seen], source)
        w = toy.weight(seen)[:, None, None]
        sums += [(k * w).sum(0), (2 * k * w).sum(0)]
    return toy.logits(sums, ids[-1])


class NumpySession(Session):
    """The toy model over the plan's tables: what an engine does, without one."""

    engine = "numpy"
    backend = "onnx"

    def __init__(self, artifact, seed: int = 0) -> None:
        super().__init__(artifact)
        self.toy = Toy.of(artifact, seed)
        self.fail: BaseException | None = None

    def _write(self, ids: np.ndarray, pos: int) -> None:
        for t in self.plan.tables:
            slots = (pos + np.arange(len(ids))) % t.slots
            if t.name.endswith(SCALE):
                self.state[t.name][slots] = STEP
                continue
            rows = self.toy.rows(ids, t.writer) * (2 if t.name.endswith("v") else 1)
            self.state[t.name][slots] = rows / (STEP if t.dtype == "int8" else 1)
        if self.fail:  # the worst moment: rows written, step not committed
            raise self.fail

    def _run_prefill(self, ids: np.ndarray, pos: int) -> None:
        assert 1 <= len(ids) <= self.plan.chunk
        self._write(ids, pos)

    def _run_decode(self, ids: np.ndarray, pos: int) -> np.ndarray:
        assert 1 <= len(ids) <= self.drafts + 1
        self._write(ids, pos)
        last = pos + len(ids) - 1
        return np.stack([self._logits(token, pos + i, last) for i, token in enumerate(ids)])

    def _logits(self, token: int, pos: int, last: int) -> np.ndarray:
        """Of the token at `pos`, rows up to position `last` being written."""
        sums = []
        for source in SOURCES:
            for name in "kv":
                t = self.plan[f"l{source}.{name}"]
                at = np.arange(t.slots)
                if t.keep:
                    at = last - (last - at) % t.slots
                seen = (at >= 0) & (at <= pos) & ((t.keep == 0) | (pos - at < t.keep))
                rows = self.state[t.name].astype(np.float32) * (STEP if t.dtype == "int8" else 1)
                w = np.where(seen, self.toy.weight(at), 0)[:, None, None]
                sums.append((rows * w).sum(0, dtype=np.float32))
        return self.toy.logits(sums, token).astype(np.float32)


def write_artifact(
    root: Path,
    *,
    ctx: int = 64,
    chunk: int = 3,
    kv: str = "f32",
    window: int = 5,
    drafts: int = 2,
    ple: bool = True,
    programs: bool = True,
    template: bool | str = True,
    marks: Sequence[str] = (),
    verify: bool = True,
    seed: int = 0,
) -> Path:
    """Write a complete artifact to `root` and return it.

    `marks`: further special tokens, instead of the last bytes of the vocabulary.
    """
    plan = make_plan(ctx, chunk, kv, window, drafts=drafts)
    toy = Toy(ple, seed)
    root.mkdir(parents=True)
    backends: dict[str, object] = {}
    if programs:
        (root / "onnx").mkdir()
        entries = {}
        for name in ("prefill", "decode"):
            file = f"onnx/{name}.onnx"
            entries[name] = {"file": file, **_build(root / file, name, plan, toy)}
        files = [f"onnx/{n}.onnx" for n in entries]
        backends["onnx"] = {"programs": entries, "files": files}
    entry = None
    if ple:
        entry = {
            "file": "ple.bin", "rows": VOCAB, "n_layers": LAYERS, "dim": DIM, "bits": 32, "block": 0
        }  # fmt: skip
        (root / "ple.bin").write_bytes(toy.ple.astype("<f4").tobytes())
    _write_tokenizer(root / "tokenizer.json", marks)
    if template:
        text = template if isinstance(template, str) else TEMPLATE
        (root / "chat_template.jinja").write_text(text)
    parity = {"onnx": _write_vectors(root / "verify.npz", toy, plan)} if verify else {}
    document = {
        "schema_version": 2,
        "edge_kv": "0.1.0",
        "name": "toy",
        "tokens": {
            "vocab": VOCAB, "bos": 2, "eos": [1, SPECIALS.index("<end_of_turn>")], "pad": 0,
            "suppress": [],
        },
        "sampling": {},
        "identity": {"model": "", "plan": ""},
        "plan": plan_entry(plan),
        "quant": {"scheme": "none", "formats": {}, "tensors": {}},
        "ple": entry,
        "backends": backends,
        "tokenizer": {
            "file": "tokenizer.json",
            "chat_template": "chat_template.jinja" if template else None,
        },
        "files": _entries(root),
        "made": {"by": "tests", "model": {"type": "toy"}},
        "parity": parity,
        "needs": {
            "weights": {}, "dense": 0, "experts": 0, "read_weights": 0, "read_experts": 0,
            "prefill": 0, "row": 16,
        },
    }  # fmt: skip
    document["identity"] = {
        "model": _digest([document["quant"], document["files"]]),
        "plan": _digest(document["plan"]),
    }
    write_manifest(root, Manifest.model_validate_json(json.dumps(document)))
    return root


def plan_entry(plan: Plan) -> dict[str, object]:
    """A plan as a manifest holds it."""
    return PlanEntry.of(plan).model_dump(mode="json")


def _digest(value: object) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def edit_manifest(root: Path, **changes: object) -> None:
    """Overwrite top-level manifest fields as they would stand in the JSON."""
    path = root / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _entries(root: Path) -> dict[str, object]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {
        p.relative_to(root).as_posix(): {"size": p.stat().st_size, "sha256": sha256_file(p)}
        for p in files
    }


def _write_tokenizer(path: Path, marks: Sequence[str] = ()) -> None:
    """A byte-level tokenizer: one id a byte behind the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters[len(letters) - len(marks) :] = marks
    vocab = {t: i for i, t in enumerate([*SPECIALS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(s, special=True, normalized=False) for s in (*SPECIALS, *marks)]
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(path))


def _write_vectors(path: Path, toy: Toy, plan: Plan) -> dict[str, object]:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, VOCAB, min(30, plan.ctx)).astype(np.int32)
    prompt = 17
    logits = np.stack([oracle(toy, plan, ids[: i + 1]) for i in range(prompt, len(ids))])
    np.savez(path, ids=ids, prompt=np.int64(prompt), logits=logits.astype(np.float32))
    nothing = {"max_abs": 0.0, "max_kl": 0.0}
    return {
        "prompt": prompt, "steps": len(ids) - prompt, "lowering": nothing, "kernels": nothing,
        "quantisation": nothing, "correlation": 1.0, "lowering_limit": nothing,
        "vectors": path.name, "verify": {"max_kl": 1e-6, "min_top1": 1.0},
    }  # fmt: skip


def _build(path: Path, name: str, plan: Plan, toy: Toy) -> dict:
    """Write one program; returns its inputs and outputs as the manifest lists them."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    types = {
        "float": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int8": TensorProto.INT8,
        "int64": TensorProto.INT64,
    }  # fmt: skip
    storage = {"f32": "float", "f16": "float16", "int8": "int8"}
    decode = name == "decode"
    n = tokens_axis(name, plan) or 1
    layers = LAYERS if decode else OWNERS
    inits: list = []
    nodes: list = []
    inputs = [("ids", "int64", [n]), ("pos", "int64", [1])]
    if toy.has_ple:
        inputs.append(("ple", "float", [n, layers, DIM]))
    outputs = [("logits", "float", list(logits_shape(plan, VOCAB)))] if decode else []
    for t in plan.tables:
        inputs.append((t.name, storage[t.dtype], list(table_shape(t))))
        outputs.append((f"{t.name}.out", storage[t.dtype], list(table_shape(t))))

    def const(value, kind) -> str:
        label = f"c{len(inits)}"
        inits.append(numpy_helper.from_array(np.asarray(value, kind), label))
        return label

    def op(kind, *args, out=None, **attrs) -> str:
        label = out or f"t{len(nodes)}"
        nodes.append(helper.make_node(kind, list(args), [label], **attrs))
        return label

    zero, one = const(0, np.int64), const(1, np.int64)

    def length(tensor: str) -> str:
        return op("Gather", op("Shape", tensor), zero)

    embed = op("Gather", const(toy.embed, np.float32), "ids")  # [n, heads, dim]
    pos = op("Squeeze", "pos")
    fed = op("Range", pos, op("Add", pos, length("ids")), one)
    written: dict[str, str] = {}
    for t in plan.tables:
        rows = embed
        if toy.has_ple:
            ple = op("Gather", "ple", const([t.writer], np.int64), axis=1)  # [n, 1, dim]
            rows = op("Add", embed, ple)
        if t.name[3] == "v":
            rows = op("Mul", rows, const(2, np.float32))
        if t.name.endswith(SCALE):
            rows = op("ReduceMax", rows, const([2], np.int64), keepdims=1)
            rows = op("Add", op("Mul", rows, const(0, np.float32)), const(STEP, np.float32))
        elif t.dtype == "int8":
            rows = op(
                "Cast", op("Round", op("Div", rows, const(STEP, np.float32))), to=types["int8"]
            )
        elif t.dtype == "f16":
            rows = op("Cast", rows, to=TensorProto.FLOAT16)
        slots = op("Unsqueeze", op("Mod", fed, length(t.name)), const([1], np.int64))
        written[t.name] = op("ScatterND", t.name, slots, rows, out=f"{t.name}.out")
    if decode:
        sums = []
        last = op("Sub", op("Add", pos, length("ids")), one)
        queries = op("Unsqueeze", fed, const([1], np.int64))  # [n, 1]
        for source in SOURCES:
            for letter in "kv":
                t = plan[f"l{source}.{letter}"]
                rows = op("Cast", written[t.name], to=TensorProto.FLOAT)  # [slots, heads, dim]
                if t.dtype == "int8":
                    rows = op("Mul", rows, written[t.name + SCALE])
                at = op("Range", zero, length(rows), one)
                if t.keep:
                    size = length(rows)
                    at = op("Sub", last, op("Mod", op("Sub", last, at), size))
                seen = op("And", op("GreaterOrEqual", at, zero), op("LessOrEqual", at, queries))
                if t.keep:
                    near = op("Less", op("Sub", queries, at), const(t.keep, np.int64))
                    seen = op("And", seen, near)
                w = op("Add", op("Mod", at, const(3, np.int64)), one)
                w = op("Mul", w, op("Cast", seen, to=TensorProto.INT64))
                w = op("Cast", w, to=TensorProto.FLOAT)  # [n, slots]
                sums.append(op("MatMul", w, op("Flatten", rows, axis=1)))
        if toy.has_ple:
            sums.append(op("Gather", "ple", const(layers - 1, np.int64), axis=1))
        else:
            none = op("Mul", op("Cast", queries, to=TensorProto.FLOAT), const(0, np.float32))
            sums.append(op("Expand", none, const([1, DIM], np.int64)))
        joined = op("Mul", op("Concat", *sums, axis=1), const(1 / 8, np.float32))
        logits = op("MatMul", joined, const(toy.head, np.float32))
        shape = [-1, VOCAB] if plan.drafts else [VOCAB]
        op("Reshape", logits, const(shape, np.int64), out="logits")

    def infos(items):
        return [helper.make_tensor_value_info(i, types[t], s) for i, t, s in items]

    graph = helper.make_graph(nodes, name, infos(inputs), infos(outputs), inits)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())

    def listed(items):
        return [{"name": i, "dtype": t, "shape": s} for i, t, s in items]

    return {"inputs": listed(inputs), "outputs": listed(outputs)}
