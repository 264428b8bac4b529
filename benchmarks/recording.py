"""Record commands on a real terminal and draw what it showed as an animated picture (SVG).

    python benchmarks/recording.py docs/first_run.svg "edge-kv export --model tiny --ctx 2k" \
        "edge-kv run tiny-2048 'And it came to pass in those days, that' --max-new-tokens 60"

A shell on a pseudo-terminal of 80 columns gets the commands one after the other, and a terminal
emulator (pyte, a development tool alone) keeps every screen that stood for a moment. Each becomes a
group of the SVG that is shown for as long as it stood, pauses cut to --pause seconds; a command
that takes longer than --longest seconds is shown faster. Where animations are off, the last screen
is seen. `--cast FILE` keeps the recording itself, an asciinema cast (version 2).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import select
import struct
import sys
import termios
import time
from html import escape
from pathlib import Path
from typing import Any

import pyte

COLUMNS, ROWS = 80, 24
FRAME = 0.15  # seconds a screen has to stand to be kept
CELL, LINE, EDGE = 8.4, 18, 14  # pixels: a column, a row, the margin
HOLD = 4.0  # seconds the last screen stays
TYPING = 0.04  # seconds a typed character takes
PROMPT = "$ "
COLOURS = {
    "default": "#d8dee9", "black": "#4c566a", "red": "#e06c75", "green": "#98c379",
    "brown": "#e5c07b", "blue": "#61afef", "magenta": "#c678dd", "cyan": "#56b6c2",
    "white": "#d8dee9", "brightblack": "#8a93a5", "brightgreen": "#b5e890",
    "brightblue": "#8cc8ff",
}  # fmt: skip

Event = tuple[float, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("svg", type=Path)
    parser.add_argument("commands", nargs="+")
    parser.add_argument("--pause", type=float, default=1.5, help="longest still second")
    parser.add_argument("--longest", type=float, default=12.0, help="seconds a command is shown")
    parser.add_argument("--cast", type=Path, help="keep the recording too")
    args = parser.parse_args()
    events: list[Event] = []
    clock = 0.0
    for command in args.commands:
        clock = typed(events, command, clock)
        clock = run(events, command, clock, args.longest)
    if args.cast:
        cast(args.cast, events)
    frames = screens(events, args.pause)
    args.svg.write_text(drawn(frames), encoding="utf-8")
    print(f"{args.svg}: {len(frames)} screens, {sum(f[0] for f in frames):.0f} s")


def typed(events: list[Event], command: str, clock: float) -> float:
    """The command as somebody types it."""
    events.append((clock, PROMPT))
    for letter in command:
        clock += TYPING
        events.append((clock, letter))
    clock += 0.4
    events.append((clock, "\r\n"))
    return clock


def run(events: list[Event], command: str, clock: float, longest: float) -> float:
    """What the command writes to its terminal, with the time of each piece."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS=str(COLUMNS), LINES=str(ROWS))
        os.execvp("sh", ["sh", "-c", command])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    begin, own = time.monotonic(), []
    while True:
        select.select([terminal], [], [])
        try:
            data = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        own.append((time.monotonic() - begin, data.decode(errors="replace")))
    _, status = os.waitpid(pid, 0)
    if status:
        sys.exit(f"Error: {command} ended with {os.waitstatus_to_exitcode(status)}.")
    took = time.monotonic() - begin
    faster = max(1.0, took / longest)
    events += [(clock + at / faster, text) for at, text in own]
    return clock + took / faster + 0.5


def cast(path: Path, events: list[Event]) -> None:
    """An asciinema cast, version 2."""
    head = {"version": 2, "width": COLUMNS, "height": ROWS}
    lines = [json.dumps(head), *(json.dumps([round(t, 3), "o", text]) for t, text in events)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def screens(events: list[Event], pause: float) -> list[tuple[float, list[Any]]]:
    """(seconds, rows) of every screen that stood long enough."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.Stream(screen)
    frames: list[tuple[float, list[Any]]] = []
    since = 0.0
    ends = [at for at, _ in events[1:]] + [events[-1][0] + HOLD]
    for (_, text), after in zip(events, ends, strict=True):
        stream.feed(text)
        if after - since >= FRAME:
            last = after == ends[-1]
            frames.append((HOLD if last else min(after - since, pause), rows_of(screen)))
            since = after
    return frames


def rows_of(screen: pyte.Screen) -> list[Any]:
    """Runs of equal looks in each row: [(column, text, colour, bold)]."""
    out: list[Any] = []
    for y in range(ROWS):
        runs: list[list[Any]] = []
        for x in range(COLUMNS):
            cell = screen.buffer[y][x]
            look = (cell.fg, cell.bold)
            if runs and runs[-1][2] == look and runs[-1][0] + len(runs[-1][1]) == x:
                runs[-1][1] += cell.data
            else:
                runs.append([x, cell.data, look])
        out.append([(x, text.rstrip(), *look) for x, text, look in runs if text.strip()])
    return out


def drawn(frames: list[tuple[float, list[Any]]]) -> str:
    """The frames one after the other, for ever."""
    width, height = COLUMNS * CELL + 2 * EDGE, ROWS * LINE + 2 * EDGE
    whole, at, groups, rules = sum(f[0] for f in frames), 0.0, [], []
    for i, (seconds, rows) in enumerate(frames):
        start, stop = 100 * at / whole, 100 * (at + seconds) / whole
        before = f"0%,{start:.3f}%{{opacity:0}}" if i else ""
        after = f"{stop:.3f}%,100%{{opacity:0}}" if i < len(frames) - 1 else ""
        rules.append(
            f"@keyframes f{i}{{{before}"
            f"{start + 0.001:.3f}%,{stop - 0.001:.3f}%{{opacity:1}}{after}}}"
            f"#f{i}{{animation:f{i} {whole:.2f}s step-end infinite}}"
        )
        texts = [
            f'<text x="{EDGE + x * CELL:.1f}" y="{EDGE + (y + 0.75) * LINE:.1f}" '
            f'fill="{colour(fg)}"{" font-weight=" + chr(34) + "bold" + chr(34) if bold else ""} '
            f'textLength="{len(text) * CELL:.1f}">{escape(text)}</text>'
            for y, row in enumerate(rows)
            for x, text, fg, bold in row
        ]
        hidden = "" if i == len(frames) - 1 else ' opacity="0"'
        groups.append(f'<g id="f{i}"{hidden}>{"".join(texts)}</g>')
        at += seconds
    style = (
        "text{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:14px;"
        "white-space:pre}"
        f"{''.join(rules)}@media(prefers-reduced-motion){{g{{animation:none!important}}}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}"><style>{style}</style>'
        f'<rect width="100%" height="100%" rx="8" fill="#22272e"/>{"".join(groups)}</svg>\n'
    )


def colour(name: str) -> str:
    """A colour of the terminal for an SVG."""
    return COLOURS.get(name, f"#{name}" if len(name) == 6 else COLOURS["default"])


if __name__ == "__main__":
    main()
