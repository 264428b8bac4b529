"""A mixture of experts under hard memory limits: speed, memory, bytes from storage, and routing.

    python benchmarks/mixtures.py zaya1-8b/ --model zaya1-8b --limits none,4g,3g,2g,1g \\
        --depths 0,4096,32000 --skew 0,1

Every step decodes another random token, so that routing varies. Random weights route as they
happen to: which experts the tokens chose is counted in the same program, with the indices of its
routers as further outputs. `--skew` s > 0 adds a bias to the routers, -s ln(rank) of each expert in
an order of each layer's own, as a trained router has its favourites; `share` in the result says how
skewed the routing then was. Each measurement is a process in a memory cgroup of its own, without
swap, and the page cache forgets the artifact before it. A depth is filled with random rows. What
the plan says of the same limit (footprint.streaming) stands beside.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from common import run_main, say, show, write_result
from memory_limits import forget, memory_group

from edge_kv import models
from edge_kv.amounts import parse_bytes
from edge_kv.artifact import Artifact, read_artifact
from edge_kv.export.weight_file import WeightLayout
from edge_kv.footprint import footprint, streaming
from edge_kv.runtime import load, native_library
from edge_kv.runtime.bench import Job, fill_depths, snapshot_path
from edge_kv.runtime.cache import cache_directory
from edge_kv.runtime.meter import read_memory

TOKENS, COUNTED = 24, 32  # decoded in a measurement; routed to see how
BIASES = ("balancing_biases", "router_bias")  # ends of the names of routers' biases


def main() -> None:
    args = _arguments()
    artifact = read_artifact(args.artifact)
    config = models.get_row(args.model).config
    layout = WeightLayout(models.weights(config), artifact.manifest.quant.formats)
    depths = [int(d) for d in args.depths.split(",")]
    job = Job(
        "measure", str(args.artifact), args.engine, args.threads, cache=True,
        depths=tuple(d for d in depths if d), prompt=1, tokens=1, repeats=1, fill="random",
    )  # fmt: skip
    if job.depths:
        fill_depths(job)
    rows, routing = [], []
    for skew in map(float, args.skew.split(",")):
        with _biased(artifact, layout, skew):
            routing.append({"skew": skew, **_routing(artifact, args.threads)})
            say(f"skew {skew}: {routing[-1]['share']}")
            for depth in depths:
                path = str(snapshot_path(artifact, job, depth)) if depth else ""
                for limit in map(_limit, args.limits.split(",")):
                    forget(args.artifact, cache_directory())
                    row = {"skew": skew, "depth": depth, "limit": limit}
                    row |= _measured(args, path, limit)
                    if limit:
                        need = footprint(config, artifact.plan, formats=layout.formats, depth=depth)
                        row["planned_storage"] = streaming(need, limit).storage
                    rows.append(row)
                    say(json.dumps(row))
    write_result(
        args.result or f"mixture_{artifact.manifest.name}_{args.engine}",
        {"artifact": artifact.manifest.name, "threads": args.threads, "note": args.note,
         "routing": routing, "rows": rows},
    )  # fmt: skip
    show("Decoding with one random token after another", [_line(row) for row in rows])


def _limit(text: str) -> int | None:
    return None if text == "none" else parse_bytes(text)


def _line(row: dict[str, Any]) -> dict[str, Any]:
    killed = row["rate"] is None
    return {
        "skew": row["skew"],
        "depth": row["depth"],
        "limit MiB": row["limit"] >> 20 if row["limit"] else "none",
        "tok/s": "killed" if killed else round(row["rate"], 2),
        "anon MB": "" if killed else round(row["anon"] / 1e6),
        "bank MB": "" if killed else round(row["bank"] / 1e6),
        "storage MB/token": "" if killed else round(row["storage"] / 1e6),
        "planned": round(row["planned_storage"] / 1e6) if "planned_storage" in row else "",
    }


def _measured(args: argparse.Namespace, snapshot: str, limit: int | None) -> dict[str, Any]:
    command = [
        sys.executable, __file__, "--worker", args.artifact, args.engine, snapshot,
        str(args.threads),
    ]  # fmt: skip
    with memory_group(limit) as group:
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True,
            preexec_fn=group.enter,
        )  # fmt: skip
        peak, killed = group.peak, group.killed
    if done.returncode:
        if not killed and "memory" not in done.stderr.lower():
            raise SystemExit(done.stderr)
        return {"rate": None, "killed": killed, "peak": peak}
    return {**json.loads(done.stdout.splitlines()[-1]), "peak": peak}


def _work(root: str, engine: str, snapshot: str, threads: str) -> None:
    """One measurement, printed as a line of JSON."""
    begin = time.perf_counter()
    with load(root, engine, threads=int(threads)) as session:
        loaded = time.perf_counter() - begin
        vocab = session.artifact.tokens.vocab
        ids = np.random.default_rng(7).integers(0, vocab, 3 * TOKENS + 256)
        if snapshot:
            session.restore(snapshot)
        start = session.pos
        begin = time.perf_counter()
        session.prefill(ids[: session.plan.chunk])
        prefill = session.plan.chunk / (time.perf_counter() - begin)
        for token in ids[-TOKENS:]:  # fills a bank
            session.decode(int(token))
        before, seconds = _storage_bytes(), []
        for token in ids[256 : 256 + TOKENS]:
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
            "prefill_first_chunk": prefill,
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
def _biased(artifact: Artifact, layout: WeightLayout, skew: float) -> Iterator[None]:
    """The weight file with biased routers, and as it was again."""
    path = artifact.path("onnx/weights.bin")
    kept = {}
    with path.open("r+b") as file:
        try:
            for number, (name, region) in enumerate(sorted(layout.regions.items())):
                if skew and name.endswith(BIASES):
                    file.seek(region.offset)
                    kept[region.offset] = file.read(4 * region.shape[0])
                    order = np.random.default_rng(number).permutation(region.shape[0])
                    bias = (-skew * np.log(order + 1.0)).astype(np.float32)
                    file.seek(region.offset)
                    file.write(bias.tobytes())
            file.flush()
            yield
        finally:
            for offset, data in kept.items():
                file.seek(offset)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())


def _routing(artifact: Artifact, threads: int) -> dict[str, Any]:
    """How often a layer's experts were chosen, the most chosen first, as a mean over layers."""
    import onnx

    from edge_kv.runtime.onnx_session import create_engine

    folder = artifact.path("onnx/decode.onnx").parent
    model = onnx.load(folder / "decode.onnx", load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "experts_q"]
    for node in nodes:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.input[1]))
    counting = folder / "counting.onnx"
    onnx.save(model, counting)
    try:
        engine = create_engine(counting, threads, 3, None, native_library.build_onnx_operators())
        tables = {
            t.name: np.zeros(
                (t.live(COUNTED), *t.row), {"f32": np.float32, "int8": np.int8}[t.dtype]
            )
            for t in artifact.plan.tables
        }
        chosen: list[Counter[int]] = [Counter() for _ in nodes]
        ids = np.random.default_rng(7).integers(0, artifact.tokens.vocab, COUNTED)
        names = [o.name for o in engine.get_outputs()]
        for pos, token in enumerate(ids):
            fed = {"ids": np.array([token]), "pos": np.array([pos]), **tables}
            found = dict(zip(names, engine.run(None, fed), strict=True))
            tables = {name: found[f"{name}.out"] for name in tables}
            for counts, node in zip(chosen, nodes, strict=True):
                counts.update(found[node.input[1]].ravel().tolist())
    finally:
        counting.unlink()
    of = [[n / counts.total() for _, n in counts.most_common()] for counts in chosen]
    most = max(map(len, of))
    mean = np.mean([shares + [0.0] * (most - len(shares)) for shares in of], axis=0)
    return {"tokens": COUNTED, "share": [round(float(s), 3) for s in mean][:32]}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--model", required=True, help="its preset")
    parser.add_argument("--engine", default="onnx")
    parser.add_argument("--limits", default="none,4g,2g")
    parser.add_argument("--depths", default="0")
    parser.add_argument("--skew", default="0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="")
    parser.add_argument("--result", help="name in results/")
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _work(*sys.argv[2:])
    else:
        run_main(main)
