"""Constrained replies: JSON schemas, regular expressions, Lark grammars and the arguments of tools.

`llguidance` (an extra: pip install '.[grammar]') says which tokens may come next; everything
else gets a logit of -inf. When the tokens that may still come run out, a short way to an end is
taken, so that a reply is whole where its limit allows a whole one.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_kv.errors import ConfigError, RuntimeFault, did_you_mean
from edge_kv.runtime.messages import Tool
from edge_kv.runtime.replies import CALL, CONTENT, THINKING, ReplyFormat
from edge_kv.runtime.session import Logits
from edge_kv.runtime.text import Tokenizer

CHOICES = ("auto", "none", "required")
_WATCHED = 256  # tokens before the limit from which the way to an end is looked up at every step
_SPARE = (
    32  # tokens that may be left over when the end is headed for; shorter ways are short enough
)
_FEW = 16  # ids that may follow where a text has ended
_LOOKED_AT = 512  # ids of those that may come next
_TRIES = 64  # times an id is taken for one that closes something
_CLOSERS = '"}]:,0n'  # what ends a JSON value soonest, best first
_DEEPEST = 16  # nested values in braces whose schema is followed
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


@dataclass(frozen=True)
class Grammar:
    """What a reply must be: a grammar in llguidance's dialect of Lark, and what it was made of."""

    source: str
    what: str
    endings: tuple[str, ...] = ()  # texts that end what is free in it

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any]) -> Grammar:
        """Replies that are JSON of `schema`, without white space between its parts.

        Raises:
            ConfigError: `schema` is not JSON, or no object.
        """
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as e:
                raise ConfigError(f"The JSON schema is not JSON ({e}).") from e
        if not isinstance(schema, Mapping | bool):
            raise ConfigError('The JSON schema must be an object, such as {"type": "object"}.')
        return cls("start: " + _json(schema), "JSON schema")

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Replies that match all of a regular expression (Rust's syntax, no look-around)."""
        return cls(f"start: /{_escaped(pattern)}/", "regular expression")

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Replies of a Lark grammar, in llguidance's dialect; it starts with the rule `start`."""
        return cls(text, "Lark grammar")


class Engine:
    """llguidance over one vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Collection[int]) -> None:
        """`vocab_size`: how many logits the model gives; `stop_ids`: ids that end a reply.

        Raises:
            ConfigError: llguidance is not installed, or does not read this tokenizer.
        """
        try:
            import llguidance
        except ModuleNotFoundError as e:
            raise ConfigError(
                "Grammars need llguidance; in the checkout, run: pip install '.[grammar]'"
            ) from e
        self._matcher: Any = llguidance.LLMatcher
        self.vocab_size = vocab_size
        self.stop_ids = sorted(i for i in stop_ids if i < vocab_size)
        self.tokenizer = tokenizer
        size = max(vocab_size, tokenizer.vocab_size)
        try:
            self._tokenizer: Any = llguidance.LLTokenizer(
                tokenizer.json(), n_vocab=size, eos_token=self.stop_ids or None
            )
        except ValueError as e:
            raise ConfigError(
                f"Replies of this tokenizer cannot be constrained: {_line(e)}."
            ) from e
        self.closers = sorted(tokenizer.special - set(self.stop_ids))
        self.closers += [i for c in _CLOSERS if (i := tokenizer.id_of(c)) is not None]
        self.closers = [i for i in self.closers if i < vocab_size]
        self._kind: dict[int, str] = {}

    def kind(self, token: int) -> str:
        """What kind of character a token begins with: the letter of its Unicode category."""
        if token not in self._kind:
            text = self.tokenizer.decode([token])
            self._kind[token] = unicodedata.category(text[0])[0] if text else ""
        return self._kind[token]

    def bits(self, matcher: Any) -> npt.NDArray[np.bool_]:
        """Which ids may come next, bool [vocab].

        Raises:
            RuntimeFault: the grammar asks for more than is spent on one.
        """
        raw = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():  # a text that breaks off is none of the grammar
            raise RuntimeFault(
                f"The reply cannot be held to its grammar ({_line(matcher.get_error())}); use a "
                "smaller one."
            )
        return np.unpackbits(raw, bitorder="little")[: self.vocab_size].view(np.bool_)

    def start(self, grammar: Grammar) -> Matcher:
        """Begin a text of `grammar`.

        Raises:
            ConfigError: the grammar is not valid.
        """
        inner = {"grammars": [{"lark_grammar": grammar.source}]}
        matcher = self._matcher(self._tokenizer, json.dumps(inner))
        if matcher.is_error():
            raise ConfigError(f"The {grammar.what} is not usable: {_line(matcher.get_error())}.")
        endings = [self.tokenizer.encode(e, start=False) for e in grammar.endings]
        return Matcher(self, matcher, endings)


class Matcher:
    """A text under way that must become one of its grammar."""

    def __init__(self, engine: Engine, matcher: Any, endings: Sequence[Sequence[int]] = ()) -> None:
        self._engine = engine
        self._matcher = matcher
        self._endings = endings
        self._way: _Way | None = None  # to the end, once it is headed for

    def allowed(self, left: int) -> npt.NDArray[np.bool_]:
        """Which ids may come next, bool [vocab]; `left` may still come, this one included."""
        bits = self._engine.bits(self._matcher)
        if self._way is None and left <= _WATCHED:
            steps, closing = self._shortest(left)
            if left <= steps + _SPARE:
                self._way = _Way(self._engine, self._endings, closing)
        if self._way:
            only = np.zeros_like(bits)
            only[self._way.next(self._matcher, bits)] = True
            return only
        return bits

    def accept(self, token: int) -> None:
        """`token` came."""
        self._matcher.consume_token(token)

    def possible(self, ids: Sequence[int]) -> int:
        """How many of `ids` may come one after another."""
        return int(self._matcher.validate_tokens(list(ids)))

    @property
    def ended(self) -> bool:
        """Whether the text is whole and cannot go on."""
        return bool(self._matcher.is_stopped())

    def distance(self, most: int) -> int:
        """Tokens of a short way to the end, the stop included; `most` if it is not found sooner."""
        return self._shortest(most)[0]

    def _shortest(self, most: int) -> tuple[int, bool]:
        """How long the shorter way is, and whether it is that of closers."""
        closed = self._length(most, closing=True)
        if closed < min(most, _SPARE):
            return closed, True
        varied = self._length(closed, closing=False)
        return (varied, False) if varied < closed else (closed, True)

    def _length(self, most: int, *, closing: bool) -> int:
        matcher, way = self._matcher.deep_copy(), _Way(self._engine, self._endings, closing)
        for steps in range(1, most):
            if matcher.is_accepting() or matcher.is_stopped():
                return steps
            try:
                matcher.consume_token(way.next(matcher, self._engine.bits(matcher)))
            except RuntimeFault:  # this way is too long: the text itself is still on
                break
        return most


class _Way:
    """A short way to the end of a text.

    With `closing`, what closes something in JSON comes first, else the kind of character (letters,
    digits, spaces, …) that came least: the rest of a regular expression is rarely more of the same.
    """

    def __init__(self, engine: Engine, endings: Sequence[Sequence[int]], closing: bool) -> None:
        self._engine = engine
        self._endings = endings
        self._closing = closing
        self._used = Counter[int]()
        self._kinds = Counter[str]()
        self._ahead: list[int] = []

    def next(self, matcher: Any, bits: npt.NDArray[np.bool_]) -> int:
        """The allowed id to go on with."""
        token = self._next(matcher, bits)
        self._used[token] += 1
        self._kinds[self._engine.kind(token)] += 1
        return token

    def _next(self, matcher: Any, bits: npt.NDArray[np.bool_]) -> int:
        if self._ahead and bits[self._ahead[0]]:
            return self._ahead.pop(0)
        for token in self._engine.stop_ids:
            if bits[token]:
                return token
        for ending in self._endings:
            if bits[ending[0]]:
                tried = matcher.deep_copy()
                whole = tried.try_consume_tokens(list(ending)) == len(ending)
                if whole and self._engine.bits(tried).sum() <= _FEW:
                    self._ahead = list(ending[1:])
                    return ending[0]
        for token in self._engine.closers if self._closing else ():
            if bits[token] and self._used[token] < _TRIES:
                return token
        return min(
            map(int, np.flatnonzero(bits)[:_LOOKED_AT]),
            key=lambda i: (
                not self._closing and self._kinds[self._engine.kind(i)],
                self._used[i],
                i,
            ),
        )


class ReplyConstraint:
    """What a reply may say, mark by mark: free thoughts, an answer of a grammar, valid calls."""

    def __init__(
        self,
        engine: Engine,
        format: ReplyFormat,
        *,
        grammar: Grammar | None = None,
        tools: Sequence[Tool] = (),
        choice: str = "auto",
        thinking: bool = False,
        may_think: bool = True,
    ) -> None:
        """`choice`: "auto", "none", "required" or the name of the tool to call.

        `thinking`: the prompt has opened a thought.

        Raises:
            ConfigError: a grammar that is not valid, or an unknown choice.
        """
        names = [tool.name for tool in tools]
        if choice not in CHOICES and choice not in names:
            known = (*CHOICES, *names)
            raise ConfigError(f"Unknown tool choice {choice!r}.{did_you_mean(choice, known)}")
        if choice == "required" and not tools:
            raise ConfigError("A tool call is required, but there are no tools.")
        self._engine = engine
        self._format = format
        self._tools = [t for t in tools if choice in (*CHOICES, t.name)] if choice != "none" else []
        self._required = choice == "required" or choice in names
        self._answer = engine.start(grammar) if grammar else None
        self._call: Matcher | None = None
        self._state = THINKING if thinking else CONTENT
        self._said = 0  # tokens of the answer so far
        self._may_think = may_think and not thinking
        marks = format.grammar.call
        self._bare = marks is None
        self._opens = format.ids.get(marks[0]) if marks else None
        self._spelled = bool(marks) and self._opens is None  # calls are marked with text
        begin, end = format.grammar.think
        self._think, self._thought = format.ids.get(begin), format.ids.get(end)
        if self._tools:
            endings = _ENDINGS.get(format.grammar.syntax, ())
            what = "schema of a tool"
            try:
                source = _calls(format, self._tools)
            except (AttributeError, TypeError, ValueError) as e:
                raise ConfigError(f"The {what} is no JSON schema ({e}).") from e
            self._grammar = Grammar(source, what, endings)
            engine.start(self._grammar)  # a schema that is not valid is found here
            if self._required and self._opens is None:
                opening = json.dumps(marks[0]) + " " if marks else ""
                source = self._grammar.source.replace("start: ", f"start: {opening}", 1)
                self._answer = engine.start(Grammar(source, what, endings))

    def mask(self, logits: Logits, left: int) -> Logits:
        """Logits with everything at -inf that must not come next."""
        bits = self._allowed(logits, left)
        return logits if bits is None else np.where(bits, logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """`token` was drawn."""
        if token in self._engine.stop_ids:
            return
        if token in (self._think, self._thought) and self._state != CALL:
            self._state = THINKING if token == self._think else CONTENT
            self._may_think = False
        elif self._state != CALL and token == self._opens and self._tools:
            self._state, self._call = CALL, self._engine.start(self._grammar)
            self._required = False
        elif self._call:
            self._call.accept(token)
            if self._call.ended:
                self._state, self._call = CONTENT, None
        elif self._state == CONTENT:
            self._said += 1
            if self._answer:
                self._answer.accept(token)
            elif self._said == 1 and self._bare and self._tools:
                self._maybe_call(token)

    def possible(self, ids: Sequence[int]) -> int:
        """How many of `ids` could come one after another; no mark and nothing behind one counts."""
        marks = {self._think, self._thought, self._opens}
        plain = next((i for i, id in enumerate(ids) if id in marks), len(ids))
        if self._state == THINKING:
            return plain
        if self._call:
            return self._call.possible(ids)
        if self._required and self._opens is not None:
            return 0
        return self._answer.possible(ids[:plain]) if self._answer else plain

    def _allowed(self, logits: Logits, left: int) -> npt.NDArray[np.bool_] | None:
        if self._state == THINKING:
            return self._thoughts(len(logits), left)
        if self._call:
            return self._call.allowed(left)
        if self._required and self._opens is not None:
            bits = np.zeros(len(logits), np.bool_)
            bits[self._opens] = True
        elif self._answer:
            bits = self._answer.allowed(left)
            if not self._said and self._tools and self._opens is not None:
                bits[self._opens] = True
        else:
            return None
        if not self._said and self._may_think and self._think is not None:
            bits[self._think] = True
        return bits

    def _thoughts(self, size: int, left: int) -> npt.NDArray[np.bool_] | None:
        """Anything, as long as there is room behind it for an answer that has to come."""
        wanted = self._answer or (self._engine.start(self._grammar) if self._required else None)
        if wanted is None or self._thought is None:
            return None
        bits = np.ones(size, np.bool_)
        bits[self._engine.stop_ids] = False
        if left <= _WATCHED and left <= wanted.distance(left) + _SPARE + 2:
            bits[:] = False
            bits[self._thought] = True
        return bits

    def _maybe_call(self, token: int) -> None:
        """An answer that begins like a call is one."""
        if not self._engine.tokenizer.decode([token]).lstrip().startswith("{"):
            return
        matcher = self._engine.start(self._grammar)
        if matcher.allowed(1 << 30)[token]:
            matcher.accept(token)
            self._answer = matcher


def _line(message: Any) -> str:
    """What llguidance says, on one line."""
    first = str(message).strip().split("\n")[0]
    return first.removeprefix("error: ").rstrip(".: ")[:200]


def _escaped(pattern: str) -> str:
    """A regular expression as it stands between slashes in Lark."""
    return re.sub(r"\\.|/", lambda found: found[0].rjust(2, "\\"), pattern, flags=re.DOTALL)


def _json(schema: Any) -> str:
    """A rule for JSON of a schema, without white space between its parts."""
    options = {"whitespace_flexible": False}
    if isinstance(schema, Mapping):
        schema = {**schema, "x-guidance": options}
    return "%json " + json.dumps(schema)


def _calls(format: ReplyFormat, tools: Sequence[Tool]) -> str:
    """The grammar of a call behind its opening mark, the closing one included."""
    start = f"start: ({' | '.join(f'call{i}' for i in range(len(tools)))})"
    return "\n".join([start, *_SYNTAXES[format.grammar.syntax](format, tools)])


def _mark(format: ReplyFormat, mark: str) -> str:
    """A mark as a token where the vocabulary has it, else as text."""
    found = format.tokenizer.id_of(mark)
    return json.dumps(mark) if found is None else f"<[{found}]>"


def _end(format: ReplyFormat) -> str:
    return _mark(format, format.grammar.call[1]) if format.grammar.call else ""


def _json_calls(format: ReplyFormat, tools: Sequence[Tool]) -> Iterator[str]:
    key = "arguments" if format.grammar.call else "parameters"
    for i, tool in enumerate(tools):
        gap = '"\\n"? ' if format.grammar.call else ""
        name = json.dumps('{"name": ' + json.dumps(tool.name) + f', "{key}": ')
        yield f'call{i}: {gap}{name} arguments{i} "}}" {gap}{_end(format)}'
        yield f"arguments{i}: {_json(_object(tool))}"


def _pair_calls(format: ReplyFormat, tools: Sequence[Tool]) -> Iterator[str]:
    key, key_end, value = (_mark(format, m) for m in ("<arg_key>", "</arg_key>", "<arg_value>"))
    for i, tool in enumerate(tools):
        yield f'call{i}: {json.dumps(tool.name)} "\\n" pairs{i}_0 {_end(format)}'

        def pair(at: str, name: str, schema: Any) -> Iterator[str]:
            text = _free(at, schema, format, "</arg_value>")
            yield f'{at}: {key} {json.dumps(name)} {key_end} "\\n" {value} {text[0]} "\\n"'
            yield from text[1:]

        yield from _listed(f"pairs{i}", tool, pair)


def _parameter_calls(format: ReplyFormat, tools: Sequence[Tool]) -> Iterator[str]:
    for i, tool in enumerate(tools):
        head = json.dumps(f"\n<function={tool.name}>\n")
        yield f'call{i}: {head} pairs{i}_0 "</function>\\n" {_end(format)}'

        def pair(at: str, name: str, schema: Any) -> Iterator[str]:
            text = _free(at, schema, format, _ENDINGS["parameters"][0])
            yield f"{at}: {json.dumps(f'<parameter={name}>' + chr(10))} {text[0]}"
            yield from text[1:]

        yield from _listed(f"pairs{i}", tool, pair)


def _free(at: str, schema: Any, format: ReplyFormat, end: str) -> list[str]:
    """A value and the text that ends it: bare where it is a string, else JSON."""
    closing = _mark(format, end)
    if not isinstance(schema, Mapping) or schema.get("type") != "string":
        return [f"{at}_value {closing}", f"{at}_value: {_json(schema)}"]
    if choices := _choices(schema):
        return [f"({' | '.join(json.dumps(str(c)) for c in choices)}) {closing}"]
    text, *rules = _text(at, schema)
    if closing.startswith("<["):
        return [f"{text} {closing}", *rules]
    return [f"{at}_value", f"{at}_value[suffix={json.dumps(end)}]: {text}", *rules]


def _text(at: str, schema: Mapping[str, Any]) -> list[str]:
    """A terminal for the texts of a schema of type string, and the rule of it if it needs one."""
    low, high = schema.get("minLength", 0), schema.get("maxLength", "")
    parts = [f"/(.|\\n){{{low},{high}}}/"] if low or high != "" else []
    if pattern := schema.get("pattern"):
        begun = pattern.startswith("^")
        ended = pattern.endswith("$") and not pattern.endswith("\\$")
        inner = _escaped(pattern[begun : len(pattern) - ended])
        rest = "(.|\\n)*"  # a pattern may be found anywhere in a text
        parts.append(f"/{'' if begun else rest}({inner}){'' if ended else rest}/")
    if not parts:
        return ["/(.|\\n)*/"]
    name = f"{at.upper()}_TEXT"
    return [name, f"{name}: {' & '.join(parts)}"]


def _listed(name: str, tool: Tool, pair: Any) -> Iterator[str]:
    """Rules `name_0` …: the arguments of a tool in their order, optional ones left out at will."""
    schema = _object(tool)
    properties, required = list(schema["properties"].items()), _listed_in(schema, "required")
    shared = {k: schema[k] for k in ("$defs", "definitions") if k in schema}  # what $ref names
    for n, (key, inner) in enumerate(properties):
        rest = f"{name}_{n + 1}"
        optional = "" if key in required else f" | {rest}"
        yield f"{name}_{n}: {name}_{n}p {rest}{optional}"
        yield from pair(
            f"{name}_{n}p", key, {**shared, **inner} if isinstance(inner, Mapping) else inner
        )
    yield f'{name}_{len(properties)}: ""'


def _brace_calls(format: ReplyFormat, tools: Sequence[Tool]) -> Iterator[str]:
    quote = _mark(format, format.grammar.quote)
    yield f"text: {quote} /(.|\\n)*/ {quote}"
    yield "integer: /-?(0|[1-9][0-9]{0,17})/"
    yield "number: /-?(0|[1-9][0-9]{0,17})(\\.[0-9]{1,17})?/"
    yield 'boolean: "true" | "false"'
    yield 'list: "[" (any ("," any)*)? "]"'
    yield 'map: "{" (key ":" any ("," key ":" any)*)? "}"'
    yield "key: /[A-Za-z_][A-Za-z0-9_]*/"
    yield 'any: text | number | boolean | "null" | list | map'
    for i, tool in enumerate(tools):
        yield f"call{i}: {json.dumps('call:' + tool.name)} a{i} {_end(format)}"
        schema = _object(tool)
        yield from _Braces(quote, schema).rules(f"a{i}", schema, 0)


class _Braces:
    """Rules of values in braces; beyond what is known, any value."""

    def __init__(self, quote: str, root: Mapping[str, Any]) -> None:
        self._quote, self._root = quote, root
        self._refs: dict[str, str] = {}  # what a $ref names -> the rule of it

    def rules(self, name: str, schema: Any, depth: int) -> Iterator[str]:
        """`name`: what `schema` allows, and the rules it needs."""
        if not isinstance(schema, Mapping) or depth >= _DEEPEST:
            yield f"{name}: any"
            return
        kind = schema.get("type")
        choices = _choices(schema)
        ways = schema.get("anyOf") or schema.get("oneOf")
        if isinstance(kind, list):
            ways = [{**schema, "type": k} for k in kind]
        if isinstance(ref := schema.get("$ref"), str):
            yield from self._named(name, ref, depth)
        elif choices:
            yield f"{name}: " + " | ".join(map(self._word, choices))
        elif isinstance(ways, list):
            yield f"{name}: " + " | ".join(f"{name}o{i}" for i in range(len(ways)))
            for i, way in enumerate(ways):
                yield from self.rules(f"{name}o{i}", way, depth + 1)
        elif kind == "string":
            text, *rules = _text(name, schema)
            yield f"{name}: {self._quote} {text} {self._quote}"
            yield from rules
        elif kind in ("integer", "number"):
            bounds = {k: schema[k] for k in _BOUNDS if k in schema}
            yield f"{name}: " + (_json({"type": kind, **bounds}) if bounds else kind)
        elif kind in ("boolean", "null"):
            yield f"{name}: " + ("boolean" if kind == "boolean" else '"null"')
        elif kind == "array":
            yield from self._array(name, schema, depth)
        elif kind == "object" and _members(schema):
            yield from self._object(name, schema, depth)
        else:
            yield f"{name}: {'map' if kind == 'object' else 'any'}"

    def _named(self, name: str, ref: str, depth: int) -> Iterator[str]:
        known = self._refs.get(ref)
        if known is None:
            known = self._refs[ref] = f"{name}r"
            target: Any = self._root
            for step in filter(None, ref.removeprefix("#").split("/")):
                target = target.get(step) if isinstance(target, Mapping) else None
            yield from self.rules(known, target, depth + 1)
        yield f"{name}: {known}"

    def _word(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self._quote} {json.dumps(value)} {self._quote}"
        return json.dumps(json.dumps(value))

    def _array(self, name: str, schema: Mapping[str, Any], depth: int) -> Iterator[str]:
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        most = "" if high is None else high - 1
        items = f'{name}i ("," {name}i){{{max(low - 1, 0)},{most}}}'
        yield f'{name}: "[" ' + ("" if high == 0 else items if low else f"({items})?") + ' "]"'
        if high != 0:
            yield from self.rules(f"{name}i", schema.get("items", {}), depth + 1)

    def _object(self, name: str, schema: Mapping[str, Any], depth: int) -> Iterator[str]:
        properties = sorted(_members(schema).items())  # as templates write them
        required = _listed_in(schema, "required")
        yield f'{name}: "{{" {name}_0f "}}"'
        for n, (key, inner) in enumerate(properties):
            for here, comma in (("f", ""), ("", '"," ')):
                optional = "" if key in required else f" | {name}_{n + 1}{here}"
                value = f"{comma}{json.dumps(key + ':')} {name}_{n}v {name}_{n + 1}"
                yield f"{name}_{n}{here}: {value}{optional}"
            yield from self.rules(f"{name}_{n}v", inner, depth + 1)
        for here in ("f", ""):
            yield f'{name}_{len(properties)}{here}: ""'


def _object(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments, closed to others."""
    schema = dict(tool.parameters)
    return {"additionalProperties": False, **schema, "type": "object",
            "properties": _members(schema)}  # fmt: skip


def _members(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The properties of an object's schema, by name."""
    found = schema.get("properties")
    if not (found is None or isinstance(found, Mapping)):
        raise ConfigError(f"The schema of a tool has properties {str(found)[:40]!r}, no object.")
    return dict(found or {})


def _listed_in(schema: Mapping[str, Any], key: str) -> list[Any]:
    """What a schema lists under `key`; nothing where it has no such key."""
    found = schema.get(key)
    if not (found is None or isinstance(found, list)):
        raise ConfigError(f"The schema of a tool has {key} {str(found)[:40]!r}, no list.")
    return found or []


def _choices(schema: Mapping[str, Any]) -> list[Any]:
    """What values of a schema are chosen from; nothing where it names none."""
    return _listed_in(schema, "enum") or ([schema["const"]] if "const" in schema else [])


_ENDINGS = {"pairs": ("</arg_value>",), "parameters": ("\n</parameter>\n",)}
_SYNTAXES = {
    "json": _json_calls,
    "braces": _brace_calls,
    "pairs": _pair_calls,
    "parameters": _parameter_calls,
}
