"""Chat: turns in, streamed text out, over a session that keeps what it has already read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_kv.errors import ConfigError
from edge_kv.runtime.generation import Slide, generate
from edge_kv.runtime.session import Session
from edge_kv.runtime.template import RAW_TEMPLATE, Template
from edge_kv.runtime.text import TextStream, Tokenizer

__all__ = ["RAW_TEMPLATE", "Chat", "Options", "Reply", "Template"]


@dataclass(frozen=True)
class Options:
    """How replies are generated; meaning and limits as in `generate`."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    on_full: str = "stop"


@dataclass(frozen=True)
class Reply:
    """One finished turn: its text, and what it cost."""

    text: str
    ids: tuple[int, ...]
    prompt_tokens: int  # length of the whole conversation up to the reply
    reused_tokens: int  # of those, how many the session still held
    first_token_seconds: float  # from the question to its first token
    seconds: float


class Chat:
    """A conversation: history, template, streaming text.

    The ids of a turn are those of the turn before, as generated, followed by the encoding of the
    new text only, whenever the template renders the earlier turns as before: then nothing is read
    twice. Otherwise the whole conversation is encoded and `generate` reuses the common prefix.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer | None = None,
        template: Template | None = None,
        *,
        options: Options | None = None,
        system: str | None = None,
        on_slide: Callable[[Slide], None] | None = None,
    ) -> None:
        """Tokenizer and template default to those of the session's artifact.

        Raises:
            ArtifactError: the artifact has no tokenizer.
            ConfigError: it has no chat template (pass `Template(RAW_TEMPLATE)` for a base model).
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
        self.options = options or Options()
        self.on_slide = on_slide
        self.messages: list[dict[str, str]] = []
        self.last: Reply | None = None
        self._system = system
        self._text = ""  # conversation as rendered, with the reply as it was generated
        self._ids: list[int] = []  # the ids of that text
        entry = artifact.manifest.tokenizer
        self._stop = {*session.config.eos_ids, *(entry.stop_ids if entry else ())}
        self.reset()

    def reset(self) -> None:
        """Start a new conversation; the session keeps what it can reuse."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []
        self._text, self._ids, self.last = "", [], None

    def save(self, path: str | Path) -> None:
        """Snapshot the session together with the conversation.

        Raises:
            SnapshotError: the file cannot be written.
        """
        note = {"messages": self.messages, "text": self._text, "ids": self._ids}
        self.session.snapshot(path, note)

    def load(self, path: str | Path) -> None:
        """Take up a saved conversation; a bare session snapshot counts as text already read.

        Raises:
            SnapshotError: it cannot be restored here.
        """
        note = self.session.restore(path)
        self.reset()
        self.messages = note.get("messages", self.messages)
        self._text = note.get("text", "")
        self._ids = note.get("ids", list(self.session.tokens))

    def send(self, content: str) -> Iterator[str]:
        """Ask and yield the reply in pieces of whole characters; `last` describes it at the end.

        When the caller stops early (Ctrl-C, closing the iterator), the text so far is the reply.

        Raises:
            PromptError: the turn is empty, or the template refuses the conversation.
            ContextFullError: the conversation does not fit the context.
        """
        begin = time.perf_counter()
        messages = [*self.messages, {"role": "user", "content": content}]
        text = self.template.render(
            messages, bos_token=self.tokenizer.bos_token, eos_token=self._eos_token()
        )
        ids = self._encode(text)
        options = self.options
        tokens = generate(
            self.session,
            ids,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed,
            stop=self._stop,
            on_full=options.on_full,
            keep_first=self._keep_first(text),
            on_slide=self.on_slide,
        )
        return self._stream(tokens, messages, text, ids, begin)

    def _stream(
        self,
        tokens: Iterator[int],
        messages: list[dict[str, str]],
        text: str,
        ids: list[int],
        begin: float,
    ) -> Iterator[str]:
        stream = TextStream(self.tokenizer)
        made: list[int] = []
        pieces: list[str] = []
        read_before = self.session.stats.prefill_tokens
        reused, first, finished = 0, 0.0, False
        try:
            for token in tokens:
                if not made:
                    first = time.perf_counter() - begin
                    read = self.session.stats.prefill_tokens - read_before
                    reused = max(0, len(ids) - 1 - read)
                made.append(token)
                if piece := stream.feed(token):
                    pieces.append(piece)
                    yield piece
            if piece := stream.flush():
                pieces.append(piece)
                yield piece
            finished = True
        finally:
            if finished or made:  # a question that failed before its reply was not asked
                reply = "".join(pieces)
                self.messages = [*messages, {"role": "assistant", "content": reply}]
                self._text, self._ids = text + reply, ids + made[: stream.done]
                seconds = time.perf_counter() - begin
                self.last = Reply(reply, tuple(made), len(ids), reused, first, seconds)

    def _encode(self, text: str) -> list[int]:
        if not self._ids or not text.startswith(self._text):
            return self.tokenizer.encode(text)
        new = text[len(self._text) :]
        if not self._text:  # the context was restored without a conversation: it has its start
            new = new.removeprefix(self.tokenizer.bos_token)
        return self._ids + self.tokenizer.encode(new, start=False)

    def _keep_first(self, text: str) -> int:
        """Tokens that sliding never forgets: up to the end of the system prompt."""
        at = text.find(self._system.strip()) if self._system else -1
        if at < 0 or not self._system:
            return 1
        head = self.tokenizer.encode(text[: at + len(self._system.strip())])
        return min(len(head), self.session.plan.ctx // 2)

    def _eos_token(self) -> str:
        eos = self.session.config.eos_ids
        return self.tokenizer.token(eos[0]) if eos else ""
