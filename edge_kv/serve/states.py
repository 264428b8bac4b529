"""Conversations kept beside the one a session holds, so that coming back reads nothing again.

A session holds the state of one text. When a prompt arrives that another conversation was about,
the session's live rows are copied aside and those of the other one put back: a copy at the speed of
memory instead of a prefill. What conversations begin with alike, a system prompt say, is in memory
once for all of them. The least recently used conversations go when there are too many, or when
their rows no longer fit the RAM allowed for them. With a folder of the user's they lie there
instead, each in a file of its own, cost no RAM and outlive the process.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_kv.errors import EdgeKVError, SnapshotError
from edge_kv.memory import TOKEN_BYTES, MemoryPlan
from edge_kv.runtime import snapshot
from edge_kv.runtime.chat import Generator
from edge_kv.runtime.session import Copy, bytes_of, held_of
from edge_kv.runtime.snapshot import Checkpoint, common_prefix

WORTH_KEEPING = 64  # tokens below which reading again is cheaper than keeping
SUFFIX = ".kv"
SERVER_BYTES = 12_000_000  # RAM of requests and grammars beside a session (measured)
log = logging.getLogger(__name__)


def kept_bytes(memory: MemoryPlan, conversations: int) -> int:
    """The most bytes of RAM that so many kept conversations take, each of the planned depth.

    They take as much if no two of them begin alike.
    """
    return conversations * memory.aside


@dataclass(eq=False)
class Kept:
    """One conversation: its rows in memory, or the file they are in."""

    tokens: Sequence[int]
    written: int
    checkpoints: Sequence[Checkpoint]  # of a file, without their rows
    stays: int  # how many of the tokens stay when the conversation goes on
    rows: Copy | None = None
    path: Path | None = None
    size: int = 0  # bytes of the file


class States:
    """The kept conversations of one session."""

    def __init__(
        self,
        generator: Generator,
        folder: Path | None = None,
        most: int = 4,
        ram: int | None = None,
    ) -> None:
        """Keep at most `most` conversations, in `ram` bytes (None: in as many as they take).

        With a `folder` they are files there, and what it holds of this artifact is taken up.
        """
        self._generator = generator
        self._session = generator.session
        self._folder = folder
        self._most = most
        self._ram = ram
        self._kept: list[Kept] = []  # the most recently used one last
        self._stays = 0  # of the conversation that the session holds
        self.restored = 0  # times a conversation was taken up from here
        if folder:
            for path in sorted(folder.glob(f"*{SUFFIX}"), key=lambda p: p.stat().st_mtime):
                self._take_up(path)

    @property
    def bytes(self) -> int:
        """Bytes of all kept conversations, in memory or on disk; what they share counts once."""
        return self.ram + sum(k.size for k in self._kept)

    @property
    def ram(self) -> int:
        """Bytes of them that are in RAM."""
        return _ram_of(self._copies())

    @property
    def count(self) -> int:
        return len(self._kept)

    def enter(self, ids: Sequence[int], stays: int = 0) -> None:
        """Make the session hold the longest known beginning of `ids`.

        `stays`: how many of them stay when the conversation goes on; 0: all. What is held of
        another conversation is kept, also where `ids` begin like it: with one system prompt.
        """
        held = self._session.tokens
        here = self._session.reusable(ids)
        best = max(self._kept, key=lambda k: self._usable(k, ids), default=None)
        if best and self._usable(best, ids) < here + WORTH_KEEPING:
            best = None
        if best:
            self._kept.remove(best)
        if best or (len(held) - here >= WORTH_KEEPING and not _goes_on(held, self._stays, ids)):
            self.keep(best)  # it is about to be overwritten
        if best:
            self._put_back(best, _goes_on(best.tokens, best.stays, ids))
        self._stays = stays

    def keep(self, returning: Kept | None = None) -> None:
        """Keep the conversation that the session holds; `returning` will be put in its place."""
        tokens = self._session.tokens
        if len(tokens) < WORTH_KEEPING or self._most == 0:
            return
        older = [k for k in self._kept if tokens[: len(k.tokens)] == tuple(k.tokens)]
        if any(len(k.tokens) == len(tokens) for k in older):
            return
        made = self._written_down(tokens, older) if self._folder else self._copied(returning)
        if made is None:
            return
        for k in older:
            if k.path and k.path != made.path:
                k.path.unlink(missing_ok=True)
        self._kept = [k for k in self._kept if k not in older] + [made]
        self._trim()

    def _trim(self) -> None:
        while len(self._kept) > self._most:
            self._drop(self._kept[0])

    def _copied(self, returning: Kept | None) -> Kept | None:
        """The rows of the session, for which others go; None where they never fit."""

        def fits(copies: list[Copy]) -> bool:
            if self._ram is None:
                return True
            more = self._session.copy_bytes(copies) + TOKEN_BYTES * self._session.pos
            return _ram_of(copies) + more <= self._ram

        stays = [returning.rows] if returning and returning.rows else []
        if not fits(stays):
            return None
        while not fits(self._copies() + stays):
            self._drop(self._kept[0])
        rows = self._session.copy(self._copies() + stays)
        return Kept(rows.tokens, rows.written, rows.checkpoints, self._stays, rows)

    def _copies(self) -> list[Copy]:
        return [k.rows for k in self._kept if k.rows]

    def _written_down(self, tokens: tuple[int, ...], older: list[Kept]) -> Kept | None:
        path = older[-1].path if older else None
        path = path or self._free_name()
        text, ids, gap = self._generator.prompts.newest
        known = tuple(ids[: len(tokens)]) == tokens
        note: dict[str, Any] = {"stays": self._stays}
        if known:
            note |= {"text": text, "ids": ids, "gap": list(gap)}
        try:
            self._session.snapshot(path, note)
            size = path.stat().st_size
        except (EdgeKVError, OSError) as e:
            log.warning("A conversation is not kept: %s", e)
            return None
        points = [replace(p, rows=()) for p in self._session.own_checkpoints()]
        return Kept(tokens, self._session.written, points, self._stays, path=path, size=size)

    def _put_back(self, kept: Kept, goes_on: bool) -> None:
        if kept.rows:
            self._session.put_back(kept.rows)
        elif kept.path:
            try:
                self._session.restore(kept.path)
            except SnapshotError as e:
                log.warning("A kept conversation is lost: %s", e)
                kept.path.unlink(missing_ok=True)
                return
        if kept.path or not goes_on:  # a file stays: the process may end at any time
            self._kept.append(kept)
            self._trim()
        self.restored += 1

    def _usable(self, kept: Kept, ids: Sequence[int]) -> int:
        """How many of `ids` the session would hold after putting `kept` back."""
        plan = self._session.plan
        return held_of(plan, kept.tokens, kept.written, kept.checkpoints, ids)[0]

    def _take_up(self, path: Path) -> None:
        session = self._session
        try:
            with snapshot.verified(path, session.identity, session.plan) as held:
                size, points = path.stat().st_size, held.checkpoints
                note, stays = held.note, held.note.get("stays")
                kept = Kept(
                    list(held.tokens), held.written, points,
                    stays if isinstance(stays, int) else 0, path=path, size=size,
                )  # fmt: skip
        except (EdgeKVError, OSError) as e:
            log.warning("%s is left alone: %s", path, e)
            return
        self._kept.append(kept)
        text, ids, gap = note.get("text"), note.get("ids"), note.get("gap")
        if isinstance(text, str) and isinstance(ids, list) and isinstance(gap, list):
            self._generator.prompts.know(text, [int(i) for i in ids], (int(gap[0]), int(gap[1])))

    def _free_name(self) -> Path:
        assert self._folder
        taken = {k.path for k in self._kept}
        names = (self._folder / f"conversation-{i}{SUFFIX}" for i in range(1_000_000))
        return next(p for p in names if p not in taken and not p.exists())

    def _drop(self, kept: Kept) -> None:
        self._kept.remove(kept)
        if kept.path:
            kept.path.unlink(missing_ok=True)


def _ram_of(copies: Sequence[Copy]) -> int:
    """Bytes of RAM that kept conversations take, their ids included."""
    return bytes_of(copies) + sum(TOKEN_BYTES * len(c.tokens) for c in copies)


def _goes_on(tokens: Sequence[int], stays: int, ids: Sequence[int]) -> bool:
    """Whether `ids` continue or repeat a conversation: at most its last reply is another one."""
    return common_prefix(tokens, ids) >= min(stays or len(tokens), len(ids))
