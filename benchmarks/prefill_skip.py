"""What skipping the sharing layers saves: our prefill program against the same graph untrimmed.

    python benchmarks/prefill_skip.py                E2B at half width
    python benchmarks/prefill_skip.py --width 1      E2B at full width
    python benchmarks/prefill_skip.py --exact        only the distances, on tiny in float

The model has E2B's 35 layers, of which 15 own keys and values, its window, its per-layer embeddings
and its proportions, random weights and a small vocabulary (prompt tokens never meet the LM head).
The untrimmed graph is lowered by the same code from the same modules over the same weight file; it
runs all layers and the last token's logits, so nothing in it is dead. Runs alternate; the state
both leave behind is compared, and so are the next logits with those of a run through decode alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from common import Variant, exported, opened, run_main, say, show, write_result
from torch import Tensor, nn

from edge_kv import presets
from edge_kv.config import ModelConfig
from edge_kv.export import export_model
from edge_kv.export import lower_onnx as lowering
from edge_kv.export.onnx_state import OnnxPrefillState
from edge_kv.export.quant_format import QuantFormat
from edge_kv.export.weight_file import WeightLayout
from edge_kv.kv_plan import KVPlan, state_views
from edge_kv.model.decoder import Decoder
from edge_kv.parity import divergence
from edge_kv.runtime import load
from edge_kv.runtime.onnx_session import ERROR, OnnxSession, create_engine
from edge_kv.tensors import tensor_table
from edge_kv.terminal import Bar

CHUNK, CTX, VOCAB = 128, 2048, 8192
UNTRIMMED = "untrimmed.onnx"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--width", type=float, default=0.5, help="of E2B's: 0.5, 1")
    parser.add_argument("--quant", default="int4", choices=("int4", "int8", "none"))
    parser.add_argument("--kv", default="int8", choices=("f32", "f16", "int8"))
    parser.add_argument("--prompt", type=int, default=512, help="tokens to prefill")
    parser.add_argument("--runs", type=int, default=7, help="pairs of timed runs")
    parser.add_argument("--exact", action="store_true", help="distances on tiny in float")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("artifacts"), help="the export goes here")
    args = parser.parse_args()
    if args.exact:
        exact(args)
        return
    root = export(args)
    session = load(root, threads=args.threads)
    assert isinstance(session, OnnxSession)
    untrimmed = Untrimmed(session, root)
    ids = np.random.default_rng(0).integers(0, VOCAB, args.prompt)

    trimmed_seconds, untrimmed_seconds = [], []
    for i in range(args.runs + 1):  # the first pair warms up
        session.reset()
        a = seconds(lambda: session.prefill(ids))
        left = {name: rows.copy() for name, rows in session.state.items()}
        clear(session)
        b = seconds(lambda: untrimmed.prefill(ids))
        say(f"run {i}: trimmed {a:.2f} s, untrimmed {b:.2f} s, ratio {b / a:.2f}")
        if i:
            trimmed_seconds.append(a)
            untrimmed_seconds.append(b)
    state = compare_state(left, session.state)
    logits = compare_logits(session, untrimmed, ids)

    ratios = [b / a for a, b in zip(trimmed_seconds, untrimmed_seconds, strict=True)]
    config = session.config
    result = {
        "model": f"E2B-shaped, width {args.width:g}, random weights",
        "hidden": config.hidden,
        "layers": config.n_layers,
        "owning_layers": config.n_own,
        "quant": args.quant,
        "kv": args.kv,
        "prompt_tokens": args.prompt,
        "chunk": CHUNK,
        "threads": args.threads,
        "body_weights": {
            name: body_weights(config, n)
            for name, n in (("trimmed", config.n_own), ("untrimmed", config.n_layers))
        },
        "median_seconds": {
            "trimmed": round(median(trimmed_seconds), 3),
            "untrimmed": round(median(untrimmed_seconds), 3),
        },
        "ratio_of_each_pair": [round(r, 3) for r in ratios],
        "speed_up": round(median(ratios), 2),
        "state_after_prefill": state,
        "next_logits": logits,
    }
    write_result("prefill_skip" if args.width == 0.5 else f"prefill_skip_{args.width:g}", result)
    row = {k: result[k] for k in ("prompt_tokens", "median_seconds", "speed_up")}
    show(result["model"], [row | {"state_bit_equal": state["bit_equal"]}])


def exact(args: argparse.Namespace) -> None:
    """Float weights and state leave nothing but summation order between the two."""
    variant = Variant("none")
    with opened("tiny", variant, args.work, args.threads) as session:
        assert isinstance(session, OnnxSession)
        untrimmed = Untrimmed(session, exported("tiny", variant, args.work))
        ids = np.random.default_rng(0).integers(0, session.config.vocab_size, args.prompt)
        session.prefill(ids)
        left = {name: rows.copy() for name, rows in session.state.items()}
        clear(session)
        untrimmed.prefill(ids)
        write_result(
            "prefill_skip_exact",
            {
                "model": "tiny",
                "weights": variant.label,
                "prompt_tokens": args.prompt,
                "state_after_prefill": compare_state(left, session.state),
                "next_logits": compare_logits(session, untrimmed, ids),
            },
        )


def shaped(width: float) -> ModelConfig:
    """E2B with hidden size, query heads and MLP scaled by `width`, and a small vocabulary."""
    e2b = presets.get_preset("e2b").config
    heads = int(e2b.sliding.q_heads * width)
    return replace(
        e2b,
        vocab_size=VOCAB,
        hidden=int(e2b.hidden * width),
        mlp_width=int(e2b.mlp_width * width),
        shared_mlp_width=int(e2b.shared_mlp_width * width),
        sliding=replace(e2b.sliding, q_heads=heads),
        full=replace(e2b.full, q_heads=heads),
    )


def export(args: argparse.Namespace) -> Path:
    """The artifact, made on first use; the preset exists in this process only."""
    name = f"e2b-shaped-{args.width:g}"
    root: Path = args.work / f"{name}-{args.quant}-{args.kv}"
    if root.exists():
        return root
    args.work.mkdir(parents=True, exist_ok=True)
    presets.PRESETS[name] = presets.Preset(shaped(args.width), "", "E2B scaled for a benchmark")
    say(f"exporting {root.name}")
    with Bar() as bar:
        return export_model(
            model=name,
            weights="random",
            ctx=CTX,
            chunk=CHUNK,
            kv=args.kv,
            quant=args.quant,
            out=root,
            open_session=load,
            progress=bar,
        )


class UntrimmedPrefill(nn.Module):
    """ids [chunk], pos [1], ple [chunk, n_layers, dim], state views -> logits, state views."""

    def __init__(self, decoder: Decoder, plan: KVPlan):
        super().__init__()
        self.decoder, self.plan = decoder, plan

    def forward(self, ids: Tensor, pos: Tensor, ple: Tensor | None, *views: Tensor) -> Any:
        state = OnnxPrefillState(self.plan, list(views))
        return self.decoder.decode(ids, pos, ple, state), *state.outputs()


class Untrimmed:
    """The untrimmed graph over an artifact's weight file, bound to its session's state."""

    def __init__(self, session: OnnxSession, root: Path):
        self.session = session
        folder = root / "onnx"
        lower_untrimmed(session, folder)
        self.engine = create_engine(folder / UNTRIMMED, session.threads, ERROR)
        self.logits: Any = None

    def prefill(self, ids: Any) -> None:
        """Run `ids` from position 0 on, in chunks; `logits` are those of the last one."""
        config, plan, ple = self.session.config, self.session.plan, self.session._ple
        assert ple
        for at in range(0, len(ids), plan.chunk):
            part = ids[at : at + plan.chunk]
            io = self.engine.io_binding()
            io.bind_cpu_input("ids", part)
            io.bind_cpu_input("pos", np.array([at], np.int64))
            io.bind_cpu_input("ple", ple.rows(part, config.n_layers))
            io.bind_output("logits", "cpu")
            for view in state_views(plan):
                rows = self.session.state[view.buffer.name]
                live = plan.live_rows(at + len(part))
                shape = [live if size == "live" else size for size in view.shape]
                address = (rows if view.head is None else rows[view.head]).ctypes.data
                unsigned = rows.dtype == np.int8 and view.buffer.role == "k"
                bound = ("cpu", 0, np.uint8 if unsigned else rows.dtype, shape, address)
                io.bind_input(view.name, *bound)
                io.bind_output(f"{view.name}.out", *bound)
            self.engine.run_with_iobinding(io)
            self.logits = io.get_outputs()[0].numpy().copy()


def lower_untrimmed(session: OnnxSession, folder: Path) -> None:
    """Lower the untrimmed graph with the exporter's own steps."""
    config, plan = session.config, session.plan
    quant = session.artifact.manifest.quant
    layout = WeightLayout(tensor_table(config), quant.formats)
    with torch.device("meta"):
        decoder = Decoder(config, plan, QuantFormat(layout)).eval()
    # Traced as a prefill whose per-layer embeddings cover every layer.
    every = replace(config, n_kv_shared=0)
    model = lowering._trace(UntrimmedPrefill(decoder, plan), plan, every, "prefill")
    lowering._name_io(model, plan, "decode", has_ple=True)
    lowering.simplify(model)
    lowering._place_weights(model, decoder, config, layout, folder, "weights.bin")
    ir.save(model, folder / UNTRIMMED)


def clear(session: OnnxSession) -> None:
    for rows in session.state.values():
        rows[:] = 0


def seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def compare_state(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Whether both prefills left the same rows."""
    same = all(np.array_equal(a[name], b[name]) for name in a)
    worst = max(float(np.abs(a[n].astype(np.float32) - b[n].astype(np.float32)).max()) for n in a)
    return {"buffers": len(a), "bit_equal": same, "max_abs": float(f"{worst:.3g}")}


def compare_logits(session: OnnxSession, untrimmed: Untrimmed, ids: Any) -> dict[str, Any]:
    """Logits behind the prompt: prefill + decode against the untrimmed run and decode alone."""
    session.reset()
    session.prefill(ids[:-1])
    skipped = session.decode(int(ids[-1]))
    untrimmed.prefill(ids)
    full = untrimmed.logits.copy()
    session.reset()
    say("the same prompt through decode alone")
    for token in ids:
        alone = session.decode(int(token))
    return {
        "prefill_and_decode_against_untrimmed": distance(full, skipped),
        "prefill_and_decode_against_decode_alone": distance(alone, skipped),
    }


def distance(reference: Any, run: Any) -> dict[str, Any]:
    d = divergence(reference[None], run[None])
    return {
        "max_abs": float(f"{d.max_abs:.3g}"),
        "in_units_of_their_spread": float(f"{d.relative:.3g}"),
        "kl": float(f"{d.mean_kl:.3g}"),
        "same_top": bool(d.top1),
    }


def body_weights(config: ModelConfig, layers: int) -> int:
    """Values of the matrices that a prompt token passes in the first `layers` layers."""
    total = 0
    for i in range(layers):
        spec = config.spec(i)
        kv = 2 * spec.kv_width if config.owns(i) else 0
        total += config.hidden * (2 * spec.q_width + kv + 3 * config.mlp(i) + 2 * config.ple_dim)
    return total


if __name__ == "__main__":
    run_main(main)
