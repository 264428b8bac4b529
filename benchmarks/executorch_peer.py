"""ExecuTorch's own Gemma 4 exporter (`examples/models/gemma4` in its wheel) beside ours.

    python benchmarks/executorch_peer.py --threads 2        results/executorch_peer.json

One random checkpoint of E2B's widths, window and sharing in four layers (two own keys and values)
with a small vocabulary, named as on the hub, goes through both exporters: theirs as its command
line would (text only; 8da4w in groups of 128, 8-bit tables, custom SDPA), with float keys and
values, its default, and with its int8 option; ours with int4 and int8. Theirs runs
on the Python runtime of the wheel, kept from locking the file into memory, with the operators it
needs. Exports and runs each have a process of their own; two exports work at a time, runs
alternate. What an export of the full size would take is extrapolated from smaller ones of E2B's
width. Their exporter also needs pytorch-tokenizers, tiktoken and sentencepiece.
"""

from __future__ import annotations

import json
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import make_random_checkpoint as checkpoint
import numpy as np
from common import each_alone, run_main, say, show, write_result

from edge_kv import models
from edge_kv.export import export_model
from edge_kv.models.gemma import Config
from edge_kv.runtime import load, read_memory
from edge_kv.runtime.executorch_python import _import, _no_mlock

CONTEXTS = (1024, 8192)
OURS = "ours-int8"
RUNS = ("peer-f32", OURS, "peer-int8")  # exporter-state
E2B: Any = models.get_row("e2b").config
SHAPE = replace(E2B, layers=4, pattern="SF" * 2, shared=2, vocab=16_384)
SMALLER = [  # of E2B's width, to extrapolate from
    replace(E2B, layers=len(pattern), pattern=pattern, shared=shared, vocab=131_072)
    for pattern, shared in (("F", 0), ("FF", 1), ("SFSF", 2))
]
PROMPT, REPEATS, STEPS, ROUNDS = 512, 4, 16, 2


def main() -> None:
    args, alone = each_alone(__file__, measure, __doc__ or "")
    args.work.mkdir(parents=True, exist_ok=True)
    ready = write_checkpoint(SHAPE, args.work / "hub")
    result: dict[str, Any] = {
        "executorch": version("executorch"),
        "model": "E2B's widths, 4 layers (2 own), vocabulary 16,384, random weights",
        "threads": args.threads,
        "prompt": PROMPT,
        "rounds": ROUNDS,
        "rows": [],
    }
    for ctx in CONTEXTS:
        cases = [args.work / f"{run}-{ctx}" for run in RUNS]
        with ThreadPoolExecutor(2) as pool:
            made = list(pool.map(lambda path: exported(path, f"export {ready}", alone), cases))
        taken: dict[Path, list[dict[str, Any]]] = {path: [] for path in cases}
        for path in cases * ROUNDS:
            taken[path].append(attempt(alone, path, "run"))
            say(f"{path.name}: {taken[path][-1]}")
        result["rows"] += [
            {
                **named(path),
                "export": export,
                **best(taken[path]),
                "logit_correlation": correlation(path),
            }
            for path, export in zip(cases, made, strict=True)
        ]
        write_result("executorch_peer", result)
    for points in full_size_points(args.work, alone, result["rows"][0]["export"]):
        write_result("executorch_peer", {**result, "full_size_export": points})
    shown = ("exporter", "kv", "ctx", "failed", "prefill_rate", "decode_rate", "decode_rate_at_end")
    rows = [{key: row.get(key, "") for key in shown} for row in result["rows"]]
    show("ExecuTorch's own exporter and ours", rows)


def named(path: Path) -> dict[str, Any]:
    """What the name of a case says."""
    exporter, kv, ctx = path.name.split("-")
    return {"exporter": exporter, "kv": kv, "ctx": int(ctx)}


def attempt(alone: Callable[[object, str], dict[str, Any]], path: Path, form: str) -> Any:
    """The row of a process of its own, or why there is none."""
    try:
        return alone(path, form)
    except subprocess.CalledProcessError as e:
        return {"failed": f"the process ended with status {e.returncode}"}


def exported(path: Path, form: str, alone: Callable[[object, str], dict[str, Any]]) -> Any:
    """Export on first use; what that took is kept beside the artifact."""
    card = path.parent / f"{path.name}.json"
    if not card.exists():
        say(f"exporting {path.name}")
        card.write_text(json.dumps(attempt(alone, path, form)))
        say(card.read_text())
    return json.loads(card.read_text())


def full_size_points(
    work: Path, alone: Callable[[object, str], dict[str, Any]], measured: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Peak RSS of their exporter against the parameters it holds in float, continued to E2B.

    Starts at what was measured of SHAPE; each further point gives a new line.
    """
    points = [{"layers": SHAPE.n_layers, "parameters": parameters(SHAPE), **measured}]
    for config in SMALLER:
        path = work / f"peer-f32-{config.n_layers}layers"
        source = work / f"hub-{config.n_layers}"
        if not (work / f"{path.name}.json").exists():
            write_checkpoint(config, source)
        row = exported(path, f"export {source}", alone)
        for left in (*source.glob("*"), path.with_suffix(".pte")):
            left.unlink(missing_ok=True)
        points.append({"layers": config.n_layers, "parameters": parameters(config), **row})
        known = [(p["parameters"], p["rss_peak"]) for p in points if "rss_peak" in p]
        line: dict[str, Any] = {}
        if len(known) > 1:
            x, y = np.array(known, float).T
            slope, base = np.polyfit(x, y, 1)
            line = {
                "bytes_a_parameter": round(slope, 2),
                "base": round(base),
                "largest_residual": round(float(np.abs(slope * x + base - y).max())),
                "e2b_parameters": parameters(E2B),
                "e2b_rss_peak": round(slope * parameters(E2B) + base),
            }
        yield {**line, "points": points}


def parameters(config: Config) -> int:
    """Parameters of their model: the checkpoint's and a second copy of the token table."""
    tensors = checkpoint.tensors(hub_config(config), dead_kv=False)
    return sum(int(np.prod(t.shape)) for t in tensors) + config.vocab * config.hidden


def hub_config(config: Config) -> dict[str, Any]:
    """`config.json` of a checkpoint of this shape."""
    types = [checkpoint.LAYER_TYPES[letter] for letter in config.pattern]
    return {
        **checkpoint.make_config("e2b"),
        "vocab_size": config.vocab,
        "vocab_size_per_layer_input": config.vocab,
        "layer_types": types,
        "num_hidden_layers": len(types),
        "num_kv_shared_layers": config.shared,
    }


def write_checkpoint(config: Config, out: Path) -> Path:
    """Random weights under the names of the hub's multimodal checkpoint, which theirs expects."""
    if not (out / "config.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        shape = hub_config(config)
        for i, part in enumerate(checkpoint.shards(checkpoint.tensors(shape, dead_kv=False))):
            hub = [
                t._replace(name=t.name.replace("model", "model.language_model", 1)) for t in part
            ]
            checkpoint.write_shard(out / f"model-{i}.safetensors", hub, seed=0)
        checkpoint.write_json(out / "config.json", shape)
    return out


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest of the rounds and the most memory, the first load apart; or why there are none.

    Other jobs only ever make a round slower.
    """
    for row in rows:
        if "failed" in row:
            return row
    kept = {k: (min if k == "load_seconds" else max)(r[k] for r in rows) for k in rows[0]}
    return {"first_load_seconds": rows[0]["load_seconds"], **kept}


def correlation(path: Path) -> float | None:
    """Of the logits after the prompt with those of our program: is it the same model?"""
    ours = path.with_name(f"{OURS}-{named(path)['ctx']}")
    pair = [Path(f"{p}.npy") for p in (ours, path)]
    if not all(p.exists() for p in pair):
        return None
    return round(float(np.corrcoef([np.load(p) for p in pair])[0, 1]), 4)


def measure(path: str, form: str, threads: int) -> dict[str, Any]:
    """One export or one run in this process; what theirs raises becomes the row."""
    case = Path(path)
    peer = case.name.startswith("peer")
    job, _, source = form.partition(" ")
    try:
        if job == "run":
            return run_peer(case, threads) if peer else run_ours(case, threads)
        return timed(export_peer if peer else export_ours, case, Path(source))
    except Exception as e:
        if not peer:
            raise
        return {"failed": f"{type(e).__name__}: {e}".splitlines()[0]}


def timed(export: Callable[[Path, Path], Path], case: Path, source: Path) -> dict[str, Any]:
    """Seconds, CPU seconds, the largest process and the bytes of an export."""
    begin = time.perf_counter()
    written = export(case, source)
    seconds = time.perf_counter() - begin
    users = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    files = [written] if written.is_file() else list(written.rglob("*"))
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(u.ru_utime + u.ru_stime for u in users), 1),
        "rss_peak": max(read_memory().peak or 0, 1024 * users[1].ru_maxrss),
        "bytes": sum(f.stat().st_size for f in files if f.is_file()),
    }


def export_ours(case: Path, source: Path) -> Path:
    return export_model(
        weights=str(source),
        ctx=named(case)["ctx"],
        backends=("executorch",),
        out=case,
        open_session=load,
    )


def export_peer(case: Path, source: Path) -> Path:
    """Their command, except that its wheel lacks the file of shapes which `--variant` names."""
    from executorch.examples.models.gemma4.export_gemma4 import export_single_pte
    from executorch.examples.models.gemma4.text_decoder.gemma4_config import Gemma4Config

    config = Gemma4Config.from_json(str(source / "config.json"))
    Gemma4Config.from_config = lambda variant: config
    _, kv, ctx = case.name.split("-")
    out: Path = export_single_pte(
        str(source),
        str(case.with_suffix(".pte")),
        max_seq_len=int(ctx) if ctx.isdigit() else CONTEXTS[0],
        quantize_kv_cache=kv == "int8",
        include_audio=False,
        include_vision=False,
    )
    return out


def run_ours(case: Path, threads: int) -> dict[str, Any]:
    before = read_memory()
    with load(case, "executorch", threads) as session:

        def feed(ids: list[int], pos: int) -> Any:
            if not pos:
                session.reset()
            session.prefill(ids[:-1])
            return session.decode(ids[-1])

        return measured(case, feed, session.stats.load_seconds, before)


def run_peer(case: Path, threads: int) -> dict[str, Any]:
    torch, runtime = _import()
    import executorch.kernels.quantized  # noqa: F401 - registers its operators
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 - as does this

    before = read_memory()
    begin = time.perf_counter()
    with _no_mlock():
        runtime._unsafe_reset_threadpool(threads)
        program = runtime._load_program(str(case.with_suffix(".pte")))
        method = program.load_method("text_decoder")
    seconds = time.perf_counter() - begin

    def feed(ids: list[int], pos: int) -> Any:
        given = [
            torch.tensor([ids]),
            torch.arange(pos, pos + len(ids)),
            torch.zeros(1, len(ids), SHAPE.hidden),
        ]
        (logits,) = method(given, clone_outputs=False)
        return logits.numpy().ravel()

    return measured(case, feed, seconds, before)


def measured(
    case: Path, feed: Callable[[list[int], int], Any], load_seconds: float, before: Any
) -> dict[str, Any]:
    """`feed(ids, pos)` reads ids from a position on and returns the logits of the last.

    A prompt from the start, decoding behind its first token and, once the context is filled
    prompt by prompt, at the end of the context; the fastest call of each. Memory is what this added
    to the process.
    """
    ctx = named(case)["ctx"]
    ids = np.random.default_rng(0).integers(3, SHAPE.vocab_size, ctx).tolist()

    def clock(begin: int, end: int) -> tuple[float, Any]:
        start = time.perf_counter()
        logits = feed(ids[begin:end], begin)
        return time.perf_counter() - start, logits

    def fastest(begin: int) -> float:
        return min(clock(pos, pos + 1)[0] for pos in range(begin, begin + STEPS))

    prompts = [clock(0, PROMPT) for _ in range(REPEATS)]  # the first also allocates
    np.save(case.parent / f"{case.name}.npy", prompts[-1][1])
    clock(0, 1)
    decode = fastest(1)
    for pos in range(0, ctx - STEPS, PROMPT):
        clock(pos, min(pos + PROMPT, ctx - STEPS))
    deep = fastest(ctx - STEPS)
    after = read_memory()
    return {
        "load_seconds": round(load_seconds, 3),
        "prefill_rate": round(PROMPT / min(seconds for seconds, _ in prompts), 1),
        "decode_rate": round(1 / decode, 1),
        "decode_rate_at_end": round(1 / deep, 1),
        "anon": (after.anon or 0) - (before.anon or 0),
        "rss_peak": (after.peak or 0) - (before.rss or 0),
    }


if __name__ == "__main__":
    run_main(main)
