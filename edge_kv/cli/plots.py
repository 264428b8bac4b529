"""Pictures of a benchmark: peak RAM against context, and decode speed against depth.

Made for a page that is read on a phone: one panel below the other, and every label in a legend
beside the lines, never on them.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edge_kv.errors import ConfigError
from edge_kv.files import replacing

NAIVE = {  # baseline -> (label, colour)
    "every_layer_full": ("if every layer kept every position", "#9a9a9a"),
    "rings_only": ("with rings, nothing shared", "#c8c8c8"),
}
COLOURS = ("#0b6e4f", "#c8553d", "#3d5a80", "#8d6a9f")
FAR = 4  # a speed limit this many times the measured speed is not drawn
WIDE = 8  # largest over smallest value from which on an axis is logarithmic


ENDINGS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Refuse a picture that cannot be drawn; matplotlib is not imported.

    Raises:
        ConfigError: matplotlib is missing, or `path` has no ending it can draw.
    """
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"Cannot draw {path}; name a .png, .svg or .pdf.")
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "Drawing needs matplotlib, which is not installed; in the checkout, run: "
            "pip install '.[plot]'"
        )


def plot_bench(document: dict[str, Any], path: Path) -> None:
    """Draw the document `runtime.bench.bench` returned into `path` (.png, .svg, .pdf).

    Above: peak memory of every engine, total and anonymous, measured and planned, beside what the
    first engine would need with the state of naive layouts in f16. Below: decode speed, and the
    speed that the memory's bandwidth allows the first engine.

    Raises:
        ConfigError: matplotlib is missing, or `path` has no ending it can draw.
    """
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: Any = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e8e8e8",
        "axes.axisbelow": True,
        "font.size": 12,
        "axes.titlesize": 14,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "legend.fontsize": 11,
    }
    with plt.rc_context(style):
        figure, (memory, speed) = plt.subplots(2, 1, figsize=(7, 10), constrained_layout=True)
        _memory(memory, document)
        _speed(speed, document)
        figure.suptitle(_title(document), x=0.01, ha="left", fontsize=11, color="#555555")
        try:
            with replacing(path) as file:
                figure.savefig(file, format=path.suffix.lower().removeprefix("."), dpi=150)
        except OSError as e:
            raise ConfigError(f"Cannot write {path} ({e.strerror}); choose another place.") from e
        finally:
            plt.close(figure)


def _memory(axes: Any, document: dict[str, Any]) -> None:
    drawn: list[float] = []

    def line(x: list[int], y: list[float], **looks: Any) -> None:
        if any(y):
            axes.plot(x, [v / 1e6 for v in y], **looks)
            drawn.extend(v / 1e6 for v in y)

    engines = _engines(document)
    for engine, colour in zip(engines, COLOURS, strict=False):
        runs, plans = _of(document["runs"], engine), _of(document["plan"], engine)
        contexts = [r["ctx"] for r in runs]
        for kind, key, looks in (
            ("total", "rss_peak", {"lw": 2.2, "marker": "s", "ms": 5}),
            ("anonymous", "anon_peak", {"lw": 2.2, "marker": "o", "ms": 6, "alpha": 0.65}),
        ):
            peaks = [[m[key] for m in r["memory"].values()] for r in runs]
            if all(all(p) for p in peaks):
                line(contexts, [max(p) for p in peaks], color=colour,
                     label=f"{engine}: {kind}", **looks)  # fmt: skip
        if plans:
            depths = [p["ctx"] for p in plans]
            for files, label in (
                (True, None if engine != engines[0] else "planned"),
                (False, None),
            ):
                planned = [
                    max(f["anon"] + files * f["file"] for f in p["phases"].values()) for p in plans
                ]
                line(depths, planned, color="black", lw=1.1, ls=(0, (4, 3)), label=label)
    first = _of(document["plan"], engines[0])
    for name, (label, colour) in NAIVE.items():
        naive = [
            max(f["anon"] + f["file"] for f in p["phases"].values())
            - p["state"] + p["baselines_f16"][name]
            for p in first
        ]  # fmt: skip
        line([p["ctx"] for p in first], naive, color=colour, lw=1.6, label=label, zorder=1)
    axes.set_title("Peak memory, MB")
    if drawn and max(drawn) > WIDE * min(drawn):
        axes.set_yscale("log")
        _plain_numbers(axes)
    else:
        axes.set_ylim(bottom=0)
    _contexts(axes, [r["ctx"] for r in document["runs"]], "context")
    _legend(axes)


def _speed(axes: Any, document: dict[str, Any]) -> None:
    ceiling = 0.0
    for engine, colour in zip(_engines(document), COLOURS, strict=False):
        runs = _of(document["runs"], engine)
        x = [r["ctx"] for r in runs]
        y = [1 / r["decode"]["seconds"]["p50"] for r in runs]
        low = [1 / r["decode"]["seconds"]["p95"] for r in runs]
        axes.plot(x, y, color=colour, lw=2.2, marker="o", ms=6, label=engine)
        axes.fill_between(x, low, y, color=colour, alpha=0.15, lw=0)
        ceiling = max(ceiling, *y)
    first = _of(document["runs"], _engines(document)[0])
    limits = [1 / r["roofline"]["seconds"] for r in first]
    if max(limits) < FAR * ceiling:  # far above, the caches and not the memory set the pace
        axes.plot(
            [r["ctx"] for r in first], limits, color="#555555", lw=1.4, ls=":",
            label="as fast as memory can be read",
        )  # fmt: skip
        ceiling = max(ceiling, *limits)
    axes.set_title("Decode speed, tokens/s (shade: to the slowest 5 %)")
    axes.set_ylim(0, 1.12 * ceiling)
    _contexts(axes, [r["ctx"] for r in document["runs"]], "depth")
    _legend(axes)


def _legend(axes: Any) -> None:
    """All labels below the panel, where no line runs."""
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)


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


def _of(entries: list[dict[str, Any]], engine: str) -> list[dict[str, Any]]:
    return sorted((e for e in entries if e["engine"] == engine), key=lambda e: e["ctx"])


def _title(document: dict[str, Any]) -> str:
    artifact, machine = document["artifact"], document["machine"]
    return (
        f"{artifact['name']}: {artifact['quant']} weights, {artifact['kv']} state · "
        f"{machine['cpu']}, threads: {document['conditions']['threads']}"
    )
