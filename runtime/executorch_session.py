"""ExecuTorchSession: the `.pte` of an artifact on our native engine, without torch.

The program owns its state: `session.state` is a view of the arena it was planned into, at the
offsets the exporter recorded, so snapshots and rewinds work as on any other engine. Weights are
packed for this CPU once, into a file in the cache directory that later sessions map.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_kv.artifact import Artifact
from edge_kv.errors import ArtifactError, EdgeKVError, MemoryLimitError, RuntimeFault
from edge_kv.files import locked
from edge_kv.kv_plan import StateBuffer
from edge_kv.ple import PleTable
from edge_kv.runtime.cache import cache_folder
from edge_kv.runtime.native_library import EXECUTORCH, load_library
from edge_kv.runtime.session import STORAGE, Ids, Logits, Session
from edge_kv.runtime.threads import thread_count

_ERROR_BYTES = 512
_PATH_LIMIT = 255  # XNNPACK's option holds this many characters


class ExecuTorchSession(Session):
    """A session on ExecuTorch's C++ runtime; both methods are loaded at once and share the state.

    The thread pool belongs to the process: sessions of one process run one after another, with the
    thread count of the session that was loaded last.
    """

    engine = "executorch"

    def __init__(self, artifact: Artifact, threads: int | None = None, cache: bool = True) -> None:
        """Load the programs of `artifact`.

        `threads` defaults to the physical cores; without `cache` weights are packed to the heap.

        Raises:
            ArtifactError: no executorch programs, or they do not hold the plan's state.
            RuntimeFault: no executorch wheel or no C++ compiler on this machine.
            MemoryLimitError: the state does not fit.
        """
        begin = time.perf_counter()
        backend = artifact.backend(self.engine)
        self._handle: Any = None
        self._error = ctypes.create_string_buffer(_ERROR_BYTES)
        self.threads = thread_count(threads)
        self._native = load_library()
        super().__init__(artifact)
        if "decode" not in backend.programs:
            raise ArtifactError(f"{artifact.root} has no decode program; export again.")
        self._file = backend.programs["decode"].file
        entry = artifact.manifest.ple
        self._ple = PleTable(artifact.path(entry.file), entry) if entry else None
        with ExitStack() as on_error:
            on_error.callback(self._close_engine)
            self._handle = self._open(cache)
            self.state = self._views(backend.details.get("state"))
            on_error.pop_all()
        self.stats.load_seconds = time.perf_counter() - begin

    def _open(self, cache: bool) -> Any:
        path = self.artifact.path(self._file)
        digest = self.artifact.manifest.files[self._file].sha256
        packed = _packed_file(digest) if cache else None
        if packed is None:
            handle = self._open_with(path, "")
        else:
            with locked(packed.with_suffix(".lock")):
                if packed.is_file():
                    handle = self._open_with(path, str(packed))
                else:  # a packing that is cut off must not be taken for a finished one
                    part = packed.with_suffix(".part")
                    part.unlink(missing_ok=True)
                    handle = self._open_with(path, str(part))
                    if handle and part.is_file():
                        part.replace(packed)
        if not handle:
            reason = self._error.value.decode(errors="replace")
            fault: EdgeKVError = ArtifactError(f"ExecuTorch cannot load {path}: {reason}.")
            raise MemoryLimitError(str(fault)) if "memory" in reason.lower() else fault
        return handle

    def _open_with(self, path: Path, packed: str) -> Any:
        return self._native.edge_kv_open(
            os.fsencode(path), packed.encode(), self.threads, self._error, _ERROR_BYTES
        )

    def _views(self, offsets: Any) -> dict[str, npt.NDArray[Any]]:
        """The state buffers as arrays over the program's arena."""
        size = ctypes.c_int64()
        base = self._native.edge_kv_state(self._handle, ctypes.byref(size))
        damaged = ArtifactError(
            f"{self.artifact.path(self._file)} does not hold the state its KV plan asks for; "
            "export again."
        )
        if not isinstance(offsets, dict) or not base:
            raise damaged
        views: dict[str, npt.NDArray[Any]] = {}
        end = 0
        for b in self.plan.buffers:
            at = offsets.get(b.name)
            if not isinstance(at, int) or not end <= at <= size.value - b.bytes:
                raise damaged
            views[b.name] = _view(base + at, b)
            end = at + b.bytes
        return views

    def _run_prefill(self, ids: Ids, pos: int) -> None:
        tokens = np.ascontiguousarray(ids)
        rows = self._ple.rows(tokens, self.config.n_own) if self._ple else None
        status = self._native.edge_kv_prefill(
            self._handle, tokens.ctypes.data, len(tokens), pos, _address(rows),
            self._error, _ERROR_BYTES,
        )  # fmt: skip
        self._check(status, "prefill", pos)

    def _run_decode(self, token: int, pos: int) -> Logits:
        logits = np.empty(self.config.vocab_size, np.float32)
        ids = np.array([token], np.int64)
        rows = self._ple.rows(ids, self.config.n_layers) if self._ple else None
        status = self._native.edge_kv_decode(
            self._handle, token, pos, _address(rows), logits.ctypes.data, len(logits),
            self._error, _ERROR_BYTES,
        )  # fmt: skip
        self._check(status, "decode", pos)
        return logits

    def _check(self, status: int, method: str, pos: int) -> None:
        if status:
            reason = self._error.value.decode(errors="replace")
            raise RuntimeFault(f"ExecuTorch failed in {method} at position {pos}: {reason}.")

    def _close_engine(self) -> None:
        self.state = {}  # views of memory that goes with the engine
        if self._ple:
            self._ple.close()
        if self._handle:
            self._native.edge_kv_close(self._handle)
            self._handle = None


def _address(rows: npt.NDArray[np.float32] | None) -> int | None:
    return None if rows is None else rows.ctypes.data


def _view(address: int, buffer: StateBuffer) -> npt.NDArray[Any]:
    memory = (ctypes.c_uint8 * buffer.bytes).from_address(address)
    rows: npt.NDArray[Any] = np.ctypeslib.as_array(memory).view(STORAGE[buffer.dtype])
    return rows.reshape(buffer.shape)


def _packed_file(digest: str) -> Path | None:
    """Where weights packed for this CPU are kept; None for a program that has no digest yet.

    The layout depends on the CPU's instructions and on the version of XNNPACK.
    """
    if not digest:
        return None
    name = f"{digest[:24]}-{EXECUTORCH}-{_cpu()}.bin"
    path = cache_folder("executorch") / name
    return path if len(os.fsencode(path)) <= _PATH_LIMIT else None


def _cpu() -> str:
    """A digest of the CPU's model and instruction sets."""
    facts = {platform.machine(), platform.processor()}
    keys = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts.update(line for line in lines if line.startswith(keys))
    except OSError:
        pass
    return hashlib.sha256(repr(sorted(facts)).encode()).hexdigest()[:8]
