"""The README's picture: memory and speed against context, ours beside llama.cpp.

    python benchmarks/picture.py

Drawn from results/full_size_e2b_today.json, which benchmarks/full_size.py measures. A bar is the
peak resident memory of one program at one depth: what had to be allocated below, the mapped files'
pages above. Below the bars stands the speed of decoding. Writes docs/beside_llama.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import read_result, run_main, say

RESULT = "full_size_e2b_today"
PICTURE = Path(__file__).parent.parent / "docs" / "beside_llama.png"
COLOURS = {"onnx": "#0b6e4f", "executorch": "#3b6fb6", "llama.cpp": "#c8553d"}
NAMES = {"onnx": "edge-kv, ONNX Runtime, int4", "executorch": "edge-kv, ExecuTorch, int4",
         "llama.cpp": "llama.cpp, Q4_0"}  # fmt: skip
WIDTH = 0.26  # of a bar, where depths are one apart


def main() -> None:
    rows = read_result(RESULT)["summary"]
    by_program = {p: [r for r in rows if p in r["subject"].split()] for p in COLOURS}
    draw(by_program, PICTURE)
    say(str(PICTURE))


def draw(by_program: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Two diagrams over the same depths: stacked memory in GB, tokens a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    depths = [r["depth"] for r in by_program["llama.cpp"]]
    with plt.rc_context({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (memory, speed) = plt.subplots(
            2, 1, figsize=(8, 8), height_ratios=(1.15, 1), constrained_layout=True
        )
        for i, (program, rows) in enumerate(by_program.items()):
            at = [k + (i - 1) * WIDTH for k in range(len(depths))]
            held = [r["anon_peak"] / 1e9 for r in rows]
            pages = [(r["rss_peak"] - r["anon_peak"]) / 1e9 for r in rows]
            bar: dict[str, Any] = {"width": WIDTH * 0.92, "color": COLOURS[program], "zorder": 3}
            memory.bar(at, held, **bar)
            memory.bar(at, pages, bottom=held, alpha=0.35, **bar)
            for x, r in zip(at, rows, strict=True):
                memory.annotate(f"{r['rss_peak'] / 1e9:.1f}", (x, r["rss_peak"] / 1e9),
                                xytext=(0, 3), textcoords="offset points", ha="center",
                                fontsize=10, color=COLOURS[program])  # fmt: skip
            speed.plot(range(len(depths)), [r["decode"] for r in rows], marker="o", linewidth=2.5,
                       markersize=7, color=COLOURS[program], label=NAMES[program])  # fmt: skip
        memory.set_title("Gemma 4 E2B, peak memory in GB", loc="left", fontweight="bold")
        memory.legend(
            handles=[Patch(color="#555555", label="allocated: has to fit"),
                     Patch(color="#555555", alpha=0.35, label="file pages: can be dropped")],
            frameon=False, loc="upper left")  # fmt: skip
        speed.set_title("Decoding, tokens a second", loc="left", fontweight="bold")
        speed.legend(frameon=False, loc="upper right")
        speed.set_ylim(0, 1.35 * max(r["decode"] for rows in by_program.values() for r in rows))
        for axes in (memory, speed):
            axes.grid(axis="y", color="#e8e8e8", zorder=0)
            axes.set_xticks(range(len(depths)), [f"{d:,}" for d in depths])
        speed.set_xlabel("tokens in the context")
        figure.savefig(path, dpi=130)
        plt.close(figure)


if __name__ == "__main__":
    run_main(main)
