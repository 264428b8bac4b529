"""A full-size model at real depth on a board with a hard memory limit: the proof that it fits.

The state of all but the last `--tokens` of `--ctx` tokens is made here as `edge-kv bench` makes it:
by prefill, or with random rows, and kept as a snapshot (rows are f32 and int8 numbers in plain byte
order, so another CPU takes them up). The board of arm64_vm.py, a Cortex-A76 with the memory of a
Pi 4, packs the weights once, then restores that snapshot inside `memory.max` and decodes the last
tokens. Their logits are compared with this machine's over the same ids. Writes
results/arm64_e2b.json; an emulator's times are not kept.

    python benchmarks/arm64_e2b.py artifacts/e2b --ctx 32k --limit 2g

Random rows (`--fill random`) save an hour and show the same memory, but no parity: every norm
behind attention blows up the mean of random values, so rounding alone changes the logits.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from arm64 import PYTHON, SUITE, install, wheels
from arm64_vm import CPUS, USER, Machine
from common import run_main, say, write_result

from edge_kv.artifact import Artifact, read_artifact
from edge_kv.errors import ConfigError, RuntimeFault
from edge_kv.kv_plan import parse_size
from edge_kv.memory import parse_bytes, predict_memory
from edge_kv.parity import divergence
from edge_kv.runtime import load
from edge_kv.runtime.bench import FILLS, Job, fill_depths, prompt_ids, snapshot_path

SPARE = 4  # disk of the board for packed weights, in weight files
# Run on the board: restore, decode the ids of a file, keep the logits and what was held.
_STEPS = """
import dataclasses, json, sys
import numpy as np
from edge_kv.runtime import load, read_memory
with load("/data/artifact", threads=2) as session:
    loaded = read_memory()
    session.restore("/data/state.kv")
    ids = np.load("/data/ids.npy").tolist()
    np.save("/data/logits.npy", np.stack([session.decode(i) for i in ids]))
    print(json.dumps({"pos": session.pos, "kv_bytes": session.stats.kv_bytes,
                      "loaded": dataclasses.asdict(loaded),
                      "decoding": dataclasses.asdict(read_memory())}))
"""
_PACK = 'from edge_kv.runtime import load\nload("/data/artifact", threads=2).close()'


def main() -> None:
    args = _arguments()
    artifact = read_artifact(args.artifact)
    cache = args.cache.expanduser()
    if not args.tokens < args.ctx <= artifact.plan.ctx:
        raise ConfigError(
            f"{args.ctx} tokens of context do not fit {artifact.root}, exported for "
            f"{artifact.plan.ctx}; name fewer with --ctx, and more than --tokens."
        )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        data, home = Path(folder) / "data", Path(folder) / "home"
        data.mkdir()
        ids, expected, made = _here(artifact, args, data)
        for file in (p for p in artifact.root.rglob("*") if p.is_file()):
            _link(file, data / "artifact" / file.relative_to(artifact.root))
        np.save(data / "ids.npy", ids)
        (data / "steps.py").write_text(_STEPS)
        (data / "pack.py").write_text(_PACK)
        found = wheels(cache, PYTHON)
        home.mkdir()
        install(home, found)
        machine = Machine(cache, cache / "work", SUITE, args.memory, found, home)
        weights = max(f.size for f in artifact.manifest.files.values())
        machine.add_data(data, spare=SPARE * weights)
    with machine.on(CPUS[0]) as board:
        say(f"{board.cpu} is up; packing the weights for this CPU")
        board.checked(f"chown -R {USER}:{USER} /data", "root")
        python = "EDGE_KV_CACHE=/data/cache edge-kv/venv/bin/python"
        packed, packing = board.capped(f"{python} /data/pack.py", parse_bytes(args.pack_limit))
        if packed.status:
            raise RuntimeFault(f"Packing ended with {packed.status}: {packed.err[-400:]}")
        say(f"decoding behind {args.ctx - args.tokens} tokens inside {args.limit}")
        done, group = board.capped(f"{python} /data/steps.py", parse_bytes(args.limit))
        if done.status or group["oom_kills"]:
            raise RuntimeFault(f"Decoding ended with {done.status}: {done.err[-400:]} {group}")
        board.fetch("/data/logits.npy", cache / "logits.npy")
    (cache / "work" / "data.img").unlink()
    held = json.loads(done.out.strip().splitlines()[-1])
    apart = divergence(expected, np.load(cache / "logits.npy"))
    plan, quant = artifact.plan, artifact.manifest.quant
    planned = predict_memory(  # the board has no compiler: no native operators
        artifact.config, plan, quant.scheme, quant.block_size, args.ctx, engine="onnx-stock"
    ).phases["decode"]
    write_result(
        args.result,
        {
            "artifact": {"name": artifact.manifest.name, "layers": artifact.config.n_layers,
                         "ctx": plan.ctx, "kv": plan.kv, "quant": quant.scheme,
                         "block_size": quant.block_size, "made": artifact.manifest.made,
                         "bytes": sum(f.size for f in artifact.manifest.files.values())},
            "board": {"cpu": CPUS[0], "system": f"Debian {SUITE}", "memory": args.memory,
                      "emulator": "qemu-system-aarch64: correctness and memory, never speed"},
            "ctx": args.ctx,
            "state": {"tokens": args.ctx - args.tokens, "filled": made,
                      "snapshot": "written on x86-64, restored on aarch64"},
            "decoded": len(ids),
            "packing_group": packing,
            "group": group,
            "memory": held,
            "planned": {"anon": planned.anon, "file": planned.file},
            "against_x86_64": {
                "max_abs": float(apart.max_abs), "spread": float(np.std(expected)),
                "mean_kl": float(apart.mean_kl), "max_kl": float(apart.max_kl),
                "top1": float(apart.top1),
            },
        },
    )  # fmt: skip


def _here(artifact: Artifact, args: argparse.Namespace, data: Path) -> tuple[list[int], Any, str]:
    """Make the state on this machine, as a snapshot in `data`.

    Returns the ids decoded behind it, their logits, and how the state was filled.
    """
    start = args.ctx - args.tokens
    job = Job(
        "fill", str(artifact.root), "onnx", args.threads, cache=True, depths=(start,), prompt=1,
        tokens=1, repeats=1, fill=args.fill,
    )  # fmt: skip
    say(f"state at {start} tokens: {fill_depths(job)[str(start)]}")
    snapshot = snapshot_path(artifact, job, start)
    _link(snapshot, data / "state.kv")
    token, made, logits = int(prompt_ids(artifact.config.vocab_size, args.ctx)[start]), [], []
    with load(artifact, threads=args.threads) as session:
        session.restore(snapshot)
        for _ in range(args.tokens):
            made.append(token)
            logits.append(session.decode(token))
            token = int(logits[-1].argmax())
    filled = "by prefill" if args.fill == "prefill" else "with seeded random rows"
    return made, np.stack(logits), filled


def _link(file: Path, to: Path) -> None:
    """The same file under another name, copied only to another disk."""
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, to)
    except OSError:
        shutil.copy(file, to)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--ctx", type=parse_size, default=32_768, help="tokens at the end")
    parser.add_argument("--tokens", type=int, default=4, help="the last of them, decoded there")
    parser.add_argument("--fill", choices=FILLS, default="prefill", help="how the others are made")
    parser.add_argument("--limit", default="2g", help="memory.max of the measured run")
    parser.add_argument("--pack-limit", default="3g", help="memory.max of the first load")
    parser.add_argument("--memory", default="4G", help="the board's RAM")
    parser.add_argument("--threads", type=int, default=2, help="on this machine")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/edge-kv/arm64"))
    parser.add_argument("--result", default="arm64_e2b", help="name in results/")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
