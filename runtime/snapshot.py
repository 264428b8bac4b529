"""Snapshot files: the live rows of a session, so that a long prompt is read once.

    magic "EDGEKVSN" | u32 version | u32 header bytes | header (JSON) | sections | checkpoints
    | SHA-256 of it all

Integers are little-endian. The header names the engine that took it (any other goes on from it,
with logits that differ as the engines do), the manifest's identity of model and plan, pos, written,
the caller's note and the sections with their bytes. The first section is the ids (int32), then one
follows for every table in plan order: the rows that `Table.held` names, oldest first. Where the
session kept its rings at earlier turns, those rows follow, and the header says of which positions.
Rows stream between file and tables: there is never a second copy of the state in memory. A file is
verified before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edge_kv.errors import SnapshotError
from edge_kv.files import replacing
from edge_kv.memory import CHECKPOINTS
from edge_kv.plan import Plan

MAGIC = b"EDGEKVSN"
VERSION = 2
_PREFIX = struct.Struct("<8sII")
_DIGEST_BYTES = 32
_MAX_HEADER = 1 << 24
_BLOCK = 1 << 20
_SHRANK = "the file shrank while it was read"
State = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Identity:
    """What a snapshot belongs to, and the engine that takes it."""

    engine: str
    model: str
    plan: str

    def owner(self) -> dict[str, str]:
        """It is refused where one of these differs."""
        return {"model": self.model, "plan": self.plan}


@dataclass(frozen=True)
class Checkpoint:
    """The rings as they were after `tokens`; append buffers keep those rows themselves.

    A `spare` one stands at no turn boundary and makes room for those that do.
    """

    tokens: tuple[int, ...]
    written: int
    rows: tuple[bytes, ...]
    spare: bool = False

    def begins(self, ids: Sequence[int]) -> bool:
        """Whether `ids` begin with its tokens."""
        return common_prefix(self.tokens, ids) == len(self.tokens)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids `a` and `b` begin with alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def write(
    path: Path,
    identity: Identity,
    plan: Plan,
    state: State,
    tokens: Sequence[int],
    written: int,
    note: dict[str, Any],
    checkpoints: Sequence[Checkpoint] = (),
) -> None:
    """Stream the live rows to `path`, written beside and renamed.

    `checkpoints` are those of beginnings of `tokens`.

    Raises:
        SnapshotError: the file cannot be written.
    """
    pos = len(tokens)
    header = {
        **asdict(identity),
        "pos": pos,
        "written": written,
        "note": note,
        "sections": _sections(plan, pos, written),
    }
    if checkpoints:
        header["checkpoints"] = [_entry(plan, len(c.tokens), c.written) for c in checkpoints]
    text = json.dumps(header, sort_keys=True).encode()
    digest = hashlib.sha256()
    try:
        with replacing(path) as f:

            def put(data: bytes | memoryview) -> None:
                digest.update(data)
                f.write(data)

            put(_PREFIX.pack(MAGIC, VERSION, len(text)))
            put(text)
            put(np.asarray(tokens, "<i4").tobytes())
            for rows in live_rows(plan, state, pos, written):
                put(rows)
            for piece in (piece for c in checkpoints for piece in c.rows):
                put(piece)
            f.write(digest.digest())
    except OSError as e:
        raise SnapshotError(f"Cannot write the snapshot {path}: {e.strerror}.") from e


class Held:
    """A verified snapshot, open at its rows."""

    def __init__(
        self,
        file: BinaryIO,
        plan: Plan,
        tokens: Sequence[int],
        written: int,
        note: dict[str, Any],
        checkpoints: list[Checkpoint],
    ) -> None:
        self._file = file
        self._plan = plan
        self.tokens = tokens
        self.written = written
        self.note = note
        self.checkpoints = checkpoints  # without their rows

    def load(self, state: State) -> list[Checkpoint]:
        """Read the rows into the buffers of a session; the checkpoints, with their rows."""
        for rows in live_rows(self._plan, state, len(self.tokens), self.written):
            if self._file.readinto(rows) != rows.nbytes:  # type: ignore[attr-defined]
                raise OSError(0, _SHRANK)
        return [replace(c, rows=tuple(self._rings(c, state))) for c in self.checkpoints]

    def _rings(self, point: Checkpoint, state: State) -> Iterator[bytes]:
        for rows in ring_rows(self._plan, state, len(point.tokens), point.written):
            data = self._file.read(rows.nbytes)
            if len(data) != rows.nbytes:
                raise OSError(0, _SHRANK)
            yield data


@contextmanager
def verified(path: Path, identity: Identity, plan: Plan) -> Iterator[Held]:
    """Open a snapshot after checking all of it: digest, owner, and that its rows fit `plan`.

    Raises:
        SnapshotError: missing, cut off, changed, or of another version, model or plan.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise _no_snapshot(path)
        file = path.open("rb")
    except OSError as e:
        raise SnapshotError(f"Cannot open the snapshot {path}: {e.strerror}.") from e
    with file:
        header, body = _verify(file, path)
        _check_owner(path, header, identity)
        pos, written, points = _positions(path, header, body, plan)
        tokens = np.frombuffer(file.read(4 * pos), "<i4").tolist()
        note = header.get("note")
        kept = [Checkpoint(tuple(tokens[:at]), end, ()) for at, end in points]
        yield Held(file, plan, tokens, written, note if isinstance(note, dict) else {}, kept)


def _no_snapshot(path: Path) -> SnapshotError:
    return SnapshotError(f"{path} is not an edge-kv snapshot; give a file `--snapshot` wrote.")


def _verify(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """Check framing and digest: the header and the bytes of all sections, `file` at the first."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size or prefix[: len(MAGIC)] != MAGIC:
        raise _no_snapshot(path)
    _, version, length = _PREFIX.unpack(prefix)
    if version != VERSION:
        raise SnapshotError(
            f"{path} is a snapshot of version {version}, this edge-kv reads {VERSION}; "
            "take it again."
        )
    damaged = SnapshotError(f"{path} is cut off or changed (its digest differs); take it again.")
    body = size - _PREFIX.size - _DIGEST_BYTES
    if not 0 < length <= min(body, _MAX_HEADER):
        raise damaged
    sections = body - length
    digest = hashlib.sha256(prefix)
    file.seek(_PREFIX.size)
    while body > 0 and (block := file.read(min(_BLOCK, body))):
        digest.update(block)
        body -= len(block)
    if file.read(_DIGEST_BYTES) != digest.digest():
        raise damaged
    file.seek(_PREFIX.size)
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as e:
        raise SnapshotError(f"{path} has a header that is not JSON; take it again.") from e
    if not isinstance(header, dict):
        raise SnapshotError(f"{path} has a header that is not an object; take it again.")
    return header, sections


def _check_owner(path: Path, header: dict[str, Any], identity: Identity) -> None:
    for key, mine in identity.owner().items():
        theirs = header.get(key)
        if theirs != mine:
            raise SnapshotError(
                f"{path} belongs to another {key} ({str(theirs)[:12]}, this one is {mine[:12]}); "
                "restore it where it was taken, or prefill again."
            )


def _positions(
    path: Path, header: dict[str, Any], body: int, plan: Plan
) -> tuple[int, int, list[tuple[int, int]]]:
    """Where the session stood, how far it had written, and the same of its checkpoints."""
    whole, kept = _position(header, plan), header.get("checkpoints", [])
    faulty = SnapshotError(f"{path} does not hold the rows its plan asks for; take it again.")
    if (
        whole is None
        or header.get("sections") != _sections(plan, *whole)
        or not isinstance(kept, list)
        or len(kept) > CHECKPOINTS
    ):
        raise faulty
    points: list[tuple[int, int]] = []
    for entry in kept:
        point = _position(entry, plan)
        before = points[-1][0] if points else 0
        if not point or not before < point[0] <= whole[0] or entry != _entry(plan, *point):
            raise faulty
        points.append(point)
    if sum(s["bytes"] for s in (*header["sections"], *kept)) != body:
        raise faulty
    return *whole, points


def _position(entry: Any, plan: Plan) -> tuple[int, int] | None:
    """`pos` and `written` of an entry, if a session may stand like that."""
    pos, written = (entry.get(k) if isinstance(entry, dict) else None for k in ("pos", "written"))
    if type(pos) is not int or type(written) is not int:
        return None
    possible = 0 <= pos <= written <= plan.ctx and plan.can_rewind(pos, written)
    return (pos, written) if possible else None


def _entry(plan: Plan, pos: int, written: int) -> dict[str, int]:
    """What the header says of a checkpoint."""
    rings = (t for t in plan.tables if t.keep)
    count = sum(len(t.held(pos, written)) * t.row_bytes for t in rings)
    return {"pos": pos, "written": written, "bytes": count}


def _sections(plan: Plan, pos: int, written: int) -> list[dict[str, Any]]:
    sections: list[dict[str, Any]] = [{"name": "tokens", "rows": pos, "bytes": 4 * pos}]
    for t in plan.tables:
        rows = len(t.held(pos, written))
        sections.append({"name": t.name, "rows": rows, "bytes": rows * t.row_bytes})
    return sections


def ring_rows(plan: Plan, state: State, pos: int, written: int) -> Iterator[memoryview]:
    """The rows below `pos` that the rings hold, as contiguous pieces of their tables."""
    return live_rows(plan, state, pos, written, only_rings=True)


def append_rows(plan: Plan, state: State, start: int, stop: int) -> Iterator[memoryview]:
    """The rows of tables without a window that are whole at `stop` and were not at `start`."""
    for t in plan.tables:
        rows: Any = state[t.name][start // t.stride : stop // t.stride]
        if not t.keep and rows.size:
            yield memoryview(rows).cast("B")


def live_rows(
    plan: Plan, state: State, pos: int, written: int, only_rings: bool = False
) -> Iterator[memoryview]:
    """The live rows below `pos` as contiguous pieces of the tables, in file order."""
    for t in plan.tables:
        held = t.held(pos, written)
        if not held or (only_rings and not t.keep):
            continue
        first = held.start % t.slots
        before_wrap = min(len(held), t.slots - first)
        rows: Any = state[t.name]
        for piece in (rows[first : first + before_wrap], rows[: len(held) - before_wrap]):
            if piece.size:
                yield memoryview(piece).cast("B")
