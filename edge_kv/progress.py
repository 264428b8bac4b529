"""What long work tells whoever watches it."""

from __future__ import annotations

from typing import Protocol

BYTES = "bytes"


class Progress(Protocol):
    """A listener for long work; the CLI's draws a bar, `Silent` draws nothing."""

    def stage(self, name: str, unit: str = BYTES) -> None:
        """A new stage begins ("weights", "parity"), whose progress is counted in `unit`."""

    def advance(self, what: str, done: int, total: int) -> None:
        """`what` (a tensor, a layer) is finished; how much of the stage is done so far."""


class Silent:
    """Ignores everything."""

    def stage(self, name: str, unit: str = BYTES) -> None:
        pass

    def advance(self, what: str, done: int, total: int) -> None:
        pass
