"""Conversations kept beside the one a session holds, so that coming back reads nothing again.

A session holds the state of one text. When a prompt arrives that another conversation was about,
the session's state is written to a snapshot and the other one restored: a copy of rows at the speed
of memory or disk instead of a prefill. A bounded number is kept, the least recently used one goes.
With a folder of the user's they outlive the process; otherwise they lie in a temporary one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_kv.errors import EdgeKVError, SnapshotError
from edge_kv.runtime import snapshot
from edge_kv.runtime.chat import Generator
from edge_kv.runtime.session import common_prefix

WORTH_KEEPING = 64  # tokens below which reading again is cheaper than a snapshot
SUFFIX = ".kv"
log = logging.getLogger(__name__)


@dataclass
class Kept:
    """One conversation on disk."""

    path: Path
    tokens: list[int]
    written: int
    bytes: int


class States:
    """The kept conversations of one session."""

    def __init__(self, generator: Generator, folder: Path, most: int) -> None:
        """Take up what `folder` holds of this artifact; at most `most` are kept."""
        self._generator = generator
        self._session = generator.session
        self._folder = folder
        self._most = most
        self._kept: list[Kept] = []  # the most recently used one last
        self._made = 0
        self.restored = 0  # times a conversation was taken up from here
        for path in sorted(folder.glob(f"*{SUFFIX}"), key=lambda p: p.stat().st_mtime):
            self._take_up(path)

    @property
    def bytes(self) -> int:
        """Bytes of all kept conversations."""
        return sum(k.bytes for k in self._kept)

    @property
    def count(self) -> int:
        return len(self._kept)

    def enter(self, ids: Sequence[int]) -> None:
        """Make the session hold the longest known beginning of `ids`."""
        held = self._session.tokens
        here = common_prefix(held, ids)
        best = max(self._kept, key=lambda k: self._usable(k, ids), default=None)
        there = self._usable(best, ids) if best else 0
        if here < len(held) and max(there, len(held) - here) >= WORTH_KEEPING:
            self.keep()  # what the session holds is about to be overwritten
        if best and there >= here + WORTH_KEEPING:
            try:
                self._session.restore(best.path)
            except SnapshotError as e:
                log.warning("A kept conversation is lost: %s", e)
                self._drop(best)
                return
            self.restored += 1
            self._kept.remove(best)
            self._kept.append(best)

    def keep(self) -> None:
        """Write down the conversation that the session holds."""
        tokens = list(self._session.tokens)
        if len(tokens) < WORTH_KEEPING or self._most == 0:
            return
        older = [k for k in self._kept if tokens[: len(k.tokens)] == k.tokens]
        if any(k.tokens == tokens for k in older):
            return
        self._made += 1
        path = older[-1].path if older else self._free_name()
        text, ids, gap = self._generator.newest
        known = ids[: len(tokens)] == tokens
        note: dict[str, Any] = {"text": text, "ids": ids, "gap": list(gap)} if known else {}
        try:
            self._session.snapshot(path, note)
        except EdgeKVError as e:
            log.warning("A conversation is not kept: %s", e)
            return
        for k in older:
            self._kept.remove(k)
            if k.path != path:
                k.path.unlink(missing_ok=True)
        self._kept.append(Kept(path, tokens, self._session.written, path.stat().st_size))
        while len(self._kept) > self._most:
            self._drop(self._kept[0])

    def _usable(self, kept: Kept, ids: Sequence[int]) -> int:
        """How many of `ids` the session would hold after restoring `kept`."""
        common = common_prefix(kept.tokens, ids)
        return common if self._session.plan.can_rewind(common, kept.written) else 0

    def _take_up(self, path: Path) -> None:
        session = self._session
        try:
            with snapshot.verified(path, session.identity, session.plan) as held:
                kept = Kept(path, list(held.tokens), held.written, path.stat().st_size)
                note = held.note
        except (EdgeKVError, OSError) as e:
            log.warning("%s is left alone: %s", path, e)
            return
        self._kept.append(kept)
        text, ids, gap = note.get("text"), note.get("ids"), note.get("gap")
        if isinstance(text, str) and isinstance(ids, list) and isinstance(gap, list):
            self._generator.know(text, [int(i) for i in ids], (int(gap[0]), int(gap[1])))

    def _free_name(self) -> Path:
        taken = {k.path for k in self._kept}
        names = (self._folder / f"conversation-{i}{SUFFIX}" for i in range(1_000_000))
        return next(p for p in names if p not in taken and not p.exists())

    def _drop(self, kept: Kept) -> None:
        self._kept.remove(kept)
        kept.path.unlink(missing_ok=True)
