"""Chat templates: Jinja as transformers renders it, in a sandbox with a budget.

A template comes with a checkpoint, so it is foreign code. The sandbox keeps it from Python's
internals; the budget keeps it from taking all time and memory: every loop round, call, filter and
operator pays for the size of what it makes. Whatever a template raises becomes one sentence.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from edge_kv.artifact import Artifact
from edge_kv.errors import ArtifactError, ConfigError, PromptError

RAW_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""No roles and no marks: the model continues the text of all turns."""

JINJA = (3, 1, 6)  # before, the sandbox can be left through `attr` (CVE-2025-27516)
MAX_SOURCE = 1 << 20  # characters of a template
MAX_TEXT = 1 << 22  # characters of one value, and of the whole output
MAX_ITEMS = 1 << 18  # items of one list
BUDGET = 1 << 25  # what one rendering may spend: characters and items made, and the prices below
SECONDS = 10.0  # of a processor, in one rendering
_CALL, _ROUND = 256, 8  # prices of a call and of one round of a loop
_MAX_WIDTH = 999  # columns that a text is padded or indented to
_MAX_INDENT = 16  # columns of a level of JSON
_MAX_BITS = 4096  # of a whole number
_PERCENT = re.compile(r"%[^a-zA-Z%]*(?:\d{4}|\*)")  # a field wider than _MAX_WIDTH, or of any width
_BRACES = re.compile(r"\{[^}]*(?::[^}]*\d{4}|\{)")
_PADDING = frozenset({"ljust", "rjust", "center", "zfill"})
_WIDE_FILTERS = frozenset({"batch", "center", "indent", "slice", "truncate", "wordwrap", "round"})
_KEEP_ITEMS = frozenset({  # filters that make no text of the items of a list
    "length", "count", "first", "last", "list", "sort", "unique", "map", "select", "reject",
    "selectattr", "rejectattr", "groupby", "batch", "slice", "dictsort", "items", "default", "d",
    "attr", "min", "max", "random", "reverse",
})  # fmt: skip
_UNBOUNDED = frozenset({"translate", "maketrans", "format_map"})


class Template:
    """A Jinja chat template in the conventions of Hugging Face, in a sandbox."""

    def __init__(self, source: str, name: str = "chat template") -> None:
        """Compile `source`.

        Raises:
            ArtifactError: it is not a valid template.
            ConfigError: the installed jinja2 is one whose sandbox can be left.
        """
        _check_jinja()
        if len(source) > MAX_SOURCE:
            raise ArtifactError(
                f"The {name} has {len(source)} characters, at most {MAX_SOURCE} are read."
            )
        self.source = source
        self._name = name
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except Exception as e:  # whatever the parser, the code generator or Python's compiler says
            raise ArtifactError(f"The {name} is not a valid Jinja template: {_said(e)}.") from e

    @classmethod
    def of(cls, artifact: Artifact) -> Template | None:
        """The chat template of an artifact; None when it has none (a base model)."""
        entry = artifact.manifest.tokenizer
        if entry is None or entry.chat_template is None:
            return None
        path = artifact.path(entry.chat_template)
        try:
            return cls(path.read_text(encoding="utf-8"), path.name)
        except (OSError, UnicodeDecodeError) as e:
            raise ArtifactError(f"Cannot read the chat template {path}: {e}.") from e

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a conversation, ready for the model's next turn.

        `messages` and `tools` have the shape that transformers gives to templates; `variables` are
        further names a template may read (bos_token, eos_token, enable_thinking, …).

        Raises:
            PromptError: the template refuses the conversation (roles out of order, …), fails, or
                needs more time or memory than a template gets.
        """
        try:
            return self._environment.run(
                self._template,
                {
                    **variables,
                    "messages": list(messages),
                    "tools": list(tools) if tools else None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                },
            )
        except Exception as e:
            raise PromptError(f"The {self._name} refuses this conversation: {_said(e)}.") from e


class _Environment(ImmutableSandboxedEnvironment):
    """The names and settings transformers gives to templates, every operation paid for."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=_sized,
        )
        self.code_generator_class = _Code
        self.filters["tojson"] = _to_json
        self.filters = {name: self._paid(name, f) for name, f in self.filters.items()}
        self.filters[_ROUNDS] = self.rounds
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]
        self._left = BUDGET
        self._end = 0.0

    def run(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        """Render within one budget."""
        self._left = BUDGET
        self._end = time.thread_time() + SECONDS
        pieces = []
        length = 0
        for piece in template.generate(variables):
            self.pay(piece)
            length += len(piece)
            if length > MAX_TEXT:
                raise _Exhausted(f"its text is longer than {MAX_TEXT} characters")
            pieces.append(piece)
        return "".join(pieces)

    def spend(self, price: int) -> None:
        """Take `price` from the budget."""
        self._left -= price
        if self._left < 0:
            raise _Exhausted("it makes more text and rounds of loops than a template may")
        if time.thread_time() > self._end:
            raise _Exhausted(f"it takes more than {SECONDS:.0f} seconds")

    def pay(self, value: Any) -> Any:
        """Charge for a value and return it."""
        if isinstance(value, str | bytes):
            size, limit = len(value), MAX_TEXT
        elif isinstance(value, list | tuple | dict):
            size, limit = len(value), MAX_ITEMS
        else:
            size, limit = 0, 0
        if size > limit:
            raise _Exhausted(f"a value is longer than {limit}")
        self.spend(1 + size)
        return value

    def rounds(self, value: Any) -> Any:
        """What a loop runs over, paid for before it runs."""
        if not isinstance(value, jinja2.Undefined | str | list | tuple | dict | range):
            value = list(value)
        self.spend(_ROUND * len(value))
        return value

    def joined(self, parts: tuple[Any, ...]) -> str:
        """The `~` operator."""
        return str(self.pay(str_join([_sized(part) for part in parts])))

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if operator == "*":
            _check_product(left, right)
        elif operator == "**":
            _check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            _check_format(_PERCENT, left, "%", right)
        return self.pay(super().call_binop(context, operator, left, right))

    def call(
        __self,  # as in jinja2: a template may pass an argument called self
        __context: jinja2.runtime.Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_method(owner, getattr(__obj, "__name__", ""), args, kwargs)
        __self.spend(_CALL)
        return __self.pay(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        safe = super().wrap_str_format(value)
        if safe is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> Any:
            _check_format(_BRACES, value.__self__, "{", (args, kwargs))
            return safe(*args, **kwargs)

        return bounded

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _ROUNDS, [], [], None, None, lineno=loop.lineno)
        return tree

    def _paid(self, name: str, wanted: Callable[..., Any]) -> Callable[..., Any]:
        """A filter with its result paid for; what jinja2 marks a filter with is kept."""

        def paid(*args: Any, **kwargs: Any) -> Any:
            given = [*(a for a in args if not isinstance(a, _CONTEXTS)), *kwargs.values()]
            if name not in _KEEP_ITEMS:
                for value in given:
                    _sized(value)
            _check_filter(name, given)
            return self.pay(wanted(*args, **kwargs))

        for mark in ("jinja_pass_arg", "jinja_async_variant"):
            if hasattr(wanted, mark):
                setattr(paid, mark, getattr(wanted, mark))
        return paid


_CONTEXTS = (jinja2.runtime.Context, nodes.EvalContext, jinja2.Environment)
_ROUNDS = "rounds of a loop"  # a filter no template can name


class _Exhausted(Exception):
    """A template asked for more time or memory than it gets."""


class _Code(CodeGenerator):
    """jinja2's code generator, with `~` as an operation of the environment."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Generation(Extension):
    """`{% generation %}` marks what a model wrote, for training; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Macro) -> str:
        return str(caller())


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)` without the type behind them."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """`namespace(...)` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_jinja() -> None:
    digits = [int(n) for n in re.findall(r"\d+", jinja2.__version__)[:3]]
    if tuple(digits) < JINJA:
        wanted = ".".join(map(str, JINJA))
        raise ConfigError(
            f"jinja2 {jinja2.__version__} is installed, whose sandbox a template can leave; "
            f"run: pip install 'jinja2>={wanted}'."
        )


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no name {name!r}")


def _sized(value: Any) -> Any:
    """A value about to become text, refused when that text would be too long."""
    if not isinstance(value, str | int | float) and _characters(value) > MAX_TEXT:
        raise _too_long()
    return value


def _characters(value: Any) -> int:
    """About how long the text of a value is; stops counting beyond MAX_TEXT."""
    total, rest = 0, [value]
    while rest and total <= MAX_TEXT:
        item = rest.pop()
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, dict):
            rest += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            rest += item
        total += 1
    return total


def _too_long() -> _Exhausted:
    return _Exhausted(f"a value is longer than {MAX_TEXT} characters")


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > _MAX_BITS:
            raise _Exhausted("a number is too large")
        return
    count, sequence = (left, right) if isinstance(left, int) else (right, left)
    if isinstance(count, int) and isinstance(sequence, str | bytes | list | tuple):
        limit = MAX_TEXT if isinstance(sequence, str | bytes) else MAX_ITEMS
        if count * len(sequence) > limit:
            raise _Exhausted(f"a value is longer than {limit}")


def _check_power(left: Any, right: Any) -> None:
    whole = isinstance(left, int) and isinstance(right, int)
    if whole and left.bit_length() * max(right, 0) > _MAX_BITS:
        raise _Exhausted("a number is too large")


def _check_format(wide: re.Pattern[str], form: str, mark: str, values: Any) -> None:
    fields = form.count(mark)
    if wide.search(form) or fields * (_MAX_WIDTH + _characters(values)) > MAX_TEXT:
        raise _Exhausted("it formats a text too wide")


def _check_widths(values: Iterable[Any]) -> None:
    if any(isinstance(v, int) and abs(v) > _MAX_WIDTH for v in values):
        raise _Exhausted(f"it asks for more than {_MAX_WIDTH} columns")


def _check_filter(name: str, given: Sequence[Any]) -> None:
    """Refuse a filter whose result may be larger than a value may be."""
    texts = [g for g in given if isinstance(g, str)]
    if name in _WIDE_FILTERS:
        _check_widths(given)
    if name == "indent" and texts:
        width = max((g for g in given if isinstance(g, int)), default=4)
        if len(texts[0]) + (texts[0].count("\n") + 1) * width > MAX_TEXT:
            raise _too_long()
    elif name == "format" and texts:
        _check_format(_PERCENT, texts[0], "%", list(given[1:]))
    elif name == "replace" and texts:
        _check_method(texts[0], name, tuple(texts[1:]), {})
    elif name == "join" and given:
        parts = given[0] if isinstance(given[0], list | tuple | str) else ()
        if len(parts) * len(str(given[1]) if len(given) > 1 else "") > MAX_TEXT:
            raise _too_long()
    elif name == "sum" and any(isinstance(g, list | tuple) for g in given[1:]):
        raise _Exhausted("it adds up lists, which is not supported")


def _check_method(text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a method of a text whose result may be larger than a value may be."""
    length = 0
    if name in _UNBOUNDED:
        raise _Exhausted(f"it calls {name}, which is not supported")
    if name in _PADDING:
        _check_widths([*args, *kwargs.values()])
    elif name == "expandtabs":
        _check_widths([*args, *kwargs.values()])
        length = len(text) + _MAX_WIDTH * text.count("\t")
    elif name == "replace" and len(args) > 1 and all(isinstance(a, str) for a in args[:2]):
        found = text.count(args[0]) if args[0] else len(text) + 1
        length = len(text) + found * (len(args[1]) - len(args[0]))
    elif name == "join" and args and isinstance(args[0], list | tuple):
        length = _characters(args[0]) + len(text) * len(args[0])
    if length > MAX_TEXT:
        raise _too_long()


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    if indent is not None and (indent if isinstance(indent, int) else len(indent)) > _MAX_INDENT:
        raise _Exhausted(f"it indents JSON by more than {_MAX_INDENT}")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _said(error: Exception) -> str:
    """What an exception says, on one line; its kind where it is not jinja2's or ours."""
    text = " ".join(str(error).split())[:300].rstrip(".")
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    if isinstance(error, jinja2.TemplateError | _Exhausted):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
