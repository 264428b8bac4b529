"""Write the tables of benchmarks/README.md from the result files.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
README = HERE / "README.md"
MODELS = {"gemma3_270m": "Gemma 3 270M", "tiny": "tiny"}
FORMATS_SINCE = "2026-11-29"  # results before it are of formats that are gone
EARLIER_BITS = {
    "int8 block 32": 9,
    "int4 block 32": 5,
    "int4 block 64": 4.5,
    "int4 block 128": 4.25,
}


def main() -> None:
    tables = {
        "greedy": greedy(result("greedy_gemma3_270m")),
        "weights": "\n\n".join(weights(m, result(f"calibration_{m}")) for m in MODELS),
        "earlier formats": earlier_formats({m: result(f"quality_{m}") for m in MODELS}),
        "kv": kv({m: result(f"kv_quality_{m}") for m in MODELS}),
        "prefill": prefill(result("prefill_skip"), result("prefill_skip_exact")),
        "full size": "\n\n".join(full_size(r) for r in results("full_size_")),
        "limits": "\n\n".join(limits(r) for r in results("limits_")),
        "exports": exports([r for r in results("export_") if "limit" in r]),
        "resume": "\n\n".join(resume(r) for r in results("resume_")),
        "clean systems": clean_systems(result("fresh_systems")),
        "startup": startup(result("startup")),
        "agreement": "\n\n".join(agreement(r) for r in results("engines_agree_")),
        "peers": "\n\n".join(peers(r) for r in results("peers_")),
        "contexts": "\n\n".join(contexts(r) for r in results("executorch_contexts")),
        "exporters": "\n\n".join(exporters(r) for r in results("executorch_peer")),
        "devices": devices(result("device_classes")),
        "smollm2": smollm2(result("greedy_smollm2")),
    }
    text = README.read_text(encoding="utf-8")
    for name, table in tables.items():
        mark = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(mark, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)
        assert found == 1, f"README.md has no place for the {name} table"
    README.write_text(text, encoding="utf-8")


def result(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text())
    return document


def results(prefix: str) -> list[dict[str, Any]]:
    """Every result file whose name starts with `prefix`, in order of name."""
    return [result(p.stem) for p in sorted((HERE / "results").glob(f"{prefix}*.json"))]


def earlier(r: dict[str, Any], model: str) -> str:
    """The format that a result was measured with, if it is none of today's, and what that loses."""
    if r["date"] >= FORMATS_SINCE:
        return ""
    stored = "int8 block 32" if "gemma" in model else "int4 block 128"
    rows = result("quality_gemma3_270m")["variants"]
    lost = next(v["windows"]["mean_kl"] for v in rows if v["run"].startswith(stored))
    return (
        f"Measured with {stored} and f32 scales, an earlier format: its KL on Gemma 3 270M is "
        f"{lost:.2g}, today's int4 has {todays_kl():.2g}."
    )


def todays_kl() -> float:
    rows = result("calibration_gemma3_270m")["rows"]
    kl: float = next(r["against"]["mean_kl"] for r in rows if r["run"] == "int4")
    return kl


def markdown(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) + ("---:",) * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(str(x) for x in line) + " |" for line in lines)


def smollm2(r: dict[str, Any]) -> str:
    rows, n = r["prompts"], r["new_tokens"]
    whole = sum(row["f32"]["equal"] == n for row in rows)
    near = sum(row["int8"]["equal"] for row in rows)
    worst = max(row["f32"]["max_abs_logit"] for row in rows)
    return (
        f"SmolLM2-135M-Instruct (GGUF, Q4_1), chats, state f32: {whole} of {len(rows)} prompts "
        f"give the same {n} greedy tokens; largest difference of a logit {worst:.2g}. State int8, "
        f"fed the same tokens: the same choice at {near} of {n * len(rows)} positions."
    )


def devices(r: dict[str, Any]) -> str:
    """The longest context of each model on each device, then what it needs there."""
    names = [d["name"] for d in r["devices"]]
    fits: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in r["models"]:
        fits.setdefault(entry["model"], {})[entry["device"]] = entry
    mark = {"in memory": "", "experts from storage": " *", "no": ""}

    def cell(entry: dict[str, Any]) -> str:
        return f"{entry['ctx']:,}{mark[entry['verdict']]}" if entry["ctx"] else "–"

    def need(entry: dict[str, Any]) -> tuple[str, ...]:
        sizes = ("anonymous", "file_pages", "weight_file", "read_weights", "read_state")
        return (f"{entry['at']:,}", *(f"{entry[key] / 1e9:.2f}" for key in sizes))

    contexts = [(m, *(cell(by_device[n]) for n in names)) for m, by_device in fits.items()]
    # What the largest device that runs the model needs; for those none runs, the least they ask.
    head = (
        "GB", "at context", "anonymous", "weights mapped", "weight file",
        "a token reads of weights", "of state",
    )  # fmt: skip
    needs = [(m, *need(by_device[names[-1]])) for m, by_device in fits.items()]
    return f"{markdown(('longest context', *names), contexts)}\n\n{markdown(head, needs)}"


def greedy(r: dict[str, Any]) -> str:
    rows = r["prompts"]
    worst = max(row["max_abs_logit"] for row in rows)
    equal = sum(row["equal"] == r["new_tokens"] for row in rows)
    return (
        f"{equal} of {len(rows)} prompts ({min(x['prompt_tokens'] for x in rows)} to "
        f"{max(x['prompt_tokens'] for x in rows)} tokens) give the same {r['new_tokens']} greedy "
        f"tokens; largest difference of a logit {worst:.2g}."
    )


def weights(model: str, r: dict[str, Any]) -> str:
    head = (
        MODELS[model],
        "bits a weight",
        "MB",
        "perplexity",
        "mean KL",
        "99 % below",
        "same top-1",
    )
    float_row = ("float", "", "", f"{r['rows'][0]['against']['perplexity']:.3f}", 0, 0, "100 %")
    rows: list[tuple[Any, ...]] = [float_row]
    for row in r["rows"]:
        against = row["against"]
        rows.append(
            (
                row["run"],
                row["bits"],
                f"{row['weight_bytes'] / 1e6:.1f}",
                f"{row['perplexity']:.3f}",
                f"{against['mean_kl']:.4f}",
                f"{against['p99_kl']:.3f}",
                f"{against['top1']:.1%}",
            )
        )
    return markdown(head, rows)


def earlier_formats(results: dict[str, dict[str, Any]]) -> str:
    """What the formats that are gone lost, as they were measured then."""
    head = ("earlier format", "bits a weight", *(f"{MODELS[m]}: perplexity, KL" for m in results))
    rows: list[tuple[Any, ...]] = []
    for label, bits in EARLIER_BITS.items():
        cells = []
        for r in results.values():
            at = next(v["windows"] for v in r["variants"] if v["run"].startswith(label))
            cells.append(f"{at['perplexity']:.2f}, {at['mean_kl']:.2g}")
        rows.append((label, bits, *cells))
    return markdown(head, rows)


def kv(results: dict[str, dict[str, Any]]) -> str:
    head = (
        "int8 KV against f32 KV", "context", "perplexity f32", "int8", "mean KL", "max KL",
        "same top-1",
    )  # fmt: skip
    rows = [
        (
            MODELS[model],
            d["context"],
            d["f32_perplexity"],
            d["perplexity"],
            d["mean_kl"],
            d["max_kl"],
            f"{d['top1_agreement']:.1%}",
        )
        for model, r in results.items()
        for d in r["depths"]
    ]
    return markdown(head, rows)


def prefill(r: dict[str, Any], exact: dict[str, Any]) -> str:
    low, high = min(r["ratio_of_each_pair"]), max(r["ratio_of_each_pair"])
    body = r["body_weights"]
    same = r["state_after_prefill"]["bit_equal"] and exact["state_after_prefill"]["bit_equal"]
    logits = max(d["max_abs"] for d in exact["next_logits"].values())
    return (
        f"{r['model']}, {r['quant']}, {r['prompt_tokens']} tokens in chunks of {r['chunk']}: "
        f"**{r['speed_up']}x** as fast (median; pairs between {low:.2f} and {high:.2f}), with "
        f"{body['untrimmed'] / body['trimmed']:.2f}x fewer matrix values a token. The state left "
        f"behind is {'bit-equal' if same else 'NOT equal'}; in float ({exact['model']}) the next "
        f"logits are {logits:.1g} apart, from the untrimmed run and from decode alone."
    )


def full_size(r: dict[str, Any]) -> str:
    c = r["conditions"]
    head = (
        "engine", "depth", "decode tok/s", "to llama.cpp", "prefill tok/s", "to llama.cpp",
        "anonymous MB", "peak RSS MB",
    )  # fmt: skip
    rows = [
        (
            f"{x['subject']}",
            f"{x['depth']:,}",
            *rate(x, "decode"),
            *rate(x, "prefill"),
            *peaks(x),
        )
        for x in r["summary"]
    ]
    how = {"prefill": "by prefill", "random": "with random rows"}[c["fill"]]
    rounds = max(x["rounds"] for x in r["summary"])
    format = earlier(r, r["summary"][0]["subject"])
    said = " ".join(s for s in (format, r.get("note", "").strip()) if s)
    return (
        f"{said} {c['threads']} threads, prefill of {c['prompt']} tokens, depth "
        f"reached {how}; medians of {rounds} alternating rounds.\n\n" + markdown(head, rows)
    )


def rate(x: dict[str, Any], phase: str) -> tuple[str, str]:
    """Tokens/s of a phase, and to the best peer's where there is one."""
    to_peer = x.get(f"{phase}_ratio")
    digits = 1 if phase == "decode" else 0
    return f"{x[phase]:.{digits}f}", f"{to_peer:.2f}x" if to_peer else ""


def peaks(x: dict[str, Any]) -> tuple[str, str]:
    """Megabytes: anonymous, and all of RSS."""
    return f"{x['anon_peak'] / 1e6:.0f}", f"{x['rss_peak'] / 1e6:.0f}"


def peers(r: dict[str, Any]) -> str:
    c = r["conditions"]
    head = (
        r["model"], "weights", "prefill tok/s", "to the best peer", "decode tok/s",
        "to the best peer", "load s", "anonymous MB", "peak RSS MB",
    )  # fmt: skip
    rounds = max(x["rounds"] for x in r["summary"])
    rows: list[tuple[Any, ...]] = []
    for x in r["summary"]:
        name = f"{x['subject']} ({x['version']})" if "version" in x else x["subject"]
        if "failed" in x:
            rows.append((name, x["weights"], x["failed"], *[""] * (len(head) - 3)))
            continue
        if x["rounds"] < rounds:
            name += f", {x['rounds']} rounds: the others failed"
        rows.append(
            (
                name,
                x["weights"],
                *rate(x, "prefill"),
                *rate(x, "decode"),
                f"{x['load']:.2f}",
                *peaks(x),
            )
        )
    format = earlier(r, r["model"])
    return (
        f"{format} {c['threads']} threads, {c['prompt']} tokens up to the first new one, "
        f"{c['tokens']} more from there; medians of {rounds} alternating rounds.\n\n"
        + markdown(head, rows)
    )


def limits(r: dict[str, Any]) -> str:
    job = r["job"]
    head = (
        f"{r['artifact']}, {job['engine']}, {job['depths'][0]:,} tokens", "decode tok/s",
        "of unlimited", "anonymous MB", "group's peak MiB",
    )  # fmt: skip
    rows: list[tuple[Any, ...]] = []
    for x in r["runs"]:
        name = f"{x['limit'] >> 20} MiB" if x["limit"] else "no limit"
        if x["rate"]:
            speed = (f"{x['rate']:.2f}", f"{x['of_unlimited']:.0%}", f"{x['anon'] / 1e6:.0f}")
        else:
            speed = ("killed", "", "")
        rows.append((name, *speed, x["peak"] >> 20))
    return f"{earlier(r, r['artifact'])}\n\n{markdown(head, rows)}".strip()


def exports(documents: list[dict[str, Any]]) -> str:
    head = ("export", "limit MiB", "peak RSS MB", "minutes", "CPU minutes")
    rows: list[tuple[Any, ...]] = [
        (
            f"`{' '.join(str(a) for a in r['arguments'] if '/' not in str(a))}`",
            r["limit"] >> 20,
            f"{r['rss_peak'] / 1e6:.0f}",
            f"{r['seconds'] / 60:.1f}" + (" (resumed)" if r["resumed"] else ""),
            f"{r['cpu_seconds'] / 60:.1f}",
        )
        for r in documents
    ]
    return markdown(head, rows)


def resume(r: dict[str, Any]) -> str:
    """A sentence on an export that was killed again and again."""
    kills, size = r["kills"], sum(r["equal_files"].values())
    end = "equals" if r["passed"] else f"differs in {', '.join(r['different_files'])} from"
    return (
        f"`{' '.join(r['arguments'])}`, killed {len(kills)} times (SIGKILL, after "
        f"{min(k['seconds'] for k in kills):.0f} to {max(k['seconds'] for k in kills):.0f} s): no "
        f"finished tensor is done twice, and the artifact, {len(r['equal_files'])} files of "
        f"{size / 1e9:.1f} GB, {end} the uninterrupted one byte by byte."
    )


def clean_systems(r: dict[str, Any]) -> str:
    """What the two commands did in clean systems: status, minutes, pytest's last line, commit."""
    rows: list[tuple[Any, ...]] = []
    for x in r["systems"]:
        cells = []
        for target in ("demo", "test"):
            ran = x.get(target)
            cell = "not run"
            if ran:
                cell = f"status {ran['status']}, {ran['seconds'] / 60:.0f} min"
                if counts := re.search(r"\d+ (failed|passed)[^=]*?(?= in )", ran["last"]):
                    cell += f", {counts[0]}"
                cell += f" ({ran['commit'][:7]})"
            cells.append(cell)
        rows.append((x["system"], x.get("python", "–"), "yes" if x["compiler"] else "no", *cells))
    return markdown(("system", "Python", "g++", "`make demo`", "`make test`"), rows)


def startup(r: dict[str, Any]) -> str:
    head = ("start", "page cache", "first token after s", "of which load s")
    rows: list[tuple[Any, ...]] = [
        (
            row["run"],
            row["page_cache"],
            f"{median(row['first_token_s']):.2f}",
            f"{median(row['load_s']):.2f}",
        )
        for row in r["rows"]
    ]
    return markdown(head, rows)


def agreement(r: dict[str, Any]) -> str:
    """Greedy tokens that two engines share before they part, and by what gap they do."""
    head = (
        f"{r['model']}, ONNX Runtime and",
        "attention",
        "weights, state",
        "equal tokens",
        "gaps",
    )
    rows: list[tuple[Any, ...]] = []
    for run in r["runs"]:
        parted = [
            f"{p['gap_at_difference'] / p['noise']:.2f}"
            for p in run["prompts"]
            if p["gap_at_difference"] is not None
        ]
        equal = ", ".join(str(p["equal"]) for p in run["prompts"])
        rows.append((run["engine"], run["attention"], run["run"], equal, ", ".join(parted)))
    return markdown(head, rows)


def contexts(r: dict[str, Any]) -> str:
    """Memory and time of a session by the size of its context."""
    head = ("attention", "context", "state MB", "loaded", f"{r['depth']:,} tokens in", "full",
            "ms a token", "at the end")  # fmt: skip
    sizes = ("state", "anon_loaded", "anon_at_depth", "anon_full")
    rows: list[tuple[Any, ...]] = [
        (
            row["attention"],
            f"{row['ctx']:,}",
            *(f"{row[key] / 1e6:.0f}" for key in sizes),
            f"{row['decode_ms']:.2f}",
            f"{row['decode_at_end_ms']:.2f}",
        )
        for row in r["rows"]
    ]
    return markdown(head, rows)


def exporters(r: dict[str, Any]) -> str:
    """ExecuTorch's own Gemma 4 exporter and ours: the exports, and what they made."""
    names = {"ours": "ours", "peer": "ExecuTorch's"}
    made: list[tuple[Any, ...]] = []
    ran: list[tuple[Any, ...]] = []
    for x in r["rows"]:
        name, ctx, e = f"{names[x['exporter']]}, {x['kv']} KV", f"{x['ctx']:,}", x["export"]
        if failed := e.get("failed") or x.get("failed"):
            ran.append((name, ctx, failed))
        if "bytes" in e:
            times = (f"{e['seconds'] / 60:.1f}", f"{e['cpu_seconds'] / 60:.1f}")
            made.append((name, ctx, *times, *(f"{e[k] / 1e6:.0f}" for k in ("rss_peak", "bytes"))))
        if "load_seconds" in x:
            rates = (f"{x['first_load_seconds']:.1f}", f"{x['load_seconds']:.2f}")
            rates += (f"{x['prefill_rate']:.0f}", f"{x['decode_rate']:.1f}")
            rates += (f"{x['decode_rate_at_end']:.1f}",)
            ran.append((name, ctx, *rates, *(f"{x[k] / 1e6:.0f}" for k in ("anon", "rss_peak"))))
    head = ("export", "context", "minutes", "CPU minutes", "peak RSS MB", "artifact MB")
    speed = ("run", "context", "first load s", "load s", f"prefill tok/s, {r['prompt']}",
             "decode tok/s, start", "decode tok/s, end", "anonymous MB", "peak RSS MB")  # fmt: skip
    return f"{r['model']}.\n\n{markdown(head, made)}\n\n{markdown(speed, ran)}"


if __name__ == "__main__":
    main()
