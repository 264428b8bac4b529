"""Chat: messages in, replies out in pieces, over a session that keeps what it has already read.

`Generator` answers any conversation it is given; `Chat` holds one. Both parse replies by token id
and feed the ids of earlier replies as they were generated, wherever the template writes them so.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_kv.errors import ConfigError, PromptError, SnapshotError
from edge_kv.runtime.generation import Constraint, Slide, Trace, generate
from edge_kv.runtime.messages import Message, Tool, ToolCall
from edge_kv.runtime.replies import CONTENT, Holdback, Piece, ReplyFormat, ReplyParser
from edge_kv.runtime.sampling import Sampling, TokenLogprobs
from edge_kv.runtime.session import Session
from edge_kv.runtime.speculation import AUTO, OFF, Speculation
from edge_kv.runtime.template import RAW_TEMPLATE, Template
from edge_kv.runtime.text import TextStream, Tokenizer

if TYPE_CHECKING:
    from edge_kv.runtime.constraints import Engine, Grammar

__all__ = [
    "RAW_TEMPLATE", "Chat", "Generator", "Message", "Options", "Piece", "Reply", "Template", "Tool",
    "ToolCall", "Turn",
]  # fmt: skip

STOP, LENGTH, FULL, CALLS, CANCELLED = "stop", "length", "full", "calls", "cancelled"
_THINK = "enable_thinking"  # the variable of templates
_CONVERSATIONS = 8  # conversations whose ids are remembered
_CONTENTS = 512  # answers whose ids are remembered
_HOLE = "\ue000{}\ue001"  # stands for an answer while its place in a rendered text is looked for


@dataclass(frozen=True)
class Options:
    """How replies are generated; meaning and limits as in `generate`.

    Sampling left at None is the checkpoint's own. `stop`: texts that end a reply and are not part
    of it. `think`: the template variable `enable_thinking`; None leaves it to the template.
    `one_call`: a reply ends with its first call of a tool.
    """

    max_new_tokens: int = 512
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    on_full: str = "stop"
    stop: tuple[str, ...] = ()
    think: bool | None = None
    one_call: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    def sampling(self, default: Sampling) -> Sampling:
        """`default` with what is set here."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        given = {n: getattr(self, n) for n in names}
        return replace(default, **{n: v for n, v in given.items() if v is not None})


@dataclass(frozen=True)
class Reply:
    """One finished turn: what was said, why it ended, and what it cost."""

    text: str  # the answer alone
    ids: tuple[int, ...]
    prompt_tokens: int  # length of the whole conversation up to the reply
    reused_tokens: int  # of those, how many the session still held
    first_token_seconds: float  # from the question to its first token
    seconds: float
    thinking: str = ""
    thinking_tokens: int = 0
    calls: tuple[ToolCall, ...] = ()
    finish: str = STOP  # STOP | LENGTH | FULL (the context) | CALLS | CANCELLED
    stopped_by: str = ""  # the stop text, if one ended it
    logprobs: tuple[TokenLogprobs, ...] = ()  # one an id but for a stop text's, where asked for
    passes: int = 0  # runs of the model
    drafted: int = 0  # ids that were fed before it was known that they come
    accepted: int = 0  # of them, those that came
    ties: int = 0  # choices in passes with drafts that another summation order may reverse

    @property
    def message(self) -> Message:
        """The reply as a turn of the conversation."""
        return Message("assistant", self.text, self.thinking, self.calls)


@dataclass
class _Known:
    """A conversation as it was fed: its text, its ids, and the part that sliding forgot."""

    text: str
    ids: list[int]
    gap: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class _Prompt:
    messages: tuple[Message, ...]
    text: str
    ids: list[int]
    gap: tuple[int, int]
    keep_first: int
    opening: int  # how many of `fed` conversations with the same system prompt and tools share
    stays: int  # how many of `fed` stay when the conversation goes on
    thinking: bool

    @property
    def fed(self) -> list[int]:
        """The ids without what sliding forgot."""
        return self.ids[: self.gap[0]] + self.ids[self.gap[1] :]


class Turn(Iterator[Piece]):
    """A reply under way: iterate for its pieces, close it to stop; `reply` describes it at the end.

    A turn that is closed early keeps what was said. It has no reply if its prompt was not read.
    """

    def __init__(self, pieces: Iterator[Piece]) -> None:
        self._pieces = pieces
        self.reply: Reply | None = None

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """Stop generating."""
        self._pieces.close()  # type: ignore[attr-defined]


class Generator:
    """Replies to conversations, over one session.

    Conversations are recognised: the ids of their turns, as read and as generated, are remembered,
    so a conversation that goes on costs its new turn only, as far as the session still holds it.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer | None = None,
        template: Template | None = None,
        *,
        on_slide: Callable[[Slide], None] | None = None,
        drafts: Speculation | str | int = AUTO,
    ) -> None:
        """Tokenizer and template default to those of the session's artifact; `drafts` are as in
        `generate`.

        Raises:
            ArtifactError: the artifact has no tokenizer.
            ConfigError: it has no chat template (pass `Template(RAW_TEMPLATE)` for a base model),
                or a pass does not take so many drafts.
        """
        artifact = session.artifact
        template = template or Template.of(artifact)
        if template is None:
            raise ConfigError(
                f"{artifact.root} has no chat template: it is a base model; use --raw, which "
                "continues the text as it stands."
            )
        self.session = session
        self.tokenizer = tokenizer or Tokenizer.of(artifact)
        self.template = template
        self.format = ReplyFormat.of(self.tokenizer, template.source)
        self.sampling = Sampling.of(artifact)
        self.on_slide = on_slide
        self.drafts: Speculation | str = Speculation.of(drafts, session) or OFF
        self._ids = _Ids(session)
        self.stop_ids = self._ids.stop | self.format.ends
        self._engine: Engine | None = None
        # Hears ids before they are read, and how many of them stay when the conversation goes on.
        self.on_prompt: Callable[[Sequence[int], int], None] | None = None
        self._conversations: list[_Known] = []  # the newest last
        self._answers: OrderedDict[str, list[int]] = OrderedDict()  # text -> ids as generated

    def reply(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        options: Options | None = None,
        grammar: Grammar | None = None,
        tool_choice: str = "auto",
        cancelled: Callable[[], bool] | None = None,
    ) -> Turn:
        """Answer a conversation. The prompt is made here; work starts with the first `next`.

        `grammar` is what the answer must be. Calls of `tools` have the arguments the tools ask for;
        `tool_choice` is "auto", "none", "required" or the name of the tool that must be called.
        `cancelled` is asked before every step, while a long prompt is read too: True ends the turn.

        Raises:
            PromptError: the template refuses the conversation.
            ContextFullError: the conversation does not fit the context.
            ConfigError: an option out of range, or a grammar or schema that is not valid.
        """
        begin = time.perf_counter()
        options = options or Options()
        prompt = self._prompt(messages, tools, options)
        constraint = self._constraint(prompt, tools, options, grammar, tool_choice)
        sampling = options.sampling(self.sampling)
        trace = Trace()
        gap = list(prompt.gap)

        def slid(slide: Slide) -> None:
            gap[:] = [slide.kept_first, max(gap[1], slide.kept_first) + slide.forgotten]
            if self.on_slide:
                self.on_slide(slide)

        tokens = generate(
            self.session,
            prompt.fed,
            max_new_tokens=options.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=options.frequency_penalty,
            presence_penalty=options.presence_penalty,
            seed=options.seed,
            stop=self.stop_ids,
            on_full=options.on_full,
            keep_first=prompt.keep_first,
            on_slide=slid,
            logit_bias=options.logit_bias,
            suppress=self._ids.suppress,
            constraint=constraint,
            logprobs=options.logprobs,
            checkpoints=(prompt.opening, prompt.stays),
            cancelled=cancelled,
            drafts=self.drafts,
            trace=trace,
        )
        parser = ReplyParser(self.format, thinking=prompt.thinking, tools=tools)
        said = _Said(self.tokenizer, parser, options.stop, trace.logprobs)

        def pieces() -> Iterator[Piece]:
            first = 0.0
            if self.on_prompt:
                self.on_prompt(prompt.fed, prompt.stays)
            finished = False
            try:
                for token in tokens:
                    if not said.ids:
                        first = time.perf_counter() - begin
                    yield from said.feed(token)
                    if said.stopped_by or (options.one_call and said.calls):
                        break
                else:
                    yield from said.end()
                finished = trace.finish != CANCELLED
            finally:
                tokens.close()  # the session then holds what was said and no drafts
                if finished or said.ids:  # a question that failed before its reply was not asked
                    seconds = time.perf_counter() - begin
                    turn.reply = said.reply(prompt, trace, first, seconds, finished)
                    self._remember(prompt, said, (gap[0], gap[1]))

        turn = Turn(pieces())
        return turn

    def _constraint(
        self,
        prompt: _Prompt,
        tools: Sequence[Tool],
        options: Options,
        grammar: Grammar | None,
        choice: str,
    ) -> Constraint | None:
        if grammar is None and choice == "auto" and (not tools or find_spec("llguidance") is None):
            return None  # without llguidance calls are what the model makes them
        from edge_kv.runtime.constraints import Engine, ReplyConstraint

        if self._engine is None:
            self._engine = Engine(self.tokenizer, _Ids.vocab(self.session), self.stop_ids)
        return ReplyConstraint(
            self._engine,
            self.format,
            grammar=grammar,
            tools=tools,
            choice=choice,
            thinking=prompt.thinking,
            may_think=options.think is not False,
        )

    def _prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool], options: Options
    ) -> _Prompt:
        text = self._render(messages, tools, options)
        ids = self._encode(messages, tools, options, text)
        slides = options.on_full == "slide"
        gap = self._gap(ids) if slides else (0, 0)
        stays = self._staying(messages, tools, options, text)
        turn, opening = self._cut(text, ids, stays)
        turn = min(turn, len(ids) - 1)  # the last id is decoded, not read
        head = (
            self._head(messages, text)
            if slides
            else self._opening(messages, tools, options, text, ids)
        )
        removed = gap[1] - gap[0]
        return _Prompt(
            messages=tuple(messages),
            text=text,
            ids=ids,
            gap=gap,
            keep_first=gap[0] or head,
            opening=head if head > 1 else 0,
            stays=turn - removed if turn > gap[1] else 0,
            thinking=self.format.opened(opening),
        )

    def _staying(
        self, messages: Sequence[Message], tools: Sequence[Tool], options: Options, text: str
    ) -> int:
        """How many characters of a prompt the history of later turns is sure to begin with.

        Templates open thoughts that history leaves out, and drop thoughts of earlier turns when a
        new question comes: the conversation is rendered as if it had gone on.
        """
        later = [*messages, Message("assistant", "a"), Message("user", "a")]
        try:
            texts = [self._render(later, tools, options)]
        except PromptError:  # a template that wants its turns in another order
            texts = []
        texts.append(self._render(messages, tools, options, add_generation_prompt=False))
        return min(_shared(text, other) for other in texts)

    def _cut(self, text: str, ids: list[int], at: int) -> tuple[int, list[int]]:
        """How many ids stand for the first `at` characters of a prompt, and the ids behind them.

        Where `at` lies inside a token, the cut moves left to where a line or a mark begins.
        """
        for cut in (at, text.rfind("<", 0, at), text.rfind("\n", 0, at) + 1):
            rest = self.tokenizer.encode(text[max(cut, 0) :], start=False)
            if ids[len(ids) - len(rest) :] == rest:
                return len(ids) - len(rest), rest
        return 0, self.tokenizer.encode(text[at:], start=False)

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Tool], options: Options, **more: Any
    ) -> str:
        if options.think is not None:
            more[_THINK] = options.think
        eos = self._ids.eos
        return self.template.render(
            [m.as_dict() for m in messages],
            tools=[t.as_dict() for t in tools] or None,
            bos_token=self.tokenizer.bos_token,
            eos_token=self.tokenizer.token(eos[0]) if eos else "",
            **more,
        )

    def _encode(
        self, messages: Sequence[Message], tools: Sequence[Tool], options: Options, text: str
    ) -> list[int]:
        """Ids of a rendered conversation, earlier turns as they were read and generated."""
        known = max(
            (c for c in self._conversations if text.startswith(c.text)),
            key=lambda c: len(c.text),
            default=None,
        )
        if known is None:
            ids, at, start = [], 0, True
        else:
            ids, at, start = list(known.ids), len(known.text), not known.ids
        if known and not known.text and text.startswith(self.tokenizer.bos_token):
            at = len(self.tokenizer.bos_token)  # a context restored without a conversation has it
        for begin, end, answer in self._places(messages, tools, options, text, at):
            ids += self.tokenizer.encode(text[at:begin], start=start) + answer
            at, start = end, False
        if at < len(text) or start:
            ids += self.tokenizer.encode(text[at:], start=start)
        return ids

    def _places(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        options: Options,
        text: str,
        at: int,
    ) -> list[tuple[int, int, list[int]]]:
        """Where answers whose ids are known stand in `text` from `at` on; none if that is unsure.

        The conversation is rendered once more with a mark instead of each such answer. Templates
        that look into answers (to trim, to strip thoughts) may then write another text: no places.
        """
        answers = {
            i: m.content
            for i, m in enumerate(messages)
            if m.role == "assistant" and m.content in self._answers
        }
        if not answers or at >= len(text):
            return []
        marked = [
            replace(m, content=_HOLE.format(i)) if i in answers else m
            for i, m in enumerate(messages)
        ]
        rest = self._render(marked, tools, options)
        places, made, length = [], [], 0
        for i, answer in answers.items():
            before, found, rest = rest.partition(_HOLE.format(i))
            if not found:
                return []
            begin = length + len(before)
            length = begin + len(answer)
            made += [before, answer]
            if begin >= at:
                places.append((begin, length, self._answers[answer]))
        return places if "".join([*made, rest]) == text else []

    def _gap(self, ids: list[int]) -> tuple[int, int]:
        """What sliding has forgotten of the beginning of `ids`, in an earlier turn."""
        gaps = (c for c in reversed(self._conversations) if c.gap[1])
        return next((c.gap for c in gaps if ids[: c.gap[1]] == c.ids[: c.gap[1]]), (0, 0))

    def _head(self, messages: Sequence[Message], text: str) -> int:
        """Tokens up to the end of the system prompt, which sliding never forgets."""
        system = messages[0].content.strip() if messages and messages[0].role == "system" else ""
        at = text.find(system) if system else -1
        if at < 0:
            return 1
        head = self.tokenizer.encode(text[: at + len(system)])
        half: int = self.session.plan.ctx // 2
        return min(len(head), half)

    def _opening(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        options: Options,
        text: str,
        ids: list[int],
    ) -> int:
        """How many ids stand before the first question: system prompt and tools; 0 without any.

        The conversation is rendered with another question. The cut moves left to where a line or a
        mark begins, so that no question changes the ids before it.
        """
        first = next((i for i, m in enumerate(messages) if m.role != "system"), None)
        if first is None or not (first or tools):
            return 0
        asked = [*messages[:first], replace(messages[first], content=_HOLE.format(first))]
        try:
            at = _shared(text, self._render(asked, tools, options))
        except PromptError:  # a template that looks into questions
            return 0
        for cut in (text.rfind("\n", 0, at) + 1, text.rfind("<", 0, at)):
            head = self.tokenizer.encode(text[: max(cut, 0)])
            if ids[: len(head)] == head:
                return len(head)
        return 0

    def _remember(self, prompt: _Prompt, said: _Said, gap: tuple[int, int]) -> None:
        ids = prompt.ids + said.whole
        text = prompt.text + self.tokenizer.decode(said.whole, special=True)
        self.know(text, ids, gap)
        answer = said.answer_ids()
        if answer:
            self._answers[said.content] = answer
            self._answers.move_to_end(said.content)
            if len(self._answers) > _CONTENTS:
                self._answers.popitem(last=False)

    def know(self, text: str, ids: Sequence[int], gap: tuple[int, int] = (0, 0)) -> None:
        """Take `ids` for the encoding of `text` wherever a conversation begins with it."""
        kept = [c for c in self._conversations if not text.startswith(c.text)]
        self._conversations = [*kept[1 - _CONVERSATIONS :], _Known(text, list(ids), gap)]

    @property
    def heeds_think(self) -> bool:
        """Whether the template looks at `Options.think`."""
        return _THINK in self.template.source

    def forget(self) -> None:
        """Recognise nothing that was said so far."""
        self._conversations.clear()
        self._answers.clear()

    @property
    def newest(self) -> tuple[str, list[int], tuple[int, int]]:
        """Text, ids and forgotten part of the conversation answered last."""
        known = self._conversations[-1] if self._conversations else _Known("", [])
        return known.text, known.ids, known.gap


class _Said:
    """A reply as it grows, and what of it is shown: what comes before a stop text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        parser: ReplyParser,
        stop: Sequence[str],
        logprobs: Sequence[TokenLogprobs],
    ) -> None:
        """`logprobs` are those of the ids that were fed, which grow with them; none if unwanted."""
        self.parser = parser
        self.ids: list[int] = []
        self.content = ""
        self.thinking = ""
        self.thinking_tokens = 0
        self.calls: list[ToolCall] = []
        self.stopped_by = ""  # the stop text that ended it
        self.shown = 0  # how many ids have their text, or its beginning, in what is shown
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._stops = Holdback(stop)
        self._looked = 0  # characters of the answer that were looked through for stop texts
        # Of those not shown yet: where a text begins, and how many ids made it and all before.
        self._begins: deque[tuple[int, int]] = deque()

    def feed(self, token: int) -> Iterator[Piece]:
        """What `token` adds to what is shown."""
        self.ids.append(token)
        yield from self._shown(self.parser.feed(token))

    def end(self) -> Iterator[Piece]:
        """What was held back when the ids end."""
        yield from self._shown(self.parser.end())
        if not self.stopped_by:
            yield from self._given(self._stops.flush())

    def _shown(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if piece.kind == CONTENT:
                self._begins.append((self._looked, len(self.ids)))
                self._looked += len(piece.text)
                text, self.stopped_by = self._stops.feed(piece.text)
                yield from self._given(text)
            else:
                yield from self._given(self._stops.flush())
                if piece.call:
                    self.calls.append(piece.call)
                else:
                    self.thinking += piece.text
                    self.thinking_tokens += len(self.ids) - self.shown
                yield self._listing(piece, len(self.ids))
            if self.stopped_by:
                return

    def _given(self, text: str) -> Iterator[Piece]:
        """More of the answer, if any."""
        if text:
            self.content += text
            ids = self.shown
            while self._begins and self._begins[0][0] < len(self.content):
                ids = self._begins.popleft()[1]
            yield self._listing(Piece(CONTENT, text), ids)

    def _listing(self, piece: Piece, ids: int) -> Piece:
        """`piece` with the log-probabilities of what it shows of the first `ids` ids."""
        before, self.shown = self.shown, ids
        return replace(piece, logprobs=tuple(self._logprobs[before:ids]))

    @property
    def whole(self) -> list[int]:
        """The ids up to the last whole character."""
        stream = TextStream(self._tokenizer)
        for token in self.ids:
            stream.feed(token)
        return self.ids[: stream.done]

    def answer_ids(self) -> list[int]:
        """The ids at the end of the reply that are exactly its answer; none if there are none."""
        if not self.content or self.calls:
            return []
        marks = self.parser.marks
        start = max((i + 1 for i, t in enumerate(self.ids) if t in marks), default=0)
        for at in range(start, len(self.whole)):
            text = self._tokenizer.decode(self.whole[at:])
            if text == self.content:
                return self.whole[at:]
            if len(text) < len(self.content):
                return []
        return []

    def reply(
        self, prompt: _Prompt, trace: Trace, first: float, seconds: float, finished: bool
    ) -> Reply:
        finish = STOP if self.stopped_by else trace.finish or (STOP if finished else CANCELLED)
        if self.calls and finish == STOP:
            finish = CALLS
        return Reply(
            text=self.content.rstrip() if self.calls else self.content,
            ids=tuple(self.ids),
            prompt_tokens=len(prompt.ids),
            reused_tokens=trace.reused,
            first_token_seconds=first,
            seconds=seconds,
            thinking=self.thinking,
            thinking_tokens=self.thinking_tokens,
            calls=tuple(self.calls),
            finish=finish,
            stopped_by=self.stopped_by,
            logprobs=tuple(trace.logprobs[: self.shown if self.stopped_by else None]),
            passes=trace.passes,
            drafted=trace.drafted,
            accepted=trace.accepted,
            ties=trace.ties,
        )


class Chat:
    """One conversation, held: history, replies, saving.

    The ids of a turn are those of the turn before, as generated, followed by the encoding of the
    new text only, whenever the template renders the earlier turns as before: then nothing is read
    twice. Where it leaves something out (thoughts), what follows is read again.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer | None = None,
        template: Template | None = None,
        *,
        options: Options | None = None,
        system: str | None = None,
        tools: Sequence[Tool] = (),
        grammar: Grammar | None = None,
        on_slide: Callable[[Slide], None] | None = None,
        drafts: Speculation | str | int = AUTO,
    ) -> None:
        """Tokenizer and template default to those of the session's artifact; `grammar` is what
        every answer must be, and `drafts` are as in `generate`.

        Raises:
            ArtifactError: the artifact has no tokenizer.
            ConfigError: it has no chat template (pass `Template(RAW_TEMPLATE)` for a base model),
                or a pass does not take so many drafts.
        """
        self.generator = Generator(session, tokenizer, template, on_slide=on_slide, drafts=drafts)
        self.options = options or Options()
        self.tools = tuple(tools)
        self.grammar = grammar
        self.history: list[Message] = []
        self.last: Reply | None = None
        self.system = system or ""
        self.reset()

    @property
    def session(self) -> Session:
        return self.generator.session

    @property
    def tokenizer(self) -> Tokenizer:
        return self.generator.tokenizer

    @property
    def template(self) -> Template:
        return self.generator.template

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The history as JSON, in the shape chat templates read."""
        return [m.as_dict() for m in self.history]

    @property
    def used(self) -> int:
        """Tokens of the context that the conversation takes, as far as it was read."""
        return self.session.pos if self.generator.newest[1] else 0

    def reset(self) -> None:
        """Start a new conversation; the session keeps what it can reuse, and saves none of it."""
        self.history = [Message("system", self.system)] if self.system else []
        self.last = None
        self.generator.forget()

    def save(self, path: str | Path) -> None:
        """Snapshot the session together with the conversation.

        Raises:
            SnapshotError: the file cannot be written.
        """
        text, ids, gap = self.generator.newest
        if not ids:
            self.session.reset()  # what is held belongs to an earlier conversation
        note = {"messages": self.messages, "text": text, "ids": ids, "gap": list(gap)}
        self.session.snapshot(path, note)

    def load(self, path: str | Path) -> None:
        """Take up a saved conversation; a bare session snapshot counts as text already read.

        Raises:
            SnapshotError: it cannot be restored here, or holds another kind of note.
        """
        note = self.session.restore(path)
        self.reset()
        messages = note.get("messages")
        if messages is not None:
            try:
                self.history = [Message.of(m) for m in messages]
            except (PromptError, TypeError) as e:
                raise SnapshotError(f"{path} holds no conversation ({e})") from e
        text, ids = note.get("text", ""), note.get("ids", list(self.session.tokens))
        gap = note.get("gap", [0, 0])
        if not (
            isinstance(text, str)
            and all(isinstance(n, list) and all(type(i) is int for i in n) for n in (ids, gap))
            and len(gap) == 2
            and 0 <= gap[0] <= gap[1] <= len(ids)
        ):
            raise SnapshotError(f"{path} holds a conversation that is damaged; take it again.")
        if ids:
            self.generator.know(text, ids, (gap[0], gap[1]))

    def send(self, content: str) -> Iterator[str]:
        """Ask and yield the answer in pieces of whole characters; `last` describes it at the end.

        When the caller stops early (Ctrl-C, closing the iterator), the text so far is the reply.

        Raises:
            PromptError: the turn is empty, or the template refuses the conversation.
            ContextFullError: the conversation does not fit the context.
        """
        return self._texts(self.ask(Message("user", content)))

    def ask(self, *messages: Message, grammar: Grammar | None = None) -> Iterator[Piece]:
        """Add turns (a question, results of tools) and yield the reply in pieces.

        `grammar` is what this answer must be, where it is not that of the conversation.

        Raises:
            As `send`.
        """
        return self._reply([*self.history, *messages], grammar)

    def again(self) -> Iterator[Piece]:
        """Answer the last question once more; the reply there was is forgotten.

        Raises:
            PromptError: nothing was asked yet.
        """
        last = [i for i, m in enumerate(self.history) if m.role != "assistant"]
        if not last or self.history[last[-1]].role == "system":
            raise PromptError("There is no question yet to answer again.")
        return self._reply(self.history[: last[-1] + 1])

    def _reply(self, asked: list[Message], grammar: Grammar | None = None) -> Iterator[Piece]:
        turn = self.generator.reply(
            asked, tools=self.tools, options=self.options, grammar=grammar or self.grammar
        )
        return self._kept(turn, asked)

    def _kept(self, turn: Turn, asked: list[Message]) -> Iterator[Piece]:
        try:
            yield from turn
        finally:
            turn.close()
            if turn.reply:
                self.history = [*asked, turn.reply.message]
                self.last = turn.reply

    def _texts(self, pieces: Iterator[Piece]) -> Iterator[str]:
        try:
            for piece in pieces:
                if piece.kind == CONTENT:
                    yield piece.text
        finally:
            pieces.close()  # type: ignore[attr-defined]


def _shared(a: str, b: str) -> int:
    """Length of the common beginning of two texts."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class _Ids:
    """What a model's vocabulary says about itself: its size, ends of turns, what is never drawn."""

    def __init__(self, session: Session) -> None:
        known: Any = session  # stand-ins for a session may have a model's config alone
        tokens = getattr(session.artifact, "tokens", None)
        self.eos: tuple[int, ...] = tuple(tokens.eos if tokens else known.config.eos_ids)
        self.stop = frozenset(self.eos)
        self.suppress = frozenset(tokens.suppress if tokens else ())

    @staticmethod
    def vocab(session: Session) -> int:
        """How many logits the model gives."""
        return int(session.artifact.tokens.vocab)
