"""What every command prints: lines on stderr, JSON on stdout or in a file."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import get_terminal_size
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Any, TextIO

import typer

from edge_kv.errors import ConfigError, one_line

if TYPE_CHECKING:
    from rich.console import Console


def say_error(text: str) -> None:
    """One line on stderr."""
    typer.echo(f"Error: {one_line(text)}", err=True)


class Notices(logging.Handler):
    """What the runtime has to say beside its results, one line each on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        # Not through typer, which writes past what draws on the terminal: bars are to stay below.
        print(record.getMessage(), file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Lines on stderr, broken between words."""
    typer.echo(wrapped(text, sys.stderr), err=True)


def wrapped(text: str, stream: TextIO) -> str:
    """`text` broken between words where a terminal would break it anywhere."""
    if not stream.isatty():
        return text
    columns = get_terminal_size().columns
    wrapper = TextWrapper(columns, break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrapper.fill(line) for line in text.split("\n"))


def print_json(data: dict[str, Any]) -> None:
    """One JSON document on stdout, in characters that it can take."""
    text = json.dumps(data, ensure_ascii=False, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeError:  # a stream of fewer characters: escapes lose none of them
        text = json.dumps(data, default=str)
    typer.echo(text)


def print_measured(
    document: dict[str, Any], file: Path | None, tables: Callable[[dict[str, Any], Console], None]
) -> None:
    """What was measured: as tables and as JSON into `file`, if there is one; `-` prints JSON alone.

    Raises:
        ConfigError: the file cannot be written.
    """
    from edge_kv.cli.terminal import output
    from edge_kv.files import write_text

    text = json.dumps(document, indent=1)
    if str(file) == "-":
        typer.echo(text)
        return
    tables(document, output())
    if file:
        try:
            write_text(file, text + "\n")
        except OSError as e:
            raise ConfigError(f"Cannot write {file}: {e.strerror}.") from e
