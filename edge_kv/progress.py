"""What long work tells whoever watches it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A listener for long work; the CLI's draws a bar, `Silent` draws nothing."""

    def stage(self, name: str) -> None:
        """A new stage begins ("weights", "prefill graph", "parity")."""

    def advance(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """`what` (a tensor, a layer) is finished; bytes of the stage done so far."""


class Silent:
    """Ignores everything."""

    def stage(self, name: str) -> None:
        pass

    def advance(self, what: str, done_bytes: int, total_bytes: int) -> None:
        pass
