"""`POST /v1/responses`: OpenAI's newer shape of a conversation, over the same replies.

Both directions are lists of items: messages, thoughts, calls of tools and what these gave back; a
stream tells how the items grow in named events. Nothing is stored, so a request brings the whole
conversation. Fields that are unknown or not served are refused by name.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from edge_kv.errors import PromptError
from edge_kv.runtime.chat import Options, Reply
from edge_kv.runtime.constraints import Grammar
from edge_kv.runtime.messages import Message, Tool, ToolCall
from edge_kv.runtime.replies import CALL, CONTENT, THINKING, Piece
from edge_kv.serve import schema

_TEXTS = ("input_text", "output_text", "reasoning_text", "text")  # parts of a content
_ITEMS = {CONTENT: "message", THINKING: "reasoning"}
_PARTS = {CONTENT: "output_text", THINKING: "reasoning_text"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Text(_Strict):
    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class _Reasoning(_Strict):
    effort: schema.Effort | None = None
    summary: Literal["auto"] | None = None


class ResponsesRequest(_Strict):
    """The body of a request; what a client says of itself and its bills is read past."""

    not_served: ClassVar[dict[str, Any]] = {
        "previous_response_id": None, "conversation": None, "store": False, "background": False,
        "truncation": "disabled", "include": [], "top_logprobs": 0,
        "stream_options": {"include_obfuscation": False}, "service_tier": "auto",
    }  # fmt: skip
    advice: ClassVar[dict[str, str]] = dict.fromkeys(
        ("previous_response_id", "conversation"),
        "nothing is stored here; send the whole conversation as input.",
    )

    input: str | Annotated[list[Any], Field(min_length=1)]
    model: str = ""
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: _Text | None = None
    reasoning: _Reasoning | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool = False
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def conversation(self) -> list[Message]:
        """The turns so far; items that an assistant's turn was split into are one again.

        Raises:
            PromptError: an item of another kind or shape, or one that holds more than text.
        """
        said = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else None
        turns = [Message("system", self.instructions)] if self.instructions else []
        for i, item in enumerate(said or self.input):
            turn = _message(item, f"input[{i}]")
            if turn == Message("assistant"):  # a thought that is not told
                continue
            if turn.role == "assistant" and turns and turns[-1].role == "assistant":
                last = turns.pop()
                turn = replace(
                    last,
                    content=last.content + turn.content,
                    thinking=last.thinking + turn.thinking,
                    calls=last.calls + turn.calls,
                )
            turns.append(turn)
        return turns

    def offered(self) -> list[Tool]:
        """The tools a reply may call; see `schema.offered`."""
        for kind in (tool.get("type", "function") for tool in self.tools or []):
            if kind != "function":
                raise PromptError(f"tools: {kind!r} is not served; only functions are.")
        choice = self.tool_choice
        if isinstance(choice, dict) and "name" in choice:
            choice = {"function": choice}
        return schema.offered(self.tools, choice)

    @property
    def form(self) -> dict[str, Any]:
        """What the answer has to be, as the client says it."""
        return (self.text.format if self.text else None) or {"type": "text"}

    @property
    def must_call(self) -> bool:
        return schema.must_call(self.tool_choice)

    def grammar(self) -> Grammar | None:
        """What the answer has to be; None for free text.

        Raises:
            PromptError: a text.format of another shape.
        """
        match self.form:
            case {"type": "text"}:
                return None
            case {"type": "json_object"}:
                return Grammar.json_schema({"type": "object"})
            case {"type": "json_schema", "schema": dict(wanted)}:
                return Grammar.json_schema(wanted)
        raise PromptError(
            "text.format must be {'type': 'text'}, {'type': 'json_object'} or "
            "{'type': 'json_schema', 'name': …, 'schema': {…}}."
        )

    def options(self, default_tokens: int) -> Options:
        """How the reply is generated; any effort of reasoning asks for thinking."""
        effort = self.reasoning.effort if self.reasoning else None
        return Options(
            max_new_tokens=self.max_output_tokens or default_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            think=schema.thinks(effort),
            one_call=self.parallel_tool_calls is False,
        )


def _message(item: Any, where: str) -> Message:
    """The turn, or part of one, that an item of the input is."""
    if not isinstance(item, Mapping):
        raise PromptError(f"{where} must be an object, not {type(item).__name__}.")
    kind = item.get("type", "message")
    if kind == "message":
        turn = {"role": item.get("role"), "content": _texts(item.get("content"))}
    elif kind == "reasoning":
        turn = {"role": "assistant", "thinking": _texts(item.get("content"))}
    elif kind == "function_call":
        named = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "function": named}
        turn = {"role": "assistant", "tool_calls": [call]}
    elif kind == "function_call_output":
        given = {"tool_call_id": item.get("call_id"), "content": _texts(item.get("output"))}
        turn = {"role": "tool", **given}
    else:
        raise PromptError(
            f"{where} is of type {kind!r}; this model reads message, reasoning, function_call and "
            "function_call_output."
        )
    return Message.of(turn, where)


def _texts(content: Any) -> Any:
    """Parts of text under the name that messages have for them."""
    if not isinstance(content, list):
        return content
    return [
        {**part, "type": "text"} if isinstance(part, Mapping) and part.get("type") in _TEXTS
        else part
        for part in content
    ]  # fmt: skip


@dataclass
class ResponsesAnswer:
    """One reply on its way to a client, as items; see `schema.Answer` for the methods."""

    number: str
    model: str
    asked: ResponsesRequest
    created: int = field(default_factory=lambda: int(time.time()))
    ends: ClassVar[str] = ""  # what closes a stream, behind its last event
    _items: list[dict[str, Any]] = field(default_factory=list)  # those that are finished
    _events: int = 0
    _kind: str = ""  # of the item under way: CONTENT or THINKING
    _text: str = ""  # of that item, or white space that may begin a message

    def whole(self, reply: Reply) -> dict[str, Any]:
        thinking, text = Piece(THINKING, reply.thinking), Piece(CONTENT, reply.text)
        calls = [Piece(CALL, "", call) for call in reply.calls]
        for piece in (*(p for p in (thinking, text) if p.text), *calls):
            self.part(piece)
        document: dict[str, Any] = self.closing(reply)[-1]["response"]
        return document

    def opening(self) -> list[dict[str, Any]]:
        response = self._response("in_progress")
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=response) for kind in kinds]

    def part(self, piece: Piece) -> list[dict[str, Any]]:
        if piece.call:
            return [*self._finish(), *self._call(piece.call)]
        events = [] if piece.kind == self._kind else list(self._finish())
        self._text += piece.text
        if not self._kind and piece.kind == CONTENT and not self._text.strip():
            return events  # what stands between a thought and a call is no message
        added = piece.text if self._kind else self._text
        if not self._kind:
            self._kind = piece.kind
            events += self._begin(self._item("in_progress", parts=False))
            events.append(self._growth("response.content_part.added", part=self._part("")))
        more: dict[str, Any] = {"logprobs": []} if piece.kind == CONTENT else {}
        kind = f"response.{_PARTS[piece.kind]}.delta"
        return [*events, self._growth(kind, delta=added, **more)]

    def closing(self, reply: Reply) -> list[dict[str, Any]]:
        cut = schema.finish_reason(reply) == "length"
        status = "incomplete" if cut else "completed"
        events = list(self._finish(status))
        return [*events, self._event(f"response.{status}", response=self._response(status, reply))]

    def broken(self, error: dict[str, Any]) -> list[dict[str, Any]]:
        why = {"code": "server_error", "message": error["error"]["message"]}
        events = list(self._finish("incomplete"))
        response = {**self._response("failed"), "error": why}
        return [*events, self._event("response.failed", response=response)]

    def _finish(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        """Close the item under way, if one."""
        if self._kind:
            part, item = self._part(self._text), self._item(status)
            more: dict[str, Any] = {"logprobs": []} if self._kind == CONTENT else {}
            yield self._growth(f"response.{part['type']}.done", text=self._text, **more)
            yield self._growth("response.content_part.done", part=part)
            yield from self._end(item)
        self._kind = self._text = ""

    def _call(self, called: ToolCall) -> Iterator[dict[str, Any]]:
        written = schema.call(called, self.number, len(self._items))
        arguments = written["function"]["arguments"]
        item = {
            "id": self._name("fc"), "type": "function_call", "call_id": written["id"],
            "name": called.name,
        }  # fmt: skip
        grows = {"item_id": item["id"], "output_index": len(self._items)}
        kind = "response.function_call_arguments"
        yield from self._begin({**item, "arguments": "", "status": "in_progress"})
        yield self._event(f"{kind}.delta", **grows, delta=arguments)
        yield self._event(f"{kind}.done", **grows, name=called.name, arguments=arguments)
        yield from self._end({**item, "arguments": arguments, "status": "completed"})

    def _begin(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield self._event("response.output_item.added", output_index=len(self._items), item=item)

    def _end(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield self._event("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)

    def _name(self, kind: str) -> str:
        return f"{kind}_{self.number}_{len(self._items)}"

    def _item(self, status: str, *, parts: bool = True) -> dict[str, Any]:
        kind = _ITEMS[self._kind]
        more: dict[str, Any] = {"role": "assistant"} if self._kind == CONTENT else {"summary": []}
        content = [self._part(self._text)] if parts else []
        return {"id": self._name(kind), "type": kind, "status": status, "content": content, **more}

    def _part(self, text: str) -> dict[str, Any]:
        part: dict[str, Any] = {"type": _PARTS[self._kind], "text": text}
        if self._kind == CONTENT:
            part |= {"annotations": [], "logprobs": []}
        return part

    def _growth(self, kind: str, **more: Any) -> dict[str, Any]:
        """An event about the text of the item under way."""
        name, index = self._name(_ITEMS[self._kind]), len(self._items)
        return self._event(kind, item_id=name, output_index=index, content_index=0, **more)

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1, **more}

    def _response(self, status: str, reply: Reply | None = None) -> dict[str, Any]:
        asked = self.asked
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": f"resp_{self.number}", "object": "response", "created_at": self.created,
            "status": status, "error": None, "incomplete_details": cut, "model": self.model,
            "output": list(self._items), "usage": _usage(reply) if reply else None,
            "instructions": asked.instructions, "max_output_tokens": asked.max_output_tokens,
            "temperature": asked.temperature, "top_p": asked.top_p, "tools": asked.tools or [],
            "tool_choice": asked.tool_choice or "auto", "metadata": asked.metadata or {},
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "text": {"format": asked.form},
            "reasoning": asked.reasoning.model_dump() if asked.reasoning else None,
            **{name: asked.not_served[name] for name in _ECHOED},
        }  # fmt: skip


_ECHOED = ("previous_response_id", "store", "background", "truncation")


def _usage(reply: Reply) -> dict[str, Any]:
    counted = schema.usage(reply)
    return {
        "input_tokens": counted["prompt_tokens"],
        "input_tokens_details": counted["prompt_tokens_details"],
        "output_tokens": counted["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": reply.thinking_tokens},
        "total_tokens": counted["total_tokens"],
    }
