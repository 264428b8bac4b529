"""Messages: what a conversation is made of, for every front end alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edge_kv.errors import PromptError, did_you_mean

ROLES = ("system", "user", "assistant", "tool")
_OTHER_NAMES = {"developer": "system", "function": "tool"}
_THINKING = ("reasoning_content", "thinking", "reasoning")  # what clients and templates call it


@dataclass(frozen=True)
class ToolCall:
    """A model's wish to have a tool called."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    `thinking` and `calls` are an assistant's; `name` and `call_id` say which tool, and which call,
    a tool message answers.
    """

    role: str
    content: str = ""
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()
    name: str = ""
    call_id: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates read it, and as JSON."""
        data: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.thinking:
            data |= {"thinking": self.thinking, "reasoning_content": self.thinking}
        if self.calls:
            data["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.calls
            ]
        if self.name:
            data["name"] = self.name
        if self.call_id:
            data["tool_call_id"] = self.call_id
        return data

    @classmethod
    def of(cls, data: Any, where: str = "message") -> Message:
        """A message from JSON in the shape of `as_dict` or of OpenAI's chat completions.

        Raises:
            PromptError: it is of another shape, of an unknown role, or holds more than text.
        """
        if not isinstance(data, Mapping):
            raise PromptError(f"{where} must be an object, not {type(data).__name__}.")
        role = data.get("role")
        role = _OTHER_NAMES.get(role, role) if isinstance(role, str) else ""
        if role not in ROLES:
            given = data.get("role")
            raise PromptError(f"{where} has role {given!r}.{did_you_mean(str(given), ROLES)}")
        thinking = next((data[k] for k in _THINKING if data.get(k) is not None), "")
        calls = data.get("tool_calls") or []
        if not isinstance(calls, list):
            raise PromptError(f"{where} has tool_calls that are no list.")
        return cls(
            role=role,
            content=_text(data.get("content"), f"{where}.content"),
            thinking=_text(thinking, f"{where}.reasoning_content"),
            calls=tuple(_call(c, f"{where}.tool_calls[{i}]") for i, c in enumerate(calls)),
            name=_text(data.get("name"), f"{where}.name"),
            call_id=_text(data.get("tool_call_id"), f"{where}.tool_call_id"),
        )


@dataclass(frozen=True)
class Tool:
    """A function a model may ask for; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})

    def as_dict(self) -> dict[str, Any]:
        """The tool as chat templates read it."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": self.parameters,
            },
        }

    @classmethod
    def of(cls, data: Any, where: str = "tool") -> Tool:
        """A tool from JSON in OpenAI's shape, with or without its outer `{"function": …}`.

        Raises:
            PromptError: it is of another shape.
        """
        inner = data.get("function", data) if isinstance(data, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise PromptError(f"{where} must be an object with a function that has a name.")
        name = inner["name"]
        if not name or not name.replace("-", "_").replace(".", "_").isidentifier():
            raise PromptError(f"{where} is called {name!r}; use letters, digits, '_', '-' and '.'.")
        parameters = inner.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(parameters, Mapping):
            raise PromptError(f"{where} has parameters that are no JSON schema.")
        return cls(name, _text(inner.get("description"), f"{where}.description"), dict(parameters))


def _call(data: Any, where: str) -> ToolCall:
    inner = data.get("function", data) if isinstance(data, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise PromptError(f"{where} must be an object with a function that has a name.")
    arguments = inner.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as e:
            raise PromptError(f"{where} has arguments that are not JSON ({e}).") from e
    if not isinstance(arguments, Mapping):
        raise PromptError(f"{where} has arguments that are no JSON object.")
    return ToolCall(inner["name"], dict(arguments), _text(data.get("id"), f"{where}.id"))


def _text(value: Any, where: str) -> str:
    """A text, or OpenAI's list of text parts, joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PromptError(f"{where} must be text, not {type(value).__name__}.")
    texts = []
    for part in value:
        text = (
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        )
        if not isinstance(text, str):
            raise PromptError(f"{where} holds a part that is not text; this model reads text only.")
        texts.append(text)
    return "".join(texts)
