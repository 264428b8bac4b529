"""Quality against bytes: our weight formats and llama.cpp's types, on the same floats and text.

    python benchmarks/weight_quality.py --work artifacts

Ours are the rows of results/calibration_gemma3_270m.json, which benchmarks/calibration.py measures.
Theirs are made here: the float file is Gemma 3 270M's published file, dequantised, and llama.cpp's
own quantiser writes each type from it, with its mixture of types and "pure". Every run predicts the
same windows; KL is from the logits of the float model in this project's own decoder. The published
file is itself a mixture of Q5_0 and Q8_0, so these types, and no others, find the grid they came
from. Writes results/weight_quality_gemma3_270m.json and draws docs/weights.png.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
from common import (
    Scored,
    Tally,
    gguf_path,
    read_result,
    read_text,
    run_main,
    say,
    show,
    windows,
    write_result,
)
from gguf import GGMLQuantizationType
from imported import Peer, requantise, stored

from edge_kv.artifact import read_artifact
from edge_kv.reference import float_reference
from edge_kv.runtime import Tokenizer

MODEL, WINDOW, WINDOWS = "gemma3-270m", 512, 4
PEER, FLOAT = "llama.cpp", "float"
PICTURE = Path(__file__).parent.parent / "docs" / "weights.png"
TYPES = {  # llama.cpp's name -> (its file type, whether every matrix has that very type)
    "Q4_0 pure": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True),
    "IQ4_NL pure": (llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL, True),
    "Q4_1 pure": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1, True),
    "Q5_0 pure": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_0, True),
    "Q4_0": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, False),
    "IQ4_NL": (llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL, False),
    "Q4_K_M": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, False),
    "Q6_K": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K, False),
    "Q8_0": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where calibration.py exported to")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    measured = read_result("calibration_gemma3_270m")
    artifact = read_artifact(next(args.work.glob(f"{MODEL}-*/manifest.json")).parent)
    text = read_text(MODEL, Tokenizer.of(artifact), WINDOWS * (WINDOW - 1) + 1)
    if text.sha256 != measured["sha256_of_the_ids"]:
        raise SystemExit("calibration_gemma3_270m.json was measured on another text; renew it.")
    reference = float_reference(str(gguf_path()), artifact)
    cuts = list(windows(text, WINDOW, WINDOWS))
    expected = [list(reference(ids)) for ids in cuts]
    rows = [
        {
            "by": "edge-kv",
            "run": row["run"],
            "bits": row["bits"],
            "bytes": row["weight_bytes"],
            "perplexity": row["perplexity"],
            "mean_kl": row["against"]["mean_kl"],
            "top1": row["against"]["top1"],
        }
        for row in measured["rows"]
    ]
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        plain, small = Path(work) / "float.gguf", Path(work) / "quantised.gguf"
        requantise(gguf_path(), plain, GGMLQuantizationType.F32)
        for name, (kind, pure) in {FLOAT: (None, False), **TYPES}.items():
            say(f"llama.cpp {name}")
            if kind is not None:
                quantise(plain, small, kind, pure, args.threads)
            file = plain if kind is None else small
            tally = Tally()
            peer = Peer(file, args.threads)
            for ids, wanted in zip(cuts, expected, strict=True):
                for held, logits, target in zip(wanted, peer.logits(ids), ids[1:], strict=True):
                    tally.add(Scored(held), Scored(logits), target)
            rows.append({"by": PEER, "run": name, **stored(file), **scores(tally)})
            del peer
    float_perplexity = tally.reference_perplexity
    content = {
        "model": MODEL,
        "llama_cpp_python": llama_cpp.__version__,
        "source": f"{gguf_path().name}, dequantised: itself a mixture of Q5_0 and Q8_0",
        **text.card(),
        "window": WINDOW,
        "float_perplexity": float_perplexity,
        "rows": rows,
    }
    write_result("weight_quality_gemma3_270m", content)
    draw(rows, PICTURE)
    show(f"{MODEL}; float: perplexity {float_perplexity}", rows)


def quantise(source: Path, out: Path, kind: int, pure: bool, threads: int) -> None:
    """Let llama.cpp write `out` in one of its types."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = threads, kind, pure
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(out).encode(), llama_cpp.ctypes.byref(params)
    )
    if status:
        raise SystemExit(f"llama.cpp cannot write {out.name} (status {status}).")


def scores(tally: Tally) -> dict[str, Any]:
    found = tally.summary()
    return {
        "perplexity": found["perplexity"],
        "mean_kl": found["mean_kl"],
        "top1": found["top1_agreement"],
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """KL against megabytes, one point a row that rounds, its name beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    looks = {"edge-kv": ("#0b6e4f", "o", -17), PEER: ("#c8553d", "s", 8)}  # its name below, above
    with plt.rc_context({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(7.5, 6), constrained_layout=True)
        for by, (colour, marker, offset) in looks.items():
            shown = [r for r in rows if r["by"] == by and r["run"] != FLOAT]
            x, y = [r["bytes"] / 1e6 for r in shown], [r["mean_kl"] for r in shown]
            axes.scatter(x, y, s=60, color=colour, marker=marker, label=by, zorder=3)
            for r, at in zip(shown, zip(x, y, strict=True), strict=True):
                axes.annotate(r["run"], at, xytext=(0, offset), textcoords="offset points",
                              fontsize=10, color=colour, ha="center")  # fmt: skip
        axes.set_yscale("log")
        axes.grid(color="#e8e8e8", zorder=0)
        axes.margins(0.18, 0.1)
        axes.set_xlabel("weights, MB")
        axes.set_title("Gemma 3 270M: what the weights lose, KL in nats a token", loc="left",
                       fontweight="bold", fontsize=13)  # fmt: skip
        axes.legend(frameon=False, loc="upper right")
        figure.savefig(path, dpi=150)
        plt.close(figure)


if __name__ == "__main__":
    run_main(main)
