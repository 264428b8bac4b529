"""What an artifact costs on this machine: RAM by phase, speed at real depth, against the plan.

Every depth is measured in a process of its own, so that its memory peaks are its own. The state at
a depth is real: a prompt of that many tokens was run through prefill once and kept as a snapshot
in the cache directory; the measured process restores it. Where that takes too long, the snapshot
can hold random rows instead (`fill="random"`): as many bytes at the same positions, so time and
memory are the same, and the document says which it was. One process runs

    load -> first token -> restore, prefill `prompt` tokens -> restore, decode `tokens` tokens

the last two `repeats` times, after one warm-up that is not counted. Prompts are seeded random ids:
speed and memory do not depend on them.

Time per token has a floor: the bytes a token must read (packed weights and the live state) at the
speed of the memory. Virtual machines have memory whose speed changes within minutes, so a plain
read of a buffer far larger than the caches comes before and after every pass of decoding, and each
pass is compared with its own two reads.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from edge_kv import __version__
from edge_kv.artifact import Artifact, read_artifact
from edge_kv.errors import ConfigError, EdgeKVError, RuntimeFault
from edge_kv.memory import Base, predict_artifact, read_weights
from edge_kv.plan import SCALE
from edge_kv.progress import Progress, Silent
from edge_kv.runtime import check_engine
from edge_kv.runtime import snapshot as snapshots
from edge_kv.runtime.base import planned_base
from edge_kv.runtime.cache import cache_directory
from edge_kv.runtime.meter import Memory, read_memory, reset_peak
from edge_kv.runtime.session import Session
from edge_kv.runtime.threads import thread_count

SCHEMA_VERSION = 1
PHASES = ("load", "prefill", "decode")
FILLS = ("prefill", "random")
SAMPLE_SECONDS = 0.02  # between two looks at anonymous memory
PASSES = (2, 3, 4, 6, 8)  # tokens of the passes with drafts that are timed
F16_BYTES = 2  # naive baselines are counted in the 16-bit storage that other runtimes use
BASELINES = {  # name -> (sharing, rings)
    "every_layer_full": (False, False),
    "sharing_only": (True, False),
    "rings_only": (False, True),
    "sharing_and_rings": (True, True),
}
MODULE = "edge_kv.runtime.bench"

Open = Callable[[Artifact, "Job"], Session]


@dataclass(frozen=True)
class Job:
    """What one measuring process is asked for; depths in tokens of context before the prompt."""

    task: str  # "warm" | "fill" | "measure"
    artifact: str
    engine: str
    threads: int
    cache: bool
    depths: tuple[int, ...]
    prompt: int
    tokens: int
    repeats: int
    fill: str = "prefill"  # one of FILLS: how a missing depth is reached
    plain_read: int = 0  # bytes read around every pass of decoding, for the roofline; 0: none
    huge_pages: bool = False
    started: float = 0.0  # time.time() of the parent, just before the process was started


def bench(
    artifact: Artifact,
    depths: Sequence[int],
    *,
    engines: Sequence[str] = ("onnx",),
    threads: int | None = None,
    cache: bool = True,
    huge_pages: bool = False,
    prompt: int = 512,
    tokens: int = 64,
    repeats: int = 3,
    fill: str = "prefill",
    modules: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure `artifact` at every context of `depths` on every engine; one JSON-ready document.

    A depth is the context in use when a phase ends: `prompt` tokens are prefilled onto the rest.
    `fill` is how that rest is reached the first time: by prefill, or with random rows.
    `modules` names, for engines that are not in `runtime.ENGINES`, the module that runs their
    processes (its `main` calls `serve`).

    What is finished is never lost: a run that fails, or Ctrl-C, is an entry of the document's
    `failures`, and the runs before it stay.

    Raises:
        ConfigError: a depth the artifact was not exported for, an unknown engine, or nothing to
            measure. ArtifactError: no programs of an engine.
        RuntimeFault, …: what stopped the measuring process, if no run was finished.
    """
    progress = progress or Silent()
    for engine in engines:
        if engine not in (modules or {}):
            check_engine(artifact, engine)
    if not depths or min(prompt, tokens, repeats) < 1:
        raise ConfigError("Nothing to measure: give depths, and prompt, tokens, repeats above 0.")
    if fill not in FILLS:
        raise ConfigError(f"Unknown fill {fill!r}; expected one of {', '.join(FILLS)}.")
    ctx = artifact.plan.ctx
    for depth in depths:
        if not 2 <= depth <= ctx:
            raise ConfigError(
                f"Depth {depth} is outside 2 … {ctx}, the context {artifact.root} was exported "
                "for; choose a smaller --ctx, or export a larger one."
            )
    count = thread_count(threads)
    quant = artifact.manifest.quant
    progress.stage("bandwidth")
    read = _plain_read_size()
    bandwidth = _ask(MODULE, {"task": "bandwidth", "threads": count, "size": read})
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "edge_kv": __version__,
        "artifact": {
            "name": artifact.manifest.name,
            "model": artifact.family,
            "layers": artifact.layers,
            "ctx": ctx,
            "chunk": artifact.plan.chunk,
            "kv": artifact.plan.kv,
            "quant": quant.scheme,
        },
        "machine": machine(),
        "conditions": {
            "threads": count,
            "cache": cache,
            "huge_pages": huge_pages,
            "prompt": prompt,
            "tokens": tokens,
            "repeats": repeats,
            "fill": fill,
            "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        },
        "bandwidth": bandwidth,
        "plan": [],
        "runs": [],
        "failures": [],
    }
    measured = _Measured(artifact, document, progress)
    common: dict[str, Any] = {
        "artifact": str(artifact.root), "threads": count, "cache": cache, "huge_pages": huge_pages,
    }  # fmt: skip
    for engine in engines:
        module = (modules or {}).get(engine, MODULE)
        starts = [_shape(artifact, d, prompt, tokens) for d in depths]
        progress.stage(f"{engine}: fill")
        filling = Job(
            "fill", engine=engine, depths=tuple(sorted({s for s, _, _ in starts})),
            prompt=1, tokens=1, repeats=1, fill=fill, **common,
        )  # fmt: skip
        made = measured.ask(module, asdict(filling), engine)
        if made is None:
            continue
        progress.stage(f"{engine}: measure", "contexts")
        for i, (depth, (start, ahead, steps)) in enumerate(zip(depths, starts, strict=True)):
            job = Job(
                "measure", engine=engine, depths=(start,), prompt=ahead, tokens=steps,
                repeats=repeats, fill=fill, plain_read=read, **common,
            )  # fmt: skip
            run = measured.ask(module, {**asdict(job), "started": time.time()}, engine, depth)
            if run is not None:
                measured.add({"engine": engine, "ctx": depth, "filled": made[str(start)], **run})
            progress.advance(f"{depth:,} tokens", i + 1, len(depths))
        if measured.interrupted:
            break
    if measured.interrupted and not document["runs"]:
        raise KeyboardInterrupt
    if not document["runs"]:
        raise RuntimeFault(document["failures"][0]["error"])
    return document


class _Measured:
    """What a benchmark has so far: runs with the plan beside them, and what failed."""

    def __init__(self, artifact: Artifact, document: dict[str, Any], progress: Progress) -> None:
        self._artifact, self._document, self._progress = artifact, document, progress
        self.interrupted = False

    def ask(self, module: str, request: Any, engine: str, depth: int | None = None) -> Any:
        """The answer of a measuring process, or None after a note of why there is none."""
        if self.interrupted:
            return None
        try:
            return _ask(module, request)
        except EdgeKVError as e:
            error = str(e)
        except KeyboardInterrupt:
            self.interrupted, error = True, "Interrupted before it was measured."
        self._document["failures"].append({"engine": engine, "ctx": depth, "error": error})
        return None

    def add(self, run: dict[str, Any]) -> None:
        """A run that is over, judged against the plan over what its process held before."""
        base = run.pop("base")
        planned = None
        if base is not None:
            planned = _planned(
                self._artifact, run["engine"], run["ctx"], Base(**base),
                bool(run["load"]["huge_page_bytes"]),
            )  # fmt: skip
            self._document["plan"].append(planned)
        self._document["runs"].append(_judged(run, self._artifact, planned))


def machine() -> dict[str, Any]:
    """The hardware and the versions a measurement belongs to."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Hardware")):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    versions = {}
    for package in ("onnxruntime", "executorch", "numpy", "torch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": name,
        "cores": thread_count(None),
        "memory": _memory_of_machine(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def read_bandwidth(threads: int, size: int, repeats: int = 7) -> dict[str, Any]:
    """Speed of `repeats` plain reads of a buffer of `size` bytes, in bytes a second.

    A read is numpy's maximum over float32 values, a slice to each thread.
    """
    data = np.zeros(size // 4, np.float32)
    data[:: 4096 // 4] = 1.0  # a page of its own for every 4 KB: untouched ones are all the same
    parts = np.array_split(data, threads)
    speeds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            begin = time.perf_counter()
            list(pool.map(np.maximum.reduce, parts))
            speeds.append(data.nbytes / (time.perf_counter() - begin))
    return {
        "best": max(speeds),
        "median": float(np.median(speeds)),
        "buffer": data.nbytes,
        "threads": threads,
        "method": "numpy maximum.reduce over float32, one slice a thread, best of "
        f"{repeats} passes",
    }


def _plain_read_size() -> int:
    """Bytes of the buffer for plain reads: eight times the last cache, 512 MiB or more.

    At most an eighth of the memory, so that a small board can hold it beside a model.
    """
    wanted = max(512 << 20, 8 * _last_level_cache())
    return min(wanted, (_memory_of_machine() or 8 * wanted) // 8)


def _memory_of_machine() -> int | None:
    """Bytes of RAM; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def fill_depths(job: Job) -> dict[str, str]:
    """Make the snapshots a measuring process will restore: depth -> how its state came to be.

    Raises:
        RuntimeFault: the process failed; its last words are in the message.
    """
    made: dict[str, str] = _ask(MODULE, asdict(replace(job, task="fill")))
    return made


def serve(open_session: Open) -> None:
    """Run one job from stdin and print its result: the whole life of a measuring process."""
    request = json.loads(sys.stdin.read())
    task = request["task"]
    try:
        if task == "bandwidth":
            result: Any = read_bandwidth(request["threads"], request["size"])
        else:
            job = Job(**{**request, "depths": tuple(request["depths"])})
            result = {"fill": _fill, "measure": _measure}[task](job, open_session)
    except EdgeKVError as e:
        print(json.dumps({"error": str(e), "kind": type(e).__name__}))
        sys.exit(1)
    print(json.dumps(result))


def _fill(job: Job, open_session: Open) -> dict[str, str]:
    """Make the snapshots that are missing; says for each depth how its state came to be."""
    artifact = read_artifact(job.artifact)
    made = {str(d): "kept from an earlier run" for d in job.depths}
    made["0"] = "empty"
    missing = [d for d in job.depths if d and not snapshot_path(artifact, job, d).exists()]
    with open_session(artifact, job) as session:
        ids = prompt_ids(session.artifact.tokens.vocab, max(job.depths))
        for depth in missing:
            path = snapshot_path(artifact, job, depth)
            path.parent.mkdir(parents=True, exist_ok=True)
            if job.fill == "random":
                _write_random(session, path, ids[:depth])
                made[str(depth)] = "random rows"
            else:
                session.prefill(ids[session.pos : depth])
                session.snapshot(path)
                made[str(depth)] = "prefilled in this run"
    return made


def _write_random(session: Session, path: Path, ids: Any) -> None:
    """A snapshot of seeded random rows: keys of unit variance, as the norm before them leaves."""
    rng = np.random.default_rng(0)
    for table, memory in session.state.items():
        for at in range(0, min(len(memory), len(ids)), 4096):
            part = memory[at : min(at + 4096, len(ids))]
            if part.dtype.kind in "iu":
                part[:] = rng.integers(1, 256, part.shape, np.uint8).view(part.dtype)
            elif table.endswith(SCALE):
                part[:] = 3 / 127  # three deviations fill the integers
            else:
                part[:] = rng.standard_normal(part.shape, np.float32)
    snapshots.write(path, session.identity, session.plan, session.state, ids.tolist(), len(ids), {})


def _measure(job: Job, open_session: Open) -> dict[str, Any]:
    artifact = read_artifact(job.artifact)
    depth = job.depths[0]
    memory: dict[str, dict[str, int | None]] = {}
    base = planned_base(job.engine)
    with Watch(memory, "load"):
        session = open_session(artifact, job)
    ids = prompt_ids(session.artifact.tokens.vocab, depth + job.prompt)
    with session:
        session.decode(int(ids[0]))
        first_token = time.time() - job.started

        def at_depth() -> None:
            session.reset()
            if depth:
                session.restore(snapshot_path(artifact, job, depth))

        prefills: list[float] = []
        with Watch(memory, "prefill"):
            for _ in range(job.repeats + 1):
                at_depth()
                begin = time.perf_counter()
                session.prefill(ids[depth:])
                prefills.append(time.perf_counter() - begin)
        steps: list[list[float]] = []
        reads = []
        for _ in range(job.repeats + 1):
            reads.append(_plain_read(job))
            with Watch(memory, "decode"):
                at_depth()
                steps.append([])
                for _ in range(job.tokens):
                    begin = time.perf_counter()
                    session.decode(int(ids[0]))
                    steps[-1].append(time.perf_counter() - begin)
        reads.append(_plain_read(job))
        at_depth()
        several = _several(session, int(ids[0]), job.repeats)
        load, huge = session.stats.load_seconds, session.stats.huge_page_bytes
    warm, latencies = steps[0][0], np.array(steps[1:])
    percentiles = {f"p{p}": float(np.percentile(latencies, p)) for p in (50, 95, 99)}
    seconds = float(np.median(prefills[1:]))
    return {
        "depth": depth,
        "base": base and asdict(base),
        "load": {
            "seconds": load,
            "start_to_first_token": first_token,
            "huge_page_bytes": huge,
        },
        "prefill": {
            "tokens": job.prompt,
            "seconds": prefills[1:],
            "rate": job.prompt / seconds,
        },
        "decode": {
            "tokens": latencies.size,
            "rate": 1 / float(latencies.mean()),
            "seconds": percentiles,
            "first_after_prefill": warm,
            "several": several,
        },
        "first_token": seconds + percentiles["p50"],
        "memory": memory,
        "passes": [
            {"seconds": float(np.median(times)), "read": (before + after) / 2}
            for times, before, after in zip(steps[1:], reads[1:], reads[2:], strict=False)
        ],
    }


def _several(session: Session, token: int, repeats: int) -> dict[str, float]:
    """Median seconds of passes by how many tokens they take, one at a time for comparison."""
    counts = [
        n for n in (1, *PASSES) if n <= min(session.drafts + 1, session.plan.ctx - session.pos)
    ]
    times: dict[int, list[float]] = {n: [] for n in counts}
    for turn in range(2 * repeats + 1):
        for n in counts:
            begin = time.perf_counter()
            session.decode_many([token] * n)
            seconds = time.perf_counter() - begin
            session.rewind(n)
            if turn:  # the first pass of a size sets its buffers up
                times[n].append(seconds)
    return {str(n): float(np.median(found)) for n, found in times.items()}


def _plain_read(job: Job) -> float:
    """Bytes a second of a plain read now; 0 where the job wants none."""
    if not job.plain_read:
        return 0.0
    best: float = read_bandwidth(job.threads, job.plain_read, repeats=3)["best"]
    return best


class Watch:
    """Notes memory of a phase: what is held at its end, and the peaks while it ran.

    Of a phase that is watched several times, the highest of each counts.
    """

    def __init__(self, memory: dict[str, dict[str, int | None]], phase: str) -> None:
        self._memory, self._phase = memory, phase
        self._stop = threading.Event()
        self._anon = self._file = 0
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> None:
        self._own_peak = reset_peak()
        self._file = read_memory().file or 0
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        held = read_memory()
        now = {
            "anon": held.anon,
            "anon_peak": self._anonymous(held),
            "file": held.file,
            "rss_peak": held.peak if self._own_peak else None,
            "rss_peak_so_far": held.peak,
            "pss": held.pss,
            "cgroup_peak": held.cgroup_peak,
        }
        before = self._memory.get(self._phase, now)
        self._memory[self._phase] = {
            name: None if value is None else max(value, before[name] or 0)
            for name, value in now.items()
        }

    def _anonymous(self, held: Memory) -> int | None:
        """The highest that was seen, or that the peak of all memory tells beside most files."""
        if held.anon is None:
            return None
        files = max(self._file, held.file or 0)
        least = held.peak - files if self._own_peak and held.peak and files else 0
        return max(self._anon, held.anon, least)

    def _look(self) -> None:
        status = Path("/proc/self/status")
        while not self._stop.wait(SAMPLE_SECONDS):
            try:
                text = status.read_text()
            except OSError:
                return
            self._anon = max(self._anon, _bytes(text, "RssAnon:"))
            self._file = max(self._file, _bytes(text, "RssFile:"))


def _bytes(status: str, name: str) -> int:
    """A line of /proc/self/status; 0 where it has none."""
    at = status.find(name)
    return 1024 * int(status[at + len(name) :].split(None, 1)[0]) if at >= 0 else 0


def prompt_ids(vocab: int, count: int) -> Any:
    """The seeded ids every measurement feeds: int64 [count]; a longer prompt begins the same."""
    return np.random.default_rng(0).integers(0, vocab, count)


def _shape(artifact: Artifact, depth: int, prompt: int, tokens: int) -> tuple[int, int, int]:
    """(tokens restored, prompt tokens, decoded tokens) so that prefill ends at `depth`."""
    ahead = min(prompt, depth)
    start = depth - ahead
    return start, ahead, max(1, min(tokens, artifact.plan.ctx - start, ahead))


def snapshot_path(artifact: Artifact, job: Job, depth: int) -> Path:
    """Where the state at a depth is kept; the file itself says which model and plan it is of."""
    model = artifact.model_digest[:16]
    plan = artifact.plan_digest[:16]
    return cache_directory() / "bench" / f"{job.engine}-{job.fill}-{model}-{plan}-{depth}.kv"


def _planned(artifact: Artifact, engine: str, depth: int, base: Base, huge: bool) -> dict[str, Any]:
    """The plan's prediction at a depth, and what naive layouts of the state would take."""
    planned = predict_artifact(
        artifact, depth, engine=engine, base=base, text=False, drafts=0, huge=huge
    )
    return {
        "engine": engine,
        "ctx": depth,
        "base": asdict(base),
        "state": planned.touched,
        "phases": {n: {"anon": p.anon, "file": p.file} for n, p in planned.phases.items()},
        "baselines_f16": {
            name: F16_BYTES * _elements(artifact, depth, sharing=sharing, rings=rings)
            for name, (sharing, rings) in BASELINES.items()
        },
    }


def _elements(artifact: Artifact, depth: int, *, sharing: bool, rings: bool) -> int:
    """Elements of keys and values with or without sharing and windows: see `Plan.full_length`."""
    return sum(
        (1 if sharing else len(t.readers))
        * (min(depth, t.keep) if rings and t.keep else depth)
        * t.row[0]
        * t.row[1]
        for t in artifact.plan.tables
        if t.stride == 1 and not t.exact and not t.name.endswith(SCALE)
    )


def _judged(run: dict[str, Any], artifact: Artifact, plan: dict[str, Any] | None) -> dict[str, Any]:
    """A run with the prediction beside its memory, and its distance from the roofline."""
    if plan:
        for name, measured in run["memory"].items():
            expected = plan["phases"][name]
            # A token was decoded before the prompt, so that pages of all weights are there.
            files = plan["phases"]["decode" if name == "prefill" else name]["file"]
            total = expected["anon"] + files
            measured["anon_planned"], measured["total_planned"] = expected["anon"], total
            for kind, peak, planned in (
                ("anon", measured["anon_peak"], expected["anon"]),
                ("total", measured["rss_peak"], total),
            ):
                measured[f"{kind}_error"] = planned / peak - 1 if peak else None
    weights = read_weights(artifact)
    state = artifact.plan.read_traffic(run["depth"] + run["decode"]["tokens"] // 2)
    passes = run.pop("passes")
    floors = [(weights + state) / p["read"] for p in passes]
    run["roofline"] = {
        "weight_bytes": weights,
        "state_bytes": state,
        "seconds": float(np.median(floors)),
        "fraction": float(
            np.median([f / p["seconds"] for f, p in zip(floors, passes, strict=True)])
        ),
        "passes": passes,
    }
    return run


def _ask(module: str, request: dict[str, Any]) -> Any:
    """Run one request in a fresh process and return its result.

    Raises:
        RuntimeFault: the process failed; its last words are in the message.
    """
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    last = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        answer = json.loads(last)
    except ValueError:
        words = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeFault(f"The measuring process failed: {words}") from None
    if done.returncode:
        raise RuntimeFault(answer["error"])
    return answer


def _last_level_cache() -> int:
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
    return max(sizes)


def _open(artifact: Artifact, job: Job) -> Session:
    from edge_kv.runtime import load

    return load(artifact, job.engine, job.threads, job.cache, job.huge_pages)


if __name__ == "__main__":
    serve(_open)
