"""Writes the generated parts of the documents: tables of results and of plans, the file map.

    python benchmarks/report.py            write them anew
    python benchmarks/report.py --check    only say which are out of date

A part stands between `<!-- generated: NAME -->` and `<!-- end of NAME -->`. Results come from
`results/*.json`, plans from `edge-kv plan`, file descriptions from the files' own first lines.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from edge_kv import models
from edge_kv.amounts import size
from edge_kv.footprint import footprint
from edge_kv.models import gemma

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (
    "README.md", "docs/android.md", "docs/calibration.md", "docs/executorch.md", "docs/files.md",
    "docs/memory.md", "docs/models.md", "docs/raspberry-pi.md", "docs/serve.md", "docs/speed.md",
)  # fmt: skip
MEASURED = {"gemma3_270m": "Gemma 3 270M", "tiny": "tiny"}  # models that quality is measured on
ENGINES = {"onnx": "ONNX", "executorch": "ExecuTorch"}  # how a row calls them
STORED = {  # how a row calls a run of benchmarks/calibration.py
    "int8 weights": "int8",
    "int4 weights, the default": "int4",
    "int4 weights, `--calibration none`": "int4, not calibrated",
}
NEW = 64  # greedy tokens compared
FORMATS_SINCE = "2026-11-29"  # results before it are of weight formats that are gone
PEER = "llama.cpp"  # the better of its settings counts, figure by figure
MISSING = "–"
BOARDS = {"Pi 4, 4 GB": 4 << 30, "Pi 5, 8 GB": 8 << 30}
SYSTEM_BYTES = 600 << 20  # what Raspberry Pi OS without a desktop and an ssh login leave less
BOARD_MODELS = ("gemma3-270m", "gemma3-1b", "e2b", "e4b")
CONTEXTS = {"32k": 32_768, "128k": 131_072}
ROOMS = ("edge_kv", *(f"edge_kv/{room}" for room in ("cli", "models", "nets", "serve", "weights")),
         "export", "runtime", "runtime/native", "benchmarks", "tests")  # fmt: skip
_PART = re.compile(r"(<!-- generated: ([\w, -]+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when stale")
    args = parser.parse_args()
    stale = [name for name in DOCUMENTS if render(read(name)) != read(name)]
    if args.check:
        sys.exit(f"Out of date: {', '.join(stale)}; run this without --check." if stale else 0)
    for name in stale:
        (ROOT / name).write_text(render(read(name)), encoding="utf-8")
        print(f"wrote {name}")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def render(document: str) -> str:
    """`document` with every generated part as it should be."""
    return _PART.sub(lambda m: f"{m[1]}{PARTS[m[2]]()}\n{m[3]}", document)


def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are aligned left."""
    rule = ["---" if i < left else "--:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def results() -> str:
    """Every claim that a committed result file holds, one column a model."""
    rows = [
        row(f"first {NEW} greedy tokens equal to `transformers` fp32", greedy),
        row("perplexity of the float checkpoint", float_perplexity),
        *(
            row(f"{label}: perplexity, KL, bits", lambda model, run=run: quality(model, run))
            for label, run in STORED.items()
        ),
        *(
            row(
                f"int8 against f32 KV at {depth:,} tokens: KL, perplexity",
                lambda model, depth=depth: int8_kv(model, depth),
            )
            for depth in (2048, 16_384)
        ),
        row("KV state for 32,768 tokens, f32 → int8", kv_sizes),
    ]
    shown = [r for r in rows if set(r[1:]) != {MISSING}]
    sentences = [s for s in (parity_sentence(), prefill_sentence()) if s]
    return "\n\n".join([table(["", *MEASURED.values()], shown), *sentences])


def row(title: str, cell: Callable[[str], str]) -> list[str]:
    """`cell` of every measured model; a model without that result gets a dash."""
    cells = [title]
    for model in MEASURED:
        try:
            cells.append(cell(model))
        except (KeyError, StopIteration, FileNotFoundError):
            cells.append(MISSING)
    return cells


def greedy(model: str) -> str:
    prompts = load(f"greedy_{model}")["prompts"]
    equal = sum(p["equal"] == NEW for p in prompts)
    worst = max(p["max_abs_logit"] for p in prompts)
    return f"{equal} of {len(prompts)} prompts, logits within {worst:.0e}"


def float_perplexity(model: str) -> str:
    return f"{load(f'calibration_{model}')['rows'][0]['against']['perplexity']:.2f}"


def quality(model: str, run: str) -> str:
    """What weights stored so predict, how far that is from float ones, and what they take."""
    stored = next(r for r in load(f"calibration_{model}")["rows"] if r["run"] == run)
    weights = f"{stored['bits']:.2f} ({size(stored['weight_bytes'])})"
    return f"{stored['perplexity']:.2f}, {stored['against']['mean_kl']:.2g}, {weights}"


def int8_kv(model: str, depth: int) -> str:
    at = next(d for d in load(f"kv_quality_{model}")["depths"] if d["context"] == depth)
    return f"{at['mean_kl']:.1e}, {100 * (at['perplexity_ratio'] - 1):+.2f} %"


def kv_sizes(model: str) -> str:
    held = load(f"kv_quality_{model}")["kv_bytes"]
    return f"{size(held['f32 KV'])} → {size(held['int8 KV'])}"


def parity_sentence() -> str:
    """How far the families are from `transformers`, small and random, at full precision."""
    if not (RESULTS / "parity.json").is_file():
        return ""
    families = load("parity")["families"]
    engines = {
        "pytorch": "the net in PyTorch",
        "onnx": "ONNX Runtime with native operators",
        "onnx_stock": "without them",
        "executorch": "ExecuTorch",
        "executorch_portable": "portable",
    }
    said = []
    for column, label in engines.items():
        found = {name: row[column] for name, row in families.items() if row.get(column)}
        which = "" if len(found) == len(families) else f" ({', '.join(found)})"
        said.append(f"{label} {max(found.values()):.0e}{which}")
    return (
        f"Small models of {len(families)} kinds ({', '.join(families)}) with every parameter drawn "
        "at random, past ring wraps, rewinds and restored snapshots: the largest difference of a "
        f"logit from `transformers` fp32 is {'; '.join(said)}. From its own fp64 `transformers` is "
        f"up to {max(row['noise'] for row in families.values()):.0e} away."
    )


def prefill_sentence() -> str:
    """What skipping the sharing layers gains, on the widest model that was measured."""
    for name in ("prefill_skip_1", "prefill_skip"):
        if (RESULTS / f"{name}.json").is_file():
            r = load(name)
            return (
                f"Prefill ({r['model']}, {r['quant']} and f32 scales, an earlier format, "
                f"{r['prompt_tokens']} tokens) runs {r['owning_layers']} of {r['layers']} layers "
                f"and is {r['speed_up']:.1f} times as fast as the same graph with all of them, "
                "leaving the same state."
            )
    return ""


def full_size(today: bool) -> str:
    """The E models on both engines beside llama.cpp: a row a depth, medians of all rounds.

    Of the weight formats of today, or of the earlier ones.
    """
    engines = {PEER: PEER, " onnx": "ONNX", " executorch": "ExecuTorch"}
    figures = {
        "decode": ("decode tok/s", max, lambda x: f"{x:.1f}"),
        "prefill": ("prefill tok/s", max, lambda x: f"{x:.0f}"),
        "anon_peak": ("anonymous MB", min, lambda x: f"{x / 1e6:.0f}"),
        "rss_peak": ("peak RSS MB", min, lambda x: f"{x / 1e6:.0f}"),
    }
    parts = []
    for model in ("e2b", "e4b"):
        found = by_depth(model, engines, today)
        if not found:
            continue
        for names in (("decode", "prefill"), ("anon_peak", "rss_peak")):
            chosen = [(n, *figures[n]) for n in names]
            head = [f"{model.upper()}: depth"]
            head += [f"{label}: {c}" for _, label, _, _ in chosen for c in engines.values()]
            rows = [
                [f"{depth:,}"]
                + [
                    show(best(r[n] for r in of[c])) if c in of else MISSING
                    for n, _, best, show in chosen
                    for c in engines.values()
                ]
                for depth, of in sorted(found.items())
            ]
            parts.append(table(head, rows))
    return "\n\n".join(parts)


def pass_cost() -> str:
    """What passes of several tokens cost at E2B."""
    rows = load("pass_cost_e2b")["rows"]
    counts = sorted({r["tokens"] for r in rows})
    of = {(r["engine"], r["depth"], r["tokens"]): r for r in rows}
    return table(
        ["engine, depth", "one token", *(f"{n} tokens" for n in counts[1:])],
        [
            [f"{ENGINES[engine]}, {depth:,}", f"{of[engine, depth, 1]['milliseconds']:.0f} ms"]
            + [f"{of[engine, depth, n]['multiple']:.2f}x" for n in counts[1:]]
            for engine, depth in dict.fromkeys((r["engine"], r["depth"]) for r in rows)
        ],
    )


def breakdown() -> str:
    """What the operators of one token of E2B take, at both depths; small ones together."""
    near, far = load("breakdown_e2b")["depths"]
    at = {o["operator"]: o["ms"] for o in far["operators"]}
    rows, rest = [], [0.0, 0.0]
    for found in near["operators"]:
        name, first, then = found["operator"], found["ms"], at.get(found["operator"], 0.0)
        if max(first, then) < 0.2:
            rest = [rest[0] + first, rest[1] + then]
            continue
        share = found.get("of a plain read")
        title = f"`{name}`" if found["calls"] else "outside the nodes"
        rows.append([title, f"{found['calls'] or ''}", f"{first:.1f}", f"{then:.1f}",
                     f"{found['MB']:.0f}" if share else MISSING,
                     f"{share:.2f}" if share else MISSING])  # fmt: skip
    rows.append(["the rest", "", f"{rest[0]:.1f}", f"{rest[1]:.1f}", MISSING, MISSING])
    head = ["operator", "calls", *(f"ms at {d['depth']:,}" for d in (near, far)), "MB read",
            "of a plain read's speed"]  # fmt: skip
    return table(head, rows)


def against_commit() -> str:
    """Today's E2B over that of the commit before the families, at both contexts."""
    head = ["engine, context", "decode", "prefill", "anonymous peak", "peak RSS"]
    return table(
        head,
        [
            [f"{ENGINES[r['engine']]}, {r['ctx']:,}"]
            + [f"{r[f'{n} ratio']:.2f}x" for n in ("decode", "prefill", "anon_peak", "rss_peak")]
            for r in load("against_commit")["summary"]
        ],
    )


def drafts() -> str:
    """Replies with drafts beside plain ones, of llama.cpp's binding too, a text a row."""
    parts = []
    for model, name in (("SmolLM2-135M", "smollm2"), ("Gemma 3 270M", "gemma3_270m")):
        r = load(f"drafts_{name}")
        peer = {row["case"]: row for row in r["llama.cpp"]["rows"]}
        rows = [
            [f"{row['kind']}: {row['case']}", f"{row['rates']['off']:.0f}",
             f"{row['rates']['auto']:.0f}", f"{row['gain']:.2f}x",
             f"{row['accepted']} of {row['drafted']}", *_greedy(row),
             f"{peer[row['case']]['gain']:.2f}x"]
            for row in r["rows"]
        ]  # fmt: skip
        rows += [
            [f"all of {kind}, least", "", "", _spread(r["gain"], kind), "", "", "",
             _spread(r["llama.cpp"]["gain"], kind)]
            for kind in ("copy", "prose")
        ]  # fmt: skip
        below = f" (leads below {r['rounding']:.2f})" if "rounding" in r else ""
        head = [
            f"{model}: text", "plain tok/s", "with drafts", "gain", "drafts that came",
            f"ties{below}", "greedy texts", "llama-cpp-python's lookup",
        ]  # fmt: skip
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def _greedy(row: dict[str, Any]) -> tuple[str, str]:
    """Choices near a tie in a greedy reply, and by how much plain decoding preferred its id where
    the texts part."""
    if row["temperature"]:
        return "", "sampled"
    if row["same"]:
        return str(row["ties"]), "equal"
    lead = f" at a lead of {row['parted']['lead']:.2f}" if "parted" in row else ""
    return str(row["ties"]), f"part{lead}"


def _spread(gain: dict[str, float], kind: str) -> str:
    return f"{gain[kind]:.2f}x, {gain[kind + '_least']:.2f}x"


def beside(name: str, subject: str) -> str:
    """Speed and memory of ours and llama.cpp in one alternation, the medians of its rounds."""
    return table(
        [f"{subject}: weights and engine, depth", "decode tok/s", "beside llama.cpp",
         "prefill tok/s", "anonymous MB", "peak RSS MB"],
        [
            [f"{r['subject']}, {r['depth']:,}", f"{r['decode']:.1f}", f"{r['decode_ratio']:.2f}x",
             f"{r['prefill']:.0f}", f"{r['anon_peak'] / 1e6:.0f}", f"{r['rss_peak'] / 1e6:.0f}"]
            for r in load(name)["summary"]
        ],
    )  # fmt: skip


def equal_width() -> str:
    """Gemma 3 270M beside llama.cpp at the same bits: one file of both, and 8 bits of each."""
    return "\n\n".join(
        beside(f"full_size_gemma3_270m_{kind}", f"Gemma 3 270M, {kind.upper()}")
        for kind in ("q4_0", "q8_0")
    )


def single_layers() -> str:
    """One layer of each kind of DeepSeek V4 Flash: time of a token, and state beside the plan."""
    rows = load("layers_deepseek-v4-flash_onnx")["rows"]
    kinds = {"W": "window alone", "S": "sparse blocks of 4", "D": "dense blocks of 128"}
    return table(
        ["layer, context", "ms a token", "state in use, planned", "process grew by"],
        [
            [f"{kinds[r['layer']]}, {r['depth']:,}", f"{1e3 * r['token_seconds']:.1f}",
             size(r["state_touched_planned"]), size(r["state_measured"])]
            for r in rows
        ],
    )  # fmt: skip


def mixtures() -> str:
    """Mixtures of experts under hard limits of memory: a row a depth and limit, both routings."""
    parts = []
    for path in sorted(RESULTS.glob("mixture_*.json")):
        r = load(path.stem)
        skews = [x["skew"] for x in r["routing"]]
        of = {(x["depth"], x["limit"], x["skew"]): x for x in r["rows"]}
        head = [f"{r['artifact']}: depth, limit"]
        for skew in skews:
            name = "alike" if skew == 0 else "favourites"
            head += [f"{name}: decode tok/s", "prefill", "MB a token, planned"]
        head += ["anonymous MB", "peak RSS MB"]
        rows = []
        for depth, limit in dict.fromkeys((x["depth"], x["limit"]) for x in r["rows"]):
            found = [of.get((depth, limit, skew)) for skew in skews]
            ran = [x for x in found if x and x["rate"]]
            cells = [f"{depth:,}, {f'{limit / 2**30:g} GiB' if limit else 'none'}"]
            for x in found:
                if not x or not x["rate"]:
                    cells += [MISSING if not x else "killed", MISSING, MISSING]
                    continue
                planned = x.get("planned_storage")
                read = f"{x['storage'] / 1e6:.0f}"
                read += f", {planned / 1e6:.0f}" if planned is not None else ""
                cells += [f"{x['rate']:.2f}", f"{x['prefill']:.1f}", read]
            peaks = (max((x[key] for x in ran), default=0) for key in ("anon", "rss_peak"))
            rows.append([*cells, *(f"{x / 1e6:.0f}" if ran else MISSING for x in peaks)])
        shares = " ".join(
            f"{'Alike' if x['skew'] == 0 else 'Favourites'}: the most chosen expert of a layer has "
            f"{x['share'][0]:.0%} of the tokens, the least {x['share'][-1]:.1%}."
            for x in r["routing"]
        )
        note = f"{r['note']} " if r["note"] else ""
        own = f"Before biases were fitted the most chosen had {r['own_share'][0]:.0%}."
        parts.append(f"{note}{shares} {own}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def expert_reads() -> str:
    """Ways to read experts: seconds and bytes of a token, a row a limit and routing."""
    r = load("expert_reads")
    modes = list(dict.fromkeys(x["mode"] for x in r["summary"]))
    rows: dict[str, dict[str, str]] = {}
    for x in r["summary"]:
        routing = "alike" if x["skew"] == 0 else "favourites"
        figures = f"{x['seconds_per_token']:.2f} s, {x['storage_bytes_per_token'] / 1e6:,.0f} MB"
        case = f"{x['limit'] / 2**30:g} GiB, {routing}"
        rows.setdefault(case, dict.fromkeys(modes, MISSING))[x["mode"]] = figures
    return table(["limit, routing", *modes], [[case, *row.values()] for case, row in rows.items()])


def smollm2_peer() -> str:
    """SmolLM2 beside llama.cpp on the same file: what is lost, then speed."""
    r = load("smollm2_peer")
    quality, speed = r["quality"], r["speed"]
    head = ["SmolLM2-135M-Instruct", "bits a weight", "perplexity", "KL from the file's floats",
            "same top-1"]  # fmt: skip
    floats = f"{quality['rows'][0]['float_perplexity']:.2f}"
    rows = [["the file's weights in floats", MISSING, floats, "0", "100 %"]]
    for x in quality["rows"]:
        figures = (f"{x['bits']:.2f}", f"{x['perplexity']:.2f}", f"{x['mean_kl']:.2g}")
        rows.append([x["run"], *figures, f"{x['top1_agreement']:.1%}"])
    c = speed["conditions"]
    columns = [f"{c['threads']} threads: depth", "decode tok/s", f"prefill tok/s, {c['prompt']}",
               "anonymous MB", "peak RSS MB"]  # fmt: skip
    rates = [
        [f"{x['subject']}, {x['depth']:,}", f"{x['decode']:.0f} ({x['decode_ratio']:.2f}x)",
         f"{x['prefill']:.0f} ({x['prefill_ratio']:.2f}x)",
         f"{x['anon_peak'] / 1e6:.0f}", f"{x['rss_peak'] / 1e6:.0f}"]
        for x in speed["summary"]
    ]  # fmt: skip
    return f"{table(head, rows)}\n\n{table(columns, rates)}"


def v4_state() -> str:
    """DeepSeek V4's state for 1M tokens, from the plan, beside that of DeepSeek V3.2.

    A row of V3.2 has a latent of 576 values and an index row of 128 in each of 61 layers. As
    published they take 656 and 132 bytes, V4's blocks of 512 values 584 and its index rows 68.
    """
    ctx, published, layers = 1 << 20, {512: 584, 128: 68}, 61
    storages: dict[str, tuple[int, Callable[[int], float]]] = {
        "both as published": (656 + 132, published.__getitem__),
        "V4 in our int8, V3.2 as published": (656 + 132, lambda dim: dim + 4),
        "both in our int8": (576 + 128 + 2 * 4, lambda dim: dim + 4),
        "both in 16 bits": (2 * (576 + 128), lambda dim: 2 * dim),
    }
    names = ("deepseek-v4-flash", "deepseek-v4-pro")
    ratios = []
    for title, (v32, row_bytes) in storages.items():
        cells = [title, f"{layers * v32:,}"]
        for name in names:
            plan = models.plan(models.get_row(name).config, ctx=ctx, kv="f16")
            blocks = [t for t in plan.tables if t.stride > 1]
            token = sum(row_bytes(t.row[1]) / t.stride for t in blocks)  # without rounding up
            cells.append(f"{token:,.0f} ({token / (layers * v32):.1%})")
        ratios.append(cells)
    needs = []
    for name in names:
        config = models.get_row(name).config
        for kv in ("int8", "f16"):
            plan = models.plan(config, ctx=ctx, kv=kv)
            fixed = sum(t.bytes for t in plan.tables if t.keep)
            need = footprint(config, plan)
            sizes = (plan.bytes, fixed, need.read_state, need.anonymous, need.weight_file)
            needs.append([f"`{name}`, {kv}", *map(size, (*sizes, need.needs.read_weights))])
    head = ["growing state, bytes a token", "V3.2", *(f"`{name}`, of V3.2" for name in names)]
    columns = [
        "at 1,048,576 tokens", "state", "of it windows and raw rows", "a token reads of it",
        "anonymous memory", "weights", "a token reads of them",
    ]  # fmt: skip
    return f"{table(head, ratios)}\n\n{table(columns, needs)}"


def adding() -> str:
    """The diff between this tree and the same without one family."""
    rows = []
    for r in load("adding_a_model")["rows"]:
        family, files = r["family"], r["files"]
        places = (f"edge_kv/models/{family}.py", f"edge_kv/nets/{family}.py")
        listed = ("edge_kv/models/__init__.py", "tests/tiny_models.py")
        rest = set(files) - {*places, *listed}
        assert not rest, rest
        cells = [str(files[path]) for path in (*places, *listed)]
        alone = ", ".join(f"`{name}`" for name in r["alone"]) or MISSING
        rows.append([f"`{family}`", str(len(files)), str(r["lines"]), *cells, alone])
    head = ["family", "files", "lines", "`models/x.py`", "`nets/x.py`", "list of models",
            "its tiny models", "shared, used by it alone"]  # fmt: skip
    return table(head, rows)


def by_depth(
    model: str, engines: dict[str, str], today: bool
) -> dict[int, dict[str, list[dict[str, Any]]]]:
    """Rows of all full-size results of a model by depth and column of the engine."""
    found: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for path in sorted(RESULTS.glob(f"full_size_{model}*.json")):
        result = load(path.stem)
        if (result["date"] >= FORMATS_SINCE) != today:
            continue
        for r in result["summary"]:
            column = next(c for part, c in engines.items() if part in r["subject"])
            found.setdefault(r["depth"], {}).setdefault(column, []).append(r)
    return found


def load(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def memory() -> str:
    """What `edge-kv plan` says about every preset with the default storages."""
    rows = []
    for name, row in gemma.ROWS.items():
        config, cells = row.config, [f"`{name}`"]
        for ctx in CONTEXTS.values():
            if ctx > config.max_ctx:
                cells += ["–", "–"]
                continue
            plan = models.plan(config, ctx=ctx)
            naive = models.plan(config, ctx=ctx, chunk=1, kv="f16").full_length()
            cells += [size(naive), f"{size(plan.bytes)} ({plan.bytes / naive:.0%})"]
        need = footprint(config, models.plan(config, ctx=min(config.max_ctx, CONTEXTS["32k"])))
        rows_file = need.needs.lookup_file
        cells += [size(need.weight_file), size(rows_file) if rows_file else "–"]
        decode = need.memory.phases["decode"]
        cells += [size(decode.anon), size(decode.file)]
        rows.append(cells)
    head = ["model"]
    for label in CONTEXTS:
        head += [f"{label}: every layer, f16", f"{label}: this plan"]
    return table(
        [*head, "weights", "PLE rows", "32k: RAM, anonymous", "32k: RAM, file pages"], rows
    )


def boards() -> str:
    """Which model and context a board holds: anonymous memory has to fit, weights should."""
    rows = []
    for name in BOARD_MODELS:
        config = models.get_row(name).config
        for ctx in (8192, *CONTEXTS.values()):
            if ctx > config.max_ctx:
                continue
            plan = models.plan(config, ctx=ctx)
            need = footprint(config, plan)
            anon, weights = need.anonymous, need.weight_file
            verdicts = []
            for ram in BOARDS.values():
                left = ram - SYSTEM_BYTES - anon
                verdicts.append(
                    "no" if left < 0 else "yes" if left >= weights else "slow: reads weights again"
                )
            costs = (size(plan.bytes), size(anon), size(weights))
            rows.append([f"`{name}`", f"{ctx // 1024}k", *costs, *verdicts])
    head = ["model, int4", "context", "state, int8", "anonymous RAM", "weights", *BOARDS]
    return table(head, rows)


ARM64_LABELS = {
    "onnx": "Python, ONNX Runtime with native operators",
    "onnx-stock": "Python, ONNX Runtime alone",
    "executorch": "Python, ExecuTorch",
    "edge-kv-run": "edge-kv-run",
}


def arm64() -> str:
    """Every engine on both emulated CPUs: parity, memory, and the full-size run in a sentence."""
    result = load("arm64_vm")
    boards, artifacts = result["boards"], result["artifacts"]
    parity, memory = [], []
    for name, label in ARM64_LABELS.items():
        for artifact, made in artifacts.items():
            found = [board_parity(board["engines"][name], artifact) for board in boards]
            if any(found):
                stored = f"{made['quant']} / {made['kv']}".replace("none", "f32")
                parity.append([label, stored, *(cell for cells in found for cell in cells)])
        for board in boards:
            engine = board["engines"][name]
            peak = engine["vm_hwm"] if "vm_hwm" in engine else engine["memory"]["VmHWM"]
            sizes = (engine["group"]["limit"], engine["group"]["peak"], peak)
            memory.append([board["cpu"], label, *map(mib, sizes)])
    columns = ["against the reference logits", "tokens as on x86-64"]
    head = ["engine", "weights / state", *(f"{b['cpu']}: {c}" for b in boards for c in columns)]
    limits = ["CPU", "engine", "memory.max", "memory.peak", "VmHWM"]
    board = boards[0]
    where = (
        f"Measured {result['date']} with the runtime of then, in a virtual machine: "
        f"{board['system']}, Python {board['versions']['python']}, onnxruntime "
        f"{board['versions']['onnxruntime']}, {board['memory_kb'] / 2**20:.1f} GiB of RAM."
    )
    return "\n\n".join(
        [table(head, parity, left=2), table(limits, memory, left=2), where, *full_size_sentences()]
    )


def board_parity(engine: dict[str, Any], artifact: str) -> list[str]:
    """Logits and tokens of one engine over an artifact; empty for one it did not run."""
    if "reference_top1" in engine:  # the runner takes ids: it ran one artifact
        if artifact != engine["artifact"]:
            return []
        said = f"top-1 {engine['reference_top1']:.0%} of {engine['reference_steps']}"
        tokens = engine["tokens"]
    else:
        verify, tokens = (engine["artifacts"][artifact][key] for key in ("verify", "tokens"))
        said = f"KL {verify['max_kl']:.1e} at most, top-1 {verify['top1']:.0%}"
    return [said, f"{tokens['equal_to_x86_64']} of {tokens['made']}"]


FULL_SIZE = {
    "arm64_e2b": "the Python runtime on ONNX Runtime's own operators",
    "arm64_e2b_executorch": "`edge-kv-run`",
}


def full_size_sentences() -> list[str]:
    """The proof that a full-size model fits, one paragraph for each engine it was run with."""
    said = []
    for name, engine in FULL_SIZE.items():
        if not (RESULTS / f"{name}.json").is_file():
            continue
        r = load(name)
        group, held, apart = r["group"], r["memory"]["decoding"], r["against_x86_64"]
        said.append(
            f"At full size, {engine} ({r['artifact']['layers']} layers, {r['artifact']['quant']} "
            f"in blocks of {r['artifact']['block_size']}, random weights; exported for "
            f"{r['artifact']['ctx']:,} tokens): a state of {r['state']['tokens']:,} tokens, made "
            f"{r['state']['filled']} on x86-64, restored on a {r['board']['cpu']} with "
            f"{r['board']['memory']} of RAM, and {r['decoded']} tokens decoded up to a context of "
            f"{r['ctx']:,} inside {mib(group['limit'])}. Anonymous memory {mib(held['anon'])} "
            f"without a tokenizer, `memory.peak` {mib(group['peak'])} with the page cache of the "
            f"weights, no OOM kill; KL from x86-64 {apart['max_kl']:.1e} at most, "
            f"top-1 {apart['top1']:.0%}."
        )
        for run in r.get("further", ()):
            said[-1] += (
                f" The same inside {mib(run['group']['limit'])}: anonymous memory "
                f"{mib(run['memory']['decoding']['anon'])}, no OOM kill, KL "
                f"{run['against_x86_64']['max_kl']:.1e} at most."
            )
    return said


def mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"


def file_map() -> str:
    """One line for every source file: what it says about itself first."""
    lines = []
    for room in ROOMS:
        files = sorted(p for p in (ROOT / room).glob("*") if p.suffix in (".py", ".h", ".cpp"))
        described = {p.name: first_line(p) for p in files}
        if not any(described.values()):
            continue
        lines.append(f"{room}/")
        lines += [f"  {name:<27} {text}" for name, text in described.items() if text]
    return "\n".join(["```", *lines, "```"])


def first_line(path: Path) -> str:
    """The first sentence of a file; empty for a C++ file that its header describes."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        first = text.splitlines()[0]
        return first.removeprefix("// ") if first.startswith("// ") else ""
    return " ".join((ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].split())


def jvm() -> str:
    """The Android app's classes against the Python runtime, one row a prompt."""
    result = load("android_jvm")
    rows = [
        [
            run["model"],
            run["stored"],
            f"{p['prompt']:,}",
            f"{p['first_equal']} of {p['tokens']}",
            f"{p['max_kl']:.0e}",
        ]
        for run in result["runs"]
        for p in run["prompts"]
    ]
    head = ["model", "stored as", "prompt", "first greedy tokens equal", "largest KL of a step"]
    strings = "; ".join(
        f"{t['tokenizer']} {t['equal']:,} of {t['strings']:,}" for t in result["tokenizers"]
    )
    sentence = f"Strings with the ids of Hugging Face `tokenizers`: {strings}."
    return f"{table(head, rows, left=2)}\n\n{sentence} Measured {result['date']}."


def apk() -> str:
    """What the APK holds, largest first."""
    result = load("android_apk")
    files = sorted(result["files"], key=lambda f: -f["stored"])
    rows = [[f"`{f['path']}`", size(f["bytes"]), size(f["stored"])] for f in files]
    rows.append(["the APK, signed", "", size(result["bytes"])])
    return f"{table(['file', 'bytes', 'in the APK'], rows)}\n\nBuilt {result['date']}."


def executorch_export() -> str:
    """What exports with ExecuTorch programs took, under which hard limit of memory."""
    rows = []
    for path in sorted(RESULTS.glob("export_*_both.json")):
        r = load(path.stem)
        rows.append(
            [
                f"`{' '.join(r['arguments']).split(' --out ')[0]}`",
                size(r["limit"]),
                size(r["rss_peak"]),
                f"{r['seconds'] / 60:.1f}",
                f"{r['cpu_seconds'] / 60:.1f}",
            ]
        )
    return table(["export", "limit", "peak RSS of a process", "minutes", "CPU minutes"], rows)


def weight_quality() -> str:
    """Bits, bytes and loss of our weight formats and llama.cpp's types, smallest first."""
    rows = sorted(load("weight_quality_gemma3_270m")["rows"], key=lambda r: (r["bytes"], r["by"]))
    cells = [
        [
            f"{r['by']} {r['run']}",
            f"{r['bits']:.2f}",
            size(r["bytes"]),
            f"{r['perplexity']:.2f}",
            f"{r['mean_kl']:.2g}",
            f"{100 * r['top1']:.0f} %",
        ]
        for r in rows
    ]
    head = ["Gemma 3 270M", "bits a weight", "weights", "perplexity", "KL", "same likeliest token"]
    return table(head, cells)


def imported() -> str:
    """A file of another project's integers, kept: what is alike, and what both make of it."""
    r = load("imported_gemma3_270m_q4_0")
    equal = r["same_as_llama_cpp"]
    rows = [
        [
            row["run"],
            f"{row['perplexity']:.2f}",
            f"{row['mean_kl']:.2g}" if "mean_kl" in row else MISSING,
            ", ".join(map(str, equal[row["run"]])),
        ]
        for row in r["rows"]
    ]
    head = ["the same file", "perplexity", "KL from llama.cpp", f"first of {r['tokens']} tokens"]
    return (
        f"Gemma 3 270M as Q4_0: all {r['values']:,} values of {r['matrices']} matrices are the "
        f"file's, bit for bit.\n\n{table(head, rows)}"
    )


def memory_model() -> str:
    """Planned and measured megabytes of every phase: rows of a model, an engine and a Python."""
    phases = ("load", "tokenizer", "prefill", "decode")
    runs = [load(p.stem) for p in sorted(RESULTS.glob("memory_model*.json"))]
    fresh = load("memory_fresh_install")
    models = list(dict.fromkeys(x["model"] for r in runs for x in r["rows"]))
    rows, held = [], []
    limits = [
        x["ram_limit"]["peak"] <= x["ram_limit"]["limit"]
        for r in (*runs, fresh)
        for x in r["rows"]
        if "ram_limit" in x
    ]
    for r in runs:
        promise = r["promise"]
        within, least = promise["within"], promise["or_bytes"]
        held.append(f"{promise['held']} of {promise['of']} with Python {r['python']}")
        for x in r["rows"]:
            cells = []
            for phase in phases:
                values = []
                for kind in ("anon", "total") if phase in x["measured"] else ():
                    planned, measured = x["planned"][phase][kind], x["measured"][phase][kind]
                    off = abs(planned - measured) > max(within * measured, least)
                    values.append(f"{planned / 1e6:.0f}, {measured / 1e6:.0f}{' *' if off else ''}")
                cells.append(" / ".join(values) or MISSING)
            python = ".".join(r["python"].split(".")[:2])
            rows.append([f"{x['model']}, {x['use']}", x["engine"], python, *cells])
    rows.sort(key=lambda row: (models.index(row[0].rpartition(", ")[0]), row[1], row[2]))
    head = ["model, use", "engine", "Python", *phases]
    return (
        f"Figures within 5 % or 5 MB: {', '.join(held)}; the others are marked *. Right "
        f"after pip had written the libraries: {fresh['promise']['held']} of "
        f"{fresh['promise']['of']} with Python {fresh['python']}. Under the least `--ram-limit` "
        f"that lets them start, {sum(limits)} of {len(limits)} runs stayed inside."
        f"\n\n{table(head, rows)}"
    )


def prompt_cache() -> str:
    """Returning conversations: tokens read again and time to the first token, a row a way."""
    r = load("prompt_cache")
    rows = [
        [
            way,
            f"{cost['opening']['first_token_seconds']:.1f} s",
            f"{cost['returning']['most_read']:.0f}",
            f"{cost['returning']['first_token_seconds']:.2f} s",
        ]
        for way, cost in r["ways"].items()
    ]
    head = ["states kept", "first token of an opening", "read again, at most", "first token"]
    return (
        f"{r['conversations']} conversations of {r['tokens']:,} tokens that take turns, "
        f"Gemma 3 270M on {r['threads']} threads, in one run (`benchmarks/prompt_cache.py`; "
        f"medians, the last two columns of the turns that return):\n\n{table(head, rows)}"
    )


PARTS: dict[str, Callable[[], str]] = {
    "results": results,
    "full-size": partial(full_size, today=True),
    "weight-quality": weight_quality,
    "imported": imported,
    "pass-cost": pass_cost,
    "drafts": drafts,
    "mobile": partial(beside, "full_size_mobile_e2b", "E2B"),
    "equal-width": equal_width,
    "single-layers": single_layers,
    "v4-state": v4_state,
    "mixtures": mixtures,
    "expert-reads": expert_reads,
    "smollm2-peer": smollm2_peer,
    "adding": adding,
    "full-size, earlier": partial(full_size, today=False),
    "memory": memory,
    "boards": boards,
    "arm64": arm64,
    "files": file_map,
    "jvm": jvm,
    "apk": apk,
    "executorch-export": executorch_export,
    "memory-model": memory_model,
    "breakdown": breakdown,
    "against-commit": against_commit,
    "prompt-cache": prompt_cache,
}


if __name__ == "__main__":
    main()
