"""ExecuTorchSession: the `.pte` of an artifact on our native engine, without torch.

The program owns its state: `session.state` is a view of the memory it was planned into, so
snapshots and rewinds work as on any other engine. The weights of a native program are mapped from
the artifact's weight file as they were exported.
"""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_kv import heap
from edge_kv.artifact import Artifact
from edge_kv.errors import ArtifactError, EdgeKVError, MemoryLimitError, RuntimeFault
from edge_kv.manifest import DRAFT, Backend, Program
from edge_kv.plan import Table
from edge_kv.ple import PleTable
from edge_kv.runtime import experts, mapped
from edge_kv.runtime.executorch_contract import (
    METHODS,
    check_contract,
    fed_layers,
    state_name,
    tables,
)
from edge_kv.runtime.native_library import load_library
from edge_kv.runtime.session import (
    STORAGE,
    Draft,
    Hidden,
    Ids,
    Logits,
    Session,
    scored_tokens,
)
from edge_kv.runtime.threads import return_threads, share_threads, thread_count

_ERROR_BYTES = 512


class ExecuTorchSession(Session):
    """A session on ExecuTorch's C++ runtime; both methods are loaded at once and share the state.

    A native program runs on threads of the session. A portable one runs on threads of the process:
    open sessions with portable programs have the same number of them (`threads.share_threads`).
    """

    engine = "executorch"

    def __init__(self, artifact: Artifact, threads: int | None = None, cache: bool = True) -> None:
        """Load the programs of `artifact`.

        `threads` defaults to the physical cores; `cache` changes nothing: weights are mapped, and
        XNNPACK packs those of a portable program to the heap.

        Raises:
            ArtifactError: no executorch programs, or not those that the manifest describes.
            RuntimeFault: no executorch wheel or no C++ compiler on this machine, or an open
                session has another number of threads.
            MemoryLimitError: the state does not fit.
        """
        begin = time.perf_counter()
        backend = artifact.backend(self.engine)
        self._handle: Any = None
        self._ple: PleTable | None = None
        self._error = ctypes.create_string_buffer(_ERROR_BYTES)
        self.threads = thread_count(threads)
        self._native = load_library()
        super().__init__(artifact)
        for name in METHODS:
            if name not in backend.programs:
                raise ArtifactError(f"{artifact.root} has no {name} program; export again.")
        path = artifact.program(backend.programs["decode"].file)
        entry = artifact.manifest.ple
        needs = artifact.manifest.needs
        # Whether there are weights that are only looked up in: what a prompt touched of them is not
        # read again. Experts would be, and they are many pages.
        self._looks_up = sum(needs.weights.values()) > needs.dense and not needs.experts
        self._prefilled = False  # whether the last step was one of a prompt
        self._layers = {name: fed_layers(artifact, name) for name in METHODS}
        with ExitStack() as on_error:
            on_error.callback(self._close_engine)
            if backend.details.get("attention") == "portable":
                share_threads(self, self.threads)
            self._handle = self._open(path, backend)
            if self.has_drafter:
                self._load_draft(backend.programs[DRAFT], path)
            check_contract(artifact, path, self._describe().splitlines())
            self.state = {t.name: self._view(t) for t in tables(artifact)}
            self._ple = PleTable(artifact.path(entry.file), entry) if entry else None
            self.stats.expert_bank_bytes = experts.keep_experts(self._native, artifact)
            on_error.pop_all()
        self.stats.load_seconds = time.perf_counter() - begin

    def _open(self, path: Path, backend: Backend) -> Any:
        weights = backend.details.get("weights", "")
        if weights and weights not in backend.files:
            raise ArtifactError(
                f"{self.artifact.root}: the manifest does not list the weights {weights!r} of its "
                "executorch program; export again."
            )
        self._folder = self.artifact.path(weights).parent if weights else path.parent
        before = mapped.spans(self._folder)
        handle = self._native.edge_kv_open(
            os.fsencode(path),
            os.fsencode(self.artifact.path(weights)) if weights else b"",
            self.threads,
            bool(backend.details.get("exact")),
            self._error,
            _ERROR_BYTES,
        )
        if not handle:
            reason = self._error.value.decode(errors="replace")
            fault: EdgeKVError = ArtifactError(f"ExecuTorch cannot load {path}: {reason}.")
            raise MemoryLimitError(str(fault)) if "memory" in reason.lower() else fault
        self._mapped = mapped.spans(self._folder) - before if weights else set()
        return handle

    def _describe(self) -> str:
        size = self._native.edge_kv_describe(self._handle, None, 0)
        text = ctypes.create_string_buffer(size)
        self._native.edge_kv_describe(self._handle, text, size)
        return text.raw.decode(errors="replace")

    def _view(self, table: Table) -> npt.NDArray[Any]:
        """A table as an array over the program's memory."""
        size = ctypes.c_int64()
        name = state_name(table.name).encode()
        address = self._native.edge_kv_buffer(self._handle, name, ctypes.byref(size))
        if not address or size.value != table.bytes:
            raise ArtifactError(
                f"{self.artifact.root}: the program does not hold the table {table.name} its plan "
                "asks for; export again."
            )
        memory = (ctypes.c_uint8 * table.bytes).from_address(address)
        rows: npt.NDArray[Any] = np.ctypeslib.as_array(memory).view(STORAGE[table.dtype])
        return rows.reshape(table.shape)

    def _run_prefill(self, ids: Ids, pos: int) -> None:
        self._prefilled = True
        tokens = np.ascontiguousarray(ids)
        rows = self._ple.rows(tokens, self._layers["prefill"]) if self._ple else None
        status = self._native.edge_kv_prefill(
            self._handle, tokens.ctypes.data, len(tokens), pos, _address(rows),
            self._error, _ERROR_BYTES,
        )  # fmt: skip
        self._check(status, "prefill", pos)

    def _run_decode(self, ids: Ids, pos: int) -> Logits:
        if self._prefilled:
            self._prefilled = False
            heap.release(self._native)
            if self._looks_up:
                mapped.let_go(self._mapped, self._folder)
        tokens, vocab = np.ascontiguousarray(ids), self.artifact.tokens.vocab
        logits = np.empty((len(tokens), vocab), np.float32)
        rows = self._ple.rows(tokens, self._layers["decode"]) if self._ple else None
        status = self._native.edge_kv_decode(
            self._handle, tokens.ctypes.data, len(tokens), pos, _address(rows),
            logits.ctypes.data, vocab, self._error, _ERROR_BYTES,
        )  # fmt: skip
        self._check(status, "decode", pos)
        if self.has_drafter:
            self._hidden = np.empty((len(tokens), self._width), np.float32)
            status = self._native.edge_kv_hidden(
                self._handle, self._hidden.ctypes.data, self._hidden.size, self._error, _ERROR_BYTES
            )
            self._check(status, "decode", pos)
        return logits

    def _load_draft(self, program: Program, path: Path) -> None:
        entry = self.artifact.manifest.drafter
        self._width = entry.width if entry else 0
        self._scored = scored_tokens(self.artifact, program)
        read = [t.name for t in program.inputs[3:]]
        odd = [name for name in read if name not in self.plan.by_name]
        if odd or not self._scored:
            raise ArtifactError(
                f"{path} does not take and give what a drafter of its plan does; export again."
            )
        names = "\n".join(map(state_name, read)).encode()
        if self._native.edge_kv_load_draft(self._handle, names, self._error, _ERROR_BYTES):
            reason = self._error.value.decode(errors="replace")
            raise ArtifactError(f"ExecuTorch cannot load {path}: {reason}.")

    def _run_draft(self, token: Ids, hidden: Hidden, pos: int) -> Draft:
        logits = np.empty(self._scored, np.float32)
        some = self._scored < self.artifact.tokens.vocab
        tokens = np.empty(self._scored, np.int64) if some else None
        carry = np.empty(self._width, np.float32)
        status = self._native.edge_kv_draft(
            self._handle, int(token[0]), pos, hidden.ctypes.data, carry.ctypes.data, self._width,
            logits.ctypes.data, None if tokens is None else tokens.ctypes.data, self._scored,
            self._error, _ERROR_BYTES,
        )  # fmt: skip
        self._check(status, DRAFT, pos)
        return Draft(logits, tokens, carry)

    def _check(self, status: int, method: str, pos: int) -> None:
        if status:
            reason = self._error.value.decode(errors="replace")
            raise RuntimeFault(f"ExecuTorch failed in {method} at position {pos}: {reason}.")

    def _weights(self) -> tuple[set[mapped.Span], Path]:
        return self._mapped, self._folder

    def _close_engine(self) -> None:
        self.state = {}  # views of memory that goes with the engine
        return_threads(self)
        if self._ple:
            self._ple.close()
        if self._handle:
            experts.forget_experts(self._native, self.artifact)
            self._native.edge_kv_close(self._handle)
            self._handle = None


def _address(rows: npt.NDArray[np.float32] | None) -> int | None:
    return None if rows is None else rows.ctypes.data
