"""Replies: the ids a model says, taken apart into answer, thinking and tool calls.

Models mark these with tokens of their own, so replies are read by token id: text that merely looks
like a mark is text. Where a vocabulary has no token for a mark, its text is looked for instead. How
a family of models marks them is a row of `replies.json`; which row, tokenizer and template tell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_kv.runtime.messages import Tool, ToolCall
from edge_kv.runtime.sampling import TokenLogprobs
from edge_kv.runtime.text import TextStream, Tokenizer

CONTENT, THINKING, CALL = "content", "thinking", "call"


@dataclass(frozen=True)
class ReplyGrammar:
    """How a family of models marks its replies.

    `needs`: what vocabulary or template must name for this row to be the one. `labelled`: the first
    line of a thought names its channel. `call`: the marks around a call; None: a reply that is JSON
    is a call. `syntax` of a call: "json", "braces", "pairs" or "parameters" (see `_READERS`).
    `quote`: the mark around texts in braces.
    """

    name: str
    needs: tuple[str, ...]
    think: tuple[str, str]
    call: tuple[str, str] | None
    syntax: str
    labelled: bool = False
    quote: str = ""


def _row(data: dict[str, Any]) -> ReplyGrammar:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    return ReplyGrammar(**fields)


_TABLE = json.loads(Path(__file__).with_name("replies.json").read_text(encoding="utf-8"))
GRAMMARS = tuple(map(_row, _TABLE["grammars"]))
"""The first row whose needs are met is a model's. The Android app reads the same file."""
TURN_ENDS = tuple(_TABLE["turn_ends"])
"""Marks that end a turn where the template writes them, whatever the checkpoint's eos says."""


@dataclass(frozen=True)
class Piece:
    """A part of a reply: more of the answer or of the thinking, or one whole tool call."""

    kind: str  # CONTENT | THINKING | CALL
    text: str
    call: ToolCall | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()  # of the ids whose text begins in it, if asked for


class ReplyFormat:
    """A grammar with its marks looked up in one vocabulary."""

    def __init__(self, grammar: ReplyGrammar, tokenizer: Tokenizer, template: str) -> None:
        self.grammar = grammar
        self.tokenizer = tokenizer
        self.ids: dict[str, int] = {}
        self.texts: list[str] = []  # marks that are no token
        for mark in (*grammar.think, *(grammar.call or ())):
            found = tokenizer.id_of(mark)
            if found is not None:
                self.ids[mark] = found
            elif mark in template:
                self.texts.append(mark)
        self.marks = {i: mark for mark, i in self.ids.items()}
        self.quote = tokenizer.id_of(grammar.quote) if grammar.quote else None
        ends = ((tokenizer.id_of(end), end in template) for end in TURN_ENDS)
        self.ends = frozenset(i for i, written in ends if i is not None and written)

    @classmethod
    def of(cls, tokenizer: Tokenizer, template: str) -> ReplyFormat:
        """The format of a model with this tokenizer and chat template."""

        def known(mark: str) -> bool:
            return mark in template or tokenizer.id_of(mark) is not None

        grammar = next(g for g in GRAMMARS if all(map(known, g.needs)))
        return cls(grammar, tokenizer, template)

    def opened(self, prompt: Sequence[int]) -> bool:
        """Whether ids leave a thought open."""
        begin, end = (self.ids.get(mark) for mark in self.grammar.think)
        last = next((i for i in reversed(prompt) if i in (begin, end)), None)
        return last is not None and last == begin


class Holdback:
    """Text in, text out, holding back what may be the start of a text looked for."""

    def __init__(self, wanted: Iterable[str]) -> None:
        self._wanted = [w for w in wanted if w]
        self._held = ""

    def feed(self, text: str) -> tuple[str, str]:
        """Text up to the first text looked for, and that text; "" when none came (yet).

        What follows a found text is held: feed "" to go on.
        """
        self._held += text
        found = [(at, -len(w), w) for w in self._wanted if (at := self._held.find(w)) >= 0]
        if found:
            at, _, hit = min(found)
            before, self._held = self._held[:at], self._held[at + len(hit) :]
            return before, hit
        keep = max((_overlap(self._held, w) for w in self._wanted), default=0)
        at = len(self._held) - keep
        given, self._held = self._held[:at], self._held[at:]
        return given, ""

    def flush(self) -> str:
        """What is held when the text ends."""
        held, self._held = self._held, ""
        return held


class ReplyParser:
    """Ids of one reply in, pieces out."""

    def __init__(
        self, format: ReplyFormat, *, thinking: bool = False, tools: Sequence[Tool] = ()
    ) -> None:
        """`thinking`: the prompt has opened a thought; `tools`: what may be called."""
        self._format = format
        self._stream = TextStream(format.tokenizer)
        called = format.grammar.call or ()
        spelled = [m for m in called if tools and m not in format.ids and m not in format.texts]
        self._texts = [*format.texts, *spelled]  # marks to look for in text
        self._marks = Holdback(self._texts)
        self._tools = {tool.name: tool for tool in tools}
        self.state = THINKING if thinking else CONTENT
        self._label = False  # the first line of a thought, its channel's name, is still to come
        self._fresh = thinking  # leading line ends of a block are no part of it
        self._tail = ""  # white space that may be the end of a thought
        self._body = ""  # of the call under way
        self._bare = bool(tools) and format.grammar.call is None  # the answer may be a call
        self._calls = 0

    @property
    def marks(self) -> Mapping[int, str]:
        """Ids that are marks."""
        return self._format.marks

    def feed(self, token: int) -> list[Piece]:
        """What `token` adds: usually one piece, or none yet."""
        format = self._format
        mark = format.marks.get(token)
        if mark is not None:
            return [*self._text(self._stream.flush()), *self._marked(mark)]
        if self.state == CALL and token == format.quote:
            return self._text(self._stream.flush() + _QUOTE)
        if self.state == CALL and token in format.tokenizer.special:
            return self._text(self._stream.flush() + format.tokenizer.token(token))
        return self._text(self._stream.feed(token))

    def end(self) -> list[Piece]:
        """What was held back when the ids end; a call that broke off is part of the answer."""
        pieces = self._text(self._stream.flush())
        pieces += self._plain(self._marks.flush())
        if self.state == CALL:
            opened = self._format.grammar.call
            text = (opened[0] if opened else "") + self._body.replace(_QUOTE, "")
            self.state = CONTENT
            pieces.append(Piece(CONTENT, text))
        elif self._bare and self._body:
            pieces += self._called(self._body)
        return pieces

    def _text(self, text: str) -> list[Piece]:
        """Text with marks that are no tokens."""
        if not self._texts:
            return self._plain(text)
        pieces: list[Piece] = []
        before, hit = self._marks.feed(text)
        while hit:
            pieces += [*self._plain(before), *self._marked(hit)]
            before, hit = self._marks.feed("")
        return pieces + self._plain(before)

    def _plain(self, text: str) -> list[Piece]:
        if self.state == CALL:
            self._body += text
            return []
        if self._label:
            self._body += text
            _, found, text = self._body.partition("\n")
            if not found:
                return []
            self._label, self._body = False, ""
        if self._fresh:
            text = text.lstrip("\r\n")
        if not text:
            return []
        self._fresh = False
        if self.state == THINKING:
            text = self._tail + text
            kept = text.rstrip()
            self._tail = text[len(kept) :]
            return [Piece(THINKING, kept)] if kept else []
        if self._bare:
            self._body += text
            if self._body.lstrip()[:1] in ("", "{", "["):
                return []
            text, self._body, self._bare = self._body, "", False
        return [Piece(CONTENT, text)]

    def _marked(self, mark: str) -> list[Piece]:
        begin, end = self._format.grammar.think
        call = self._format.grammar.call or ("", "")
        if mark == call[1] and self.state == CALL:
            body, self._body = self._body, ""
            self._start(CONTENT)
            return self._called(body)
        if self.state == CALL:
            self._body += mark
        elif mark == begin:
            self._start(THINKING)
            self._label = self._format.grammar.labelled
        elif mark == call[0]:
            self._start(CALL)
        elif mark == end:
            self._start(CONTENT)
        return []

    def _start(self, state: str) -> None:
        self.state, self._fresh, self._label, self._tail, self._body = state, True, False, "", ""

    def _called(self, body: str) -> list[Piece]:
        """The calls a body describes; the body as text where it describes none."""
        grammar = self._format.grammar
        try:
            calls = _READERS[grammar.syntax](body, self._tools)
        except (ValueError, RecursionError):
            marks = grammar.call or ("", "")
            return [Piece(CONTENT, marks[0] + body.replace(_QUOTE, "") + marks[1])]
        pieces = []
        for name, arguments in calls:
            self._calls += 1
            call = ToolCall(name, arguments, f"call_{self._calls}")
            pieces.append(Piece(CALL, json.dumps(arguments, ensure_ascii=False), call))
        return pieces


_QUOTE = "\U0010ffff"  # stands for the quote mark in a call; no text holds this code point
_Calls = list[tuple[str, dict[str, Any]]]


def _read_json(body: str, tools: Mapping[str, Tool]) -> _Calls:
    """`{"name": …, "arguments" or "parameters": {…}}`, or several in a list."""
    data = json.loads(body)
    calls = []
    for item in data if isinstance(data, list) else [data]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise ValueError("a call has no name")
        arguments = item.get("arguments", item.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(arguments, dict):
            raise ValueError("arguments are no object")
        calls.append((item["name"], arguments))
    return calls


def _read_braces(body: str, tools: Mapping[str, Tool]) -> _Calls:
    """`call:name{key:value,…}` with texts between quote marks and bare keys."""
    head, brace, rest = body.partition("{")
    name = head.strip().removeprefix("call:").strip()
    if not name or not brace:
        raise ValueError("a call has no name")
    reader = _Braces(brace + rest)
    arguments = reader.value()
    if not isinstance(arguments, dict) or reader.rest().strip():
        raise ValueError("arguments are no object")
    return [(name, arguments)]


class _Braces:
    """Values in braces: texts between quote marks, JSON otherwise, keys bare or quoted."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def rest(self) -> str:
        return self._text[self._at :]

    def value(self) -> Any:
        first = self._peek()
        if first == "{":
            return dict(self._items("}", self._pair))
        if first == "[":
            return self._items("]", self.value)
        if first == _QUOTE:
            return self._quoted()
        end = re.compile(r"[,}\]]|$").search(self._text, self._at)
        assert end is not None
        word, self._at = self._text[self._at : end.start()].strip(), end.start()
        return json.loads(word) if word not in ("None", "null", "") else None

    def _pair(self) -> tuple[str, Any]:
        if self._peek() == _QUOTE:
            key = self._quoted()
        else:
            colon = self._text.find(":", self._at)
            if colon < 0:
                raise ValueError("a key has no value")
            key, self._at = self._text[self._at : colon].strip().strip('"'), colon
        if self._peek() != ":":
            raise ValueError("a key has no value")
        self._at += 1
        return key, self.value()

    def _items(self, close: str, item: Any) -> list[Any]:
        self._at += 1
        items: list[Any] = []
        while self._peek() != close:
            items.append(item())
            if self._peek() == ",":
                self._at += 1
            elif self._peek() != close:
                raise ValueError("a list does not end")
        self._at += 1
        return items

    def _quoted(self) -> str:
        end = self._text.find(_QUOTE, self._at + 1)
        if end < 0:
            raise ValueError("a text does not end")
        text, self._at = self._text[self._at + 1 : end], end + 1
        return text

    def _peek(self) -> str:
        while self._text[self._at : self._at + 1].isspace():
            self._at += 1
        return self._text[self._at : self._at + 1]


def _read_pairs(body: str, tools: Mapping[str, Tool]) -> _Calls:
    """`name` and then `<arg_key>key</arg_key><arg_value>value</arg_value>` for each argument."""
    name = body.partition("<arg_key>")[0].strip()
    if not name:
        raise ValueError("a call has no name")
    pairs = re.findall(
        r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", body, flags=re.DOTALL
    )
    types = _types(tools.get(name))
    return [(name, {k.strip(): _value(v, types.get(k.strip())) for k, v in pairs})]


def _read_parameters(body: str, tools: Mapping[str, Tool]) -> _Calls:
    """`<function=name>` and then `<parameter=key>value</parameter>` for each argument."""
    calls: _Calls = []
    for name, inner in re.findall(
        r"<function=([^>\n]+)>(.*?)(?:</function>|$)", body, flags=re.DOTALL
    ):
        types = _types(tools.get(name.strip()))
        pairs = re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", inner, flags=re.DOTALL)
        calls.append((name.strip(), {k.strip(): _value(v, types.get(k.strip())) for k, v in pairs}))
    if not calls:
        raise ValueError("a call has no name")
    return calls


def _types(tool: Tool | None) -> dict[str, Any]:
    """The JSON type of every argument a tool declares."""
    properties = tool.parameters.get("properties") if tool else None
    if not isinstance(properties, Mapping):
        return {}
    return {k: v.get("type") for k, v in properties.items() if isinstance(v, Mapping)}


def _value(text: str, kind: Any) -> Any:
    """A value written bare: JSON, except where the tool asks for text or it is none."""
    if kind == "string":
        return text
    if text in _PYTHON:  # templates that write values as Python prints them teach this
        return _PYTHON[text]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


_PYTHON = {"True": True, "False": False, "None": None}
_READERS = {
    "json": _read_json,
    "braces": _read_braces,
    "pairs": _read_pairs,
    "parameters": _read_parameters,
}


def _overlap(text: str, wanted: str) -> int:
    """How many characters at the end of `text` begin `wanted`."""
    sizes = range(min(len(text), len(wanted) - 1), 0, -1)
    return next((n for n in sizes if wanted.startswith(text[-n:])), 0)
