"""What the command line draws: a progress bar for exports, streamed text with a status line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from edge_kv.amounts import size
from edge_kv.progress import BYTES

_REFRESHES = 10  # drawings of the status line a second
_SMOOTH = 0.03  # seconds between two drawings of growing text
_PIPE_WIDTH = 132  # columns of a table that goes to a file


def output() -> Console:
    """A console on stdout; wide enough for tables when stdout is not a terminal."""
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False)


def layers(numbers: tuple[int, ...] | list[int]) -> str:
    """Layer numbers with runs drawn together: `13, 15-18, 20`."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


class Bar:
    """`edge_kv.progress.Progress` as a bar on stderr; draws nothing where that is no terminal."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description:22}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[count]:>17}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task: Any = None
        self._unit = BYTES

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish()
        self._bar.stop()

    def stage(self, name: str, unit: str = BYTES) -> None:
        self._finish()
        self._unit = unit
        self._task = self._bar.add_task(name, total=None, count="")

    def advance(self, what: str, done: int, total: int) -> None:
        if self._task is None:
            self.stage("working")
        self._bar.update(self._task, completed=done, total=total, count=self._count(done, total))

    def _count(self, done: int, total: int) -> str:
        if self._unit == BYTES:
            return f"{size(done)} of {size(total)}"
        return f"{done:,} of {total:,} {self._unit}"

    def _finish(self) -> None:
        if self._task is not None:
            task = self._bar.tasks[self._task]
            total = task.total or 1
            self._bar.update(self._task, total=total, completed=total)


class Stream:
    """Text that grows on stdout, above a status line on a terminal.

    Finished rows scroll away like any output; only the row being written and the status are
    redrawn, by a thread, so that the status also moves while a long prompt is read. Where stdout
    is a file, text goes there plainly, without what is dim, and the status stays on stderr.
    """

    def __init__(self, status: Callable[[], str]) -> None:
        self._status = status
        self._row = ""
        self._style = ""
        self._drawn = 0.0
        self._text_here = sys.stdout.isatty() and sys.stderr.isatty()
        self._live: Live | None = None
        if sys.stderr.isatty():
            self._live = Live(
                get_renderable=self._render,
                console=Console(stderr=not self._text_here, highlight=False, markup=False),
                refresh_per_second=_REFRESHES,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )

    def __enter__(self) -> Stream:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()
        if self._text_here and self._live:
            self._live.console.print(Text(self._row, style=self._style))
        else:
            sys.stdout.write("\n")
            sys.stdout.flush()

    def write(self, piece: str, *, dim: bool = False) -> None:
        """Show more text; dim text stands apart, in rows of its own."""
        if not self._text_here or not self._live:
            if not dim:
                sys.stdout.write(piece)
                sys.stdout.flush()
            return
        style = "dim" if dim else ""
        if style != self._style and self._row:
            self._live.refresh()
            self._live.console.print(Text(f"{self._row}\n", style=self._style))
            self._row = ""
        self._style = style
        console = self._live.console
        *done, row = (self._row + piece).split("\n")
        rows = Text(row).wrap(console, console.width)
        if len(rows) > 1:
            done += [r.plain for r in rows[:-1]]
            row = rows[-1].plain
        self._row = row
        now = time.monotonic()
        if done or now - self._drawn > _SMOOTH:
            self._drawn = now
            self._live.refresh()  # before rows are printed: printing redraws what was drawn last
        for line in done:
            console.print(Text(line, style=style))

    def _render(self) -> RenderableType:
        status = Text(self._status(), style="dim", no_wrap=True)
        return Group(Text(self._row, style=self._style), status) if self._text_here else status
