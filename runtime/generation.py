"""generate: ids in, ids out. Knows no text, keeps what a session already holds of a prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edge_kv.errors import ConfigError, ContextFullError, PromptError, did_you_mean
from edge_kv.parity import lead
from edge_kv.runtime.sampling import Sampler, TokenLogprobs
from edge_kv.runtime.session import Logits, Session
from edge_kv.runtime.speculation import AUTO, Speculation

ON_FULL = ("stop", "slide", "error")
MAX_LOGPROBS = 100
CHECKPOINT_TOKENS = 2048  # of a long prompt, between two spare checkpoints of the rings


@dataclass(frozen=True)
class Slide:
    """The context was full and its middle was forgotten: what remains, in tokens."""

    kept_first: int
    forgotten: int
    kept_last: int


@dataclass
class Trace:
    """What a generation did, filled while it runs."""

    reused: int = 0  # tokens of the prompt that the session still held
    finish: str = ""  # "stop" (a stop id), "length", "full" or "cancelled"; "" until it ends
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one a yielded id, if asked for
    passes: int = 0  # runs of the model over the newest id and the drafts behind it
    drafted: int = 0  # ids that were fed before it was known that they come
    accepted: int = 0  # of them, those that came
    ties: int = 0  # greedy choices in passes with drafts that another summation order may reverse


class Constraint(Protocol):
    """What limits the ids a model may say, one step after another."""

    def mask(self, logits: Logits, left: int) -> Logits:
        """The logits with what must not come next at -inf; `left` ids may still come."""

    def accept(self, token: int) -> None:
        """`token` was drawn."""

    def possible(self, ids: Sequence[int]) -> int:
        """How many of `ids` could come one after another, as far as that is known."""


def generate(
    session: Session,
    ids: Iterable[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    seed: int | None = None,
    stop: Collection[int] = (),
    on_full: str = "stop",
    keep_first: int = 1,
    on_slide: Callable[[Slide], None] | None = None,
    logit_bias: Mapping[int, float] | None = None,
    suppress: Collection[int] = (),
    constraint: Constraint | None = None,
    logprobs: int | None = None,
    checkpoints: Collection[int] = (),
    cancelled: Callable[[], bool] | None = None,
    drafts: Speculation | str | int = AUTO,
    trace: Trace | None = None,
) -> Generator[int]:
    """Continue `ids` by up to `max_new_tokens` sampled ids; a stop id ends them and is not yielded.

    What the session already holds of `ids` is kept: it rewinds to the common prefix where the rings
    allow it and starts over otherwise. Arguments are checked here; work starts with the first
    `next`. A context of ctx tokens yields at most `ctx - len(ids) + 1` ids: the last is not fed.

    When the context is full, `on_full` decides: "stop" ends quietly, "error" raises, and "slide"
    keeps the first `keep_first` ids (the start token, a system prompt) and the newest half of the
    others, prefills those again and goes on. The model then no longer knows the forgotten middle;
    `on_slide` is told each time how much that was.

    `constraint` limits what may be drawn. `logprobs` asks for the log-probabilities of every id and
    of that many likeliest ones, in `trace`. `checkpoints` are lengths of the prompt at which the
    session keeps its rings, for prompts that go on differently from there. `cancelled` is asked
    before every step, chunks of the prompt included: True ends the ids, and the session stays as
    the last step left it.

    `drafts`: "auto" feeds guessed ids with the newest one wherever that promises more ids a second,
    a number feeds so many wherever there is a guess, "off" none; a `Speculation` keeps what it has
    learnt from one call to the next. Each id is drawn, in its turn, from the logits behind the ids
    before it, as in plain decoding; logits of a pass over several ids differ from those of single
    ones by rounding. How many "auto" feeds depends on measured times, so it feeds none to sampling
    with a `seed`, which asks for the same ids every time. While ids of one pass are being yielded
    the session holds all of the pass; once the iterator is exhausted or closed it holds what plain
    decoding would have fed.

    Raises:
        PromptError: `ids` is empty or holds something that is not a token id.
        ConfigError: a sampling argument out of range, an unknown `on_full`, or more drafts than a
            pass takes.
        ContextFullError: the prompt does not fit the context ("slide" shortens it), or "error".
    """
    prompt = list(ids)
    sampler = Sampler(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        seed=seed,
        logit_bias=logit_bias,
        suppress=suppress,
    )
    if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
        raise ConfigError(f"logprobs {logprobs} must lie in 0 … {MAX_LOGPROBS}.")
    if on_full not in ON_FULL:
        raise ConfigError(f"Unknown on_full {on_full!r}.{did_you_mean(on_full, ON_FULL)}")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens {max_new_tokens} must not be negative.")
    if not prompt:
        raise PromptError("The prompt is empty; give at least one token (the start token will do).")
    ctx = session.plan.ctx
    slides = on_full == "slide"
    if slides and not 0 <= keep_first < ctx - 1:
        raise ConfigError(f"keep_first {keep_first} must lie in 0 … {ctx - 2} of a {ctx} context.")
    if len(prompt) > ctx and not slides:
        raise ContextFullError(
            f"The prompt has {len(prompt)} tokens, the context {ctx}; shorten it, or export with "
            "a larger --ctx (`edge-kv run --on-full slide` forgets its middle instead)."
        )
    speculation = Speculation.of(drafts, session)
    if speculation and seed is not None and temperature > 0 and not speculation.repeatable:
        speculation = None
    run = _Run(
        session, sampler, max_new_tokens, frozenset(stop), on_full, keep_first, on_slide,
        constraint, logprobs, frozenset(checkpoints), cancelled or _never,
        speculation, trace or Trace(),
    )  # fmt: skip
    return run.ids(prompt)


@dataclass
class _Run:
    session: Session
    sampler: Sampler
    max_new_tokens: int
    stop: frozenset[int]
    on_full: str
    keep_first: int
    on_slide: Callable[[Slide], None] | None
    constraint: Constraint | None
    logprobs: int | None
    checkpoints: frozenset[int]
    cancelled: Callable[[], bool]
    speculation: Speculation | None
    trace: Trace

    def ids(self, history: list[int]) -> Generator[int]:
        """`history` is prompt and yielded ids; all but the newest are in the session."""
        ctx = self.session.plan.ctx
        held = False
        made = 0
        while made < self.max_new_tokens:
            full = len(history) > ctx
            if full and self.on_full == "stop":
                self.trace.finish = "full"
                return
            if full and self.on_full == "error":
                raise ContextFullError(
                    f"The context of {ctx} tokens is full after {made} new ones; reset the "
                    "session, use on_full slide, or export with a larger --ctx."
                )
            if full:
                history, slide = _slide(history, ctx, self.keep_first)
                held = False
                self.checkpoints = frozenset({self.keep_first})
                if self.on_slide:
                    self.on_slide(slide)
            if not held:
                reused = feed(self.session, history[:-1], self.checkpoints, self.cancelled)
                if not made:
                    self.trace.reused = reused
                if self.speculation:
                    self.speculation.begin(history)
                held = True
            if self.cancelled():
                self.trace.finish = "cancelled"
                return
            left = self.max_new_tokens - made
            if self.on_full != "slide":
                left = min(left, ctx + 1 - len(history))
            before = len(history)
            yield from self._pass(history, left)
            made += len(history) - before
            if self.trace.finish:
                return
        self.trace.finish = "length"

    def _pass(self, history: list[int], left: int) -> Generator[int]:
        """Feed the newest id with drafts behind it, and yield the ids that come: at least one.

        Ends early, with a `finish`, at a stop id and when cancelled.
        """
        session, trace = self.session, self.trace
        begin = time.perf_counter()
        drafts = self._drafts(history, min(left - 1, session.plan.ctx - len(history)))
        drafted = time.perf_counter()
        rows = session.decode_many([history[-1], *drafts])
        seconds = time.perf_counter() - drafted
        mark = _mark(session)
        came: list[int] = []
        used = 0
        try:
            for used, draft in enumerate((*drafts, None), 1):
                if used > 1 and self.cancelled():
                    used -= 1
                    trace.finish = "cancelled"
                    return
                row, room = rows[used - 1], left - len(came)
                token = self._drawn(row, history, room, tied=bool(drafts))
                came.append(token)
                if token in self.stop:
                    trace.finish = "stop"
                    return
                history.append(token)
                yield token
                if token != draft:
                    return
        finally:
            trace.passes += 1
            trace.drafted += len(drafts)
            trace.accepted += used - 1
            refused = len(drafts) + 1 - used
            if refused and _mark(session) == mark:  # else the session went on without this text
                session.refuse(refused)
            if self.speculation:
                self.speculation.passed(len(drafts), came, seconds, drafted - begin)

    def _drafts(self, history: list[int], room: int) -> tuple[int, ...]:
        """At most `room` ids to feed behind the newest one."""
        if not self.speculation:
            return ()
        drafts = self.speculation.drafts(history, min(room, self.session.drafts))
        ends = (i for i, id in enumerate(drafts) if id in self.stop)  # nothing follows a stop id
        drafts = drafts[: next(ends, len(drafts))]
        if drafts and self.constraint:
            drafts = drafts[: self.constraint.possible(drafts)]
        return drafts

    def _drawn(self, logits: Logits, history: list[int], left: int, *, tied: bool) -> int:
        """The next id; with `tied` it is counted where it nearly was another."""
        allowed = self.constraint.mask(logits, left) if self.constraint else logits
        shaped = self.sampler.shaped(allowed, history)
        token = self.sampler.draw(shaped)
        if tied and self.sampler.temperature == 0.0:
            self.trace.ties += lead(shaped, token) < self.session.rounding
        if self.logprobs is not None and token not in self.stop:
            self.trace.logprobs.append(TokenLogprobs.of(logits, token, self.logprobs))
        if self.constraint:
            self.constraint.accept(token)
        return token


def _mark(session: Session) -> tuple[bool, int, int, int]:
    """What changes when a session is used or closed by someone else."""
    return session.closed, session.pos, session.stats.decode_passes, session.stats.prefill_tokens


def _never() -> bool:
    return False


def feed(
    session: Session,
    ids: Sequence[int],
    checkpoints: Collection[int] = (),
    cancelled: Callable[[], bool] = _never,
) -> int:
    """Make `session.tokens` equal `ids`, reusing what the session holds of them; how much that was.

    At every length in `checkpoints` the session keeps its rings, and, where there are any, every
    `CHECKPOINT_TOKENS` of what is read, as far as there is room: a text that goes on otherwise
    from the middle of a long turn is then not read from its start. Once `cancelled()` is true no
    further chunk is read: `session.tokens` is then a beginning of `ids`.

    Raises:
        PromptError: something in `ids` is not a token id of the model.
        ContextFullError: `ids` is longer than the context.
    """
    reused = session.resume(ids)
    chunk = session.plan.chunk
    marks = {c for c in checkpoints if 0 < c <= len(ids)}
    spare = set(range(reused + CHECKPOINT_TOKENS, len(ids), CHECKPOINT_TOKENS)) if marks else set()
    left = sorted(marks | spare)
    while True:
        while left and left[0] <= session.pos:  # whole chunks: the rings still hold its rows
            at = left.pop(0)
            session.checkpoint(at, spare=at not in marks)
        if session.pos == len(ids) or cancelled():
            return reused
        session.prefill(ids[session.pos : session.pos + chunk])


def _slide(history: list[int], ctx: int, keep_first: int) -> tuple[list[int], Slide]:
    """Keep the first ids and the newest half of the room behind them."""
    last = max(1, (ctx - keep_first) // 2)
    forgotten = len(history) - keep_first - last
    slide = Slide(keep_first, forgotten, last)
    return history[:keep_first] + history[-last:], slide
