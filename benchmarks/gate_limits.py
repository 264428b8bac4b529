"""What the parity gate has to allow and what it has to catch, over every small model at hand.

    python benchmarks/gate_limits.py [--models 31b,tiny,...]

Two tables. `noise`: how far the logits of one set of weights are apart in float32 on transformers,
in float64 on transformers, and in our oracle with every weight changed by half a unit in the last
place; some models get sharper attention, which multiplies rounding. `storage`: logits of stored
weights against the checkpoint they come from (`own`) and against another one (`other`: other random
weights, or the same trained weights with two layers exchanged or tokens renumbered). Writes
results/gate_limits.json, from which the limits in export/gate.py are chosen.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import run_main, say, write_result
from torch import Tensor

from edge_kv import models
from edge_kv.export import gate
from edge_kv.export.packed_weights import PackedWeights
from edge_kv.export.weight_file import (
    Journal,
    StoredWeights,
    WeightLayout,
    ple_layout,
    write_ple,
    write_weights,
)
from edge_kv.models.model import Model
from edge_kv.models.sources import Source, open_weights
from edge_kv.nets.oracle import oracle as run_oracle
from edge_kv.nets.oracle import table_values
from edge_kv.nets.weights import Weights
from edge_kv.parity import divergence
from edge_kv.ple import PleTable
from edge_kv.progress import Silent
from edge_kv.tensors import weight_formats

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from weights_gguf import gemma3_270m
from weights_models import NAMES, tiny_hf

SHARPER = (1, 2, 4, 6, 8)  # what q and k norms are multiplied by
SCHEMES = ("none", "int8", "int4")
Read = Callable[[str, int, int], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    known = [*NAMES, "tiny", "random-tiny", "gemma3-270m"]
    parser.add_argument("--models", default=",".join(known))
    chosen = parser.parse_args().models.split(",")
    noise, storage = [], []
    for name in chosen:
        if name in NAMES:
            noise += [noise_of(name, k) for k in SHARPER]
        storage += list(storage_of(name))
        say(f"{name}: done")
    write_result("gate_limits", {"noise": noise, "storage": storage})


def noise_of(name: str, sharper: int) -> dict[str, Any]:
    """The rounding noise of a tiny model, in units of the logits' spread, and in nats."""
    model = tiny_hf(name)
    model.config._experts_implementation = "eager"  # grouped products know no float64
    one = 1.0 if model.config.model_type.startswith("gemma3") else 0.0  # stored as 1 + w
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith(("q_norm.weight", "k_norm.weight")):
                value.copy_((value + one) * sharper - one)
    ids = torch.randint(0, 128, (64,), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        source = open_weights(folder)
        single = model(ids[None]).logits[0]
        double = copy.deepcopy(model).double()(ids[None]).logits[0]
        row: dict[str, Any] = {"model": name, "sharper": sharper}
        row["float32"] = apart(double, single)
        for kv in ("f32", "int8"):
            ours = oracle(source, ids, kv=kv)
            moved = oracle(source, ids, kv=kv, change=gate.perturbed)
            row[f"perturbed_{kv}"] = apart(ours, moved)
    return row


def storage_of(name: str) -> Iterator[dict[str, Any]]:
    """Stored weights of every scheme against their checkpoint and against others."""
    with tempfile.TemporaryDirectory() as folder:
        source, others, ctx = sources(name, Path(folder))
        plan = models.plan(source.config, ctx=ctx, chunk=8, kv="int8")
        run = gate.plan_run(plan, source.config.vocab, None)
        ids = torch.from_numpy(run.ids)
        expected = {"own": oracle(source, ids)}
        for what, other in others.items():
            expected[what] = oracle(source, ids, change=other)
        for scheme in SCHEMES:
            stored = stored_logits(source, scheme, ids, Path(folder))
            for what, logits in expected.items():
                a, b = logits[run.prompt :], stored[run.prompt :]
                yield {"model": name, "scheme": scheme, "against": what, **apart(a, b)}


def sources(name: str, folder: Path) -> tuple[Source, dict[str, Callable[[Read], Read]], int]:
    """(checkpoint, other weights as changes of its reads, context)."""
    if name in NAMES:
        tiny_hf(name).save_pretrained(folder / "own")
        tiny_hf(name, seed=1).save_pretrained(folder / "other")
        source, other = open_weights(str(folder / "own")), open_weights(str(folder / "other"))
        return source, {"other weights": lambda _: reads(other)}, 96
    if name == "random-tiny":
        config = models.get_row("tiny").config
        other = open_weights("random:1", config)
        return open_weights("random", config), {"other weights": lambda _: reads(other)}, 256
    path = str(models.get_row("tiny").weights) if name == "tiny" else str(gemma3_270m())
    source = open_weights(path)
    config = source.config
    changes = {
        "layers exchanged": exchanged(config),
        "tokens renumbered": lambda read: renumbered(read, config),
        "random weights": lambda _: reads(open_weights("random", config)),
    }
    return source, changes, 256 if name == "tiny" else 64


def exchanged(config: Model) -> Callable[[Read], Read]:
    """Layers 1 and 2, which are of one shape, in each other's place."""
    other = {"layers.1.": "layers.2.", "layers.2.": "layers.1."}

    def change(read: Read) -> Read:
        return lambda name, a, b: read(other.get(name[:9], name[:9]) + name[9:], a, b)

    return change


def renumbered(read: Read, config: Model) -> Read:
    """Every token's row is that of the next one."""

    def rows(name: str, a: int, b: int) -> Tensor:
        if name not in ("embed", "ple.embed"):
            return read(name, a, b)
        n = config.vocab
        return torch.cat([read(name, (i + 1) % n, (i + 1) % n + 1) for i in range(a, b)])

    return rows


def reads(source: Source) -> Read:
    return lambda name, a, b: torch.from_numpy(source.read(name, a, b))


def oracle(
    source: Source, ids: Tensor, *, kv: str = "f32", change: Callable[[Read], Read] = lambda r: r
) -> Tensor:
    read, config = change(reads(source)), source.config

    def array(name: str, a: int, b: int) -> Any:
        return read(name, a, b).numpy()

    values, weights = table_values(config, array), Weights(models.weights(config))
    return run_oracle(config, weights, read, ids, kv=kv, token_values=values).logits()


def stored_logits(source: Source, scheme: str, ids: Tensor, folder: Path) -> Tensor:
    """Logits of weights and state as an artifact stores them."""
    config, rows = source.config, models.weights(source.config)
    layout = WeightLayout(rows, weight_formats(scheme))
    path, journal = folder / f"{scheme}.bin", folder / f"{scheme}.jsonl"
    write_weights(source, layout, path, Journal(journal), Silent())
    shape = config.token_rows
    entry = ple_layout(shape, config.vocab, weight_formats(scheme), f"{scheme}.ple")
    table = None
    if shape and entry:
        target = folder / entry.file
        write_ple(source, shape.name, entry, target, Journal(journal), Silent())
        table = PleTable(target, entry)

    def values(wanted: Tensor) -> Tensor:
        assert table and shape
        return torch.from_numpy(table.rows(wanted.numpy(), shape.layers))

    logits = run_oracle(
        config, PackedWeights(rows, layout), StoredWeights(layout, path).read, ids, kv="int8",
        token_values=values if table else None,
    ).logits()  # fmt: skip
    if table:
        table.close()
    path.unlink()
    return logits


def apart(reference: Tensor, run: Tensor) -> dict[str, float]:
    """Three digits of every figure of a divergence, and the mean correlation of a step's logits."""
    d = divergence(reference.double().numpy(), run.double().numpy())
    figures = {
        "relative": d.relative, "max_kl": d.max_kl, "mean_kl": d.mean_kl, "top1": d.top1,
        "correlation": float(np.mean(gate.correlations(reference.numpy(), run.numpy()))),
    }  # fmt: skip
    return {k: float(f"{v:.3g}") for k, v in figures.items()}


if __name__ == "__main__":
    run_main(main)
