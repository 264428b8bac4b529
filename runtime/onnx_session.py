"""OnnxSession: the programs of an artifact on ONNX Runtime's CPU provider.

State is bound in place: every table's input and its output are the same memory, so that rows are
written without copying a table. Tables without a `keep` are bound as a prefix of `Table.live(end)`
rows, so that the cost of a step follows the live length, not ctx.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edge_kv import heap
from edge_kv.artifact import Artifact
from edge_kv.errors import ArtifactError, EdgeKVError, MemoryLimitError, RuntimeFault
from edge_kv.manifest import (
    CARRY,
    DRAFT,
    HIDDEN,
    TOKENS,
    Program,
    live_axis,
    logits_shape,
    table_shape,
    tokens_axis,
)
from edge_kv.ple import PleTable
from edge_kv.runtime import experts, mapped, native_library, packed
from edge_kv.runtime.ort import onnxruntime as ort
from edge_kv.runtime.packed import PROGRAMS
from edge_kv.runtime.session import Draft, Hidden, Ids, Logits, Session, scored_tokens
from edge_kv.runtime.threads import thread_count

log = logging.getLogger(__name__)
WARNING, ERROR = 2, 3  # onnxruntime's log severities
_TYPES: dict[str, type[np.generic]] = {  # as ONNX names them
    "float": np.float32,
    "float16": np.float16,
    "int8": np.int8,
    "uint8": np.uint8,
    "int64": np.int64,
}


def create_engine(
    model: Path,
    threads: int,
    log_severity: int,
    options: ort.SessionOptions | None = None,
    operators: Path | None = None,
    exact: bool = False,
    pool: int | None = None,
    arena: bool = True,
) -> Any:
    """An onnxruntime InferenceSession for one program, weights mapped from beside it.

    `operators` is the library of native operators to run in place of the program's functions;
    with `exact` their products take activations as they are. `pool` are the threads of
    onnxruntime's own operators, as many as `threads` when left out. Without an `arena`, what a run
    works in goes back to the heap.

    Raises:
        ArtifactError: onnxruntime refuses the file.
        MemoryLimitError: the weights do not fit.
    """
    options = options or ort.SessionOptions()
    options.intra_op_num_threads = pool or threads
    options.log_severity_level = log_severity
    options.enable_mem_pattern = False  # a planned arena holds 40 MB more at E2B, and gains nothing
    options.enable_cpu_mem_arena = arena
    try:
        if operators:
            options.add_session_config_entry("edge_kv.threads", str(threads))
            options.add_session_config_entry("edge_kv.exact", str(int(exact)))
            options.add_session_config_entry("session.disable_prepacking", "1")  # float weights too
            options.register_custom_ops_library(str(operators))
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's exceptions share no base of their own
        raise _fault(e, ArtifactError(f"onnxruntime cannot load {model}: {_line(e)}")) from e


def _optimised() -> ort.SessionOptions:
    """Options for a program that onnxruntime has optimised before: nothing is left to rewrite."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


class OnnxSession(Session):
    """A session on onnxruntime with native operators for state and weights, where it can have them.

    Without a compiler the program's own functions run, as in `OnnxStockSession`.
    """

    engine = "onnx"

    def __init__(
        self,
        artifact: Artifact,
        threads: int | None = None,
        cache: bool = True,
        log_severity: int = ERROR,
    ) -> None:
        """Load the programs of `artifact`.

        `threads` defaults to the physical cores; `cache` keeps weights packed for this device in
        a cache directory (`edge_kv.runtime.packed`); `log_severity` WARNING makes onnxruntime
        report state that it had to copy. Of an artifact that is still being exported one program
        is held at a time: its gate reads a prompt and decodes, once, on a small host.

        Raises:
            ArtifactError: no onnx programs, or they do not have the inputs the plan asks for.
            MemoryLimitError: the weights do not fit.
        """
        begin = time.perf_counter()
        super().__init__(artifact)
        programs = artifact.backend(self.backend).programs
        entry = artifact.manifest.ple
        self.threads = thread_count(threads)
        self._ple = PleTable(artifact.path(entry.file), entry) if entry else None
        self.operators = self._operators()
        self._mapped: dict[str, set[mapped.Span]] = {}
        self._running = ""  # the program whose pages are resident
        self._lean = not artifact.manifest.finished
        self._bound: dict[str, _Bound] = {}
        self._drafting: _Drafts | None = None
        try:
            for name in PROGRAMS:
                if name not in programs:
                    raise ArtifactError(f"{artifact.root} has no {name} program; export again.")
            self._create = self._load(cache, log_severity)
            for name in () if self._lean else PROGRAMS:
                self._open(name)
            if self.has_drafter and not self._lean:
                self._drafts()
            heap.trim()
        except BaseException:
            if self._ple:
                self._ple.close()
            raise
        self.stats.load_seconds = time.perf_counter() - begin

    @property
    def backend(self) -> str:
        return "onnx"

    def _load(self, cache: bool, log_severity: int) -> Callable[[str], Any]:
        """What creates a program's engine: packed for this device, or from the artifact itself."""

        backend = self.artifact.backend(self.backend)
        programs, exact = backend.programs, bool(backend.details.get("exact"))

        def create(
            model: Path, options: ort.SessionOptions | None = None, pool: int | None = None,
            arena: bool = True,
        ) -> Any:  # fmt: skip
            return create_engine(
                model, self.threads, log_severity, options, self.operators, exact, pool, arena
            )

        names = (*PROGRAMS, DRAFT) if self.has_drafter else PROGRAMS
        plain = {name: self.artifact.program(programs[name].file) for name in names}
        # Native operators multiply weights as they were exported: nothing is packed.
        wanted = cache and not self.operators
        files = (packed.packed_programs(self.artifact, create) if wanted else None) or {}
        self._folders = {name: files.get(name, plain[name]).parent for name in names}

        def create_program(name: str) -> Any:
            if name not in files:
                # Threads of two programs that take turns would wait on the same cores: a pass
                # behind a draft took 77 ms instead of 53 at E2B. Native operators share theirs.
                pool = 1 if name == DRAFT and self.operators else None
                # An arena would hold what a prompt was read in beside the tokens that follow.
                return create(plain[name], pool=pool, arena=name != "prefill" or not self.operators)
            try:
                return create(files[name], _optimised())
            except ArtifactError as e:
                packed.discard(files)
                packed.log.warning("Packed weights were discarded: %s", e)
                return create(plain[name])

        return create_program

    def _operators(self) -> Path | None:
        """The library of native operators; None where there is none to be had."""
        try:
            return native_library.build_onnx_operators()
        except RuntimeFault as e:
            log.info("The onnx engine runs without its native operators, and slower. %s", e)
            return None

    def _open(self, name: str) -> None:
        """Create a program's engine, note what it maps, and bind the state to it."""
        program = self.artifact.backend(self.backend).programs[name]
        folder = self._folders[name]
        before = mapped.spans(folder)
        engine = self._create(name)
        self._mapped[name] = mapped.spans(folder) - before
        self._bound[name] = _Bound(self, name, program, engine)
        if self.operators:  # its weights may lie where those of another program were
            library = ctypes.CDLL(str(self.operators))
            self.stats.expert_bank_bytes = experts.keep_experts(library, self.artifact)

    def _program(self, name: str) -> _Bound:
        """The program to run next; the other lets go of its pages, both map the same file."""
        if self._running != name:
            if name == "decode" and self.operators:
                heap.release(ctypes.CDLL(str(self.operators)))
            for other in PROGRAMS:
                if other != name and other in self._bound:
                    if self._lean:
                        del self._bound[other]
                        heap.trim()
                    else:
                        mapped.let_go(self._mapped[other], self._folders[other])
            if name not in self._bound:
                self._open(name)
            self._running = name
        return self._bound[name]

    def _run_prefill(self, ids: Ids, pos: int) -> None:
        program = self._program("prefill")
        program.run(ids, pos, self._ple.rows(ids, program.ple_layers) if self._ple else None)

    def _run_decode(self, ids: Ids, pos: int) -> Logits:
        program = self._program("decode")
        program.run(ids, pos, self._ple.rows(ids, program.ple_layers) if self._ple else None)
        logits: Logits = program.logits[: len(ids)].copy()
        if self.has_drafter:
            self._hidden = program.hidden[: len(ids)].copy()
        return logits

    def _drafts(self) -> _Drafts:
        """The program of the drafter, which keeps its pages beside those of `decode`."""
        if self._drafting is None:
            program = self.artifact.backend(self.backend).programs[DRAFT]
            self._drafting = _Drafts(self, program, self._create(DRAFT))
        return self._drafting

    def _run_draft(self, token: Ids, hidden: Hidden, pos: int) -> Draft:
        self._program("decode")
        return self._drafts().run(token, hidden, pos)

    def _weights(self) -> tuple[set[mapped.Span], Path]:
        self._program("decode")  # prefill keeps the file: it waits for its multiplications
        return self._mapped["decode"], self._folders["decode"]

    def _close_engine(self) -> None:
        if self._ple:
            self._ple.close()
        if self.operators:
            experts.forget_experts(ctypes.CDLL(str(self.operators)), self.artifact)
        self._bound.clear()
        self._drafting = None


class OnnxStockSession(OnnxSession):
    """A session on onnxruntime as it is installed: every function is made of its own operators."""

    engine = "onnx-stock"

    def _operators(self) -> Path | None:
        return None


class _Program:
    """A program over tables of state, which are bound as far as they are in use."""

    writes = True  # whether it returns every table too

    def __init__(self, session: OnnxSession, name: str, program: Program, engine: Any) -> None:
        self._name, self._engine = name, engine
        self._dtypes = _check_contract(engine, program, session.artifact.path(program.file))
        self._views, self._axes = _views(session)
        self._binding = engine.io_binding()
        self._lengths: tuple[int, ...] | None = None  # of the tables as they are bound

    def _run(self, pos: int, end: int) -> None:
        """Run a step at `pos` over tables that hold all rows before `end`."""
        lengths = tuple(live(end) for live in self._axes.values())
        try:
            if lengths != self._lengths:
                self._bind_tables(lengths)
            self._bind_values()
            self._engine.run_with_iobinding(self._binding)
        except Exception as e:  # onnxruntime's exceptions share no base of their own
            message = f"onnxruntime failed in {self._name} at position {pos}: {_line(e)}"
            raise _fault(e, RuntimeFault(message)) from e

    def _bind_values(self) -> None:
        """Bind what is no table."""

    def _bind_tables(self, lengths: tuple[int, ...]) -> None:
        self._lengths = None  # a failure half way must not look like a finished binding
        open_axes = dict(zip(self._axes, lengths, strict=True))
        for view in self._views:
            shape = [open_axes[d] if isinstance(d, str) else d for d in view.shape]
            at = ("cpu", 0, self._dtypes[view.name], shape, view.memory.ctypes.data)
            self._binding.bind_input(view.name, *at)
            if self.writes:
                self._binding.bind_output(f"{view.name}.out", *at)
        self._lengths = lengths

    def _feed(self, name: str, array: npt.NDArray[Any]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def _fetch(self, name: str, array: npt.NDArray[Any]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


class _Bound(_Program):
    """A program that reads tokens, with its inputs and outputs bound to fixed memory."""

    def __init__(self, session: OnnxSession, name: str, program: Program, engine: Any) -> None:
        super().__init__(session, name, program, engine)
        plan, vocab = session.plan, session.artifact.tokens.vocab
        path = session.artifact.path(program.file)
        decode = name == "decode"
        width = plan.drafts + 1 if decode else plan.chunk
        self._ids = np.zeros(width, np.int64)
        self._pos = np.zeros(1, np.int64)
        rows = [_fixed(t.shape[1:], path) for t in program.inputs if t.name == "ple"]
        self._ple_shape = rows[0] if rows else (0, 0)  # of a token's rows
        self._has_ple = bool(rows)
        self.logits: Logits = np.zeros((width if decode else 0, vocab), np.float32)
        entry = session.artifact.manifest.drafter
        drafted = decode and entry is not None and session.has_drafter
        self.hidden: Hidden = np.zeros((width if drafted else 0, entry.width if entry else 0),
                                       np.float32)  # fmt: skip
        fed = ["ids", "pos", *(["ple"] if self._has_ple else []), *(v.name for v in self._views)]
        if sorted(fed) != sorted(self._dtypes) or self._has_ple != bool(
            session.artifact.manifest.ple
        ):
            odd = sorted(set(fed) ^ set(self._dtypes)) or ["ple"]
            raise ArtifactError(
                f"{path} does not have the inputs its KV plan asks for ({', '.join(odd)}); "
                "export again."
            )
        tokens = tokens_axis(name, plan)
        wanted: dict[str, tuple[int | str, ...]] = {v.name: v.shape for v in self._views}
        wanted["ids"] = (tokens or 1,)
        if decode:
            wanted["logits"] = logits_shape(plan, vocab)
        if self.hidden.size:
            wanted[HIDDEN] = (tokens or 1, self.hidden.shape[1])
        real = {t.name: tuple(t.shape) for t in (*engine.get_inputs(), *engine.get_outputs())}
        sizes = {v.name: v.memory.itemsize for v in self._views}
        for value, shape in wanted.items():
            if real.get(value) != shape or (
                value in sizes and self._dtypes[value](0).itemsize != sizes[value]
            ):
                raise ArtifactError(
                    f"{path} has {value!r} as {list(real.get(value, ()))}, its plan has "
                    f"{list(shape)}; export again."
                )
        self._flat = not tokens  # logits without an axis of tokens
        self._tokens = 0  # of the step to run
        self._bound_tokens: int | None = None

    @property
    def ple_layers(self) -> int:
        """How many layers' per-layer rows the program takes."""
        return self._ple_shape[0]

    def run(self, ids: Ids, pos: int, ple: npt.NDArray[np.float32] | None) -> None:
        """Run over `ids` at `pos`: state is updated in place, logits are in `self.logits`."""
        n = self._tokens = len(ids)
        self._ids[:n] = ids
        self._pos[0] = pos
        if ple is not None:
            self._feed("ple", ple)
        self._run(pos, pos + n)

    def _bind_values(self) -> None:
        n = self._tokens
        if n == self._bound_tokens:
            return
        self._bound_tokens = None
        self._feed("ids", self._ids[:n])
        self._feed("pos", self._pos)
        if self.logits.size:
            self._fetch("logits", self.logits[0] if self._flat else self.logits[:n])
        if self.hidden.size:
            self._fetch(HIDDEN, self.hidden[:n])
        self._bound_tokens = n


class _Drafts(_Program):
    """The program of a drafter, bound to the tables that it reads."""

    writes = False

    def __init__(self, session: OnnxSession, program: Program, engine: Any) -> None:
        super().__init__(session, DRAFT, program, engine)
        path, entry = session.artifact.path(program.file), session.artifact.manifest.drafter
        assert entry
        self._views = [v for v in self._views if v.name in self._dtypes]
        shapes = {t.name: tuple(t.shape) for t in program.inputs}
        wanted: dict[str, tuple[int | str, ...]] = {v.name: v.shape for v in self._views}
        wanted |= {"ids": (1,), "pos": (1,), HIDDEN: (1, entry.width)}
        scored = scored_tokens(session.artifact, program)
        if shapes != wanted or not scored:
            raise ArtifactError(
                f"{path} does not take and give what a drafter of its plan does; export again."
            )
        self._ids, self._pos = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self._hidden = np.zeros((1, entry.width), np.float32)
        self._carry = np.zeros((1, entry.width), np.float32)
        self._logits: Logits = np.zeros(scored, np.float32)
        some = scored < session.artifact.tokens.vocab
        self._tokens = np.zeros(scored, np.int64) if some else None
        self._has_values = False

    def run(self, token: Ids, hidden: Hidden, pos: int) -> Draft:
        self._ids[:], self._pos[0], self._hidden[0] = token, pos, hidden
        self._run(pos, pos)
        tokens = None if self._tokens is None else self._tokens.copy()
        return Draft(self._logits.copy(), tokens, self._carry[0].copy())

    def _bind_values(self) -> None:
        if self._has_values:
            return
        for name, array in (("ids", self._ids), ("pos", self._pos), (HIDDEN, self._hidden)):
            self._feed(name, array)
        for name, out in (("logits", self._logits), (CARRY, self._carry), (TOKENS, self._tokens)):
            if out is not None:
                self._fetch(name, out)
        self._has_values = True


class _View(NamedTuple):
    """How a program sees a table of state: its name, memory and shape with names for open axes."""

    name: str
    memory: npt.NDArray[Any]
    shape: tuple[int | str, ...]


def _views(session: OnnxSession) -> tuple[list[_View], dict[str, Callable[[int], int]]]:
    """What the programs bind, and the length of each open axis for positions below an end."""
    tables = session.plan.tables
    views = [_View(t.name, session.state[t.name], table_shape(t)) for t in tables]
    return views, {axis: t.live for t in tables if (axis := live_axis(t))}


def _fixed(shape: Sequence[int | str], path: Path) -> tuple[int, ...]:
    if len(shape) != 2 or any(isinstance(d, str) for d in shape):
        raise ArtifactError(f"{path} takes per-layer rows of shape {list(shape)}; export again.")
    return int(shape[0]), int(shape[1])


def _check_contract(engine: Any, program: Program, path: Path) -> dict[str, type[np.generic]]:
    """Compare the graph's real inputs and outputs with the manifest; the inputs' dtypes."""
    real = {(t.name, t.type) for t in (*engine.get_inputs(), *engine.get_outputs())}
    said = {(t.name, f"tensor({t.dtype})") for t in (*program.inputs, *program.outputs)}
    if real != said:
        name = min(real ^ said)[0]
        raise ArtifactError(
            f"{path} and the manifest disagree about {name!r}; copy or export the artifact again."
        )
    unread = [t for t in program.inputs if t.dtype not in _TYPES]
    if unread:
        raise ArtifactError(
            f"{path} wants {unread[0].name!r} as {unread[0].dtype}, which this edge-kv does not "
            "feed; export again."
        )
    return {t.name: _TYPES[t.dtype] for t in program.inputs}


def _fault(e: Exception, otherwise: EdgeKVError) -> EdgeKVError:
    if isinstance(e, EdgeKVError):
        return e
    if isinstance(e, MemoryError) or "allocate memory" in str(e) or "bad_alloc" in str(e):
        return MemoryLimitError(
            f"onnxruntime ran out of memory ({_line(e)}); close other programs, or export with "
            "a smaller --ctx, --quant int4 or --kv int8."
        )
    return otherwise


def _line(e: Exception) -> str:
    """The first line of an engine's message, without its status prefix."""
    text = (str(e).strip() or type(e).__name__).splitlines()[0]
    return text.removeprefix("[ONNXRuntimeError] : ").strip()
