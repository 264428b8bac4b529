"""A full-size model at real depth on a board with a hard memory limit: the proof that it fits.

The state of all but the last `--tokens` of `--ctx` tokens is made here as `edge-kv bench` makes it:
by prefill, or with random rows, and kept as a snapshot (rows are f32 and int8 numbers in plain byte
order, so another CPU takes them up). The board of arm64_vm.py, a Cortex-A76 with the memory of a
Pi 4, packs the weights once, then restores that snapshot inside `memory.max`, once for every limit
named, and decodes the last tokens: on onnxruntime's own operators, or with `--engine executorch` by
edge-kv-run. Their logits are compared with this machine's over the same ids. Writes
results/arm64_e2b.json or arm64_e2b_executorch.json; an emulator's times are not kept.

    python benchmarks/arm64_e2b.py artifacts/e2b --ctx 32k --limit 2g
    python benchmarks/arm64_e2b.py artifacts/e2b-et --engine executorch --limit 2g 1g

Random rows (`--fill random`) save an hour and show the same memory, but no parity: every norm
behind attention blows up the mean of random values, so rounding alone changes the logits.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from arm64 import PYTHON, SUITE, install, reported, wheels
from arm64_vm import CPUS, USER, Machine
from common import run_main, say, write_result

from edge_kv.amounts import parse_bytes, parse_size
from edge_kv.artifact import Artifact, read_artifact
from edge_kv.bundle import LOADER, RUNNER, write_runner
from edge_kv.errors import ConfigError, RuntimeFault
from edge_kv.memory import predict_artifact
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
    np.stack([session.decode(i) for i in ids]).tofile("/data/logits")
    print(json.dumps({"pos": session.pos, "kv_bytes": session.stats.kv_bytes,
                      "loaded": dataclasses.asdict(loaded),
                      "decoding": dataclasses.asdict(read_memory())}))
"""
_PACK = """
from edge_kv.runtime import load
load("/data/artifact", threads=2).close()
"""
_PYTHON = "EDGE_KV_CACHE=/data/cache edge-kv/venv/bin/python"
_RUN = (
    f"/data/runner/{LOADER} --library-path /data/runner/lib /data/runner/{RUNNER} /data/artifact "
    "--threads 2"
)


@dataclass(frozen=True)
class Engine:
    """How an engine is run on the board: it packs, then decodes the ids of a file."""

    name: str  # of the Python runtime, on this machine
    planned: str  # what the plan calls what runs there: the board has no compiler
    there: str
    pack: str
    decode: str  # leaves logits in /data/logits

    def held(self, out: str, err: str) -> dict[str, Any]:
        """What the process held, as it said."""
        if self.there != RUNNER:
            return dict(json.loads(out.strip().splitlines()[-1]))
        sizes = reported(err)
        return {"decoding": {"anon": sizes["RssAnon"], "file": sizes["RssFile"],
                             "peak": sizes["VmHWM"]}}  # fmt: skip


ENGINES = {
    "onnx": Engine(
        "onnx", "onnx-stock", "Python", f"{_PYTHON} /data/pack.py", f"{_PYTHON} /data/steps.py"
    ),
    "executorch": Engine(
        "executorch",
        "executorch",
        RUNNER,
        f"{_RUN} --ids 2 --max-new-tokens 1",
        f"{_RUN} --ids $(cat /data/first) --restore /data/state.kv --logits /data/logits "
        "--max-new-tokens $(cat /data/count)",
    ),
}


def main() -> None:
    args = _arguments()
    artifact, engine = read_artifact(args.artifact), ENGINES[args.engine]
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
        ids, expected, made = _here(artifact, engine, args, data)
        for file in (p for p in artifact.root.rglob("*") if p.is_file()):
            _link(file, data / "artifact" / file.relative_to(artifact.root))
        np.save(data / "ids.npy", ids)
        (data / "first").write_text(str(ids[0]))
        (data / "count").write_text(str(len(ids)))
        (data / "steps.py").write_text(_STEPS)
        (data / "pack.py").write_text(_PACK)
        write_runner(data / "runner")
        found = wheels(cache, PYTHON)
        home.mkdir()
        install(home, found)
        machine = Machine(cache, cache / "work", SUITE, args.memory, found, home)
        weights = max(f.size for f in artifact.manifest.files.values())
        machine.add_data(data, spare=SPARE * weights)
    runs = []
    with machine.on(CPUS[0]) as board:
        say(f"{board.cpu} is up; packing the weights for this CPU")
        board.checked(f"chown -R {USER}:{USER} /data", "root")
        packed, packing = board.capped(engine.pack, parse_bytes(args.pack_limit))
        if packed.status:
            raise RuntimeFault(f"Packing ended with {packed.status}: {packed.err[-400:]}")
        for limit in args.limit:
            say(f"decoding behind {args.ctx - args.tokens} tokens inside {limit}")
            done, group = board.capped(engine.decode, parse_bytes(limit))
            if done.status or group["oom_kills"]:
                raise RuntimeFault(f"Decoding ended with {done.status}: {done.err[-400:]} {group}")
            board.fetch("/data/logits", cache / "logits")
            runs.append(
                {
                    "group": group,
                    "memory": engine.held(done.out, done.err),
                    "against_x86_64": _apart(ids, expected, cache / "logits"),
                }
            )
    (cache / "work" / "data.img").unlink()
    plan, quant = artifact.plan, artifact.manifest.quant
    planned = predict_artifact(artifact, args.ctx, engine=engine.planned).phases["decode"]
    write_result(
        args.result or {"onnx": "arm64_e2b", "executorch": "arm64_e2b_executorch"}[args.engine],
        {
            "artifact": {"name": artifact.manifest.name, "layers": artifact.layers,
                         "ctx": plan.ctx, "kv": plan.kv, "quant": quant.scheme,
                         "formats": quant.formats, "made": artifact.manifest.made,
                         "bytes": sum(f.size for f in artifact.manifest.files.values())},
            "board": {"cpu": CPUS[0], "system": f"Debian {SUITE}", "memory": args.memory,
                      "emulator": "qemu-system-aarch64: correctness and memory, never speed"},
            "engine": {"here": engine.name, "there": engine.there, "planned": engine.planned},
            "ctx": args.ctx,
            "state": {"tokens": args.ctx - args.tokens, "filled": made,
                      "snapshot": "written on x86-64, restored on aarch64"},
            "decoded": len(ids),
            "packing_group": packing,
            "planned": {"anon": planned.anon, "file": planned.file},
            **runs[0],
            "further": runs[1:],
        },
    )  # fmt: skip


def _apart(ids: list[int], expected: Any, path: Path) -> dict[str, float]:
    """How far logits of the board are from these, as far as it was fed the same ids.

    Both chose their ids greedily: the first that differs is the last whose logits compare.
    """
    got = np.fromfile(path, np.float32).reshape(expected.shape)
    same = got[:-1].argmax(-1) == ids[1:]
    steps = len(ids) if same.all() else int(np.argmin(same)) + 1
    apart = divergence(expected[:steps], got[:steps])
    return {"steps": steps, "max_abs": apart.max_abs, "spread": float(np.std(expected)),
            "mean_kl": apart.mean_kl, "max_kl": apart.max_kl, "top1": apart.top1}  # fmt: skip


def _here(
    artifact: Artifact, engine: Engine, args: argparse.Namespace, data: Path
) -> tuple[list[int], Any, str]:
    """Make the state on this machine, as a snapshot in `data`.

    Returns the ids decoded behind it, their logits, and how the state was filled.
    """
    start = args.ctx - args.tokens
    job = Job(
        "fill", str(artifact.root), engine.name, args.threads, cache=True, depths=(start,),
        prompt=1, tokens=1, repeats=1, fill=args.fill,
    )  # fmt: skip
    say(f"state at {start} tokens: {fill_depths(job)[str(start)]}")
    snapshot = snapshot_path(artifact, job, start)
    _link(snapshot, data / "state.kv")
    token, made, logits = int(prompt_ids(artifact.tokens.vocab, args.ctx)[start]), [], []
    with load(artifact, engine.name, threads=args.threads) as session:
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
    parser.add_argument("--engine", choices=sorted(ENGINES), default="onnx")
    parser.add_argument("--limit", nargs="+", default=["2g"], help="memory.max of measured runs")
    parser.add_argument("--pack-limit", default="3g", help="memory.max of the first load")
    parser.add_argument("--memory", default="4G", help="the board's RAM")
    parser.add_argument("--threads", type=int, default=2, help="on this machine")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/edge-kv/arm64"))
    parser.add_argument("--result", default="", help="name in results/, if not the usual one")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
