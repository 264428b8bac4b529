"""The multi-turn conversation of `edge-kv run` on a terminal: line editing, history, commands."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from edge_kv.errors import EdgeKVError, did_you_mean, one_line
from edge_kv.runtime.chat import CANCELLED, FULL, LENGTH, Chat
from edge_kv.runtime.messages import Message, ToolCall
from edge_kv.runtime.replies import Piece
from edge_kv.runtime.text import clean_text

HISTORY = "EDGE_KV_HISTORY"  # a file that keeps what was typed; without it nothing is kept
THINK = {"on": True, "off": False, "auto": None}
_HELP = {
    "/help": "this list",
    "/reset": "start a new conversation",
    "/system": "[TEXT]: a new conversation with this system prompt, or with none",
    "/regen": "answer the last question again",
    "/think": "on, off or auto: whether the model thinks before it answers",
    "/result": "TEXT: what the tool that a reply called gave back",
    "/save": "FILE: keep the conversation and what was read of it",
    "/load": "FILE: take up a saved conversation",
    "/context": "how much of the context is used",
    "/stats": "speeds and memory so far",
    "/bye": "leave (also Ctrl-D); Ctrl-C stops a reply",
}
_ENDS = ("/bye", "/quit", "/exit")


@dataclass(frozen=True)
class Terminal:
    """What the conversation needs of the command line: `show` streams a reply, `say` prints a line.

    `stats` is one line of speeds and memory.
    """

    show: Callable[[Iterator[Piece]], None]
    say: Callable[[str], None]
    stats: Callable[[], str]


def converse(chat: Chat, terminal: Terminal) -> None:
    """Read turns until /bye or the end of input.

    Errors are said and the conversation goes on; Ctrl-C stops the reply, or leaves an empty line.
    """
    terminal.say("Type a message, /help for commands, Ctrl-D to leave.")
    read = _reader()
    while True:
        try:
            line = clean_text(read()).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            continue
        except EdgeKVError as e:
            terminal.say(f"Error: {one_line(str(e))}")
            continue
        if line in _ENDS:
            return
        try:
            if line.startswith("/"):
                _command(chat, terminal, line)
            elif line:
                _answer(chat, terminal, chat.ask(Message("user", line)))
        except EdgeKVError as e:
            terminal.say(f"Error: {one_line(str(e))}")
        except KeyboardInterrupt:
            terminal.say("(stopped)")


def ended(chat: Chat, *, goes_on: bool) -> str:
    """Why the last reply ended, where that is worth a sentence; a conversation may go on."""
    reply = chat.last
    if reply is None or reply.finish == CANCELLED:
        return ""
    if reply.finish == LENGTH:
        return (
            f"(cut off at --max-new-tokens {chat.options.max_new_tokens}; "
            "give a larger one to let replies grow longer)"
        )
    if reply.finish == FULL:
        anew = "/reset starts anew, " if goes_on else ""
        return (
            f"(the context of {chat.session.plan.ctx:,} tokens is full; {anew}"
            "--on-full slide forgets the middle, a larger --ctx at export holds more)"
        )
    return f"(ended at the stop text {reply.stopped_by!r})" if reply.stopped_by else ""


def unheard(chat: Chat) -> str:
    """That thinking was asked for or against in vain, if it was."""
    if chat.options.think is None or chat.generator.prompts.heeds_think:
        return ""
    return "(the chat template of this model does not ask whether to think)"


def figures(chat: Chat) -> str:
    """What the last turn cost, on one line."""
    reply = chat.last
    if reply is None:
        return ""
    spent = reply.seconds - reply.first_token_seconds
    speed = f", {(len(reply.ids) - 1) / spent:.1f} tokens/s" if len(reply.ids) > 1 and spent else ""
    drafted = ""
    if reply.drafted:
        drafted = f"; {guesses(reply.accepted, reply.drafted, reply.ties)}"
    return (
        f"({len(reply.ids)} tokens{speed}, first after {reply.first_token_seconds:.2f} s; "
        f"{reply.reused_tokens:,} of {reply.prompt_tokens:,} prompt tokens were in memory"
        f"{drafted})"
    )


def guesses(accepted: int, drafted: int, ties: int) -> str:
    """How many drafted tokens were what the model chose, and how many choices were near a tie."""
    close = f", {ties:,} near {'tie' if ties == 1 else 'ties'}" if ties else ""
    return f"{accepted:,} of {drafted:,} guesses right{close}"


def _answer(chat: Chat, terminal: Terminal, pieces: Iterator[Piece]) -> None:
    terminal.show(pieces)
    for line in (ended(chat, goes_on=True), _wanted(chat), figures(chat)):
        if line:
            terminal.say(line)


def _open_calls(chat: Chat) -> list[ToolCall]:
    """The calls at the end of a conversation that have no result yet."""
    for given, message in enumerate(reversed(chat.history)):
        if message.role != "tool":
            return list(message.calls[given:])
    return []


def _wanted(chat: Chat) -> str:
    calls = _open_calls(chat)
    return f"(give the result of {calls[0].name} with /result TEXT)" if calls else ""


def _result(chat: Chat, terminal: Terminal, text: str) -> None:
    """Answer the oldest open call; after the last one the model goes on."""
    calls = _open_calls(chat)
    if not calls or not text:
        terminal.say("/result takes what a tool gave back; no call waits." if not calls else
                     "/result needs the text that the tool gave back.")  # fmt: skip
        return
    answer = Message("tool", text, name=calls[0].name, call_id=calls[0].id)
    if len(calls) > 1:
        chat.history.append(answer)
        terminal.say(_wanted(chat))
    else:
        _answer(chat, terminal, chat.ask(answer))


def _command(chat: Chat, terminal: Terminal, line: str) -> None:
    """Run one /command."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    say = terminal.say
    if name == "/help":
        say("\n".join(f"{command:<9} {text}" for command, text in _HELP.items()))
    elif name == "/reset":
        chat.reset()
        say("New conversation.")
    elif name == "/system":
        chat.system = rest
        chat.reset()
        say("New conversation with this system prompt." if rest else "No system prompt.")
    elif name == "/regen":
        _answer(chat, terminal, chat.again())
    elif name == "/result":
        _result(chat, terminal, rest)
    elif name == "/think":
        if rest in THINK:
            chat.options = dataclasses.replace(chat.options, think=THINK[rest])
        now = next(k for k, v in THINK.items() if v == chat.options.think)
        say(f"Thinking is {now}." if rest in (*THINK, "") else "/think takes on, off or auto.")
        if note := unheard(chat):
            say(note)
    elif name in ("/save", "/load") and not rest:
        say(f"{name} needs a file name.")
    elif name == "/save":
        chat.save(rest)
        say(f"Saved {chat.used:,} tokens to {rest}.")
    elif name == "/load":
        chat.load(rest)
        say(f"Loaded {chat.used:,} tokens, {_messages(chat)}.")
    elif name == "/context":
        used, ctx = chat.used, chat.session.plan.ctx
        say(f"{used:,} of {ctx:,} tokens ({used / ctx:.0%}), {_messages(chat)}.")
    elif name == "/stats":
        say(terminal.stats())
    else:
        say(f"Unknown command {name}.{did_you_mean(name, _HELP)}")


def _messages(chat: Chat) -> str:
    count = len(chat.messages)
    return "1 message" if count == 1 else f"{count} messages"


def _reader() -> Callable[[], str]:
    """A function that reads one turn: lines are edited, pasted lines stay together."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output.vt100 import Vt100_Output

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    path = os.environ.get(HISTORY)
    history: History = FileHistory(path) if path else InMemoryHistory()
    stream = sys.stdout if sys.stdout.isatty() else sys.stderr
    output = None
    if sys.platform != "win32":
        output = Vt100_Output.from_pty(stream, term=os.environ.get("TERM"))
        output.enable_cpr = False  # terminals that do not answer would be waited for
    session: PromptSession[str] = PromptSession(
        history=history,
        completer=WordCompleter(list(_HELP), sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
        output=output,
    )
    return lambda: session.prompt("> ")
