"""Prompts: conversations as ids, earlier turns as they were read and generated.

A template writes the whole conversation for every turn. What of that text was read before, and what
of it is sure to stay when the conversation goes on, is found by comparing renderings: templates are
foreign code, and each leaves other things out of the past.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from edge_kv.errors import PromptError
from edge_kv.runtime.messages import Message, Tool
from edge_kv.runtime.replies import ReplyFormat
from edge_kv.runtime.template import Template
from edge_kv.runtime.text import Tokenizer

_THINK = "enable_thinking"  # the variable of templates
_CONVERSATIONS = 8  # whose ids are remembered
_ANSWERS = 512  # whose ids are remembered
_HOLE = "\ue000{}\ue001"  # stands for a content while its place in a rendered text is looked for


@dataclass(frozen=True)
class Asked:
    """What a template makes a prompt of; `think` None leaves thinking to the template."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    think: bool | None = None


@dataclass(frozen=True)
class Prompt:
    """A conversation as it is fed."""

    text: str
    ids: list[int]
    gap: tuple[int, int]  # the part of `ids` that sliding forgot
    keep_first: int  # how many of `fed` no slide forgets
    opening: int  # how many of `fed` conversations with the same system prompt and tools share
    stays: int  # how many of `fed` stay when the conversation goes on
    thinking: bool  # whether it leaves a thought open

    @property
    def fed(self) -> list[int]:
        """The ids without what sliding forgot."""
        return self.ids[: self.gap[0]] + self.ids[self.gap[1] :]


class Known(NamedTuple):
    """A conversation as it was fed: its text, its ids, and the part that sliding forgot."""

    text: str
    ids: list[int]
    gap: tuple[int, int] = (0, 0)


class Prompts:
    """Makes prompts, and remembers the ids of what was read and generated."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        format: ReplyFormat,
        eos: Sequence[int],
        ctx: int,
    ) -> None:
        """`eos`: ids that end a text, the template's eos_token first; `ctx`: tokens in all."""
        self._tokenizer = tokenizer
        self._template = template
        self._format = format
        self._eos = tokenizer.token(eos[0]) if eos else ""
        self._ctx = ctx
        self._conversations: list[Known] = []  # the newest last
        self._answers: OrderedDict[str, list[int]] = OrderedDict()  # text -> ids as generated

    @property
    def heeds_think(self) -> bool:
        """Whether the template looks at `Asked.think`."""
        return _THINK in self._template.source

    def make(self, asked: Asked, *, slides: bool) -> Prompt:
        """The prompt of a conversation; `slides`: what a full context forgot stays forgotten.

        Raises:
            PromptError: the template refuses the conversation.
        """
        text = self._render(asked)
        ids = self._encode(asked, text)
        gap = self._gap(ids) if slides else (0, 0)
        turn, rest = self._cut(text, ids, self._staying(asked, text))
        turn = min(turn, len(ids) - 1)  # the last id is decoded, not read
        head = self._head(asked, text) if slides else self._opening(asked, text, ids)
        return Prompt(
            text=text,
            ids=ids,
            gap=gap,
            keep_first=gap[0] or head,
            opening=head if head > 1 else 0,
            stays=turn - (gap[1] - gap[0]) if turn > gap[1] else 0,
            thinking=self._format.opened(rest),
        )

    def remember(
        self,
        prompt: Prompt,
        said: Sequence[int],
        gap: tuple[int, int],
        answer: tuple[str, list[int]],
    ) -> None:
        """Keep what was read and `said`, and the text and ids of the `answer` in it, if any."""
        text = prompt.text + self._tokenizer.decode(said, special=True)
        self.know(text, [*prompt.ids, *said], gap)
        content, ids = answer
        if ids:
            self._answers[content] = ids
            self._answers.move_to_end(content)
            if len(self._answers) > _ANSWERS:
                self._answers.popitem(last=False)

    def know(self, text: str, ids: Sequence[int], gap: tuple[int, int] = (0, 0)) -> None:
        """Take `ids` for the encoding of `text` wherever a conversation begins with it."""
        kept = [c for c in self._conversations if not text.startswith(c.text)]
        self._conversations = [*kept[1 - _CONVERSATIONS :], Known(text, list(ids), gap)]

    def forget(self) -> None:
        """Recognise nothing that was said so far."""
        self._conversations.clear()
        self._answers.clear()

    @property
    def newest(self) -> Known:
        """The conversation answered last; an empty one if there is none."""
        return self._conversations[-1] if self._conversations else Known("", [])

    def _render(self, asked: Asked, **more: Any) -> str:
        if asked.think is not None:
            more[_THINK] = asked.think
        return self._template.render(
            [m.as_dict() for m in asked.messages],
            tools=[t.as_dict() for t in asked.tools] or None,
            bos_token=self._tokenizer.bos_token,
            eos_token=self._eos,
            **more,
        )

    def _encode(self, asked: Asked, text: str) -> list[int]:
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
        if known and not known.text and text.startswith(self._tokenizer.bos_token):
            at = len(self._tokenizer.bos_token)  # a context restored without a conversation has it
        for begin, end, answer in self._places(asked, text, at):
            ids += self._tokenizer.encode(text[at:begin], start=start) + answer
            at, start = end, False
        if at < len(text) or start:
            ids += self._tokenizer.encode(text[at:], start=start)
        return ids

    def _places(self, asked: Asked, text: str, at: int) -> list[tuple[int, int, list[int]]]:
        """Where answers whose ids are known stand in `text` from `at` on; none if that is unsure.

        The conversation is rendered once more with a mark instead of each such answer. Templates
        that look into answers (to trim, to strip thoughts) may then write another text: no places.
        """
        answers = {
            i: m.content
            for i, m in enumerate(asked.messages)
            if m.role == "assistant" and m.content in self._answers
        }
        if not answers or at >= len(text):
            return []
        marked = tuple(
            replace(m, content=_HOLE.format(i)) if i in answers else m
            for i, m in enumerate(asked.messages)
        )
        rest = self._render(replace(asked, messages=marked))
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

    def _staying(self, asked: Asked, text: str) -> int:
        """How many characters of a prompt the history of later turns is sure to begin with.

        Templates open thoughts that history leaves out, and drop thoughts of earlier turns when a
        new question comes: the conversation is rendered as if it had gone on.
        """
        later = (*asked.messages, Message("assistant", "a"), Message("user", "a"))
        try:
            texts = [self._render(replace(asked, messages=later))]
        except PromptError:  # a template that wants its turns in another order
            texts = []
        texts.append(self._render(asked, add_generation_prompt=False))
        return min(_shared(text, other) for other in texts)

    def _cut(self, text: str, ids: list[int], at: int) -> tuple[int, list[int]]:
        """How many ids stand for the first `at` characters of a prompt, and the ids behind them.

        Where `at` lies inside a token, the cut moves left to where a line or a mark begins.
        """
        for cut in (at, text.rfind("<", 0, at), text.rfind("\n", 0, at) + 1):
            rest = self._tokenizer.encode(text[max(cut, 0) :], start=False)
            if ids[len(ids) - len(rest) :] == rest:
                return len(ids) - len(rest), rest
        return 0, self._tokenizer.encode(text[at:], start=False)

    def _gap(self, ids: list[int]) -> tuple[int, int]:
        """What sliding has forgotten of the beginning of `ids`, in an earlier turn."""
        gaps = (c for c in reversed(self._conversations) if c.gap[1])
        return next((c.gap for c in gaps if ids[: c.gap[1]] == c.ids[: c.gap[1]]), (0, 0))

    def _head(self, asked: Asked, text: str) -> int:
        """Tokens up to the end of the system prompt, which sliding never forgets."""
        first = asked.messages[0] if asked.messages else Message("user")
        system = first.content.strip() if first.role == "system" else ""
        at = text.find(system) if system else -1
        if at < 0:
            return 1
        return min(len(self._tokenizer.encode(text[: at + len(system)])), self._ctx // 2)

    def _opening(self, asked: Asked, text: str, ids: list[int]) -> int:
        """How many ids stand before the first question: system prompt and tools; 0 without any.

        The conversation is rendered with another question. The cut moves left to where a line or a
        mark begins, so that no question changes the ids before it.
        """
        messages = asked.messages
        first = next((i for i, m in enumerate(messages) if m.role != "system"), None)
        if first is None or not (first or asked.tools):
            return 0
        other = replace(messages[first], content=_HOLE.format(first))
        try:
            rendered = self._render(replace(asked, messages=(*messages[:first], other)))
        except PromptError:  # a template that looks into questions
            return 0
        at = _shared(text, rendered)
        for cut in (text.rfind("\n", 0, at) + 1, text.rfind("<", 0, at)):
            head = self._tokenizer.encode(text[: max(cut, 0)])
            if ids[: len(head)] == head:
                return len(head)
        return 0


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
