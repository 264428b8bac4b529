"""Session: the contract every engine implements, and everything about it that no engine decides.

A session owns the state buffers of one artifact, the ids fed so far and the rules of moving back.
Engines subclass it and run programs over the buffers: `_run_prefill` and `_run_decode`.
"""

from __future__ import annotations

import mmap
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from edge_kv.artifact import Artifact
from edge_kv.errors import ContextFullError, PromptError, RewindError, RuntimeFault, SnapshotError
from edge_kv.manifest import DRAFT, Program, draft_outputs
from edge_kv.memory import CHECKPOINTS
from edge_kv.plan import Plan, Table
from edge_kv.runtime import snapshot as snapshots
from edge_kv.runtime.huge_pages import FilledState, use_huge_pages
from edge_kv.runtime.mapped import Span
from edge_kv.runtime.snapshot import Checkpoint, common_prefix

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
Hidden = npt.NDArray[np.float32]
_Self = TypeVar("_Self", bound="Session")
_Result = TypeVar("_Result")

# Storage of a plan dtype. int8 rows may be unsigned to an engine; the bytes are its own affair.
STORAGE: dict[str, type[np.generic]] = {"f32": np.float32, "f16": np.float16, "int8": np.int8}
BLOCK = 64  # tokens whose rows copies of texts that begin alike share
_LATENCIES = 16_384  # newest decode latencies kept for the percentiles


@dataclass
class Stats:
    """What a session has done since it was loaded; times in seconds of wall clock."""

    load_seconds: float = 0.0
    kv_bytes: int = 0
    expert_bank_bytes: int = 0  # 0: all experts stay where they are mapped
    huge_page_bytes: int = 0  # of weights; 0: they stay in pages of their file
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0  # fed to passes, refused drafts included
    decode_passes: int = 0
    refused_tokens: int = 0  # drafts that were fed and taken back
    decode_seconds: float = 0.0
    draft_runs: int = 0  # of the drafter that an artifact holds
    draft_seconds: float = 0.0
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES), repr=False)

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second; 0 before the first."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Decoded tokens a second, refused drafts left out; 0 before the first."""
        kept = self.decode_tokens - self.refused_tokens
        return kept / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def drafted_tokens(self) -> int:
        """Drafts that were fed."""
        return self.decode_tokens - self.decode_passes

    @property
    def accepted_tokens(self) -> int:
        """Of them, those that stayed."""
        return self.drafted_tokens - self.refused_tokens

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass of decode brought; 0 before the first."""
        kept = self.decode_tokens - self.refused_tokens
        return kept / self.decode_passes if self.decode_passes else 0.0

    def latency(self, percent: float) -> float:
        """Seconds a pass of decode took at `percent` (50: median); 0 before the first."""
        if not self.latencies:
            return 0.0
        ordered = sorted(self.latencies)  # numpy's percentile would import 2 MB of numpy.ma
        whole, part = divmod(percent / 100 * (len(ordered) - 1), 1)
        low, high = ordered[int(whole)], ordered[min(int(whole) + 1, len(ordered) - 1)]
        return low + (high - low) * part


@dataclass(frozen=True)
class Copy:
    """All live rows of a session as they were after `tokens`, and the checkpoints before.

    The rows of tables without a window come in blocks, one for each `BLOCK` tokens, which never
    change: they follow from the tokens up to their end. Copies of texts that begin alike hold the
    same blocks. What changes from token to token, rings and blocks that are not full, is a copy's
    own.
    """

    tokens: tuple[int, ...]
    written: int
    blocks: tuple[bytes, ...]
    rest: bytes  # the rows behind the last block, then those of the rings
    checkpoints: tuple[Checkpoint, ...]

    def begins_like(self, tokens: Sequence[int]) -> tuple[bytes, ...]:
        """The blocks that a copy of `tokens` would have too."""
        return self.blocks[: common_prefix(self.tokens, tokens) // BLOCK]

    def pieces(self) -> Iterator[bytes]:
        """All rows, as they lie in memory."""
        yield from (*self.blocks, self.rest)
        for point in self.checkpoints:
            yield from point.rows


def bytes_of(copies: Iterable[Copy]) -> int:
    """Bytes of all rows of `copies`; what several of them hold counts once."""
    return sum({id(piece): len(piece) for copy in copies for piece in copy.pieces()}.values())


@dataclass(frozen=True)
class Draft:
    """What a drafter says of the token after one."""

    logits: Logits  # [n] of some tokens
    tokens: Ids | None  # which these are [n]; None: all, in their order
    hidden: Hidden  # [width], what the next draft takes up

    @property
    def token(self) -> int:
        """The likeliest one."""
        best = int(self.logits.argmax())
        return best if self.tokens is None else int(self.tokens[best])


class Session(ABC):
    """One running model: state buffers, position, and the two programs.

    The last token of a prompt goes through `decode`, the others through `prefill`. Tokens that are
    only supposed to come next (drafts) go through `decode_many` with it, and are taken back with
    `rewind` as far as they turn out to be others. A session is used from one thread. After Ctrl-C
    or an error it stands where the last finished step left it.
    """

    engine: ClassVar[str]

    def __init__(self, artifact: Artifact) -> None:
        """Allocate the state of `artifact`; memory is touched only as rows are written.

        Raises:
            ArtifactError: a file is another artifact's.
        """
        artifact.check_samples()
        self.artifact = artifact
        self.plan = artifact.plan
        self.stats = Stats(kv_bytes=self.plan.bytes)
        self.state: dict[str, npt.NDArray[Any]] = {t.name: _allocate(t) for t in self.plan.tables}
        self._filled = FilledState(self.plan)
        self._tokens: list[int] = []
        self._written = 0
        self._checkpoints: list[Checkpoint] = []  # by length
        self._closed = False
        self._hidden: Hidden | None = None  # [n, width] of the last pass of decode
        self._hidden_start = 0  # position of its first token

    @property
    def backend(self) -> str:
        """The backend whose programs this engine runs: that of its own name, unless it says so."""
        return self.engine

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids fed so far, in order."""
        return tuple(self._tokens)

    @property
    def pos(self) -> int:
        """Position of the next token: how many were fed."""
        return len(self._tokens)

    @property
    def written(self) -> int:
        """High-water mark: positions below it may have been written since the last reset.

        It does not fall when rewinding: a ring slot keeps the newest position written to it, and
        writing on from an earlier position meets that same slot again with that same position, so
        the rings hold `[written - slots, written)` whatever was rewound in between.
        """
        return self._written

    @property
    def drafts(self) -> int:
        """Most tokens that `decode_many` takes behind the first."""
        backend = self.artifact.manifest.backends.get(self.backend)
        runs_any = backend is None or backend.checks_drafts  # None: of no exported program
        return self.plan.drafts if runs_any else 0

    @property
    def has_drafter(self) -> bool:
        """Whether the artifact holds what `draft` runs."""
        manifest = self.artifact.manifest
        backend = manifest.backends.get(self.backend)
        return bool(manifest.drafter and backend and DRAFT in backend.programs)

    @property
    def hidden(self) -> Hidden | None:
        """Hidden state [width] of the newest token fed, which the first draft behind it takes up.

        None unless that token went through `decode` with the last step, and without a drafter.
        """
        row = self.pos - 1 - self._hidden_start
        if self._hidden is None or not 0 <= row < len(self._hidden):
            return None
        state: Hidden = self._hidden[row]
        return state

    @property
    def closed(self) -> bool:
        return self._closed

    def prefill(self, ids: Iterable[int]) -> None:
        """Feed `ids` (any number, none included) in chunks of `plan.chunk`; yields no logits.

        Each chunk is a step of its own: after Ctrl-C the finished ones stay fed.

        Raises:
            PromptError: something in `ids` is not a token id of the model.
            ContextFullError: they do not fit behind `pos`.
        """
        row = self._checked(ids)
        self._hidden = None
        for start in range(0, len(row), self.plan.chunk):
            part = row[start : start + self.plan.chunk]
            begin = time.perf_counter()
            self._step(part, self._run_prefill)
            self.stats.prefill_seconds += time.perf_counter() - begin
            self.stats.prefill_tokens += len(part)

    def decode(self, token: int) -> Logits:
        """Feed one id and return the logits of its successor, float32 [vocab], a fresh array.

        Raises:
            PromptError: `token` is not a token id of the model.
            ContextFullError: the context is full.
        """
        logits: Logits = self._pass(self._checked((token,)))[0]
        return logits

    def decode_many(self, ids: Iterable[int]) -> Logits:
        """Feed up to `drafts` + 1 ids in one pass: float32 [n, vocab], a fresh array.

        Row i holds the logits of the successor of `ids[i]`. The ids of the last pass can always be
        taken back with `rewind`.

        Raises:
            PromptError: something in `ids` is not a token id of the model, or they are none or too
                many.
            ContextFullError: they do not fit behind `pos`.
        """
        row = self._checked(ids)
        if not 1 <= len(row) <= self.drafts + 1:
            raise PromptError(
                f"A pass takes 1 … {self.drafts + 1} tokens, not {len(row)}; feed fewer at a time, "
                "or export with more --drafts."
            )
        return self._pass(row)

    def draft(self, token: int, hidden: Hidden) -> Draft:
        """What may come after `token`, of which nothing is written; nothing is fed.

        Args:
            token: the one that is to stand at `pos`, or the last draft behind it.
            hidden: `hidden` of the session, then that of the draft before.

        Raises:
            PromptError: `token` is not a token id of the model.
            RuntimeFault: the artifact has no drafter, or nothing was fed.
        """
        row = self._checked((token,))
        entry = self.artifact.manifest.drafter
        if not self.has_drafter or entry is None or not self.pos:
            raise RuntimeFault(
                f"{self.artifact.root} has no drafter for engine {self.engine}, or nothing was fed "
                "yet; export it with --assistant, and feed a token first."
            )
        taken = np.ascontiguousarray(hidden, np.float32)
        if taken.shape != (entry.width,):
            raise RuntimeFault(
                f"A draft takes up {entry.width} values, not {list(taken.shape)}; give it "
                "`hidden` of the session, or that of the draft before."
            )
        begin = time.perf_counter()
        draft = self._run_draft(row, taken, self.pos)
        self.stats.draft_seconds += time.perf_counter() - begin
        self.stats.draft_runs += 1
        return draft

    def _pass(self, ids: Ids) -> Logits:
        begin = time.perf_counter()
        self._hidden, self._hidden_start = None, self.pos
        logits = self._step(ids, self._run_decode)
        seconds = time.perf_counter() - begin
        self.stats.decode_seconds += seconds
        self.stats.decode_tokens += len(ids)
        self.stats.decode_passes += 1
        self.stats.latencies.append(seconds)
        return logits

    def rewind(self, n: int) -> None:
        """Forget the last `n` tokens; costs nothing, the rows are masked by position.

        Raises:
            RewindError: `n` is negative or beyond `max_rewind`.
        """
        self._check_open()
        to = self.pos - n
        if n < 0 or not self.plan.can_rewind(to, self._written):
            raise RewindError(
                f"Cannot rewind {n} tokens from position {self.pos}: the rings reach back "
                f"{self.max_rewind}; rewind at most that far, or reset and prefill again."
            )
        del self._tokens[to:]
        if to == 0:
            self._written = 0

    def refuse(self, n: int) -> None:
        """Take back the last `n` ids of the newest `decode_many`: drafts that did not come."""
        self.rewind(n)
        self.stats.refused_tokens += n

    @property
    def rounding(self) -> float:
        """A likeliest id whose logit leads by less may be another one in a pass of several tokens.

        It is three times the largest change of a lead that the export gate saw in some forty rows:
        a reply has hundreds. Artifacts from before that was measured have twice the largest
        |Δlogit| of programs with float kernels.
        """
        parity = self.artifact.manifest.parity.get(self.backend)
        if parity is None:
            return 0.0
        if parity.lead_change is not None:
            return 3 * parity.lead_change
        return 2 * parity.lowering.get("max_abs", 0.0)

    @property
    def max_rewind(self) -> int:
        """How many tokens `rewind` can go back without starting over."""
        return self.pos - self.plan.earliest(self._written)

    def checkpoint(self, at: int, *, spare: bool = False) -> None:
        """Keep the rings as they are after the first `at` tokens, for `resume` to go back to.

        Does nothing where the rings no longer hold those rows, or where there are no rings. At most
        `CHECKPOINTS` are kept: `spare` ones make room for the others, of which the first and the
        newest stay, and those between as far apart as they come.
        """
        self._check_open()
        if not 0 < at <= self.pos or not self.plan.can_rewind(at, self._written):
            return
        rows = tuple(map(bytes, snapshots.ring_rows(self.plan, self.state, at, self._written)))
        if not rows:
            return
        kept = Checkpoint(tuple(self._tokens[:at]), self._written, rows, spare)
        points = [c for c in self._checkpoints if len(c.tokens) != at]
        self._checkpoints = points = sorted([*points, kept], key=lambda c: len(c.tokens))
        if len(points) > CHECKPOINTS:
            gaps = [b - a for a, b in pairwise([0, *(len(c.tokens) for c in points)])]
            less = [i for i, c in enumerate(points) if c.spare] or range(1, len(points) - 1)
            del points[min(less, key=lambda i: gaps[i])]

    def resume(self, ids: Sequence[int]) -> int:
        """Go back to the longest beginning of `ids` that is still held, and return its length.

        That is the common prefix with `tokens` where the rings reach back so far, else the last
        checkpoint before it, else nothing.
        """
        self._check_open()
        common, best = self._held(ids)
        if best:
            self.reset()  # so that an interrupt leaves nothing half put back
            rows = snapshots.ring_rows(self.plan, self.state, common, best.written)
            for piece, kept in zip(rows, best.rows, strict=True):
                piece[:] = kept
            self._tokens, self._written = list(best.tokens), best.written
        else:
            self.rewind(self.pos - common)
        return common

    def reusable(self, ids: Sequence[int]) -> int:
        """How many of `ids` would be held after `resume(ids)`."""
        self._check_open()
        return self._held(ids)[0]

    def _held(self, ids: Sequence[int]) -> tuple[int, Checkpoint | None]:
        """The longest beginning of `ids` that is held, and the checkpoint that has it, if one."""
        return held_of(self.plan, self._tokens, self._written, self._checkpoints, ids)

    def copy(self, beside: Iterable[Copy] = ()) -> Copy:
        """All live rows, for `put_back`; the blocks that a copy `beside` has are that one's.

        Those may differ from the rows here as the same tokens do when they are read in chunks that
        begin elsewhere: by rounding.
        """
        self._check_open()
        blocks = list(self._shared(beside))
        for start in range(BLOCK * len(blocks), self.pos - BLOCK + 1, BLOCK):
            blocks.append(b"".join(self._rows_of(start, start + BLOCK)))
        rest = b"".join(self._rest(len(blocks), self.pos, self._written))
        return Copy(self.tokens, self._written, tuple(blocks), rest, self.own_checkpoints())

    def copy_bytes(self, beside: Sequence[Copy] = ()) -> int:
        """Bytes that `copy` would add to those of the copies `beside`."""
        rows = self._rest(len(self._shared(beside)), self.pos, self._written)
        known = {id(piece) for copy in beside for piece in copy.pieces()}
        kept = (piece for point in self.own_checkpoints() for piece in point.rows)
        return sum(r.nbytes for r in rows) + sum(len(p) for p in kept if id(p) not in known)

    def _shared(self, beside: Iterable[Copy]) -> tuple[bytes, ...]:
        """The most blocks of what is held that one of `beside` has."""
        return max((c.begins_like(self._tokens) for c in beside), key=len, default=())

    def _rows_of(self, start: int, stop: int) -> Iterator[memoryview]:
        return snapshots.append_rows(self.plan, self.state, start, stop)

    def _rest(self, blocks: int, pos: int, written: int) -> Iterator[memoryview]:
        """The live rows below `pos` but those of so many blocks."""
        yield from self._rows_of(BLOCK * blocks, pos)
        yield from snapshots.ring_rows(self.plan, self.state, pos, written)

    def own_checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoints of what is held now; others are of texts that were reset."""
        return tuple(p for p in self._checkpoints if p.begins(self._tokens))

    def put_back(self, kept: Copy) -> None:
        """Continue from a `copy` of this session, as if nothing had been fed since.

        Blocks of tokens that it holds now stay where they are.
        """
        there = len(kept.begins_like(self._tokens))
        self.reset()  # so that an interrupt leaves nothing half put back
        self._checkpoints.clear()
        for start, block in enumerate(kept.blocks[there:], there):
            _fill(self._rows_of(BLOCK * start, BLOCK * (start + 1)), block)
        _fill(self._rest(len(kept.blocks), len(kept.tokens), kept.written), kept.rest)
        self._checkpoints = list(kept.checkpoints)
        self._tokens, self._written = list(kept.tokens), kept.written

    def reset(self) -> None:
        """Forget everything but checkpoints; buffers stay allocated."""
        self._check_open()
        self._tokens.clear()
        self._written = 0
        self._hidden = None

    def snapshot(self, path: str | Path, note: dict[str, Any] | None = None) -> None:
        """Write the live rows, the ids and their checkpoints to `path` (beside, then renamed).

        `note` is kept with them for whoever restores: anything JSON can say.

        Raises:
            SnapshotError: the file cannot be written.
        """
        self._check_open()
        snapshots.write(
            Path(path),
            self.identity,
            self.plan,
            self.state,
            self._tokens,
            self._written,
            note or {},
            self.own_checkpoints(),
        )

    def restore(self, path: str | Path) -> dict[str, Any]:
        """Continue from a snapshot: the next logits are those of the session it is of, bit for bit
        if that was on the same engine.

        Returns the note it was taken with.

        Raises:
            SnapshotError: missing, cut off, changed, or of another model or plan; the session is
                then as it was (empty if the file failed after it had been verified).
        """
        self._check_open()
        with snapshots.verified(Path(path), self.identity, self.plan) as held:
            if not all(0 <= token < self.artifact.tokens.vocab for token in held.tokens):
                raise SnapshotError(f"{path} holds ids that are no tokens here; take it again.")
            self.reset()
            self._checkpoints.clear()
            try:
                self._checkpoints = held.load(self.state)
            except OSError as e:
                raise SnapshotError(f"Cannot read {path} ({e.strerror}); session emptied.") from e
            self._tokens = list(held.tokens)
            self._written = held.written
            self._filled.cover(self.state, self.pos)
            return held.note

    def close(self) -> None:
        """Free buffers and engine; closing twice is allowed."""
        if not self._closed:
            self._closed = True
            self._close_engine()
            self._checkpoints.clear()
            self.state.clear()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _run_prefill(self, ids: Ids, pos: int) -> None:
        """Write the rows of `ids` (int64 [n], 1 <= n <= plan.chunk) at positions pos … pos+n-1."""

    @abstractmethod
    def _run_decode(self, ids: Ids, pos: int) -> Logits:
        """Write the rows of `ids` (int64 [n], 1 <= n <= drafts + 1) and return their logits.

        They are a fresh float32 [n, vocab]. Of an artifact with a drafter the hidden states
        [n, width] of the ids are left in `_hidden`.
        """

    def _run_draft(self, token: Ids, hidden: Hidden, pos: int) -> Draft:
        """What the drafter says behind `token` [1] in a burst at `pos`, from `hidden` [width]."""
        raise NotImplementedError

    def use_huge_pages(self) -> None:
        """Put the weights that a token reads into huge pages; see `runtime.load`.

        `stats.huge_page_bytes` says how many bytes of them are in such pages now; none where the
        system has no huge pages, or not enough memory for a copy.
        """
        self.stats.huge_page_bytes = use_huge_pages(*self._weights())

    def _weights(self) -> tuple[set[Span], Path]:
        """Mappings of the weights that a token reads, and the folder of their files."""
        return set(), self.artifact.root

    def _close_engine(self) -> None:  # noqa: B027 - an engine without resources has nothing to do
        """Release what the engine holds."""

    @property
    def identity(self) -> snapshots.Identity:
        """What a snapshot of this session belongs to."""
        return snapshots.Identity(
            engine=self.engine,
            model=self.artifact.model_digest,
            plan=self.artifact.plan_digest,
        )

    def _step(self, ids: Ids, run: Callable[[Ids, int], _Result]) -> _Result:
        """Run one program over `ids` and commit them.

        The high-water mark rises before the run: an interrupted one may have written its rows.
        Its positions can still be written again, since ring slots = window + chunk - 1.
        """
        pos = self.pos
        self._checkpoints = [c for c in self._checkpoints if len(c.tokens) <= pos]
        self._written = max(self._written, pos + len(ids))
        self._filled.cover(self.state, pos)
        result = run(ids, pos)
        self._tokens.extend(ids.tolist())
        return result

    def _checked(self, ids: Iterable[int]) -> Ids:
        """`ids` as int64 [n], open, in range and within the context."""
        self._check_open()
        raw = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
        if raw.size == 0:
            return np.zeros(0, np.int64)
        if raw.ndim != 1 or raw.dtype.kind not in "iu":
            raise PromptError(
                f"Token ids must be a flat list of whole numbers, not {raw.dtype} {raw.shape}."
            )
        bad = np.flatnonzero((raw < 0) | (raw >= self.artifact.tokens.vocab))
        if bad.size:
            raise PromptError(
                f"Token id {raw[bad[0]]} at index {bad[0]} is outside 0 … "
                f"{self.artifact.tokens.vocab - 1}; encode the text with this model's tokenizer."
            )
        if self.pos + len(raw) > self.plan.ctx:
            raise ContextFullError(
                f"{len(raw)} more tokens do not fit at position {self.pos} of a context of "
                f"{self.plan.ctx}; shorten the prompt, rewind or reset, or export a larger --ctx."
            )
        return raw.astype(np.int64)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeFault("This session is closed; load the artifact again.")


def scored_tokens(artifact: Artifact, program: Program) -> int:
    """How many logits a draft program gives; 0 where its outputs are not those of one."""
    entry = artifact.manifest.drafter
    shapes = [t.shape for t in program.outputs if t.name == "logits"]
    scored = shapes[0][0] if shapes and len(shapes[0]) == 1 else 0
    vocab = artifact.tokens.vocab
    if entry is None or not isinstance(scored, int) or not 0 < scored <= vocab:
        return 0
    return scored if draft_outputs(vocab, entry.width, scored) == program.outputs else 0


def held_of(
    plan: Plan,
    tokens: Sequence[int],
    written: int,
    checkpoints: Iterable[Checkpoint],
    ids: Sequence[int],
) -> tuple[int, Checkpoint | None]:
    """How many of `ids` a state of `tokens` still has, and which checkpoint has them, if one."""
    common = common_prefix(tokens, ids)
    if not plan.can_rewind(common, written):
        common = 0
    best: Checkpoint | None = None
    for point in checkpoints:
        if len(point.tokens) > common and point.begins(ids):
            common, best = len(point.tokens), point
    return common, best


def _fill(rows: Iterable[memoryview], data: bytes) -> None:
    """Write `data` over `rows`, one after the other."""
    source, at = memoryview(data), 0
    for piece in rows:
        piece[:] = source[at : at + piece.nbytes]
        at += piece.nbytes


def _allocate(table: Table) -> npt.NDArray[Any]:
    """Zeroed page-aligned memory of a table that costs RAM only where it is written."""
    if sys.platform == "win32":
        pages = mmap.mmap(-1, table.bytes)
    else:  # private: a shared mapping would be counted as shmem, not as anonymous memory
        pages = mmap.mmap(-1, table.bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, STORAGE[table.dtype]).reshape(table.shape)
