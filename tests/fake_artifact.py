"""A hand-made artifact whose two ONNX programs are small enough to be checked by hand.

Its "model": a token's row in a buffer is `embed[id] + ple[id, layer]`; the logits are a linear map
of position-weighted sums over what each layer may see. `oracle` computes the same from the ids
alone, without any state, and `NumpySession` runs it over the plan's buffers without an engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from edge_kv.artifact import (
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
    PleEntry,
    plan_entry,
    sha256_file,
    write_manifest,
)
from edge_kv.config import AttentionSpec, ModelConfig
from edge_kv.kv_plan import RING, KVPlan, plan_kv, state_views
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


def make_config(window: int = 5, ple: bool = True, max_ctx: int = 4096) -> ModelConfig:
    """A ring layer, an append layer and a layer that shares the ring."""
    spec = AttentionSpec(2 * HEADS, HEADS, DIM, 1e4, DIM // 2)
    return ModelConfig(
        family="gemma4",
        vocab_size=VOCAB,
        hidden=8,
        pattern="SFS",
        sliding_window=window,
        sliding=spec,
        full=spec,
        mlp_width=16,
        max_ctx=max_ctx,
        n_kv_shared=1,
        ple_dim=DIM if ple else 0,
        eos_ids=(1,),
    )


class Toy:
    """The numbers of the toy model, seeded."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.config = config
        n = config.n_layers
        self.embed = (rng.integers(-40, 40, (VOCAB, HEADS, DIM)) * STEP).astype(np.float32)
        self.ple = (rng.integers(-20, 20, (VOCAB, n, DIM)) * STEP).astype(np.float32)
        if not config.ple_dim:
            self.ple[:] = 0
        self.head = rng.standard_normal((n * 2 * HEADS * DIM + DIM, VOCAB)).astype(np.float32) * 0.2

    def rows(self, ids: np.ndarray, layer: int) -> np.ndarray:
        """K rows [heads, n, dim]; V rows are twice that."""
        return (self.embed[ids] + self.ple[ids, layer][:, None]).transpose(1, 0, 2)

    def weight(self, positions: np.ndarray) -> np.ndarray:
        """How much a row at a position counts: makes an exchanged position visible."""
        return (1.0 + (positions % 3)).astype(np.float32)

    def logits(self, sums: list[np.ndarray], token: int) -> np.ndarray:
        last = self.ple[token, -1].astype(np.float32)
        return (np.concatenate([*(s.reshape(-1) for s in sums), last]) / 8) @ self.head


def oracle(toy: Toy, plan: KVPlan, ids: Sequence[int]) -> np.ndarray:
    """Logits after `ids`, from the ids alone: float32 [vocab]."""
    at = np.arange(len(ids))
    row = np.asarray(ids)
    sums = []
    for layer in plan.layers:
        seen = at[-layer.window :] if layer.window else at
        k = toy.rows(row[seen], layer.source)
        w = toy.weight(seen)[None, :, None]
        sums += [(k * w).sum(1), (2 * k * w).sum(1)]
    return toy.logits(sums, ids[-1])


class NumpySession(Session):
    """The toy model over the plan's buffers: what an engine does, without one."""

    engine = "numpy"

    def __init__(self, artifact, seed: int = 0) -> None:
        super().__init__(artifact)
        self.toy = Toy(artifact.config, seed)
        self.fail: BaseException | None = None

    def _write(self, ids: np.ndarray, pos: int) -> None:
        for b in self.plan.buffers:
            slots = (pos + np.arange(len(ids))) % b.slots
            if b.role.endswith("scale"):
                self.state[b.name][:, slots] = STEP
                continue
            rows = self.toy.rows(ids, b.writer) * (2 if b.role == "v" else 1)
            scale = STEP if b.dtype == "int8" else 1
            self.state[b.name][:, slots] = rows / scale
        if self.fail:  # the worst moment: rows written, step not committed
            raise self.fail

    def _run_prefill(self, ids: np.ndarray, pos: int) -> None:
        assert 1 <= len(ids) <= self.plan.chunk
        self._write(ids, pos)

    def _run_decode(self, token: int, pos: int) -> np.ndarray:
        self._write(np.array([token]), pos)
        sums = []
        for layer in self.plan.layers:
            for name in (layer.k, layer.v):
                b = self.plan.by_name[name]
                at = np.arange(b.slots)
                if b.kind == RING:
                    at = pos - (pos - at) % b.slots
                seen = (at >= 0) & (at <= pos) & ((layer.window == 0) | (pos - at < layer.window))
                rows = self.state[name].astype(np.float32) * (STEP if b.dtype == "int8" else 1)
                w = np.where(seen, self.toy.weight(at), 0)[None, :, None]
                sums.append((rows * w).sum(1, dtype=np.float32))
        return self.toy.logits(sums, token).astype(np.float32)


def write_artifact(
    root: Path,
    *,
    ctx: int = 64,
    chunk: int = 3,
    kv: str = "f32",
    window: int = 5,
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
    config = make_config(window, ple)
    plan = plan_kv(config, ctx=ctx, chunk=chunk, kv=kv)
    toy = Toy(config, seed)
    root.mkdir(parents=True)
    backends: dict[str, object] = {}
    if programs:
        (root / "onnx").mkdir()
        entries = {}
        for name in ("prefill", "decode"):
            file = f"onnx/{name}.onnx"
            entries[name] = {"file": file, **_build(root / file, name, config, plan, toy)}
        files = [f"onnx/{n}.onnx" for n in entries]
        backends["onnx"] = {"programs": entries, "files": files}
    entry = None
    if ple:
        entry = PleEntry(
            file="ple.bin", rows=VOCAB, n_layers=config.n_layers, dim=DIM, bits=32, block=0
        )
        (root / entry.file).write_bytes(toy.ple.astype("<f4").tobytes())
    _write_tokenizer(root / "tokenizer.json", marks)
    if template:
        text = template if isinstance(template, str) else TEMPLATE
        (root / "chat_template.jinja").write_text(text)
    parity: dict[str, object] = {}
    if verify:
        parity = _write_vectors(root / "verify.npz", toy, plan)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        edge_kv="0.1.0",
        name="toy",
        model=json.loads(json.dumps(asdict(config))),
        plan=plan_entry(plan),
        quant={"scheme": "none", "formats": {}, "tensors": {}},
        ple=entry,
        backends=backends,
        tokenizer={
            "file": "tokenizer.json",
            "chat_template": "chat_template.jinja" if template else None,
            "stop_ids": [SPECIALS.index("<end_of_turn>")],
        },
        files=_entries(root),
        made={"by": "tests"},
        parity=parity,
        memory={},
    )
    write_manifest(root, manifest)
    return root


def edit_manifest(root: Path, **changes: object) -> None:
    """Overwrite top-level manifest fields as they would stand in the JSON."""
    path = root / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _entries(root: Path) -> dict[str, FileEntry]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {
        p.relative_to(root).as_posix(): FileEntry(size=p.stat().st_size, sha256=sha256_file(p))
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


def _write_vectors(path: Path, toy: Toy, plan: KVPlan) -> dict[str, object]:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, VOCAB, min(30, plan.ctx)).astype(np.int32)
    prompt = 17
    logits = np.stack([oracle(toy, plan, ids[: i + 1]) for i in range(prompt, len(ids))])
    np.savez(path, ids=ids, prompt=np.int64(prompt), logits=logits.astype(np.float32))
    return {"vectors": path.name, "verify": {"max_kl": 1e-6, "min_top1": 1.0}}


def _build(path: Path, name: str, config: ModelConfig, plan: KVPlan, toy: Toy) -> dict:
    """Write one program; returns its inputs and outputs as the manifest lists them."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    types = {
        "float": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int8": TensorProto.INT8,
        "uint8": TensorProto.UINT8, "int64": TensorProto.INT64,
    }  # fmt: skip
    storage = {"f32": "float", "f16": "float16", "int8": "int8"}
    decode = name == "decode"
    n: int | str = 1 if decode else "chunk"
    layers = config.n_layers if decode else config.n_own
    views = state_views(plan)
    inits: list = []
    nodes: list = []
    inputs = [("ids", "int64", [n]), ("pos", "int64", [1])]
    if config.ple_dim:
        inputs.append(("ple", "float", [n, layers, DIM]))
    outputs = [("logits", "float", [VOCAB])] if decode else []

    def dtype(view) -> str:
        unsigned = view.buffer.dtype == "int8" and view.buffer.role == "k"
        return "uint8" if unsigned else storage[view.buffer.dtype]

    for view in views:
        inputs.append((view.name, dtype(view), list(view.shape)))
        outputs.append((f"{view.name}.out", dtype(view), list(view.shape)))

    def const(value, kind) -> str:
        label = f"c{len(inits)}"
        inits.append(numpy_helper.from_array(np.asarray(value, kind), label))
        return label

    def op(kind, *args, out=None, **attrs) -> str:
        label = out or f"t{len(nodes)}"
        nodes.append(helper.make_node(kind, list(args), [label], **attrs))
        return label

    zero_i = const(0, np.int64)
    embed = op("Gather", const(toy.embed, np.float32), "ids")  # [n, heads, dim]
    pos = op("Squeeze", "pos")
    written: dict[str, str] = {}
    for view in views:
        b = view.buffer
        rows = embed
        if config.ple_dim:
            ple = op("Gather", "ple", const([b.writer], np.int64), axis=1)  # [n, 1, dim]
            rows = op("Add", embed, ple)
        if b.role[0] == "v":
            rows = op("Mul", rows, const(2, np.float32))
        rows = op("Transpose", rows, perm=[1, 0, 2])  # [heads, n, dim]
        if view.head is not None:
            rows = op("Slice", rows, const([view.head], np.int64), const([view.head + 1], np.int64))
        if b.role.endswith("scale"):
            rows = op("ReduceMax", rows, const([2], np.int64), keepdims=0)
            rows = op("Add", op("Mul", rows, const(0, np.float32)), const(STEP, np.float32))
        elif b.dtype == "int8":
            offset = 128 if b.role == "k" else 0
            rows = op("Add", op("Div", rows, const(STEP, np.float32)), const(offset, np.float32))
            rows = op("Cast", op("Round", rows), to=types[dtype(view)])
        elif b.dtype == "f16":
            rows = op("Cast", rows, to=TensorProto.FLOAT16)
        mode, axis = "linear", 1
        if view.head is None:
            rows = op("Unsqueeze", rows, const([0], np.int64))
            mode, axis = "circular", 2
        written[view.name] = op(
            "TensorScatter", view.name, rows, "pos", out=f"{view.name}.out", mode=mode, axis=axis
        )
    if decode:
        sums = []
        for layer in plan.layers:
            for base in (layer.k, layer.v):
                b = plan.by_name[base]
                names = [base] if b.kind == RING else [f"{base}.h{h}" for h in range(b.heads)]
                for view_name in names:
                    rows = op("Cast", written[view_name], to=TensorProto.FLOAT)
                    if b.kind == RING:
                        rows = op("Squeeze", rows, const([0], np.int64))  # [heads, slots, dim]
                    elif b.dtype == "int8":
                        offset = 128 if b.role == "k" else 0
                        scale = op(
                            "Unsqueeze", written[view_name.replace(".h", ".scale.h")],
                            const([2], np.int64),
                        )  # fmt: skip
                        rows = op("Mul", op("Sub", rows, const(offset, np.float32)), scale)
                    size = op("Gather", op("Shape", rows), const(1, np.int64))
                    at = op("Range", zero_i, size, const(1, np.int64))
                    if b.kind == RING:
                        at = op("Sub", pos, op("Mod", op("Sub", pos, at), size))
                    seen = op("And", op("GreaterOrEqual", at, zero_i), op("LessOrEqual", at, pos))
                    if layer.window:
                        near = op("Less", op("Sub", pos, at), const(layer.window, np.int64))
                        seen = op("And", seen, near)
                    w = op("Add", op("Mod", at, const(3, np.int64)), const(1, np.int64))
                    w = op("Mul", w, op("Cast", seen, to=TensorProto.INT64))
                    w = op("Unsqueeze", op("Cast", w, to=TensorProto.FLOAT), const([1], np.int64))
                    total = op("ReduceSum", op("Mul", rows, w), const([1], np.int64), keepdims=0)
                    sums.append(op("Reshape", total, const([-1], np.int64)))
        if config.ple_dim:
            last = op("Gather", "ple", const(layers - 1, np.int64), axis=1)
            sums.append(op("Reshape", last, const([-1], np.int64)))
        else:
            sums.append(const(np.zeros(DIM), np.float32))
        joined = op("Mul", op("Concat", *sums, axis=0), const(1 / 8, np.float32))
        op("MatMul", joined, const(toy.head, np.float32), out="logits")

    def infos(items):
        return [helper.make_tensor_value_info(i, types[t], s) for i, t, s in items]

    graph = helper.make_graph(nodes, name, infos(inputs), infos(outputs), inits)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())

    def listed(items):
        return [{"name": i, "dtype": t, "shape": s} for i, t, s in items]

    return {"inputs": listed(inputs), "outputs": listed(outputs)}
