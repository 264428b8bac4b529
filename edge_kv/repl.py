"""The multi-turn conversation of `edge-kv run` on a terminal."""

from __future__ import annotations

from collections.abc import Callable

from edge_kv.errors import EdgeKVError
from edge_kv.runtime.chat import Chat

HELP = """\
/help        this list
/reset       start a new conversation
/save FILE   keep the conversation and what was read of it
/load FILE   take up a saved conversation
/quit        leave (also Ctrl-D); Ctrl-C stops a reply"""
COMMANDS = ("/help", "/reset", "/save", "/load", "/quit")


def converse(chat: Chat, answer: Callable[[str], None], say: Callable[[str], None]) -> None:
    """Read turns with `input` until /quit or the end of input.

    `answer` is called with each question and shows its reply; `say` prints one line. Errors are
    said and the conversation goes on; Ctrl-C stops the reply, or leaves an empty prompt line.
    """
    say("Type a message, /help for commands, Ctrl-D to leave.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            say("")
            continue
        if not line:
            continue
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                say(_command(chat, line))
            else:
                answer(line)
        except EdgeKVError as e:
            say(f"Error: {e}")
        except KeyboardInterrupt:
            say("(stopped)")


def _command(chat: Chat, line: str) -> str:
    """Run one /command and return what to say."""
    name, _, rest = line.partition(" ")
    file = rest.strip()
    if name == "/reset":
        chat.reset()
        return "New conversation."
    if name in ("/save", "/load") and not file:
        return f"{name} needs a file name."
    if name == "/save":
        chat.save(file)
        return f"Saved {chat.session.pos} tokens to {file}."
    if name == "/load":
        chat.load(file)
        return f"Loaded {chat.session.pos} tokens, {len(chat.messages)} messages."
    return HELP if name == "/help" else f"Unknown command {name}; {', '.join(COMMANDS)}."
