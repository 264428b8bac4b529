"""What a user gives to be read: prompts, grammars, tools, biases of ids."""

from __future__ import annotations

import json
import os
import select
import stat
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from edge_kv.cli.printing import say
from edge_kv.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from edge_kv.runtime.constraints import Grammar
    from edge_kv.runtime.messages import Tool


_PIPE_SECONDS = 3.0  # how long a pipe beside a prompt may stay silent


def read_prompt(prompt: str | None, file: Path | None) -> str | None:
    """The prompt from the argument, --file and stdin; None to converse on a terminal.

    What is piped in follows the argument; `-` is stdin alone.
    """
    if prompt is not None and file is not None:
        raise PromptError("Both a prompt and --file were given; give one of them.")
    from edge_kv.runtime.text import clean_text

    try:
        if file is not None:
            text = clean_text(_content(file))
        elif prompt is not None and prompt != "-":
            piped = clean_text(_piped())
            text = "\n\n".join(t for t in (clean_text(prompt), piped) if t.strip())
        elif prompt is None and sys.stdin.isatty():
            return None
        else:
            text = clean_text(_content())
    except OSError as e:
        raise PromptError(f"Cannot read {file or 'standard input'}: {e.strerror}.") from e
    if not text.strip():
        raise PromptError("The prompt is empty; give some text.")
    return text


def _piped() -> bytes:
    """What a file or a pipe on stdin holds; nothing for terminals and devices."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # no stdin, or one without a file behind it
        buffer = getattr(sys.stdin, "buffer", None)
        return buffer.read() if buffer and not sys.stdin.isatty() else b""
    if stat.S_ISREG(mode):
        return _content()
    if not stat.S_ISFIFO(mode):
        return b""
    waits = os.name == "posix"  # elsewhere a pipe cannot be waited for
    if waits and not select.select([sys.stdin], [], [], _PIPE_SECONDS)[0]:
        say("Nothing came through the pipe on stdin; answering the prompt alone.")
        return b""
    return _content()


def _content(path: Path | None = None) -> bytes:
    """What a file of the user's holds, or stdin, up to the length of any text."""
    from edge_kv.files import read_bounded

    with path.open("rb") if path else nullcontext(sys.stdin.buffer) as f:
        return read_bounded(f)


def read_grammar(schema: Path | None, regex: str | None, lark: Path | None) -> Grammar | None:
    """What replies must be, from at most one of the options."""
    from edge_kv.runtime.constraints import Grammar

    if sum(o is not None for o in (schema, regex, lark)) > 1:
        raise ConfigError("Give one of --json-schema, --regex and --grammar.")
    try:
        if schema:
            return Grammar.json_schema(_content(schema).decode())
        if lark:
            return Grammar.lark(_content(lark).decode())
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else e
        raise ConfigError(f"Cannot read {schema or lark} ({why}).") from e
    return Grammar.regex(regex) if regex is not None else None


def read_bias(text: str) -> tuple[int, float]:
    """A token id and what is added to its logit, from ID=BIAS."""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as e:
        raise ConfigError(f"--logit-bias {text!r} must be ID=BIAS, such as 107=-100.") from e


def read_tools(path: Path) -> tuple[Tool, ...]:
    """The tools that a file lists, in OpenAI's shape."""
    from edge_kv.runtime.messages import Tool

    try:
        listed = json.loads(_content(path))
    except (OSError, ValueError, RecursionError) as e:
        why = e.strerror if isinstance(e, OSError) else f"it is not JSON: {e}"
        raise ConfigError(f"Cannot read the tools in {path} ({why}).") from e
    if not isinstance(listed, list):
        raise ConfigError(f"{path} must hold a JSON list of tools, not {type(listed).__name__}.")
    return tuple(Tool.of(tool, f"{path}[{i}]") for i, tool in enumerate(listed))
