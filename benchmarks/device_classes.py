"""Which model and context fits which device, from plans alone: nothing is built or measured.

    python benchmarks/device_classes.py
    python benchmarks/device_classes.py --quant int8

Weights are stored as `--quant int4` and state is int8, as `edge-kv plan` counts them for
onnxruntime with native operators. "In memory": no token waits for storage. "Experts from storage":
everything but the routed experts stays in memory, and a token reads the experts it chose from the
file.
"""

from __future__ import annotations

import argparse

from common import console, write_result
from rich.table import Table

from edge_kv import models
from edge_kv.footprint import DEVICES, NO, Fit, fits


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quant", default="int4", choices=("int4", "int8"))
    parser.add_argument("--kv", default="int8", choices=("f32", "f16", "int8"))
    args = parser.parse_args()
    found = fits(models.ROWS.items(), quant=args.quant, kv=args.kv)
    content = {
        "quant": args.quant,
        "kv": args.kv,
        "devices": [{"name": d.name, "ram": d.ram, "kept": d.kept} for d in DEVICES],
        "models": [entry(fit) for fit in found],
    }
    suffix = "" if args.quant == "int4" else f"_{args.quant}"
    write_result(f"device_classes{suffix}", content)
    show(found)


def entry(fit: Fit) -> dict[str, object]:
    """One model on one device, in bytes."""
    need = fit.need
    return {
        "model": fit.model,
        "device": fit.device.name,
        "verdict": fit.verdict,
        "ctx": fit.ctx,
        "at": need.depth,
        "anonymous": need.anonymous,
        "file_pages": need.needs.dense + need.experts,
        "experts": need.experts,
        "weight_file": need.weight_file,
        "lookup_file": need.needs.lookup_file,
        "read_weights": need.needs.read_weights,
        "read_state": need.read_state,
    }


def show(found: list[Fit]) -> None:
    table = Table("model", *(d.name for d in DEVICES), box=None, pad_edge=False)
    for name in models.ROWS:
        cells = [fit for fit in found if fit.model == name]
        table.add_row(name, *(f"{f.ctx:,} {f.verdict}" if f.verdict != NO else NO for f in cells))
    console.print(table)


if __name__ == "__main__":
    main()
