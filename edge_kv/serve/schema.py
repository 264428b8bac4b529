"""Requests and answers in the shape of OpenAI's API: what a client sends is checked here.

Fields that are unknown are ignored, as OpenAI's own servers do; fields that are known and cannot be
served (`n` above 1, images) are refused by name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_kv.errors import PromptError
from edge_kv.runtime.chat import CALLS, CANCELLED, FULL, LENGTH, Options, Reply
from edge_kv.runtime.constraints import Grammar
from edge_kv.runtime.messages import Message, Tool, ToolCall
from edge_kv.runtime.replies import THINKING, Piece
from edge_kv.runtime.sampling import TokenLogprobs
from edge_kv.runtime.text import Tokenizer

MAX_TEXTS = 16  # stop texts of one request
MAX_TOP_LOGPROBS = 20
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]  # of reasoning


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)
    # Fields of OpenAI's API that change a reply in ways not built here, and the values that do not.
    not_served: ClassVar[dict[str, Any]] = {
        "n": 1, "best_of": 1, "echo": False, "suffix": "", "functions": [],
    }  # fmt: skip
    advice: ClassVar[dict[str, str]] = {}  # what to do instead

    model: str = ""
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_TEXTS)] | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None

    @property
    def include_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))

    def options(self, default_tokens: int) -> Options:
        """How the reply is generated; what a request leaves out is the checkpoint's own."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Options(
            max_new_tokens=self.max_tokens or default_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            seed=None if self.seed is None else self.seed & 0xFFFF_FFFF_FFFF_FFFF,
            stop=tuple(text for text in stop if text),
            logit_bias=self.logit_bias or {},
        )


class _TemplateValues(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    enable_thinking: bool | None = None


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Any], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: _TemplateValues | None = None

    def conversation(self) -> list[Message]:
        """The turns so far.

        Raises:
            PromptError: a message of another shape, or one that holds more than text.
        """
        return [Message.of(m, f"messages[{i}]") for i, m in enumerate(self.messages)]

    def offered(self) -> list[Tool]:
        """The tools a reply may call; see `offered`."""
        return offered(self.tools, self.tool_choice)

    @property
    def must_call(self) -> bool:
        return must_call(self.tool_choice)

    def grammar(self) -> Grammar | None:
        """What the answer has to be; None for free text.

        Raises:
            PromptError: a response_format of another shape.
        """
        wanted = self.response_format or {"type": "text"}
        match wanted:
            case {"type": "text"}:
                return None
            case {"type": "json_object"}:
                return Grammar.json_schema({"type": "object"})
            case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
                return Grammar.json_schema(schema)
            case {"type": "grammar", "syntax": "regex", "definition": str(pattern)}:
                return Grammar.regex(pattern)
            case {"type": "grammar", "syntax": "lark", "definition": str(text)}:
                return Grammar.lark(text)
        raise PromptError(
            "response_format must be {'type': 'text'}, {'type': 'json_object'}, "
            "{'type': 'json_schema', 'json_schema': {'name': …, 'schema': {…}}} or "
            "{'type': 'grammar', 'syntax': 'regex' or 'lark', 'definition': …}."
        )

    def options(self, default_tokens: int) -> Options:
        options = super().options(self.max_completion_tokens or default_tokens)
        said = self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None
        return replace(
            options,
            think=thinks(self.reasoning_effort) if said is None else said,
            one_call=self.parallel_tool_calls is False,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class CompletionRequest(_Request):
    """`POST /v1/completions`: text that is continued as it stands."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    def options(self, default_tokens: int) -> Options:
        return replace(super().options(default_tokens), logprobs=self.logprobs)

    def text(self, tokenizer: Tokenizer) -> str:
        """The prompt as text.

        Raises:
            PromptError: several prompts.
        """
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise PromptError(f"prompt has {len(prompt)} texts; send one request for each.")
            prompt = prompt[0]
        if isinstance(prompt, str):
            return prompt
        if odd := next((i for i in prompt if not 0 <= i < tokenizer.vocab_size), None):
            raise PromptError(f"prompt holds {odd}, which is no token id of this model.")
        return tokenizer.decode(prompt, special=True)  # marks of turns are part of a prompt


def offered(given: Sequence[Any] | None, choice: str | dict[str, Any] | None) -> list[Tool]:
    """The tools a reply may call, after `tool_choice`.

    Raises:
        PromptError: a tool of another shape, or a choice that names none of them.
    """
    tools = [Tool.of(t, f"tools[{i}]") for i, t in enumerate(given or [])]
    if choice is None or choice in ("auto", "required"):
        return tools
    if choice == "none":
        return []
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    chosen = [tool for tool in tools if tool.name == name]
    if not chosen:
        raise PromptError(
            f"tool_choice {choice!r} names no tool of this request; it can be 'auto', 'none', "
            "'required' or an object with the name of a function."
        )
    return chosen


def must_call(choice: str | dict[str, Any] | None) -> bool:
    """Whether a `tool_choice` asks for a call."""
    return choice == "required" or isinstance(choice, dict)


def thinks(effort: str | None) -> bool | None:
    """Whether an effort of reasoning asks for thinking; None leaves it to the template."""
    return None if effort is None else effort != "none"


def parse(kind: Any, body: bytes) -> Any:
    """A request from the body of an HTTP request.

    Raises:
        PromptError: not JSON, or a field of the wrong kind or that is not served; the message names
            it.
    """
    try:
        data = json.loads(body)
        for name, neutral in kind.not_served.items() if isinstance(data, dict) else ():
            if data.pop(name, None) not in (None, neutral):
                only = f"only {json.dumps(neutral)} is served; leave it out."
                raise PromptError(f"{name}: {kind.advice.get(name, only)}")
        return kind.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        # Of a field that takes several types, the first one's name stands behind the field's.
        where = ".".join(str(x) for x in first["loc"] if x != "str") or "the request"
        unknown = first["type"] == "extra_forbidden"
        why = "this is not served; leave it out" if unknown else first["msg"]
        raise PromptError(f"{where}: {why}.") from e
    except (ValueError, RecursionError) as e:
        raise PromptError(f"The request is not JSON ({e}).") from e


@dataclass
class Answer:
    """One reply on its way to a client: the documents that OpenAI's clients read.

    `whole` is the reply in one; a stream has the `opening`, a `part` for each piece, and the
    `closing`, or else what `broken` says.
    """

    number: str  # of the reply; its name and those of its calls are made of it
    model: str
    tokenizer: Tokenizer
    chat: bool
    counts: bool  # whether what a streamed reply cost is told at its end
    created: int = field(default_factory=lambda: int(time.time()))
    ends: ClassVar[str] = "data: [DONE]\n\n"  # what closes a stream, behind its last document
    calls: int = 0  # that were sent
    listed: int = 0  # log-probabilities that were sent
    offset: int = 0  # where, in the text of their tokens, the next one's begins

    def whole(self, reply: Reply) -> dict[str, Any]:
        """The reply as one document."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason(reply)}
        if self.chat:
            text = reply.text if reply.text or not reply.calls else None
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if reply.thinking:
                message["reasoning_content"] = reply.thinking
            if reply.calls:
                message["tool_calls"] = [call(c, self.number, i) for i, c in enumerate(reply.calls)]
            choice["message"] = message
        else:
            choice["text"] = reply.text
        choice["logprobs"] = self._logprobs(reply.logprobs)
        return {**self._head(""), "choices": [choice], "usage": usage(reply)}

    def opening(self) -> list[dict[str, Any]]:
        return [self._chunk({"role": "assistant", "content": ""})] if self.chat else []

    def part(self, piece: Piece) -> list[dict[str, Any]]:
        """More of the reply, with the log-probabilities of the tokens it is made of."""
        if piece.call:
            named = {"index": self.calls, **call(piece.call, self.number, self.calls)}
            delta: dict[str, Any] = {"tool_calls": [named]}
            self.calls += 1
        else:
            delta = {"reasoning_content" if piece.kind == THINKING else "content": piece.text}
        return [self._chunk(delta, piece.logprobs)]

    def closing(self, reply: Reply) -> list[dict[str, Any]]:
        """The end, with the log-probabilities of tokens that made no text."""
        last = self._chunk({}, reply.logprobs[self.listed :], finish_reason(reply))
        cost = {**self._head(".chunk"), "choices": [], "usage": usage(reply)}
        return [last, cost] if self.counts else [last]

    def broken(self, error: dict[str, Any]) -> list[dict[str, Any]]:
        return [error]

    def _chunk(
        self,
        delta: dict[str, Any],
        logprobs: Sequence[TokenLogprobs] = (),
        finish: str | None = None,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        choice |= {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        choice["logprobs"] = self._logprobs(logprobs)
        uncounted = {"usage": None} if self.counts else {}
        return {**self._head(".chunk"), "choices": [choice], **uncounted}

    def _head(self, part: str) -> dict[str, Any]:
        short, kind = ("chatcmpl", f"chat.completion{part}") if self.chat else (
            "cmpl", "text_completion")  # fmt: skip
        name = f"{short}-{self.number}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, given: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        """Those of the next tokens of the reply, as chats or as completions have them."""
        if not given:
            return None
        self.listed += len(given)
        if self.chat:
            return {"content": [self._chosen(t) for t in given], "refusal": None}
        texts = [self._text(t.id) for t in given]
        offsets = list(accumulate(map(len, texts), initial=self.offset))
        self.offset = offsets.pop()
        return {
            "tokens": texts,
            "text_offset": offsets,
            "token_logprobs": [t.logprob for t in given],
            "top_logprobs": [{self._text(i): p for i, p in t.top} for t in given],
        }

    def _chosen(self, token: TokenLogprobs) -> dict[str, Any]:
        likeliest = [self._entry(i, p) for i, p in token.top]
        return {**self._entry(token.id, token.logprob), "top_logprobs": likeliest}

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        text, data = self._text(token), self.tokenizer.token_bytes(token)
        return {"token": text, "logprob": value, "bytes": list(data or text.encode())}

    def _text(self, token: int) -> str:
        return self.tokenizer.decode([token], special=True)


def call(called: ToolCall, number: str, index: int) -> dict[str, Any]:
    """A call of the reply `number` as clients read it: arguments are JSON in a string.

    Its id is another one in every reply: clients tell the calls of a conversation apart by it.
    """
    return {
        "id": f"call_{number}_{index}",
        "type": "function",
        "function": {
            "name": called.name,
            "arguments": json.dumps(called.arguments, ensure_ascii=False),
        },
    }


def finish_reason(reply: Reply) -> str:
    """Why a reply ended, in OpenAI's words: a full context and a time limit cut it off too."""
    words = {CALLS: "tool_calls", LENGTH: "length", FULL: "length", CANCELLED: "length"}
    return words.get(reply.finish, "stop")


def usage(reply: Reply) -> dict[str, Any]:
    """Tokens of the prompt, of it those not read again, and of the reply, with its drafts."""
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": len(reply.ids),
        "total_tokens": reply.prompt_tokens + len(reply.ids),
        "prompt_tokens_details": {"cached_tokens": reply.reused_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": reply.thinking_tokens,
            "accepted_prediction_tokens": reply.accepted,
            "rejected_prediction_tokens": reply.drafted - reply.accepted,
        },
    }


def error(message: str, kind: str = "invalid_request_error", code: str = "") -> dict[str, Any]:
    """An error in the shape that OpenAI's clients show."""
    message = message.encode(errors="backslashreplace").decode()  # what it quotes may be no UTF-8
    return {"error": {"message": message, "type": kind, "param": None, "code": code or None}}
