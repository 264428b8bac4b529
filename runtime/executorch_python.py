"""ExecuTorchPythonSession: a portable `.pte` on the stock Python runtime of the executorch wheel.

Needs torch and no compiler. It runs on the extension module that `executorch.runtime` wraps, which
spares the import of the exporter. The program owns its state, which the runtime zeroes when it
loads: the whole context is resident from the start, and weights are packed into the heap.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_kv.artifact import Artifact
from edge_kv.errors import ArtifactError, RuntimeFault
from edge_kv.plan import Table
from edge_kv.ple import PleTable
from edge_kv.runtime.executorch_contract import (
    METHODS,
    check_contract,
    fed_layers,
    state_name,
    tables,
)
from edge_kv.runtime.session import STORAGE, Ids, Logits, Session
from edge_kv.runtime.threads import return_threads, share_threads, thread_count

INSTALL = "pip install --no-deps executorch==1.5.1 'torch==2.13.*'"
CAP_IPC_LOCK = 14
PROGRAM = b"ET12"  # the flatbuffer identifier, at byte 4
_TYPES = {4: "int64", 6: "float"}  # by their numbers in a program
_CAPABILITY_VERSION = 0x20080522


class ExecuTorchPythonSession(Session):
    """A session on ExecuTorch's own Python runtime; both methods share the state.

    Its threads belong to the process: portable sessions of one process have the same number of
    them (`threads.share_threads`).
    """

    engine = "executorch-python"

    def __init__(self, artifact: Artifact, threads: int | None = None, cache: bool = True) -> None:
        """Load the programs of `artifact`; `cache` changes nothing, this runtime cannot keep one.

        Raises:
            ArtifactError: no portable executorch programs, or they do not hold the plan's state.
            RuntimeFault: torch or executorch is not installed, or an open session has another
                number of threads.
        """
        begin = time.perf_counter()
        backend = artifact.backend(self.backend)
        if backend.details.get("attention") != "portable":
            raise ArtifactError(
                f"{artifact.root} attends with operators that only edge-kv's own engine has; use "
                "--engine executorch, or export with --attention portable."
            )
        if not set(METHODS) <= set(backend.programs):
            raise ArtifactError(f"{artifact.root} has no decode program; export again.")
        self._layers = {name: fed_layers(artifact, name) for name in METHODS}
        super().__init__(artifact)
        self._torch, self._runtime = _import()
        self.threads = thread_count(threads)
        entry = artifact.manifest.ple
        path = artifact.program(backend.programs["decode"].file)
        with path.open("rb") as file:  # the runtime's own check reads past the end without one
            if file.read(8)[4:] != PROGRAM:
                raise ArtifactError(f"ExecuTorch cannot load {path}: it is no ExecuTorch program.")
        with ExitStack() as on_error:
            on_error.callback(return_threads, self)
            share_threads(self, self.threads)
            self._load(path)
            self._ple = PleTable(artifact.path(entry.file), entry) if entry else None
            on_error.pop_all()
        self.stats.load_seconds = time.perf_counter() - begin

    def _load(self, path: Path) -> None:
        with _log() as log, _no_mlock():
            if self._runtime._threadpool_get_thread_count() != self.threads:
                self._runtime._unsafe_reset_threadpool(self.threads)
            try:
                checked = self._runtime.Verification.InternalConsistency
                self._program: Any = self._runtime._load_program(
                    str(path), program_verification=checked
                )
                self._prefill: Any = self._program.load_method("prefill")
                self._decode: Any = self._program.load_method("decode")
                check_contract(self.artifact, path, self._lines())
                self.state = {t.name: self._view(t) for t in tables(self.artifact)}
            except (RuntimeError, ValueError) as e:
                reason = str(e).splitlines()[0]
                raise ArtifactError(f"ExecuTorch cannot load {path}: {log() or reason}.") from e

    def _lines(self) -> Iterator[str]:
        """Inputs and outputs of both methods as `check_contract` takes them."""
        for name, method in (("prefill", self._prefill), ("decode", self._decode)):
            meta = method.method_meta()
            for what, count, tensor in (
                ("input", meta.num_inputs(), meta.input_tensor_meta),
                ("output", meta.num_outputs(), meta.output_tensor_meta),
            ):
                for i in range(count):
                    dtype = _TYPES.get(tensor(i).dtype(), "other")
                    yield " ".join([name, what, dtype, *map(str, tensor(i).sizes())])

    @property
    def backend(self) -> str:
        return "executorch"

    def _view(self, table: Table) -> npt.NDArray[Any]:
        """A table as an array over the runtime's memory."""
        name = state_name(table.name)
        rows: npt.NDArray[Any] = self._decode.get_attribute(name).numpy()
        if rows.shape != table.shape or rows.dtype != STORAGE[table.dtype]:
            raise ValueError(f"its table {table.name} is {rows.dtype} {rows.shape}")
        return rows

    def _run_prefill(self, ids: Ids, pos: int) -> None:
        self._run(self._prefill, "prefill", ids, pos)

    def _run_decode(self, ids: Ids, pos: int) -> Logits:
        output = self._run(self._decode, "decode", ids, pos)
        logits: Logits = output.numpy().reshape(len(ids), -1).copy()
        return logits

    def _run(self, method: Any, name: str, ids: Ids, pos: int) -> Any:
        """Run a method; its output is the runtime's memory until the next run."""
        given: list[Any] = [np.ascontiguousarray(ids), np.array([pos], np.int64)]
        if self._ple:
            given.append(self._ple.rows(ids, self._layers[name]))
        try:
            (output,) = method([self._torch.from_numpy(x) for x in given], clone_outputs=False)
        except RuntimeError as e:
            reason = str(e).splitlines()[0]
            raise RuntimeFault(f"ExecuTorch failed in {name} at position {pos}: {reason}.") from e
        return output

    def _close_engine(self) -> None:
        self.state = {}  # views of memory that goes with the program
        self._prefill = self._decode = self._program = None
        return_threads(self)
        if self._ple:
            self._ple.close()


def _import() -> tuple[Any, Any]:
    """torch, and the runtime's extension module.

    Raises:
        RuntimeFault: one of them is missing or cannot be loaded.
    """
    try:
        import torch
        from executorch.extension.pybindings import _C
    except ImportError as e:
        raise RuntimeFault(
            f"The executorch-python engine needs torch and executorch ({e}); run: {INSTALL}, or "
            "use --engine executorch."
        ) from e
    return torch, _C


@contextmanager
def _log() -> Iterator[Any]:
    """Keep from the user what the runtime prints while it loads; yields its last error, callable.

    It says there why something failed: in part through sys.stderr, in part to file descriptor 2.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile("w+", errors="replace") as held:
        saved = os.dup(2)
        os.dup2(held.fileno(), 2)

        def last() -> str:
            held.seek(0)
            said = [x.partition("] ")[2] for x in held.read().splitlines() if "cpuinfo" not in x]
            return said[-1] if said else ""

        try:
            with redirect_stderr(held):
                yield last
        finally:
            os.dup2(saved, 2)
            os.close(saved)


@contextmanager
def _no_mlock() -> Iterator[None]:
    """Keep the loader from pinning the program in memory, lookup tables and all.

    It locks as many pages as it may: none at a limit of 0, unless the process is privileged, which
    it is not while the capability is set aside.
    """
    try:
        import resource
    except ImportError:  # not a Unix: the loader locks nothing there
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, limits[1]))
    effective = _lay_aside(CAP_IPC_LOCK)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, limits)
        if effective is not None:
            _set_effective(effective)


def _capabilities() -> tuple[Any, Any, Any] | None:
    """libc with this thread's capability header and sets; None where there are none."""
    libc = ctypes.CDLL(None)
    if not (sys.platform == "linux" and hasattr(libc, "capget")):
        return None
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then their upper halves
    return (libc, header, sets) if libc.capget(header, sets) == 0 else None


def _lay_aside(capability: int) -> int | None:
    """Make `capability` ineffective; returns the effective set as it was, None if it lacked it."""
    held = _capabilities()
    if held is None or not held[2][0] >> capability & 1:
        return None
    effective = int(held[2][0])
    _set_effective(effective & ~(1 << capability))
    return effective


def _set_effective(effective: int) -> None:
    held = _capabilities()
    if held is not None:
        libc, header, sets = held
        sets[0] = effective
        libc.capset(header, sets)
