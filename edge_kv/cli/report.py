"""Plans and artifacts as tables for people and as plain data for `--json`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edge_kv.amounts import size
from edge_kv.artifact import Artifact
from edge_kv.cli.terminal import layers
from edge_kv.manifest import Manifest
from edge_kv.memory import COSTS, UNPLANNED, predict_artifact
from edge_kv.plan import Plan
from edge_kv.runtime.sampling import Sampling
from edge_kv.shelf import Listed


def print_evaluation(data: dict[str, Any], console: Console) -> None:
    """An evaluation (`runtime.evaluate.readable`) as a sentence and, with a reference, a table."""
    console.print(
        f"Perplexity {data['perplexity']:.4g} over {data['tokens']:,} tokens, read "
        f"{data['window']} at a time."
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
    found = parity["quantisation"]
    if not {"mean_kl", "max_kl", "top1"} <= found.keys():
        return ""
    return (
        f"Beside the float checkpoint, over {parity['steps']} tokens: KL mean "
        f"{found['mean_kl']:.3g}, max {found['max_kl']:.3g} nats, same likeliest token "
        f"{found['top1']:.1%}."
    )


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
    """One row for state buffers that are alike: the layers that write them and, beside these, the
    layers that read them too."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for b in buffers:
        others = tuple(r for r in b["readers"] if r != b["writer"])
        key = (b["name"].partition(".")[2], b["kind"], tuple(b["shape"]), b["dtype"], others)
        alike.setdefault(key, []).append(b)
    table = Table(box=None, pad_edge=False)
    for name in ("buffer", "kind", "shape", "dtype"):
        table.add_column(name)
    for name in ("each", "all"):
        table.add_column(name, justify="right")
    table.add_column("layers", overflow="fold")
    table.add_column("also read by", overflow="fold")
    for (suffix, kind, shape, dtype, others), same in alike.items():
        each, writers = same[0]["bytes"], layers([b["writer"] for b in same])
        table.add_row(
            suffix, kind, "×".join(f"{n:,}" for n in shape), dtype, size(each),
            size(each * len(same)), writers, layers(others) if others else "–",
        )  # fmt: skip
    return table


def phase_table(engine: str, phases: dict[str, Any]) -> Table:
    """Predicted peak RAM of each phase on an engine."""
    table = Table(f"planned peak, {engine}", box=None, pad_edge=False)
    for name in ("heap", "mapped files", "total"):
        table.add_column(name, justify="right")
    for name, phase in phases.items():
        table.add_row(name, size(phase["anon"]), size(phase["file"]), size(phase["total"]))
    return table


def print_bench(document: dict[str, Any], console: Console) -> None:
    """The document of `runtime.bench.bench` as tables: speed, then memory against the plan."""
    artifact, machine = document["artifact"], document["machine"]
    conditions, bandwidth = document["conditions"], document["bandwidth"]
    huge = any(r["load"].get("huge_page_bytes") for r in document["runs"])
    console.print(
        f"[bold]{artifact['name']}[/]: weights {artifact['quant']}{' in huge pages' * huge}, "
        f"state {artifact['kv']}; "
        f"{machine['cpu']}, threads: {conditions['threads']}, reads {size(bandwidth['best'])}/s"
    )
    console.print()
    speed = Table("engine", box=None, pad_edge=False)
    for name in ("context", "load", "first", "prefill", "decode", "p50", "p95", "p99", "limit"):
        speed.add_column(name, justify="right")
    speed.add_row(
        "", "tokens", "s", "token s", "tok/s", "tok/s", "ms", "ms", "ms", "%", style="dim"
    )
    for r in document["runs"]:
        times = r["decode"]["seconds"]
        speed.add_row(
            r["engine"],
            f"{r['ctx']:,}",
            f"{r['load']['seconds']:.2f}",
            f"{r['first_token']:.2f}",
            f"{r['prefill']['rate']:.0f}",
            f"{r['decode']['rate']:.1f}",
            *(f"{1e3 * times[p]:.1f}" for p in ("p50", "p95", "p99")),
            f"{r['roofline']['fraction']:.0%}",
        )
    console.print(speed)
    console.print("[dim]limit: how much of the speed that this memory allows is reached[/]")
    for r in document["runs"]:
        several = r["decode"].get("several", {})
        if len(several) > 1:
            counts = [n for n in several if n != "1"]
            times = (f"{several[n] / several['1']:.2f}" for n in counts)
            console.print(
                f"[dim]{r['engine']}, {r['ctx']:,}: a pass of {', '.join(counts)} tokens takes "
                f"{', '.join(times)} times as long as a pass of one[/]"
            )
    console.print()
    memory = Table("engine", box=None, pad_edge=False)
    for name in ("context", "peak of", "heap", "planned", "error", "total", "planned", "error"):
        memory.add_column(name, justify="left" if name == "peak of" else "right")
    for r in document["runs"]:
        for phase, m in r["memory"].items():
            cells = [r["engine"], f"{r['ctx']:,}", phase]
            for peak, kind in ((m["anon_peak"], "anon"), (m["rss_peak"], "total")):
                planned, error = m.get(f"{kind}_planned"), m.get(f"{kind}_error")
                cells += ["–" if n is None else size(n) for n in (peak, planned)]
                cells.append("–" if error is None else f"{error:+.1%}")
            memory.add_row(*cells)
    console.print(memory)
    unplanned = {r["engine"] for r in document["runs"]} - {p["engine"] for p in document["plan"]}
    if unplanned - {"torch"}:
        console.print(UNPLANNED)
    for failure in document.get("failures", ()):
        at = f" at {failure['ctx']:,} tokens" if failure["ctx"] else ""
        console.print(f"[red]{failure['engine']}{at}:[/] {escape(failure['error'])}")


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
    manifest, plan = artifact.manifest, artifact.plan
    errors = sorted(t.error for t in manifest.quant.tensors.values())
    worst = sorted(manifest.quant.tensors.items(), key=lambda item: -item[1].error)[:5]
    return {
        "name": manifest.name,
        "edge_kv": manifest.edge_kv,
        "made": manifest.made,
        "model": _model_data(artifact),
        "ctx": artifact.plan.ctx,
        "chunk": artifact.plan.chunk,
        "drafts": artifact.plan.drafts,
        "kv": artifact.plan.kv,
        "state_bytes": artifact.plan.bytes,
        "buffers": _table_data(plan),
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
        "drafter": manifest.drafter.model_dump() if manifest.drafter else None,
        "sampling": asdict(Sampling.of(artifact)),
        "unused": unused_settings(manifest),
        "tokens": manifest.tokens.model_dump(),
        "tokenizer": manifest.tokenizer.model_dump() if manifest.tokenizer else None,
        "files": {n: f.size for n, f in manifest.files.items()},
        "parity": {n: p.model_dump() for n, p in manifest.parity.items()},
        "memory": {
            name: predict_artifact(artifact, engine=name).as_dict()
            for name in COSTS
            if name in manifest.backends
        },
    }


def _drawn(sampling: dict[str, float], tokens: dict[str, Any]) -> str:
    """How tokens are drawn and what ends a reply, unless somebody says otherwise."""
    penalty = sampling["repetition_penalty"]
    if sampling["temperature"]:
        how = ", ".join(f"{k} {v:g}" for k, v in sampling.items())
    else:
        how = "greedy" + (f", repetition_penalty {penalty:g}" if penalty != 1 else "")
    ends = ", ".join(map(str, tokens["eos"])) or "none"
    count = len(tokens["suppress"])
    some = ", ".join(map(str, tokens["suppress"][:8])) + (", …" if count > 8 else "")
    never = f"; never drawn: {count:,} ids ({some})" if count else ""
    return f"Sampling: {how}. Ids that end a reply: {ends}{never}."


def unused_settings(manifest: Manifest) -> list[str]:
    """What the checkpoint says of sampling that is not computed here, as "name value"."""
    found = manifest.made.get("unused")
    return [str(text) for text in found] if isinstance(found, list) else []


def unused_line(settings: list[str]) -> str:
    """`unused_settings` as a sentence."""
    return f"The checkpoint's settings that edge-kv does not apply: {', '.join(settings)}."


def _model_data(artifact: Artifact) -> dict[str, Any]:
    tables, model = artifact.plan.tables, artifact.manifest.made.get("model")
    pattern = model.get("pattern", "") if isinstance(model, dict) else ""
    return {
        "family": artifact.family,
        "layers": artifact.layers,
        "pattern": str(pattern),
        "kv_owners": len({t.writer for t in tables}),
        "window": max((t.keep for t in tables), default=0),
        "vocab": artifact.tokens.vocab,
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
        f"({model['kv_owners']} own keys and values)"
        f"{', window {:,}'.format(model['window']) if model['window'] else ''}, "
        f"ctx {data['ctx']:,}, chunk {data['chunk']}, drafts {data['drafts']}"
    )
    if model["pattern"]:
        console.print(f"Layers: {model['pattern']} (S sliding, F full)")
    console.print()
    console.print(buffer_table(data["buffers"]))
    console.print(f"State: {size(data['state_bytes'])} ({data['kv']}).")
    for name, engine in data["engines"].items():
        files = ", ".join(f"{n} ({f})" for n, f in engine["programs"].items())
        console.print(f"Engine {name}: {files}.")
    if drafter := data["drafter"]:
        judged = all(p["draft"] for p in data["parity"].values())
        console.print(
            f"It has an assistant; a draft reads {size(drafter['read'])} of weights"
            f"{'' if judged else '; how near its program is to it was not recorded'}."
        )
    if quant["tensors"]:
        worst = ", ".join(f"{n} {e:.3g}" for n, e in quant["worst"].items())
        console.print(
            f"Weights: {quant['scheme']}, {quant['tensors']} tensors, relative error "
            f"{quant['median_error']:.3g} (median); worst: {worst}."
        )
        console.print(f"Stored as: {', '.join(f'{k} {n}' for k, n in quant['formats'].items())}.")
    else:
        console.print(f"Weights: {quant['scheme']}.")
    console.print(_drawn(data["sampling"], data["tokens"]))
    if data["unused"]:
        console.print(unused_line(data["unused"]), markup=False)
    console.print()
    listing = Table("file", box=None, pad_edge=False)
    listing.add_column("bytes", justify="right")
    for name, count in data["files"].items():
        listing.add_row(name, size(count))
    listing.add_row("total", size(sum(data["files"].values())))
    console.print(listing)
    if data["parity"]:
        console.print()
        console.print(_parity_table(data["parity"]))
        console.print(
            "How far programs are from the model, KL in nats: lowering from the same weights in "
            "PyTorch, kernels from those with activations in 8 bits, quantisation from the "
            "checkpoint. Up to the limits `edge-kv verify` accepts a device."
        )
        perplexity = next(iter(data["parity"].values()))["perplexity"] or {}
        if {"float", "stored"} <= perplexity.keys():
            console.print(
                f"Perplexity of the gate's text: {perplexity['float']:.4g} as floats, "
                f"{perplexity['stored']:.4g} as stored."
            )
    for engine, memory in data["memory"].items():
        console.print()
        console.print(phase_table(engine, memory["phases"]))


def _parity_table(parity: dict[str, Any]) -> Table:
    """How far the programs of each backend are from the model, and its drafts from the drafter."""
    table = Table("parity", "of", box=None, pad_edge=False)
    for name in ("KL mean", "KL max", "top-1", "max |Δlogit|"):
        table.add_column(name, justify="right")
    for backend, entry in parity.items():
        name = backend
        for what, judged in (("", entry), ("drafts, ", entry["draft"])):
            if judged is None:
                continue
            for kind in ("lowering", "kernels", "quantisation"):
                table.add_row(name, what + kind, *_distances(judged[kind]))
                name = ""
            limits = judged["verify"]
            accepted = {"max_kl": limits["max_kl"], "top1": limits["min_top1"]}
            table.add_row("", what + "limits", *_distances(accepted))
    return table


def _distances(found: dict[str, float]) -> list[str]:
    """KL mean and max, top-1, max |Δlogit|; a dash for what a manifest does not say."""
    forms = {"mean_kl": ".2g", "max_kl": ".2g", "top1": ".1%", "max_abs": ".2g"}
    return [format(found[k], form) if k in found else "–" for k, form in forms.items()]
