"""Pictures of a benchmark: peak RAM against context, and decode speed against depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_kv.errors import ConfigError
from edge_kv.files import replacing

NAIVE = {  # baseline -> (label, colour)
    "every_layer_full": ("every layer keeps all keys", "#b0b0b0"),
    "rings_only": ("rings, nothing shared", "#d0d0d0"),
}
MEASURED, PLANNED = "#0b6e4f", "#0b6e4f"
FAR = 4  # a speed limit this many times the measured speed is not drawn
COLOURS = ("#0b6e4f", "#c8553d", "#3d5a80", "#8d6a9f")


def plot_bench(document: dict[str, Any], path: Path) -> None:
    """Draw the document `runtime.bench.bench` returned into `path` (.png, .svg, .pdf).

    Left: the first engine's anonymous peak, measured and planned, beside what the same weights
    would need with the state of naive layouts in f16. Right: decode speed of every engine, and
    the speed that the memory bandwidth allows the first.

    Raises:
        ConfigError: matplotlib is missing, or `path` has no ending it can draw.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as e:
        raise ConfigError(
            "Drawing needs matplotlib, which is not installed; run: pip install 'edge-kv[plot]'."
        ) from e
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: Any = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e8e8e8",
        "axes.axisbelow": True,
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
    }
    with plt.rc_context(style):
        figure, (memory, speed) = plt.subplots(1, 2, figsize=(11, 4.4), constrained_layout=True)
        _memory(memory, document)
        _speed(speed, document)
        figure.suptitle(_title(document), x=0.01, ha="left", fontsize=10, color="#555555")
        try:
            with replacing(path) as file:
                figure.savefig(file, format=path.suffix.removeprefix("."), dpi=150)
        except (ValueError, OSError) as e:
            raise ConfigError(f"Cannot draw {path} ({e}); name a .png, .svg or .pdf.") from e
        finally:
            plt.close(figure)


def _memory(axes: Any, document: dict[str, Any]) -> None:
    engine = _engines(document)[0]
    runs = _of(document, engine)
    plan = sorted((p for p in document["plan"] if p["engine"] == engine), key=lambda p: p["ctx"])
    contexts = [p["ctx"] for p in plan]
    planned = [_planned_peak(p) for p in plan]
    fixed = [total - p["state"] for total, p in zip(planned, plan, strict=True)]
    for name, (label, colour) in NAIVE.items():
        naive = [f + p["baselines_f16"][name] for f, p in zip(fixed, plan, strict=True)]
        axes.plot(contexts, _mb(naive), color=colour, lw=2, marker="o", ms=3)
        axes.annotate(
            label, (contexts[-1], naive[-1] / 1e6), xytext=(0, 6), textcoords="offset points",
            ha="right", va="bottom", color="#888888", fontsize=9,
        )  # fmt: skip
    axes.plot(contexts, _mb(planned), color=PLANNED, lw=1.5, ls="--", label="planned")
    measured = [
        (r["ctx"], max(m["anon_peak"] for m in r["memory"].values()))
        for r in runs
        if all(m["anon_peak"] for m in r["memory"].values())
    ]
    if measured:
        x, y = zip(*measured, strict=True)
        axes.plot(x, _mb(y), "o", color=MEASURED, ms=6, label="measured")
        for ctx, value in measured:
            axes.annotate(
                f"{value / 1e6:.0f}", (ctx, value / 1e6), xytext=(0, -13),
                textcoords="offset points", ha="center", fontsize=9, color=MEASURED,
            )  # fmt: skip
    axes.set_title("Peak anonymous memory, MB")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7 * min(v / 1e6 for v in (*planned, *(y for _, y in measured))))
    _contexts(axes, contexts, "context")
    axes.legend(frameon=False, loc="upper left")
    _plain_numbers(axes)


def _speed(axes: Any, document: dict[str, Any]) -> None:
    ceiling = 0.0
    for engine, colour in zip(_engines(document), COLOURS, strict=False):
        runs = _of(document, engine)
        x = [r["ctx"] for r in runs]
        y = [1 / r["decode"]["seconds"]["p50"] for r in runs]
        low = [1 / r["decode"]["seconds"]["p95"] for r in runs]
        axes.plot(x, y, color=colour, lw=2, marker="o", ms=5, label=engine)
        axes.fill_between(x, low, y, color=colour, alpha=0.15, lw=0)
        ceiling = max(ceiling, *y)
    first = _of(document, _engines(document)[0])
    limits = [1 / r["roofline"]["seconds"] for r in first]
    if max(limits) < FAR * ceiling:  # far above, the caches and not the memory set the pace
        axes.plot(
            [r["ctx"] for r in first], limits, color="#555555", lw=1.2, ls=":",
            label="limit of memory bandwidth",
        )  # fmt: skip
        ceiling = max(ceiling, *limits)
    axes.set_title("Decode speed, tokens/s (median; shade to p95)")
    axes.set_ylim(0, 1.12 * ceiling)
    _contexts(axes, [r["ctx"] for r in first], "depth")
    axes.legend(frameon=False)


def _contexts(axes: Any, contexts: list[int], name: str) -> None:
    """A logarithmic axis with a tick at every measured context: `2k`, `8k`, …"""
    axes.set_xscale("log", base=2)
    ticks = sorted(set(contexts))
    axes.set_xticks(ticks, [f"{c // 1024}k" if c % 1024 == 0 else f"{c:,}" for c in ticks])
    axes.minorticks_off()
    axes.margins(x=0.08)
    axes.set_xlabel(f"{name}, tokens")


def _plain_numbers(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _engines(document: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(r["engine"] for r in document["runs"]))


def _of(document: dict[str, Any], engine: str) -> list[dict[str, Any]]:
    return sorted((r for r in document["runs"] if r["engine"] == engine), key=lambda r: r["ctx"])


def _planned_peak(entry: dict[str, Any]) -> int:
    peak: int = max(entry["phases"][name]["anon"] for name in ("load", "prefill", "decode"))
    return peak - int(entry["tokenizer"])


def _mb(values: Any) -> list[float]:
    return [v / 1e6 for v in values]


def _title(document: dict[str, Any]) -> str:
    artifact, machine = document["artifact"], document["machine"]
    return (
        f"{artifact['name']}: {artifact['quant']} weights, {artifact['kv']} state · "
        f"{machine['cpu']}, {document['conditions']['threads']} threads"
    )
