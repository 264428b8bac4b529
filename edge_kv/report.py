"""Plans and artifacts as tables for people and as plain data for `--json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edge_kv import models
from edge_kv.amounts import size
from edge_kv.artifact import Artifact
from edge_kv.config import ModelConfig
from edge_kv.footprint import footprint
from edge_kv.kv_plan import KVPlan, state_elements
from edge_kv.memory import MemoryPlan, predict_artifact
from edge_kv.models.model import Model
from edge_kv.plan import Plan
from edge_kv.runtime.sampling import Sampling
from edge_kv.shelf import Listed
from edge_kv.tensors import SCHEMES
from edge_kv.terminal import layers

F16_BYTES = 2  # baselines are counted in the 16-bit storage that other runtimes use
BASELINES = {
    "every_layer_full": "every layer full length",
    "sharing_only": "sharing only",
    "rings_only": "rings only",
    "sharing_and_rings": "sharing and rings",
}


def plan_data(config: ModelConfig, plan: KVPlan, memory: MemoryPlan, name: str) -> dict[str, Any]:
    """Everything `plan` prints, as JSON data; bytes throughout."""
    return {
        "model": name,
        "ctx": plan.ctx,
        "chunk": plan.chunk,
        "kv": plan.kv,
        "quant": memory.quant,
        "buffers": [
            {
                "name": b.name,
                "kind": b.kind,
                "shape": list(b.shape),
                "dtype": b.dtype,
                "bytes": b.bytes,
                "writer": b.writer,
                "readers": list(b.readers),
            }
            for b in plan.buffers
        ],
        "totals": {
            "bytes": plan.bytes,
            "baselines_f16": {
                key: F16_BYTES * state_elements(config, plan.ctx, sharing=s, rings=r)
                for key, s, r in zip(
                    BASELINES, (False, True, False, True), (False, False, True, True), strict=True
                )
            },
            "read_traffic_per_token": plan.read_traffic(memory.depth),
        },
        "memory": memory.as_dict(),
    }


def net_plan_data(
    config: Model,
    name: str,
    ctx: int,
    chunk: int,
    kv: str,
    quant: str,
    formats: Mapping[str, str],
) -> dict[str, Any]:
    """Everything `plan` prints of a model with tables of state, as JSON data; bytes throughout.

    Raises:
        PlanError, ConfigError: a context, chunk, storage or quantisation that cannot be.
    """
    plan = models.plan(config, ctx=ctx, chunk=chunk, kv=kv)
    need = footprint(config, plan, quant, formats=formats)
    others = models.plan(config, ctx=ctx, chunk=1, kv="f16")
    files = {q: footprint(config, plan, q).weight_file for q in SCHEMES}
    return {
        "model": name,
        "ctx": plan.ctx,
        "chunk": plan.chunk,
        "kv": plan.kv,
        "quant": quant,
        "buffers": [
            {
                "name": t.name,
                "shape": list(t.shape),
                "dtype": t.dtype,
                "bytes": t.bytes,
                "stride": t.stride,
                "keep": t.keep,
                "writer": t.writer,
                "readers": list(t.readers),
            }
            for t in plan.tables
        ],
        "totals": {
            "bytes": plan.bytes,
            "baselines_f16": {
                key: others.full_length(sharing=s, rings=r)
                for key, s, r in zip(
                    BASELINES, (False, True, False, True), (False, False, True, True), strict=True
                )
            },
            "read_traffic_per_token": need.read_state,
        },
        "memory": {
            "quant": quant,
            "formats": dict(formats),
            "depth": need.depth,
            "weight_file": need.weight_file,
            "weights": need.weights,
            "weight_files": files,
            "ple_file": need.lookup_file,
            "state": need.state,
            "state_touched": need.touched,
            "anonymous": need.anonymous,
            "mapped": {"dense": need.dense, "experts": need.experts},
            "read_per_token": {"weights": need.read_weights, "state": need.read_state},
        },
    }


def print_net_plan(data: dict[str, Any], console: Console) -> None:
    """`net_plan_data` as tables; layers whose tables have equal shapes share a row."""
    console.print(
        f"[bold]{data['model']}[/]  ctx {data['ctx']:,}  chunk {data['chunk']}  "
        f"kv {data['kv']}  quant {data['quant']}"
    )
    console.print(_tables_by_shape(data["buffers"]))
    totals, memory = data["totals"], data["memory"]
    naive = totals["baselines_f16"]["every_layer_full"]
    state = Table("state", box=None, pad_edge=False)
    state.add_column("bytes", justify="right")
    state.add_column("share", justify="right")
    state.add_row("this plan", size(totals["bytes"]), f"{totals['bytes'] / naive:.1%}")
    shown: set[int] = set()
    for key, label in BASELINES.items():
        value = totals["baselines_f16"][key]
        if value not in shown:  # what a model has nothing of makes no difference
            state.add_row(f"f16, {label}", size(value), f"{value / naive:.1%}")
        shown.add(value)
    console.print(state)
    files = ", ".join(f"{quant} {size(n)}" for quant, n in memory["weight_files"].items())
    console.print(f"Weights: {files}.")
    read, mapped = memory["read_per_token"], memory["mapped"]
    console.print(
        f"One token at {memory['depth']:,} tokens reads {size(read['weights'])} of weights and "
        f"{size(read['state'])} of state."
    )
    experts = f", of routed experts {size(mapped['experts'])}" if mapped["experts"] else ""
    console.print(
        f"Memory at that depth: {size(memory['anonymous'])} anonymous, "
        f"{size(mapped['dense'] + mapped['experts'])} of mapped weights{experts}."
    )


def _tables_by_shape(buffers: list[dict[str, Any]]) -> Table:
    """One row for each kind of table: the layers that have it, and all their bytes."""
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for b in buffers:
        suffix = b["name"].partition(".")[2]
        key = (suffix, tuple(b["shape"]), b["dtype"], b["stride"], b["keep"])
        kinds.setdefault(key, []).append(b)
    table = Table(box=None, pad_edge=False)
    for name in ("table", "rows × heads × dim", "dtype"):
        table.add_column(name)
    for name in ("positions a row", "looks back", "bytes each", "of all"):
        table.add_column(name, justify="right")
    table.add_column("layers")
    for (suffix, shape, dtype, stride, keep), same in kinds.items():
        each = same[0]["bytes"]
        table.add_row(
            suffix, " × ".join(f"{n:,}" for n in shape), dtype, str(stride),
            f"{keep:,}" if keep else "all", size(each), size(each * len(same)),
            layers([b["writer"] for b in same]),
        )  # fmt: skip
    return table


def print_plan(data: dict[str, Any], console: Console) -> None:
    """`plan_data` as tables."""
    console.print(
        f"[bold]{data['model']}[/]  ctx {data['ctx']:,}  chunk {data['chunk']}  "
        f"kv {data['kv']}  quant {data['quant']}"
    )
    console.print(buffer_table(data["buffers"]))
    totals, memory = data["totals"], data["memory"]
    state = Table("state", box=None, pad_edge=False)
    state.add_column("bytes", justify="right")
    state.add_column("share", justify="right")
    naive = totals["baselines_f16"]["every_layer_full"]
    state.add_row("this plan", size(totals["bytes"]), f"{totals['bytes'] / naive:.1%}")
    for key, label in BASELINES.items():
        value = totals["baselines_f16"][key]
        state.add_row(f"f16, {label}", size(value), f"{value / naive:.1%}")
    console.print(state)
    console.print(
        f"Read traffic of one token at {memory['depth']:,} tokens: "
        f"{size(totals['read_traffic_per_token'])} of state."
    )
    parts = ", ".join(f"{kind} {size(n)}" for kind, n in memory["weights"].items())
    console.print(f"Weights: {size(memory['weight_file'])} ({parts}).")
    if memory["ple_file"]:
        console.print(f"PLE rows: {size(memory['ple_file'])} on disk, read row by row.")
    console.print(f"Tokenizer: {size(memory['tokenizer'])} of heap while there is text to read.")
    if memory["checkpoints"]:
        console.print(
            f"Conversations: up to {size(memory['checkpoints'])} more, to go back to turns whose "
            "rows the rings have lost."
        )
    console.print(phase_table(memory))


def print_evaluation(data: dict[str, Any], console: Console) -> None:
    """An evaluation (`runtime.evaluate.readable`) as a sentence and, with a reference, a table."""
    console.print(
        f"Perplexity {data['perplexity']:.4g} over {data['tokens']:,} tokens in "
        f"{data['windows']:,} windows of {data['window']}."
    )
    against = data.get("against")
    if not against:
        return
    console.print(
        f"Float checkpoint: perplexity {against['perplexity']:.4g}; KL mean "
        f"{against['mean_kl']:.3g}, 99 % below {against['p99_kl']:.3g}, max "
        f"{against['max_kl']:.3g} nats; same likeliest token {against['top1']:.1%}."
    )
    table = Table("at", "token", "likeliest", "float's likeliest", box=None, pad_edge=False)
    for name in ("KL", "loss", "float's loss"):
        table.add_column(name, justify="right")
    for miss in against["worst"]:
        words = (miss["text"], miss["likeliest_text"], miss["reference_likeliest_text"])
        figures = (miss["kl"], miss["loss"], miss["reference_loss"])
        table.add_row(
            f"{miss['at']:,}", *(escape(repr(w)) for w in words), *(f"{x:.3g}" for x in figures)
        )
    console.print(table)


def parity_line(parity: dict[str, Any]) -> str:
    """What an export cost in quality, from a manifest's `parity`; empty where it does not say."""
    found = parity.get("quantisation")
    if not found:
        return ""
    line = (
        f"Against the float checkpoint: KL mean {found['mean_kl']:.3g}, max {found['max_kl']:.3g} "
        f"nats, same likeliest token {found['top1']:.1%}"
    )
    if perplexity := parity.get("perplexity"):
        line += f", perplexity {perplexity['stored']:.4g} (float {perplexity['float']:.4g})"
    return f"{line}, over {parity['steps']} tokens of the gate's text."


def listed_data(found: list[Listed]) -> list[dict[str, Any]]:
    """For JSON: each artifact of a folder with size, context, engines and quality."""
    rows: list[dict[str, Any]] = []
    for one in found:
        row: dict[str, Any] = {"name": one.name, "bytes": one.bytes}
        if one.artifact is None:
            rows.append({**row, "fault": one.fault})
            continue
        manifest = one.artifact.manifest
        entries = map(one.artifact.parity, manifest.backends)
        lost: dict[str, Any] = next((e["quantisation"] for e in entries if "quantisation" in e), {})
        rows.append(
            {
                **row,
                "ctx": one.artifact.plan.ctx,
                "backends": list(manifest.backends),
                "quant": manifest.quant.scheme,
                "mean_kl": lost.get("mean_kl"),
            }
        )
    return rows


def print_listed(rows: list[dict[str, Any]], console: Console) -> None:
    """One line an artifact; what cannot be used says why below."""
    table = Table(box=None, pad_edge=False)
    for title, right in (
        ("artifact", False), ("size", True), ("context", True), ("weights", False), ("KL", True),
        ("engines", False),
    ):  # fmt: skip
        table.add_column(title, justify="right" if right else "left", no_wrap=right)
    for row in rows:
        if "fault" in row:
            table.add_row(row["name"], size(row["bytes"]), "–", "–", "–", "cannot be used")
            continue
        kl = "–" if row["mean_kl"] is None else f"{row['mean_kl']:.2g}"
        engines = ", ".join(row["backends"])
        table.add_row(row["name"], size(row["bytes"]), f"{row['ctx']:,}", row["quant"], kl, engines)
    console.print(table)
    for row in rows:
        if "fault" in row:
            console.print(f"{row['name']}: {row['fault']}", soft_wrap=True)


def buffer_table(buffers: list[dict[str, Any]]) -> Table:
    """One row a state buffer."""
    table = Table(box=None, pad_edge=False)
    for name in ("buffer", "kind", "shape", "dtype"):
        table.add_column(name)
    for name in ("bytes", "writer"):
        table.add_column(name, justify="right")
    table.add_column("readers")
    for b in buffers:
        shape = " × ".join(str(n) for n in b["shape"])
        readers = layers(b["readers"])
        table.add_row(
            b["name"], b["kind"], shape, b["dtype"], size(b["bytes"]), str(b["writer"]), readers
        )
    return table


def phase_table(memory: dict[str, Any]) -> Table:
    """Predicted peak RAM of each phase."""
    table = Table("predicted peak", box=None, pad_edge=False)
    for name in ("anonymous", "file-backed", "total"):
        table.add_column(name, justify="right")
    for name, phase in memory["phases"].items():
        table.add_row(name, size(phase["anon"]), size(phase["file"]), size(phase["total"]))
    return table


def print_bench(document: dict[str, Any], console: Console) -> None:
    """The document of `runtime.bench.bench` as tables: speed, then memory against the plan."""
    artifact, machine = document["artifact"], document["machine"]
    conditions, bandwidth = document["conditions"], document["bandwidth"]
    console.print(
        f"[bold]{artifact['name']}[/]  quant {artifact['quant']}, kv {artifact['kv']}  ·  "
        f"{machine['cpu']}, "
        f"{conditions['threads']} threads, reads {size(bandwidth['best'])}/s"
    )
    speed = Table("engine", box=None, pad_edge=False)
    for name in (
        "context", "load s", "first token s", "prefill tok/s", "decode tok/s", "p50 ms", "p95 ms",
        "p99 ms", "of the roofline",
    ):  # fmt: skip
        speed.add_column(name, justify="right")
    for r in document["runs"]:
        times = r["decode"]["seconds"]
        speed.add_row(
            r["engine"],
            f"{r['ctx']:,}",
            f"{r['load']['seconds']:.2f}",
            f"{r['first_token']:.2f}",
            f"{r['prefill']['rate']:.1f}",
            f"{r['decode']['rate']:.1f}",
            *(f"{1e3 * times[p]:.1f}" for p in ("p50", "p95", "p99")),
            f"{r['roofline']['fraction']:.0%}",
        )
    console.print(speed)
    memory = Table("engine", box=None, pad_edge=False)
    for name in ("context", "phase", "anonymous", "planned", "error", "file", "PSS", "peak RSS"):
        memory.add_column(name, justify="left" if name == "phase" else "right")
    for r in document["runs"]:
        for phase, m in r["memory"].items():
            error = m.get("anon_error")
            memory.add_row(
                r["engine"],
                f"{r['ctx']:,}",
                phase,
                *("–" if m.get(k) is None else size(m[k]) for k in ("anon_peak", "anon_planned")),
                "–" if error is None else f"{error:+.1%}",
                *("–" if m.get(k) is None else size(m[k]) for k in ("file", "pss")),
                size(m["rss_peak"] or m["rss_peak_so_far"] or 0),
            )
    console.print(memory)


def print_deploy(document: dict[str, Any], console: Console) -> None:
    """The document of `edge_kv.deploy`: what travelled, parity there, then the measurement."""
    copied = document["copied"]
    console.print(
        f"[bold]{document['artifact']}[/] on {document['device']} ({document['system']}), in "
        f"{document['folder']}: copied {copied['files']} files, {size(copied['bytes'])}; "
        f"{copied['kept_files']} were there, {size(copied['kept_bytes'])}"
    )
    for engine, parity in document["verify"].items():
        kl = f"KL max {parity['max_kl']:.3g}, " if "max_kl" in parity else ""
        console.print(f"{engine}: {kl}top-1 {parity['top1']:.1%} over {parity['steps']} steps")
    measured = document["bench"]
    if measured and "runs" in measured:
        print_bench(measured, console)
    elif measured:
        prefill, decode = measured["prefill_seconds"], measured["decode_seconds"]
        console.print(
            f"load {measured['load_seconds']:.2f} s, prefill {measured['prefill_tokens']} tokens "
            f"{prefill:.2f} s, decode {measured['decode_tokens']} tokens {decode:.2f} s, "
            f"peak RSS {size(measured['memory'].get('VmHWM', 0))}"
        )


def artifact_data(artifact: Artifact) -> dict[str, Any]:
    """What is in an artifact, as JSON data."""
    manifest, config, plan = artifact.manifest, artifact.config, artifact.plan
    errors = sorted(t.error for t in manifest.quant.tensors.values())
    worst = sorted(manifest.quant.tensors.items(), key=lambda item: -item[1].error)[:5]
    return {
        "name": manifest.name,
        "edge_kv": manifest.edge_kv,
        "made": manifest.made,
        "model": _model_data(artifact),
        "ctx": artifact.plan.ctx,
        "chunk": artifact.plan.chunk,
        "kv": artifact.plan.kv,
        "state_bytes": artifact.plan.bytes,
        "buffers": _table_data(plan) if config is None else manifest.plan.buffers,
        "engines": {
            name: {"programs": {n: p.file for n, p in b.programs.items()}, "details": b.details}
            for name, b in manifest.backends.items()
        },
        "quant": {
            "scheme": manifest.quant.scheme,
            "formats": manifest.quant.formats,
            "tensors": len(errors),
            "median_error": errors[len(errors) // 2] if errors else None,
            "worst": {n: t.error for n, t in worst},
        },
        "ple": manifest.ple.model_dump() if manifest.ple else None,
        "sampling": asdict(Sampling.of(artifact)),
        "tokenizer": manifest.tokenizer.model_dump() if manifest.tokenizer else None,
        "files": {n: f.size for n, f in manifest.files.items()},
        "parity": (
            {n: p.model_dump() for n, p in manifest.parity.items()}
            if config is None
            else manifest.parity
        ),
        "memory": predict_artifact(artifact).as_dict() if config is None else manifest.memory,
    }


def _model_data(artifact: Artifact) -> dict[str, Any]:
    config, tables = artifact.config, getattr(artifact.plan, "tables", ())
    if config is None:
        return {
            "family": artifact.family,
            "layers": artifact.layers,
            "pattern": "",
            "kv_owners": len({t.writer for t in tables}),
            "window": max((t.keep for t in tables), default=0),
            "vocab": artifact.tokens.vocab,
        }
    return {
        "family": config.family,
        "layers": config.n_layers,
        "pattern": config.pattern,
        "kv_owners": config.n_own,
        "window": config.sliding_window,
        "hidden": config.hidden,
        "vocab": config.vocab_size,
        "ple_dim": config.ple_dim,
    }


def _table_data(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "name": t.name,
            "kind": "ring" if t.keep else "append",
            "shape": list(t.shape),
            "dtype": t.dtype,
            "bytes": t.bytes,
            "writer": t.writer,
            "readers": list(t.readers),
        }
        for t in plan.tables
    ]


def print_artifact(data: dict[str, Any], console: Console) -> None:
    """`artifact_data` as tables."""
    model, quant = data["model"], data["quant"]
    console.print(
        f"[bold]{data['name']}[/]  {model['family']}, {model['layers']} layers "
        f"({model['kv_owners']} own keys and values), window {model['window']}, "
        f"ctx {data['ctx']:,}, chunk {data['chunk']}"
    )
    if model["pattern"]:
        console.print(f"Layers: {model['pattern']} (S sliding, F full)")
    console.print(buffer_table(data["buffers"]))
    console.print(f"State: {size(data['state_bytes'])} ({data['kv']}).")
    for name, engine in data["engines"].items():
        files = ", ".join(f"{n} ({f})" for n, f in engine["programs"].items())
        console.print(f"Engine {name}: {files}.")
    if quant["tensors"]:
        worst = ", ".join(f"{n} {e:.3g}" for n, e in quant["worst"].items())
        console.print(
            f"Weights: {quant['scheme']}, {quant['tensors']} tensors, relative error "
            f"{quant['median_error']:.3g} (median); worst: {worst}."
        )
        console.print(f"Stored as: {', '.join(f'{k} {n}' for k, n in quant['formats'].items())}.")
    else:
        console.print(f"Weights: {quant['scheme']}.")
    drawn = ", ".join(f"{k} {v:g}" for k, v in data["sampling"].items())
    console.print(f"Sampling: {drawn}." if data["sampling"]["temperature"] else "Sampling: greedy.")
    listing = Table("file", box=None, pad_edge=False)
    listing.add_column("bytes", justify="right")
    for name, count in data["files"].items():
        listing.add_row(name, size(count))
    listing.add_row("total", size(sum(data["files"].values())))
    console.print(listing)
    if data["parity"]:
        console.print("Parity: " + _inline(data["parity"]) + ".")
    if data["memory"].get("phases"):
        console.print(phase_table(data["memory"]))


def _inline(value: Any) -> str:
    """Nested results on one line: `lowering (max_abs 1e-05, …), vectors verify.npz`."""
    if isinstance(value, dict):
        parts = [
            f"{k} ({_inline(v)})" if isinstance(v, dict) else f"{k} {_inline(v)}"
            for k, v in value.items()
        ]
        return ", ".join(parts)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
