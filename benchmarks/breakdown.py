"""Where the time of one token goes, operator by operator, beside the bytes that it reads.

    python benchmarks/breakdown.py e2b/ --depths 0,32256        results/breakdown_NAME.json

onnxruntime's own profile of the decode program, medians over the tokens: for every operator its
calls, milliseconds and, where it reads weights, their bytes and GB/s beside a plain read of the
same minutes. `outside` is what a step takes besides its nodes: the runtime between them, Python,
logits. Profiling slows every node a little; `unprofiled_ms` is the same step without it. State at a
depth holds random rows, which take the same time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import onnx
from common import run_main, show, write_result

from edge_kv.artifact import Artifact, read_artifact
from edge_kv.errors import ConfigError
from edge_kv.runtime import onnx_session
from edge_kv.runtime.bench import _write_random, prompt_ids, read_bandwidth
from edge_kv.runtime.onnx_session import OnnxSession
from edge_kv.runtime.ort import onnxruntime as ort

PROBE = 1 << 30  # bytes of a plain read
WARM = 4  # tokens that are not counted


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--depths", default="0", help="tokens of context, with commas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--huge-pages", action="store_true")
    args = parser.parse_args()
    artifact = read_artifact(args.artifact)
    depths = [int(d) for d in args.depths.split(",")]
    if max(depths) + WARM + args.tokens > artifact.plan.ctx:
        raise ConfigError(f"{args.artifact} holds {artifact.plan.ctx} tokens, too few for this.")
    weights = weight_bytes(artifact)
    found = []
    for depth in depths:
        plain, _ = measured(artifact, depth, args, profiled=False)
        read = read_bandwidth(args.threads, PROBE, repeats=3)["best"] / 1e9
        step, nodes = measured(artifact, depth, args, profiled=True)
        found.append(of_depth(depth, plain, step, nodes, weights, read))
        show(f"One token at {depth:,}: {plain:.2f} ms", found[-1]["operators"])
    conditions = {
        "threads": args.threads, "tokens": args.tokens, "huge_pages": args.huge_pages,
        "quant": artifact.manifest.quant.model_dump(mode="json"),
    }  # fmt: skip
    write_result(f"breakdown_{artifact.manifest.name}", {"conditions": conditions, "depths": found})


def weight_bytes(artifact: Artifact) -> dict[str, int]:
    """Bytes of stored weights that each node of the decode program reads; an embedding a row."""
    program = artifact.backend("onnx").programs["decode"]
    graph = onnx.load(artifact.path(program.file), load_external_data=False).graph
    stored = {
        t.name: int({e.key: e.value for e in t.external_data}.get("length", 0))
        for t in graph.initializer
    }
    read = {}
    for number, node in enumerate(graph.node):
        name = node.name or f"{node.op_type}_{number}"
        total = sum(stored.get(i, 0) for i in node.input)
        read[name] = 0 if node.op_type == "embed_q" else total
    return read


def measured(
    artifact: Artifact, depth: int, args: argparse.Namespace, *, profiled: bool
) -> tuple[float, list[dict[str, Any]]]:
    """Median ms of a decoded token, and the events of its nodes if `profiled`."""
    create = onnx_session.create_engine
    with TemporaryDirectory() as folder:

        def with_profile(model: Path, *rest: Any, **named: Any) -> Any:
            options = ort.SessionOptions()
            options.enable_profiling = True
            options.profile_file_prefix = f"{folder}/{model.stem}"
            threads, severity, _, operators = (*rest, None, None)[:4]
            return create(model, threads, severity, options, operators, **named)

        patched = with_profile if profiled else create
        with (
            mock.patch.object(onnx_session, "create_engine", patched),
            OnnxSession(artifact, threads=args.threads) as session,
        ):
            if args.huge_pages:
                session.use_huge_pages()
            ids = prompt_ids(artifact.tokens.vocab, max(1, depth))
            if depth:
                path = Path(folder) / "state.kv"
                _write_random(session, path, ids)
                session.restore(path)
            times = []
            for _ in range(WARM + args.tokens):
                begin = time.perf_counter()
                session.decode(int(ids[0]))
                times.append((time.perf_counter() - begin) * 1e3)
            events = []
            if profiled:
                file = session._bound["decode"]._engine.end_profiling()
                events = json.loads(Path(file).read_text())
    return median(times[WARM:]), [e for e in events if e.get("cat") == "Node"]


def of_depth(
    depth: int, plain: float, step: float, nodes: list[dict[str, Any]], weights: dict[str, int],
    read: float,
) -> dict[str, Any]:  # fmt: skip
    """The table of one depth: operators by time, then what is outside of them."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in nodes:
        if event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            times[event["args"]["op_name"], name].append(event["dur"] / 1e3)
    groups: dict[str, dict[str, Any]] = {}
    for (op, name), all_times in times.items():
        group = groups.setdefault(op, {"operator": op, "calls": 0, "ms": 0.0, "MB": 0.0})
        group["calls"] += 1
        group["ms"] += float(np.median(all_times[WARM:]))
        group["MB"] += weights.get(name, 0) / 1e6
    rows = sorted(groups.values(), key=lambda g: -g["ms"])
    total = sum(g["ms"] for g in rows)
    for g in rows:
        g["GB/s"] = round(g["MB"] / g["ms"], 1) if g["MB"] > 1 else None
        g["of a plain read"] = round(g["MB"] / g["ms"] / read, 2) if g["MB"] > 1 else None
        g["ms"], g["MB"] = round(g["ms"], 3), round(g["MB"], 2)
    rows.append({"operator": "outside", "calls": None, "ms": round(step - total, 3)})
    megabytes = sum(weights.values()) / 1e6
    return {
        "depth": depth, "unprofiled_ms": round(plain, 3), "profiled_ms": round(step, 3),
        "nodes": sum(g["calls"] for g in groups.values()), "weights_MB": round(megabytes, 1),
        "plain_read_GB_s": round(read, 1), "operators": rows,
    }  # fmt: skip


if __name__ == "__main__":
    run_main(main)
