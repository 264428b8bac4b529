"""generate: ids in, ids out. Knows no text, keeps what a session already holds of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from edge_kv.errors import ConfigError, ContextFullError, PromptError, did_you_mean
from edge_kv.runtime.sampling import Sampler
from edge_kv.runtime.session import Session

ON_FULL = ("stop", "slide", "error")


@dataclass(frozen=True)
class Slide:
    """The context was full and its middle was forgotten: what remains, in tokens."""

    kept_first: int
    forgotten: int
    kept_last: int


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
    seed: int | None = None,
    stop: Collection[int] = (),
    on_full: str = "stop",
    keep_first: int = 1,
    on_slide: Callable[[Slide], None] | None = None,
) -> Iterator[int]:
    """Continue `ids` by up to `max_new_tokens` sampled ids; a stop id ends them and is not yielded.

    What the session already holds of `ids` is kept: it rewinds to the common prefix where the rings
    allow it and starts over otherwise. Arguments are checked here; work starts with the first
    `next`. A context of ctx tokens yields at most `ctx - len(ids) + 1` ids: the last is not fed.

    When the context is full, `on_full` decides: "stop" ends quietly, "error" raises, and "slide"
    keeps the first `keep_first` ids (the start token, a system prompt) and the newest half of the
    others, prefills those again and goes on. The model then no longer knows the forgotten middle;
    `on_slide` is told each time how much that was.

    Raises:
        PromptError: `ids` is empty or holds something that is not a token id.
        ConfigError: a sampling argument out of range, or an unknown `on_full`.
        ContextFullError: the prompt does not fit the context ("slide" shortens it), or "error".
    """
    prompt = list(ids)
    sampler = Sampler(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
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
            f"The prompt has {len(prompt)} tokens, the context {ctx}; shorten it, use "
            "--on-full slide, or export with a larger --ctx."
        )
    return _run(
        session, prompt, sampler, max_new_tokens, frozenset(stop), on_full, keep_first, on_slide
    )


def _run(
    session: Session,
    history: list[int],
    sampler: Sampler,
    max_new_tokens: int,
    stop: frozenset[int],
    on_full: str,
    keep_first: int,
    on_slide: Callable[[Slide], None] | None,
) -> Iterator[int]:
    """`history` is prompt and yielded ids; all but the newest are in the session."""
    ctx = session.plan.ctx
    held = False
    for made in range(max_new_tokens):
        full = len(history) > ctx
        if full and on_full == "stop":
            return
        if full and on_full == "error":
            raise ContextFullError(
                f"The context of {ctx} tokens is full after {made} new ones; reset the session, "
                "use on_full slide, or export with a larger --ctx."
            )
        if full:
            history, slide = _slide(history, ctx, keep_first)
            held = False
            if on_slide:
                on_slide(slide)
        if not held:
            feed(session, history[:-1])
            held = True
        token = sampler(session.decode(history[-1]), history)
        if token in stop:
            return
        history.append(token)
        yield token


def feed(session: Session, ids: Sequence[int]) -> None:
    """Make `session.tokens` equal `ids`, reusing their common prefix as far as the rings allow.

    Raises:
        PromptError: something in `ids` is not a token id of the model.
        ContextFullError: `ids` is longer than the context.
    """
    held = session.tokens
    common = next(
        (i for i, (a, b) in enumerate(zip(held, ids, strict=False)) if a != b),
        min(len(held), len(ids)),
    )
    back = len(held) - common
    if back > session.max_rewind:
        session.reset()
        common = 0
    elif back:
        session.rewind(back)
    session.prefill(ids[common:])


def _slide(history: list[int], ctx: int, keep_first: int) -> tuple[list[int], Slide]:
    """Keep the first ids and the newest half of the room behind them."""
    last = max(1, (ctx - keep_first) // 2)
    forgotten = len(history) - keep_first - last
    slide = Slide(keep_first, forgotten, last)
    return history[:keep_first] + history[-last:], slide
