"""A mixture of experts under hard memory limits: speed, memory, bytes from storage, and routing.

    python benchmarks/mixtures.py zaya1-8b/ --model zaya1-8b --limits none,4g,3g,2g,1g \\
        --depths 0,4096,32000 --skew 0,1

Every step decodes another random token, so that routing varies. Random weights prefer few experts,
so the biases of their routers are fitted until an expert is chosen as often as 1 / rank ** skew
says: `--skew 0` chooses all alike, which is the worst case, and 1 has favourites, as trained
routers do. `share` in the result counts what other random tokens then chose, and `own_share` what
they choose before any bias is fitted. Each measurement is a process in a memory cgroup of its own,
without swap, and the page cache forgets the artifact before it: the first chunk of a prompt is read
from storage in any case, the second has what the limit left. A depth is filled with random rows.
What the plan says of the same limit (footprint.streaming) stands beside where the limit holds at
least all but the experts. Rows in the result that are not measured again stay in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import (
    answer_of,
    ask_worker,
    numbers,
    random_states,
    read_result,
    run_main,
    say,
    show,
    write_result,
)
from cut_models import model_row
from memory_limits import forget, memory_group

from edge_kv.amounts import parse_bytes
from edge_kv.artifact import Artifact, read_artifact, sha256_file, write_manifest
from edge_kv.footprint import footprint, streaming
from edge_kv.manifest import FileEntry
from edge_kv.runtime import load, native_library
from edge_kv.runtime.cache import cache_directory
from edge_kv.runtime.meter import read_memory
from edge_kv.runtime.onnx_session import create_engine
from edge_kv.runtime.session import STORAGE

Array = np.ndarray[Any, Any]
TOKENS, COUNTED = 24, 96  # decoded in a measurement; routed to see how
ROUNDS, STEPS, DECAY = 3, 300, 0.98  # of fitting biases


def main() -> None:
    args = _arguments()
    artifact = read_artifact(args.artifact)
    config, formats = model_row(args.model).config, artifact.manifest.quant.formats
    states = random_states(args.artifact, args.engine, args.threads, args.depths)
    name = args.result or f"mixture_{artifact.manifest.name}_{args.engine}"
    held = read_result(name)
    rows = {_case(row): row for row in held.get("rows", ())}
    routing = {entry["skew"]: entry for entry in held.get("routing", ())}
    own = _scores(artifact, {}, args.threads, seed=8)[1]
    say(f"routing of its own: {own}")
    for skew in map(float, args.skew.split(",")):
        with _routed(artifact, skew, args.threads) as (root, share):
            routing[skew] = {"skew": skew, "tokens": COUNTED, "share": share}
            say(f"skew {skew}: {share}")
            for depth in args.depths:
                for limit in map(_limit, args.limits.split(",")):
                    forget(root, cache_directory())
                    row = {"skew": skew, "depth": depth, "limit": limit}
                    row |= _measured(args, root, states[depth], limit)
                    need = footprint(config, artifact.plan, formats=formats, depth=depth)
                    if limit and limit >= need.least:
                        row["planned_storage"] = streaming(need, limit).storage
                    rows[_case(row)] = row
                    say(json.dumps(row))
                    write_result(
                        name,
                        {"artifact": artifact.manifest.name, "threads": args.threads,
                         "note": args.note, "own_share": own, "routing": [*routing.values()],
                         "rows": [*rows.values()]},
                    )  # fmt: skip
    show("Decoding with one random token after another", [_line(row) for row in rows.values()])


def _case(row: dict[str, Any]) -> tuple[float, int, int | None]:
    return row["skew"], row["depth"], row["limit"]


def _limit(text: str) -> int | None:
    return None if text == "none" else parse_bytes(text)


def _line(row: dict[str, Any]) -> dict[str, Any]:
    killed = row["rate"] is None
    return {
        "skew": row["skew"],
        "depth": row["depth"],
        "limit MiB": row["limit"] >> 20 if row["limit"] else "none",
        "tok/s": "killed" if killed else round(row["rate"], 2),
        "prefill": "" if killed else round(row["prefill"], 1),
        "anon MB": "" if killed else round(row["anon"] / 1e6),
        "bank MB": "" if killed else round(row["bank"] / 1e6),
        "storage MB/token": "" if killed else round(row["storage"] / 1e6),
        "planned": round(row["planned_storage"] / 1e6) if "planned_storage" in row else "",
    }


def _measured(
    args: argparse.Namespace, root: Path, snapshot: str, limit: int | None
) -> dict[str, Any]:
    with memory_group(limit) as group:
        words = (root, args.engine, snapshot, args.threads)
        done = ask_worker(__file__, *words, preexec_fn=group.enter)
        peak, killed = group.peak, group.killed
    if done.returncode and (killed or "memory" in done.stderr.lower()):
        return {"rate": None, "killed": killed, "peak": peak}
    return {**answer_of(done), "peak": peak}


def _work(root: str, engine: str, snapshot: str, threads: str) -> None:
    """One measurement, printed as a line of JSON."""
    begin = time.perf_counter()
    with load(root, engine, threads=int(threads)) as session:
        loaded = time.perf_counter() - begin
        vocab = session.artifact.tokens.vocab
        chunks = 2 * session.plan.chunk
        ids = np.random.default_rng(7).integers(0, vocab, chunks + 2 * TOKENS)
        if snapshot:
            session.restore(snapshot)
        start = session.pos
        chunk, prefill = session.plan.chunk, []
        for at in (0, chunk):
            begin = time.perf_counter()
            session.prefill(ids[at : at + chunk])
            prefill.append(chunk / (time.perf_counter() - begin))
        for token in ids[-TOKENS:]:  # fills a bank
            session.decode(int(token))
        before, seconds = _storage_bytes(), []
        for token in ids[chunks : chunks + TOKENS]:
            begin = time.perf_counter()
            session.decode(int(token))
            seconds.append(time.perf_counter() - begin)
        memory = read_memory()
        card = {
            "start": start,
            "load": loaded,
            "rate": 1 / float(np.median(seconds)),
            "mean_rate": 1 / float(np.mean(seconds)),
            "worst_seconds": max(seconds),
            "prefill_first_chunk": prefill[0],
            "prefill": prefill[1],
            "storage": (_storage_bytes() - before) / TOKENS,
            "bank": session.stats.expert_bank_bytes,
            "anon": memory.anon,
            "rss_peak": memory.peak,
        }
    print(json.dumps(card))


def _storage_bytes() -> int:
    """Bytes that this process had the storage read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


@contextmanager
def _routed(artifact: Artifact, skew: float, threads: int) -> Iterator[tuple[Path, list[float]]]:
    """The artifact with other biases in its routers, and the shares they lead to.

    All but programs and manifest are links to the files of `artifact`, in a folder beside it.
    """
    root = Path(tempfile.mkdtemp(prefix=f".{artifact.root.name}-", dir=artifact.root.parent))
    try:
        for name in artifact.manifest.files:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(artifact.path(name), root / name)
        biases: dict[str, Array] = {}
        for _ in range(ROUNDS):  # a layer's routing moves the scores of the layers above it
            scores, _ = _scores(artifact, biases, threads, seed=7)
            biases = {name: fitted(s, skew, taken) for name, (s, taken) in scores.items()}
        _, share = _scores(artifact, biases, threads, seed=8)
        files = dict(artifact.manifest.files)
        for program in ("prefill", "decode"):
            name = f"onnx/{program}.onnx"
            model = onnx.load(artifact.path(name), load_external_data=False)
            _set_biases(model, biases)
            (root / name).unlink()
            onnx.save(model, root / name)
            path = root / name
            files[name] = FileEntry(size=path.stat().st_size, sha256=sha256_file(path))
        write_manifest(root, artifact.manifest.model_copy(update={"files": files}))
        yield root, share
    finally:
        shutil.rmtree(root)


def fitted(scores: Array, skew: float, taken: int) -> Array:
    """Biases [experts] with which the `taken` largest of scores [tokens, experts] + bias are those
    of an expert as often as 1 / rank ** skew says, ranks being those of the mean scores."""
    tokens, experts = scores.shape
    rank = np.empty(experts)
    rank[np.argsort(-scores.mean(0))] = np.arange(1, experts + 1)
    target = rank**-skew / (rank**-skew).sum()
    bias, step = np.zeros(experts), scores.std()
    for _ in range(STEPS):
        chosen = np.argpartition(-(scores + bias), taken - 1, axis=1)[:, :taken]
        share = np.bincount(chosen.ravel(), minlength=experts) / (tokens * taken)
        bias += step * (target - share)
        step *= DECAY
    return bias.astype(np.float32)


def _routers(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto, str]]:
    """Of each router that adds a bias: the indices it chooses, that bias, the scores before it."""
    made = {name: node for node in model.graph.node for name in node.output}
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "experts_q":
            continue
        above = made.get(node.input[1])
        while above is not None and above.op_type != "Add":
            above = made.get(above.input[0])
        if above is not None:
            bias = next(name for name in above.input if name in held)
            yield node.input[1], held[bias], next(n for n in above.input if n != bias)


def _set_biases(model: onnx.ModelProto, biases: dict[str, Array]) -> None:
    """Of those that the program has: `prefill` ends at the last layer that writes state."""
    for _, held, _ in _routers(model):
        if held.name in biases:
            held.CopyFrom(onnx.numpy_helper.from_array(biases[held.name], held.name))


def _scores(
    artifact: Artifact, biases: dict[str, Array], threads: int, seed: int
) -> tuple[dict[str, tuple[Array, int]], list[float]]:
    """By the name of a router's bias: what it gave random tokens [tokens, experts], and how many
    experts it takes; and the shares of experts, the most chosen first, as a mean over routers."""
    folder = artifact.path("onnx/decode.onnx").parent
    model = onnx.load(folder / "decode.onnx", load_external_data=False)
    _set_biases(model, biases)
    routers = [(held.name, index, scores) for index, held, scores in _routers(model)]
    wanted = {name for _, *pair in routers for name in pair}
    for name in wanted:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    counting = folder / "counting.onnx"
    onnx.save(model, counting)
    try:
        engine = create_engine(counting, threads, 3, None, native_library.build_onnx_operators())
        tables = {
            t.name: np.zeros((t.live(COUNTED), *t.row), STORAGE[t.dtype])
            for t in artifact.plan.tables
        }
        ids = np.random.default_rng(seed).integers(0, artifact.tokens.vocab, COUNTED)
        names = [o.name for o in engine.get_outputs()]
        rows: list[dict[str, Array]] = []
        for pos, token in enumerate(ids):
            fed = {"ids": np.array([token]), "pos": np.array([pos]), **tables}
            found = dict(zip(names, engine.run(None, fed), strict=True))
            tables = {name: found[f"{name}.out"] for name in tables}
            rows.append({name: found[name] for name in wanted})
    finally:
        counting.unlink()
    scores, shares = {}, []
    for name, index, score in routers:
        chosen = np.concatenate([row[index] for row in rows])
        given = np.concatenate([row[score] for row in rows])
        scores[name] = given, chosen.shape[-1]
        counts = np.bincount(chosen.ravel().astype(int), minlength=given.shape[-1])
        shares.append(np.sort(counts / counts.sum())[::-1])
    return scores, [round(float(share), 3) for share in np.mean(shares, axis=0)][:32]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--model", required=True, help="its preset")
    parser.add_argument("--engine", default="onnx")
    parser.add_argument("--limits", default="none,4g,2g")
    parser.add_argument("--depths", type=numbers, default=[0])
    parser.add_argument("--skew", default="0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="")
    parser.add_argument("--result", help="name in results/")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main, _work)
