"""Chat: messages in, replies out in pieces, over a session that keeps what it has already read.

`Generator` answers any conversation it is given; `Chat` holds one. Both parse replies by token id
and feed the ids of earlier replies as they were generated, wherever the template writes them so.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_kv.errors import ConfigError, PromptError, SnapshotError
from edge_kv.runtime.generation import Constraint, Slide, Trace, generate
from edge_kv.runtime.messages import Message, Tool, ToolCall
from edge_kv.runtime.prompts import Asked, Prompt, Prompts
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
        tokens = artifact.tokens
        self.prompts = Prompts(self.tokenizer, template, self.format, tokens.eos, session.plan.ctx)
        self.stop_ids = frozenset(tokens.eos) | self.format.ends
        self._suppress = frozenset(tokens.suppress)
        self._engine: Engine | None = None
        # Hears ids before they are read, and how many of them stay when the conversation goes on.
        self.on_prompt: Callable[[Sequence[int], int], None] | None = None

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
        asked = Asked(tuple(messages), tuple(tools), options.think)
        prompt = self.prompts.make(asked, slides=options.on_full == "slide")
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
            suppress=self._suppress,
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
                    answer = said.content, said.answer_ids()
                    self.prompts.remember(prompt, said.whole, (gap[0], gap[1]), answer)

        turn = Turn(pieces())
        return turn

    def _constraint(
        self,
        prompt: Prompt,
        tools: Sequence[Tool],
        options: Options,
        grammar: Grammar | None,
        choice: str,
    ) -> Constraint | None:
        if grammar is None and choice == "auto" and (not tools or find_spec("llguidance") is None):
            return None  # without llguidance calls are what the model makes them
        from edge_kv.runtime.constraints import Engine, ReplyConstraint

        if self._engine is None:
            vocab = self.session.artifact.tokens.vocab
            self._engine = Engine(self.tokenizer, vocab, self.stop_ids)
        return ReplyConstraint(
            self._engine,
            self.format,
            grammar=grammar,
            tools=tools,
            choice=choice,
            thinking=prompt.thinking,
            may_think=options.think is not False,
        )


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
        whole = self.whole
        for at in range(start, len(whole)):
            text = self._tokenizer.decode(whole[at:])
            if text == self.content:
                return whole[at:]
            if len(text) < len(self.content):
                return []
        return []

    def reply(
        self, prompt: Prompt, trace: Trace, first: float, seconds: float, finished: bool
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
        return self.session.pos if self.generator.prompts.newest.ids else 0

    def reset(self) -> None:
        """Start a new conversation; the session keeps what it can reuse, and saves none of it."""
        self.history = [Message("system", self.system)] if self.system else []
        self.last = None
        self.generator.prompts.forget()

    def save(self, path: str | Path) -> None:
        """Snapshot the session together with the conversation.

        Raises:
            SnapshotError: the file cannot be written.
        """
        text, ids, gap = self.generator.prompts.newest
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
            self.generator.prompts.know(text, ids, (gap[0], gap[1]))

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
