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

from edge_kv.config import ModelConfig
from edge_kv.export import gate
from edge_kv.export.quant_format import QuantFormat
from edge_kv.export.weight_file import (
    Journal,
    StoredWeights,
    WeightLayout,
    ple_layout,
    write_ple,
    write_weights,
)
from edge_kv.kv_plan import KVPlan, plan_kv
from edge_kv.model.oracle import oracle_logits
from edge_kv.models import gemma
from edge_kv.parity import divergence
from edge_kv.ple import PleTable
from edge_kv.presets import get_preset
from edge_kv.progress import Silent
from edge_kv.tensors import tensor_table
from edge_kv.weights import WeightSource, open_weights

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
            plan = plan_kv(source.config, ctx=96, chunk=8, kv=kv)
            ours = oracle(source, plan, ids, exact_state=False)
            moved = oracle(source, plan, ids, exact_state=False, change=gate.perturbed)
            row[f"perturbed_{kv}"] = apart(ours, moved)
    return row


def storage_of(name: str) -> Iterator[dict[str, Any]]:
    """Stored weights of every scheme against their checkpoint and against others."""
    with tempfile.TemporaryDirectory() as folder:
        source, others, ctx = sources(name, Path(folder))
        plan = plan_kv(source.config, ctx=ctx, chunk=8, kv="int8")
        run = gate.plan_run(plan, source.config.vocab_size, None)
        ids = torch.from_numpy(run.ids)
        expected = {"own": oracle(source, plan, ids)}
        for what, other in others.items():
            expected[what] = oracle(source, plan, ids, change=other)
        for scheme in SCHEMES:
            stored = stored_logits(source, plan, scheme, ids, Path(folder))
            for what, logits in expected.items():
                a, b = logits[run.prompt :], stored[run.prompt :]
                yield {"model": name, "scheme": scheme, "against": what, **apart(a, b)}


def sources(name: str, folder: Path) -> tuple[WeightSource, dict[str, Callable[[Read], Read]], int]:
    """(checkpoint, other weights as changes of its reads, context)."""
    if name in NAMES:
        tiny_hf(name).save_pretrained(folder / "own")
        tiny_hf(name, seed=1).save_pretrained(folder / "other")
        source, other = open_weights(str(folder / "own")), open_weights(str(folder / "other"))
        return source, {"other weights": lambda _: reads(other)}, 96
    if name == "random-tiny":
        config = get_preset("tiny").config
        other = open_weights("random:1", config)
        return open_weights("random", config), {"other weights": lambda _: reads(other)}, 256
    path = get_preset("tiny").source if name == "tiny" else str(gemma3_270m())
    source = open_weights(path)
    config = source.config
    changes = {
        "layers exchanged": exchanged(config),
        "tokens renumbered": lambda read: renumbered(read, config),
        "random weights": lambda _: reads(open_weights("random", config)),
    }
    return source, changes, 256 if name == "tiny" else 64


def exchanged(config: ModelConfig) -> Callable[[Read], Read]:
    """Layers 1 and 2, which are of one shape, in each other's place."""
    other = {"layers.1.": "layers.2.", "layers.2.": "layers.1."}

    def change(read: Read) -> Read:
        return lambda name, a, b: read(other.get(name[:9], name[:9]) + name[9:], a, b)

    return change


def renumbered(read: Read, config: ModelConfig) -> Read:
    """Every token's row is that of the next one."""

    def rows(name: str, a: int, b: int) -> Tensor:
        if name not in ("embed.weight", "ple_embed.weight"):
            return read(name, a, b)
        n = config.vocab_size
        return torch.cat([read(name, (i + 1) % n, (i + 1) % n + 1) for i in range(a, b)])

    return rows


def reads(source: WeightSource) -> Read:
    return lambda name, a, b: torch.from_numpy(source.read(name, a, b))


def oracle(
    source: WeightSource,
    plan: KVPlan,
    ids: Tensor,
    *,
    exact_state: bool = True,
    change: Callable[[Read], Read] = lambda read: read,
) -> Tensor:
    read, config = change(reads(source)), source.config

    def array(name: str, a: int, b: int) -> Any:
        return read(name, a, b).numpy()

    rows = gate.float_rows(config, array) if config.ple_dim else None
    return oracle_logits(config, plan, read, ids, ple_rows=rows, exact_state=exact_state)


def stored_logits(
    source: WeightSource, plan: KVPlan, scheme: str, ids: Tensor, folder: Path
) -> Tensor:
    """Logits of weights and state as an artifact stores them."""
    config = source.config
    layout = WeightLayout(tensor_table(config), scheme, 32)
    path, journal = folder / f"{scheme}.bin", folder / f"{scheme}.jsonl"
    write_weights(source, layout, path, Journal(journal), Silent())
    rows_of = gemma.of(config).token_rows
    entry = ple_layout(rows_of, config.vocab_size, scheme, f"{scheme}.ple")
    table = None
    if entry:
        write_ple(
            source, "ple_embed.weight", entry, folder / entry.file, Journal(journal), Silent()
        )
        table = PleTable(folder / entry.file, entry)

    def rows(wanted: Tensor) -> Tensor:
        assert table
        return torch.from_numpy(table.rows(wanted.numpy(), config.n_layers))

    logits = oracle_logits(
        config, plan, StoredWeights(layout, path).read, ids, fmt=QuantFormat(layout),
        ple_rows=rows if table else None, exact_state=False,
    )  # fmt: skip
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
